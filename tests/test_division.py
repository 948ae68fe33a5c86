"""Shards of a corpus are its documents, each once and in order, whatever the files and the number of shards."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.corpus import Corpus
from pretrain.data.division import Part, Shard, divide
from pretrain.data.indexed import DataError, TokenFile
from pretrain.data.tokenizer import Tokenizer
from tests.test_tools_data import ROOT, make_texts, texts_of, tool


def test_all_shards_have_something_and_together_every_byte_once_in_order():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = (rng.pareto(1, rng.integers(1, 16)) * 1000).astype(int).tolist()
        divisible = {f"{i}": bool(rng.integers(2)) for i in range(len(sizes))}
        files = [(f"{i}", size) for i, size in enumerate(sizes)]
        count = int(rng.integers(1, len(sizes) + 1))
        shards = [divide(files, Shard(i, count), divisible.__getitem__) for i in range(count)]
        assert all(shards)
        parts = [part for shard in shards for part in shard]
        for name, size in files:
            own = [part for part in parts if part.name == name]
            assert own[0].begin == 0 and own[-1].end == size
            assert all(a.end == b.begin for a, b in itertools.pairwise(own))
            assert len(own) == 1 or divisible[name]
        assert list(dict.fromkeys(part.name for part in parts)) == [name for name, _ in files]


def test_shards_have_about_the_same_size():
    files = [(f"{i}", size) for i, size in enumerate([10**9, 5, 3 * 10**8, 7 * 10**7])]
    sizes = [sum(part.end - part.begin for part in divide(files, Shard(i, 16), lambda name: True)) for i in range(16)]
    assert max(sizes) < 1.04 * min(sizes)
    one_large = [("large", 100), ("a", 1), ("b", 1), ("c", 1)]
    shards = [divide(one_large, Shard(i, 3), lambda name: False) for i in range(3)]
    assert [[part.name for part in shard] for shard in shards] == [["large"], ["a"], ["b", "c"]]
    assert divide([("x", 9)], Shard(0, 1), lambda name: True) == [Part("x", 0, 9, 9)]


def documents(inputs: list[Path], shard: Shard | None = None, **options) -> list[str]:
    return [text for _, text in Corpus([*map(str, inputs)], shard=shard, **options).documents()]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_documents_of_all_shards_are_those_of_the_input(tmp_path, line_end):
    """Of files that are divided, with lines of very different length, and of those that are not."""
    rng = np.random.default_rng(1)
    texts = [f"{i} " + "ä" * int(rng.pareto(1) * 20) for i in range(1000)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line_end.join([*lines[:600], "", "  ", *lines[600:700]]).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[700:800]).encode()))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in texts[800:900]]))
    (tmp_path / "d.txt").write_bytes(line_end.join(texts[900:]).encode() + line_end.encode())
    inputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.txt")]
    assert documents(inputs, split="line") == texts
    for count in (1, 2, 3, 7, 50):
        shards = [documents(inputs, Shard(i, count), split="line") for i in range(count)]
        assert [text for shard in shards for text in shard] == texts
        assert max(map(len, shards)) <= 1000 / count + 400 or count == 1


def test_a_text_file_of_one_document_stays_whole(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name}\n" * 1000)
    assert [documents([tmp_path], Shard(i, 2)) for i in range(2)] == [["a.txt\n" * 1000], ["b.txt\n" * 1000]]
    with pytest.raises(DataError, match="at most as many shards as files"):
        documents([tmp_path], Shard(0, 3))


def test_a_bad_line_is_found_from_the_byte_that_the_message_names(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(1000)]
    lines[777] = "not JSON"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        documents([tmp_path / "a.jsonl"], Shard(3, 4))
    byte, number = str(error.value).partition("from byte ")[2].split(": ")[0].split(":")
    rest = (tmp_path / "a.jsonl").read_bytes()[int(byte.replace(",", "")) :]
    assert rest.split(b"\n")[int(number) - 1] == b"not JSON"


@pytest.mark.parametrize("given", ["-", "stdlib"])
def test_what_cannot_be_divided_is_refused(given):
    with pytest.raises(DataError, match="--shard"):
        documents([given], Shard(0, 2))


# ---------------------------------------------------------------- tokenize_corpus --shard


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with text, a tokenizer, and token files of 3 shards, written from the last to the first."""
    folder = tmp_path_factory.mktemp("text")
    texts = make_texts(3000, 100)
    texts[2500:2510] = texts[:10]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tool("train_tokenizer", "--input", folder / "text.jsonl", "--output", folder / "tokenizer", "--vocab-size", 400)
    for index in (2, 1, 0):
        tokenize(folder, f"{index}/3")
    return folder


def tokenize(folder: Path, shard: str | None, *more, output: str = "new", fraction: float = 0.1, status: int = 0):
    flags = ["--input", folder / "text.jsonl", "--tokenizer", folder / "tokenizer", "--output", folder / output, "--workers", 1]
    flags += ["--valid-fraction", fraction, *(["--shard", shard] if shard else []), *more]
    return tool("tokenize_corpus", *flags, status=status)


def shards_of(folder: Path, part: str, count: int = 3, output: str = "new") -> list[Path]:
    return [folder / f"{output}_{part}-{i:05d}-of-{count:05d}" for i in range(count)]


def test_shards_have_all_documents_and_split_them_as_an_unsharded_job_does(text):
    tokenize(text, None, output="whole")
    tokenizer = Tokenizer.load(text / "tokenizer")
    for part in ("train", "valid"):
        shards = [texts_of(prefix, tokenizer) for prefix in shards_of(text, part)]
        assert sorted(itertools.chain(*shards)) == sorted(texts_of(text / f"whole_{part}", tokenizer))
        assert part == "valid" or max(map(len, shards)) < 1.1 * min(map(len, shards))
        numbers = [int(document.split(":")[0]) for document in shards[1]]
        assert abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.3  # shuffled
        for index, prefix in enumerate(shards_of(text, part)):
            about = TokenFile(prefix).sidecar.corpus["shard"]
            assert (about["index"], about["count"], about["settings"]["seed"]) == (index, 3, 1234)


def test_a_shard_depends_on_no_other_and_a_complete_one_is_left_alone(text):
    paths = [Path(f"{prefix}{end}") for prefix in shards_of(text, "train") for end in (".bin", ".idx", ".json")]
    before = {path: path.read_bytes() for path in paths}
    times = {path: path.stat().st_mtime_ns for path in paths}
    assert "complete already" in tokenize(text, "1/3").stdout
    assert times == {path: path.stat().st_mtime_ns for path in paths}
    for path in paths[3:6]:
        path.unlink()
    tokenize(text, "1/3", "--workers", 2, "--overwrite")
    assert before == {path: path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("shard", "more", "part"),
    [
        ("0/4", [], "one of 3 shards"),
        ("1/3", ["--seed", 5], "seed"),
        ("1/3", ["--on-bad-line", "skip"], "on_bad_line"),
        ("3/3", [], "0 <= I < N"),
        ("-1/3", [], "I/N"),
        ("1", [], "I/N"),
        ("0/3000000", [], "I/N"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(text, shard, more, part):
    error = tokenize(text, shard, *more, status=2).stderr
    assert part in error and "Traceback" not in error
    assert not list(text.glob("*.tmp")) and not list(text.glob("new*-of-00004*"))


def test_a_shard_without_validation_documents_is_no_error_but_one_without_training_documents_is(text, tmp_path):
    tokenize(text, "0/3", output="few", fraction=1e-9)
    assert TokenFile(text / "few_train-00000-of-00003").num_documents > 900
    assert not list(text.glob("few_valid*"))
    assert "few_train" in tokenize(text, "1/3", "--overwrite", output="few", fraction=0.999999999, status=2).stderr


def test_the_slurm_script_writes_every_shard_whatever_part_of_the_array_runs(text, tmp_path):
    """Without SLURM: it sets one variable per task, and runs the script with the arguments of sbatch."""
    script = [shutil.which("bash"), str(ROOT / "tools" / "tokenize_slurm.sh")]
    flags = ["--input", text / "text.jsonl", "--tokenizer", text / "tokenizer", "--output", tmp_path / "new", "--workers", 1]
    words = [*map(str, [*flags, "--valid-fraction", 0.1])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(variables: dict, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*script, *arguments], cwd=ROOT, env=environment | variables, capture_output=True, text=True)

    for task in (2, 0, 1):  # SLURM_ARRAY_TASK_COUNT is that of the submission, which may be of missing tasks only
        done = run({"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "1"}, "3", *words)
        assert done.returncode == 0, done.stderr
    for one, other in zip(shards_of(tmp_path, "train"), shards_of(text, "train"), strict=True):
        assert Path(f"{one}.bin").read_bytes() == Path(f"{other}.bin").read_bytes()
    assert run({"SLURM_ARRAY_TASK_ID": "3"}, "3", *words).returncode == 2
    for variables, arguments, part in (
        ({}, ["3", *words], "--array=0-2"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, [], "number of shards"),
    ):
        done = run(variables, *arguments)
        assert done.returncode != 0 and part in done.stderr
