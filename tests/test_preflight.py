"""The preflight names every planted fault, and finds nothing in a correct configuration."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain.config import DataConfig, load
from pretrain.data import checks, tokenizer_training
from pretrain.data.batches import MASKED, Batch
from pretrain.data.indexed import TokenFile, TokenWriter
from pretrain.data.tokenizer import Tokenizer
from pretrain.model import hf_mapping
from pretrain.model.config import ModelConfig, resolve_model
from pretrain.run import surroundings
from pretrain.run.directory import RunDirectory
from pretrain.run.length import plan
from pretrain.run.parts import open_parts
from pretrain.run.preflight import Report, epoch_findings, first_batch_findings, preflight, store_findings
from pretrain.run.processes import free_port
from pretrain.run.surroundings import _is_in_netrc, build_locks, port_findings
from pretrain.train import train
from tests.models import make_tokenizer, train_here, write_token_file
from tests.ranks import run_ranks
from tests.test_batches import sparse_pair
from tests.test_indexed import write_megatron
from tools import check_run

ROOT = Path(__file__).resolve().parents[1]
ENGLISH = "the of and to in is that it was for on are with as at be this have from or one had by word but not what all were"
CHINESE = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏閏餘成歲律呂調陽雲騰致雨露結為霜金生麗水玉出崑岡劍號巨闕珠稱夜光"
CODE = "def return self import for in range len print if else None True lambda x y z = ( ) [ ] : + - * 0 1 2 3"


def texts(kind: str, count: int = 600) -> list[str]:
    """Documents in which each word depends on the one before it."""
    generator, made = random.Random(kind), []
    words = {"english": ENGLISH.split(), "chinese": list(CHINESE), "code": CODE.split()}[kind]
    follow = {word: generator.sample(words, 4) for word in words}
    for number in range(count):
        word, line = generator.choice(words), [f"{number}"]
        for _ in range(generator.randint(20, 200)):
            word = generator.choice(follow[word])
            line.append(word)
        made.append(("" if kind == "chinese" else " ").join(line) + "\n")
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tokenizer for each kind of text, and training and validation data with sidecars."""
    folder = tmp_path_factory.mktemp("made")
    for kind in ("english", "chinese", "code"):
        written = texts(kind)
        sizes = {"english": 320, "chinese": 420, "code": 320}
        tokenizer_training.train(written, folder / f"{kind}_tokenizer", vocab_size=sizes[kind], describe=dict)
        write_token_file(folder / f"{kind}_tokenizer", written[:500], folder / f"{kind}_train")
        write_token_file(folder / f"{kind}_tokenizer", written[500:], folder / f"{kind}_valid")
    return folder


class World:
    """A configuration with its own copy of the files, into which a test plants a fault."""

    def __init__(self, made: Path, folder: Path, kind: str = "english"):
        for path in made.glob(f"{kind}_*"):
            place = folder / path.name.removeprefix(f"{kind}_")
            shutil.copytree(path, place) if path.is_dir() else shutil.copy(path, place)
        self.folder, self.ranks = folder, None
        self.train, self.valid, self.tokenizer = folder / "train", folder / "valid", folder / "tokenizer"
        self.flags = {
            "engine.precision": "fp32",
            "run.directory": folder / "runs",
            "model.hidden_size": 32,
            "model.num_hidden_layers": 1,
            "model.num_attention_heads": 2,
            "tokenizer.path": self.tokenizer,
            "data.train": f"[{{path: {self.train}}}]",
            "data.valid": f"[{{path: {self.valid}}}]",
            "data.sequence_length": 64,
            "batch.global_batch_size": 8,
            "batch.micro_batch_size": 2,
            "schedule.warmup_steps": 10,
            "train.max_steps": 200,
            "log.sinks": "[console, jsonl]",
        }

    def argv(self) -> list[str]:
        return [word for key, value in self.flags.items() for word in (f"--{key}", str(value))]

    def plant(self, fault: Callable[[World], None] | dict) -> None:
        """A fault is a function, or the settings that make it."""
        if isinstance(fault, dict):
            self.flags |= fault
        else:
            fault(self)

    def check(self) -> Report:
        return preflight(load(self.argv(), world_size=None), self.ranks)

    def tokens(self) -> list[np.ndarray]:
        file = TokenFile(self.train)
        return [file.document(i) for i in range(file.num_documents)]

    def foreign(self, documents: list[np.ndarray], **options) -> None:
        """Replaces the training data by files as another program writes them: without a sidecar."""
        Path(f"{self.train}.json").unlink(missing_ok=True)
        write_megatron(self.train, documents, **options)

    def change_sidecar(self, **changes) -> None:
        path = Path(f"{self.train}.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr("pretrain.run.surroundings.DEFAULT_PORT", free_port())
    return World(made, tmp_path)


# ---------------------------------------------------------------- nothing wrong


@pytest.mark.parametrize("kind", ["english", "chinese", "code"])
def test_correct_data_in_any_language_have_no_finding(made, tmp_path, world, kind):
    (tmp_path / kind).mkdir()
    clean = World(made, tmp_path / kind, kind)
    report = clean.check()
    assert report.findings == []
    text = "\n".join(report.facts)
    assert "batch: 8 sequences per step; times 64 tokens = 512 tokens per step. Possible numbers of ranks: 1, 2, 4" in text
    assert "end of warm-up (10) 0.0003" in text and "last (200) 3e-05" in text and "0.0% of labels masked" in text


@pytest.mark.parametrize("kind", ["uniform", "unigram", "markov", "repeat", "copy"])
def test_generated_data_have_no_finding(world, kind):
    world.flags |= {"data.train": "[]", "data.valid": "[]", "tokenizer.path": "null", "model.vocab_size": 256}
    assert preflight(load([*world.argv(), "--data.synthetic.kind", kind], world_size=None)).findings == []


def test_files_of_other_programs_need_no_sidecar(world):
    documents = world.tokens()
    world.foreign(documents)
    assert names(world) == ["no-seal"]
    np.concatenate(documents).astype("<u2").tofile(world.folder / "flat.bin")
    world.flags["data.train"] = f"[{{path: {world.folder / 'flat.bin'}}}]"
    assert names(world) == ["no-seal"]


def split_into_shards(world, count: int) -> Path:
    """Replaces the training data by a folder of `count` shards with the same documents."""
    folder, documents, sidecar = world.folder / "shards", world.tokens(), TokenFile(world.train).sidecar
    about = {key: getattr(sidecar, key) for key in ("vocab_size", "end_of_document_id", "tokenizer_fingerprint", "shuffled")}
    for number in range(count):
        part = documents[number::count]
        with TokenWriter(folder / f"{number:03}", **about, tokenizer_path=sidecar.tokenizer_path) as writer:
            writer.add(np.concatenate(part), np.array(list(map(len, part))), sidecar.utf8_bytes // count)
            writer.finish({})
    world.flags["data.train"] = f"[{{path: {folder}, max_epochs: 3}}]"
    return folder


def test_a_folder_of_shards_has_no_finding_and_is_described_as_one_source(world):
    folder, tokens = split_into_shards(world, 25), TokenFile(world.train).num_tokens
    report = world.check()
    assert report.findings == []
    text = "\n".join(report.facts)
    assert f"{folder}/000 to {folder}/024 (25 files): {tokens:,} tokens (uint16) in 500 documents" in text
    assert "shards: read" in text and "(all 600 documents)" in text


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_configurations_lack_at_most_their_data(config, world):
    flags = ["--config", str(config), "--run.directory", str(world.folder / "runs")]
    missing = {"data-missing", "tokenizer-missing"}
    assert {each.name for each in preflight(load(flags, world_size=None)).findings} - {"wandb-no-key"} <= missing


def names(world: World) -> list[str]:
    return sorted(finding.name for finding in world.check().findings)


# ---------------------------------------------------------------- planted faults that stop a run


def id_beyond_the_vocabulary_without_a_sidecar(world):
    world.foreign([*world.tokens(), np.array([319, 320, 2])])


def a_sidecar_that_understates_the_largest_id(world):
    world.change_sidecar(max_id=50)


def dtype_too_narrow_for_the_tokenizer(world):
    world.flags |= {"model.vocab_size": 100_000, "tokenizer.path": "null"}
    world.foreign(world.tokens())


def another_tokenizer(world):
    tokenizer_training.train(texts("code"), world.folder / "other", vocab_size=320, describe=dict)
    world.flags["tokenizer.path"] = world.folder / "other"


def no_tokenizer(world):
    shutil.rmtree(world.tokenizer)


def broken_tokenizer(world):
    (world.tokenizer / "tokenizer.model").write_bytes(b"not a model")


def cut_file(world):
    os.truncate(f"{world.train}.bin", 1000)


def flipped_byte(world):
    with open(f"{world.train}.bin", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))


def hole_in_a_file(world):
    documents = np.concatenate(world.tokens())
    documents[1000:9000] = 0
    world.foreign(np.split(documents, [500, 20_000]))


def document_mask_without_documents(world):
    np.concatenate(world.tokens()).astype("<u2").tofile(world.folder / "flat.bin")
    world.flags |= {"data.train": f"[{{path: {world.folder / 'flat.bin'}}}]", "data.document_mask": "true"}


def batch_that_does_not_divide(world):
    world.ranks = 3


def other_number_of_ranks(world):
    world.flags["engine.world_size"], world.ranks = 4, 2


def rows_that_ranks_cannot_share(world):
    """320 of them, which only the tokenizer shows."""
    world.flags |= {"model.hidden_size": 96, "model.num_attention_heads": 3, "model.intermediate_size": 96}
    world.flags |= {"data.sequence_length": 96, "model.vocab_multiple": 1, "engine.parallel.tensor": 3}


def directory_that_is_a_file(world):
    (world.folder / "runs").write_text("in the way")


def another_job_in_the_directory(world):
    world.held = RunDirectory(world.folder / "runs" / "run")


def a_stop_file(world):
    (world.folder / "runs" / "run").mkdir(parents=True)
    (world.folder / "runs" / "run" / "STOP").touch()


def stale_build_lock(world):
    lock = world.folder / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    world.flags["engine.name"] = "zero2"


def checkpoints_that_must_not_be_resumed(world):
    (world.folder / "runs" / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    world.flags["checkpoint.resume"] = "never"


def a_shard_of_another_tokenizer(world):
    folder = split_into_shards(world, 5)
    path = folder / "003.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"end_of_document_id": 5}))


def a_shard_that_is_missing(world):
    folder = split_into_shards(world, 5)
    for path in folder.iterdir():
        if path.stem != "003":
            path.rename(folder / f"web-00{path.stem}-of-00005{path.suffix}")
        else:
            path.unlink()


def a_cache_smaller_than_the_tokens(world):
    world.flags |= {"data.train": f"[{{path: 'file://{world.train}'}}]", "data.cache_gib": 1e-6}


def a_shard_that_is_damaged(world):
    folder = split_into_shards(world, 5)
    content = bytearray((folder / "004.bin").read_bytes())  # the last is always verified
    content[len(content) // 2] ^= 1
    (folder / "004.bin").write_bytes(content)


def too_many_epochs(world):
    split_into_shards(world, 5)
    world.flags["train.max_steps"] = 2000


def an_id_that_wandb_refuses(world):
    os.environ["WANDB_RUN_ID"] = "sweep/7"
    world.flags |= {"log.sinks": "[jsonl, wandb]", "log.wandb.mode": "offline"}


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ({"model.vocab_size": 300, "tokenizer.path": "null"}, "id-outside-vocabulary"),
        (id_beyond_the_vocabulary_without_a_sidecar, "id-outside-vocabulary"),
        (a_sidecar_that_understates_the_largest_id, "seal-contradicted"),
        (dtype_too_narrow_for_the_tokenizer, "dtype-too-narrow"),
        (another_tokenizer, "tokenizer-mismatch"),
        ({"model.vocab_size": 384}, "vocabulary-mismatch"),
        (no_tokenizer, "tokenizer-missing"),
        (broken_tokenizer, "tokenizer-damaged"),
        ({"data.train": "[{path: nowhere}]"}, "data-missing"),
        (cut_file, "data-damaged"),
        (flipped_byte, "checksum-wrong"),
        (hole_in_a_file, "constant-tokens"),
        ({"data.sequence_length": 100_000}, "too-few-tokens"),
        (document_mask_without_documents, "no-document-index"),
        (batch_that_does_not_divide, "batch-arithmetic"),
        (other_number_of_ranks, "batch-arithmetic"),
        ({"engine.parallel.sequence": 2, "engine.world_size": 3}, "batch-arithmetic"),
        (rows_that_ranks_cannot_share, "settings-refused"),
        ({"train.max_steps": "null", "train.max_tokens": 1000}, "schedule-too-long"),
        (directory_that_is_a_file, "directory-not-writable"),
        ({"model.hidden_size": 2**19, "model.num_hidden_layers": 64}, "disk-too-small"),
        (another_job_in_the_directory, "run-locked"),
        (a_stop_file, "stop-file"),
        (stale_build_lock, "build-lock"),
        (checkpoints_that_must_not_be_resumed, "resume-refused"),
        (an_id_that_wandb_refuses, "wandb-id"),
        (a_shard_of_another_tokenizer, "shards-differ"),
        (a_shard_that_is_damaged, "checksum-wrong"),
        (too_many_epochs, "max-epochs-exceeded"),
    ],
)
def test_a_fault_that_stops_a_run_is_named(world, monkeypatch, fault, name):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    world.plant(fault)
    found = world.check().findings
    assert {each.name for each in found if each.stops} == {name}, found
    assert {each.name for each in found} - {"no-seal"} == {name}, found


def test_rows_that_ranks_cannot_share_are_refused_by_every_rank_with_a_degree_that_works(world):
    rows_that_ranks_cannot_share(world)
    assert run_ranks(3, train_here, world.argv()) == [2, 2, 2]
    [problem] = [each for each in world.check().findings if each.stops]
    advice = problem.text.partition("; the nearest that works: ")[2].split()
    assert advice[:2] == ["--engine.parallel.tensor", "1"]
    world.flags |= {key.removeprefix("--"): value for key, value in zip(advice[::2], advice[1::2], strict=True)}
    assert world.check().findings == []


def test_the_mesh_is_shown_and_the_numbers_of_ranks_are_multiples_of_it(world):
    world.flags |= {"engine.parallel.sequence": 2}
    assert "Possible numbers of ranks: 2, 4, 8" in "\n".join(world.check().facts)
    world.ranks = 4
    report = world.check()
    assert "mesh: 4 ranks = 2 shards x 2 sequence" in report.facts and report.findings == []


# ---------------------------------------------------------------- planted faults that cause warnings


def no_end_of_document(world):
    world.foreign([document[:-1] for document in world.tokens()])


def end_inside_documents(world):
    world.foreign([np.insert(document, range(1, len(document), 9), 2) for document in world.tokens()])


def lines_as_documents(world):
    world.foreign([np.array([5, 6, 7, 2 + 0 * i]) for i in range(300)] + world.tokens()[:2])


def empty_documents(world):
    world.foreign([part for document in world.tokens() for part in (document, np.array([2]))])


def unknown_ids(world):
    world.foreign([np.append(np.where(np.arange(len(part) - 1) % 50 == 9, 0, part[:-1]), 2) for part in world.tokens()])


def shuffled_tokens(world):
    everything = np.random.default_rng(0).permutation(np.concatenate(world.tokens()))
    everything = everything[everything != 2]
    world.foreign([np.append(part, 2) for part in np.array_split(everything, 400)])


def random_tokens(world):
    world.foreign([np.append(np.random.default_rng(i).integers(3, 320, 200), 2) for i in range(400)])


def duplicate_documents(world):
    write_token_file(world.tokenizer, texts("english")[:300] * 2, world.train)


def training_documents_in_validation(world):
    write_token_file(world.tokenizer, texts("english")[450:600], world.valid)


def a_flat_file_as_its_own_validation(world):
    """Without a tokenizer, the ends of documents are unknown."""
    np.concatenate(world.tokens()).astype("<u2").tofile(world.folder / "flat.bin")
    both = f"[{{path: {world.folder / 'flat.bin'}}}]"
    world.flags |= {"data.train": both, "data.valid": both, "tokenizer.path": "null", "model.vocab_size": 400}


def a_tokenizer_of_another_language(world):
    """Chinese becomes bytes under a tokenizer trained on code alone, although it has a thousand ids to spare."""
    many = [" ".join(f"{a}{b}" for b in range(40)) for a in ("def", "return", "self", "import") for _ in range(40)]
    many += ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz ", k=400)) for i in range(400)]
    tokenizer_training.train(many, world.folder / "code", vocab_size=1200, describe=dict)
    for prefix, part in ((world.train, texts("chinese")[:500]), (world.valid, texts("chinese")[500:])):
        write_token_file(world.folder / "code", part, prefix)
    world.flags["tokenizer.path"] = world.folder / "code"


def ids_of_another_tokenizer(world):
    """Without a sidecar, only the decoded text shows the mistake."""
    documents = [np.append(np.random.default_rng(i).integers(131, 255, 60).repeat(2), 2) for i in range(400)]
    world.foreign(documents)


def weights_of_another_tokenizer(world):
    make_tokenizer(world.folder / "hf")
    weights_of_this_tokenizer(world)


def weights_of_this_tokenizer(world):
    """A Hugging Face folder; it gets the tokenizer of the data unless it has one already."""
    if not (folder := world.folder / "hf").exists():
        shutil.copytree(world.tokenizer, folder)
    shape = ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = resolve_model(shape, vocab_size=Tokenizer.load(folder).vocab_size, sequence_length=64)
    (folder / "config.json").write_text(json.dumps(hf_mapping.to_config(model, "float32", {})))
    world.flags["model.from_pretrained"] = folder


def shards_of_little_more_than_a_sample(world):
    split_into_shards(world, 30)
    world.flags |= {"data.sequence_length": 800, "train.max_steps": 15}


def busy_port(world):
    world.server = socket.create_server(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(world.server.getsockname()[1])


def no_wandb(world):
    os.environ |= {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}
    world.flags["log.sinks"] = "[jsonl, wandb]"


def no_wandb_key(world):
    server = socket.create_server(("127.0.0.1", 0))
    os.environ |= {"WANDB_MODE": "online", "HOME": str(world.folder)}
    os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
    os.environ.pop("WANDB_API_KEY", None)
    world.flags["log.sinks"], world.server = "[jsonl, wandb]", server


def new_build_lock(world):
    stale_build_lock(world)
    os.utime(world.folder / "extensions" / "py311_cpu" / "cpu_adam" / "lock")


@pytest.mark.parametrize(("gib", "advised"), [(27.9, None), (28.1, 33), (70, 80)])
def test_the_advised_size_of_a_cache_has_room_for_the_tokens(gib, advised):
    """Of the default 32 GiB, 28 stay filled."""
    tokens = int(gib * 2**30 / 2)
    stored = SimpleNamespace(path="s3://bucket/web", num_tokens=tokens, dtype=np.dtype("<u2"))
    local = SimpleNamespace(path="data/web", num_tokens=10**15, dtype=np.dtype("<u2"))
    found = store_findings(DataConfig(), [SimpleNamespace(files=[stored, local])])
    assert [f"{advised} fetches everything once" in each.text for each in found] == [True] * (advised is not None)
    assert not found or not store_findings(DataConfig(cache_gib=advised), [SimpleNamespace(files=[stored])])


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (no_end_of_document, "documents-not-ended"),
        (end_inside_documents, "end-inside-documents"),
        (lines_as_documents, "documents-tiny"),
        (empty_documents, "documents-empty"),
        (unknown_ids, "text-unknown"),
        (shuffled_tokens, "tokens-shuffled"),
        (random_tokens, "tokens-random"),
        (duplicate_documents, "duplicate-documents"),
        (training_documents_in_validation, "validation-overlap"),
        (a_flat_file_as_its_own_validation, "validation-overlap"),
        (a_tokenizer_of_another_language, "tokens-are-bytes"),
        (ids_of_another_tokenizer, "text-garbled"),
        (weights_of_another_tokenizer, "weights-of-another-tokenizer"),
        ({"optimizer.lr": 0.3}, "lr-out-of-range"),
        ({"schedule.warmup_steps": 150}, "warmup-too-long"),
        ({"schedule.decay_steps": 50}, "lr-ends-early"),
        ({"train.max_steps": 20_000}, "many-passes"),
        (shards_of_little_more_than_a_sample, "tokens-unused"),
        (a_shard_that_is_missing, "shards-missing"),
        (a_cache_smaller_than_the_tokens, "cache-too-small"),
        (busy_port, "port-in-use"),
        (no_wandb, "wandb-unreachable"),
        (no_wandb_key, "wandb-no-key"),
        (new_build_lock, "build-lock"),
    ],
)
def test_a_doubtful_setting_or_file_causes_a_warning_with_its_name(world, monkeypatch, fault, name):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    world.plant(fault)
    found = world.check().findings
    assert name in {each.name for each in found}, found
    assert {each.name for each in found if each.stops} <= {"port-in-use"}, found


def test_trained_weights_of_the_same_tokenizer_cause_no_warning(world):
    weights_of_this_tokenizer(world)
    assert world.check().findings == []


# ---------------------------------------------------------------- the parts


def test_labels_that_are_not_the_next_token_stop_a_run():
    tokens = torch.randint(0, 50, (4, 33), generator=torch.Generator().manual_seed(0))
    right = Batch(tokens[:, :-1], tokens[:, 1:])
    assert first_batch_findings(right, None) == []
    (unshifted,) = first_batch_findings(Batch(tokens[:, :-1], tokens[:, :-1]), None)
    assert unshifted.name == "labels-wrong" and "not shifted" in unshifted.text and unshifted.stops
    (masked,) = first_batch_findings(Batch(tokens[:, :-1], torch.full((4, 32), MASKED)), None)
    assert masked.name == "labels-all-masked" and masked.stops


def test_duplicates_are_found_anywhere_and_a_part_of_the_documents_gives_the_same_fractions(world, monkeypatch):
    """A third of the training documents twice, far apart; half of the validation documents from the training data."""
    written = texts("english")
    write_token_file(world.tokenizer, written[:300] + written[:100], world.train)
    write_token_file(world.tokenizer, written[250:350], world.valid)
    files = [TokenFile(world.train)], [TokenFile(world.valid)]
    full = checks.duplicates(*files, None)
    assert full.complete and full.documents == 500
    assert full.train == pytest.approx(0.25, abs=0.05) and full.valid == pytest.approx(0.5, abs=0.1)
    monkeypatch.setattr(checks, "_HASHED_TOKENS", TokenFile(world.train).num_tokens // 2)
    part = checks.duplicates(*files, None)
    assert not part.complete and 100 < part.documents < 400
    assert part.train == pytest.approx(full.train, abs=0.1) and part.valid == pytest.approx(full.valid, abs=0.15)


def test_a_run_repeats_the_quick_checks_at_its_start_and_all_ranks_refuse(world):
    hole_in_a_file(world)
    assert run_ranks(2, train_here, world.argv()) == [2, 2]
    state = json.loads((world.folder / "runs" / "run" / "run_state.json").read_text())
    assert state["exit_status"] == 2 and "constant-tokens: " in state["reason"]
    assert not (world.folder / "runs" / "run" / "checkpoints").exists()


def test_a_run_prints_its_warnings_and_trains(world, capsys):
    world.flags |= {"train.max_steps": 3, "schedule.warmup_steps": 2, "data.valid": world.flags["data.train"]}
    assert train(load(world.argv())) == 0
    output = capsys.readouterr().out
    assert "warning    warmup-too-long: schedule.warmup_steps: 2 of 3 steps" in output
    assert f"warning    validation-overlap: data.valid: {world.train} is also in data.train" in output


def test_a_run_that_could_not_resume_is_refused(world):
    world.flags |= {"train.max_steps": 3, "schedule.warmup_steps": 0}
    assert train(load(world.argv())) == 0
    assert names(world) == []
    world.flags["optimizer.lr"] = 1e-4
    (finding,) = world.check().findings
    assert finding.name == "resume-refused" and finding.where == "optimizer.lr" and finding.stops


def test_entropies_are_judged_by_the_vocabulary_of_the_data(world):
    """Random ids over the vocabulary of the data are random, even if the model has a larger vocabulary."""
    documents = [np.append(np.random.default_rng(i).integers(3, 320, 200), 2) for i in range(400)]
    about = dict(tokenizer_fingerprint="f", tokenizer_path="t", shuffled=True, vocab_size=320, end_of_document_id=2)
    with TokenWriter(world.folder / "random", **about) as writer:
        writer.add(np.concatenate(documents), np.array([len(each) for each in documents]), 400_000)
        writer.finish({})
    for vocab_size in (320, 400):
        (found,) = checks.check_entropies(TokenFile(world.folder / "random"), "data.train[0].path", vocab_size)
        assert found.name == "tokens-random" and "unless longer contexts help" in found.text


def test_the_exit_status_of_the_command_agrees_with_its_json(world, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # another job of this machine may use the default one
    argv = [*world.argv(), "--json", str(world.folder / "found.json")]

    def command(*more: str) -> tuple[int, str, list[dict]]:
        status = check_run.main([*argv, *more])
        return status, "".join(capsys.readouterr()), json.loads((world.folder / "found.json").read_text())

    status, said, found = command("--ranks", "2")
    assert (
        status == 0 and "ranks 2 x micro-batch 2 x accumulation 2" in said and [each for each in found if each["stops"]] == []
    )
    done = subprocess.run(
        [sys.executable, "tools/check_run.py", *argv, "--ranks", "3"], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    status, said, found = done.returncode, done.stdout + done.stderr, json.loads((world.folder / "found.json").read_text())
    assert status == 2 and "STOP  batch-arithmetic: batch.global_batch_size" in said and found[0]["name"] == "batch-arithmetic"
    status, said, found = command("--optimizer.lr", "fast")
    assert status == 2 and "STOP  settings-refused: optimizer.lr" in said and found[0]["name"] == "settings-refused"


@pytest.mark.parametrize("batch", [8, 7])
def test_the_longest_run_within_max_epochs_is_named_and_fits(world, batch):
    """A run may end within the step that uses the source up; counted here by listing all samples."""
    world.flags |= {"batch.global_batch_size": batch, "batch.micro_batch_size": 1, "train.max_steps": 1000}
    path = f"{{path: {world.train}, max_epochs: 1.5}}"
    world.flags["data.train"] = f"[{path}, {{path: {world.valid}, weight: 0.25}}]"
    (found,) = [each for each in world.check().findings if each.name == "max-epochs-exceeded"]
    assert found.stops and found.where == "data.train[0].max_epochs"
    steps, share = (
        int(re.search(r"at most ([\d,]+) steps", found.text)[1].replace(",", "")),
        re.search(r"or ([\d.]+)%", found.text),
    )
    data = open_parts(load(world.argv(), world_size=None)).data
    read = np.array([source == 0 for source, _, _ in data.sample_ids(0, (steps + 1) * batch)])
    allowed = 1.5 * data.num_samples[0]
    assert read[: (steps - 1) * batch].sum() <= allowed < read[: steps * batch].sum()
    assert float(share[1]) / 100 == pytest.approx(allowed / (1000 * batch), rel=1e-3)
    for length, names in ((steps, set()), (steps + 1, {"max-epochs-exceeded"})):
        world.flags["train.max_steps"] = length
        assert {each.name for each in world.check().findings if each.stops} == names


def test_max_epochs_counts_all_stages_and_the_smallest_limit_holds(world):
    """The second stage has another batch, twice the length, and the first source again, with a smaller limit."""
    again = f"{{path: {world.train}, max_epochs: 2}}"
    world.flags["data.train"] = f"[{{path: {world.train}, max_epochs: 5}}]"
    stage = f"{{after_steps: 40, global_batch_size: 6, micro_batch_size: 2, sequence_length: 128, sources: [{again}]}}"
    world.flags |= {"train.stages": f"[{stage}]", "train.max_steps": 5000}
    config = load(world.argv(), world_size=None)
    data = open_parts(config).data
    length = plan(config, data, None)
    assert [length.position_after(step) for step in (0, 1, 40, 41, 5000)] == [0, 8, 320, 326, 320 + 6 * 4960]
    (found,) = epoch_findings(length.place(data), length)
    assert found.where == "data.train[0].max_epochs" and "max_epochs allows 2;" in found.text
    steps = int(re.search(r"train\.max_steps (\d+)", found.text)[1])
    tokens = data.sources[0].num_blocks(128) * 128
    assert 40 * 8 * 64 + (steps - 41) * 6 * 128 <= 2 * tokens < 40 * 8 * 64 + (steps - 40) * 6 * 128


def test_one_epoch_is_within_max_epochs_of_1_whatever_the_batch(world):
    world.flags["data.train"] = ", ".join(
        f"{{path: {path}, weight: null, max_epochs: 1}}" for path in (world.train, world.valid)
    ).join("[]")
    world.flags |= {"train.max_steps": "null", "train.epochs": 1, "data.valid": "[]"}
    for batch in (1, 2, 7, 64, 999):
        world.flags |= {"batch.global_batch_size": batch, "batch.micro_batch_size": 1, "schedule.warmup_steps": 0}
        assert not world.check().stops, batch


def test_rounding_in_a_blend_of_a_trillion_tokens_does_not_exceed_max_epochs(tmp_path):
    for number, tokens in enumerate((6.1e11, 2.9e11, 0.7e11)):
        sparse_pair(tmp_path / str(number), int(tokens))
    sources = ", ".join(f"{{path: {tmp_path / str(number)}, weight: null, max_epochs: 1}}" for number in range(3))
    flags = {"data.train": f"[{sources}]", "data.sequence_length": 8, "model.vocab_size": 64, "train.epochs": 1}
    flags |= {"batch.global_batch_size": 1, "batch.micro_batch_size": 1}
    config = load([word for key, value in flags.items() for word in (f"--{key}", str(value))])
    data = open_parts(config).data
    length = plan(config, data, None)
    assert max(data.passes(length.position_after(length.total_steps - 1))) > 1
    assert epoch_findings(data, length) == []


def test_a_start_beyond_max_epochs_is_refused(world, capsys):
    too_many_epochs(world)
    assert train_here(world.argv()) == 2
    said = capsys.readouterr().err
    assert "shards would be read 10.5 times, and max_epochs allows 3" in said and "data.train[0].max_epochs" in said
    assert not list(world.folder.glob("runs/*/checkpoints/*"))


def test_the_documentation_explains_every_finding_and_no_other_name():
    files = ("run/preflight.py", "run/surroundings.py", "data/checks.py", "data/tasks.py", "../tools/check_run.py")
    source = "".join((ROOT / "pretrain" / path).read_text() for path in files)
    names = set(re.findall(r'"([a-z]+(?:-[a-z]+)+)"', source)) - set(surroundings.PACKAGES.values())
    section = (ROOT / "docs" / "data.md").read_text().split("\n## Before a run: the preflight\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert names == {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)}


def test_a_user_without_a_home_directory_and_a_name_has_no_finding(tiny, monkeypatch):
    """As in a container that runs under a number."""

    def unknown(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "NETRC", "TORCH_EXTENSIONS_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError):
        Path.home()
    config = load(["--engine.name", "zero1", "--log.sinks", "[console, jsonl, wandb]", *tiny])
    assert build_locks(config) == [] and not _is_in_netrc("api.wandb.ai")


@pytest.mark.parametrize("port", ["abc", "70000", "-1"])
def test_a_port_that_is_not_one_is_a_finding(monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    assert [(each.name, each.where, each.stops) for each in port_findings(2)] == [("port-in-use", "MASTER_PORT", True)]
