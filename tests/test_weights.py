"""Weights move unchanged: any range of any parameter, from checkpoints and folders, to any engine on any number of ranks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.data.indexed import DataError
from pretrain.engines.shards import Shard
from pretrain.interop.convert import ConversionError, import_model
from pretrain.interop.load import open_hf_folder, open_run
from pretrain.interop.weights import HFWeights, MeanWeights, load_transformer, weight_loader, write_hf_folder
from pretrain.model.hf_mapping import UnsupportedModel
from pretrain.model.transformer import Transformer
from tests.models import FAMILIES, V, loaded_by, make_hf_folder, make_run, model_of, moe
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("weights") / "run", model_of("qwen3_moe"), None, steps=(1, 2, 3))


@pytest.fixture(scope="module")
def folder(run) -> Path:
    return make_hf_folder(run.parent / "hf", open_run(run).weights)


@pytest.mark.parametrize(
    ("family", "dtype"), [(family, "bf16") for family in FAMILIES] + [("llama", "fp32"), ("dots1", "fp32"), ("dots1", "fp16")]
)
def test_a_model_saved_by_transformers_survives_import_and_export_bit_for_bit(family, dtype, tmp_path):
    source = make_hf_folder(tmp_path / "hf", open_run(make_run(tmp_path / "run", model_of(family), None)).weights, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    import_model(tmp_path / "theirs", tmp_path / "back")
    written = load_file(make_hf_folder(tmp_path / "again", open_run(tmp_path / "back").weights, dtype) / "model.safetensors")
    saved = {}
    for path in sorted((tmp_path / "theirs").glob("*.safetensors")):
        saved |= load_file(path)
    assert written.keys() == saved.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name


@pytest.mark.parametrize("max_file_bytes", [1, 40_000, 10**9])
def test_files_respect_the_size_limit_and_are_indexed(run, tmp_path, max_file_bytes):
    (tmp_path / "hf").mkdir()
    files = write_hf_folder(tmp_path / "hf", open_run(run).weights, "bf16", max_file_bytes)
    assert {path.name: path.stat().st_size for path in (tmp_path / "hf").iterdir()} == {k: v["bytes"] for k, v in files.items()}
    tensors = {}
    for path in sorted((tmp_path / "hf").glob("*.safetensors")):
        assert max_file_bytes == 1 or path.stat().st_size < max_file_bytes + 10_000
        tensors |= load_file(path)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    assert index.exists() == (max_file_bytes < 10**9)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"].keys() == tensors.keys()
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_values_are_aligned_in_the_file(tmp_path):
    """A bf16 tensor with an odd number of values would misalign the fp32 tensors after it."""
    odd = model_of("glm4_moe", hidden_size=45, head_dim=30, moe=moe(score="sigmoid", num_experts=5))
    run = make_run(tmp_path / "run", odd, None)
    write_hf_folder(tmp_path, open_run(run).weights, "bf16", 10**9)
    data = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    places = [each for name, each in header.items() if name != "__metadata__"]
    assert {each["dtype"] for each in places} == {"F32", "BF16"}
    assert all(each["data_offsets"][0] % 4 == 0 for each in places if each["dtype"] == "F32")


def test_any_range_reads_the_same_values_as_the_full_parameter(run, folder):
    whole = dict(load_transformer(open_run(run).weights).named_parameters())
    sources = [open_run(run).weights, HFWeights(folder), MeanWeights([open_run(run, 3).weights])]
    generator = torch.Generator().manual_seed(0)
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj", "model.norm.weight"):
        values = whole[name].detach().flatten()
        for _ in range(20):
            start, stop = sorted(torch.randint(0, len(values) + 1, (2,), generator=generator).tolist())
            for source in sources:
                into = torch.full((stop - start,), torch.nan)
                source.read(name, start, into)
                assert torch.equal(into, values[start:stop]), (name, start, stop)


@pytest.mark.parametrize(
    ("engine", "ranks"), [("fsdp2", 3), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero3"))]
)
def test_every_engine_loads_a_folder_and_a_run(engine, ranks, run, folder):
    target = dataclasses.replace(model_of("qwen3_moe"), vocab_size=V + 70)  # more ids, and padding rows
    whole = {name: parameter.detach() for name, parameter in load_transformer(open_run(run).weights).named_parameters()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = whole[name][:V]
        mean = rows.double().mean(0, keepdim=True).float()
        whole[name] = torch.cat([rows, mean.expand(70, -1), torch.zeros(512 - V - 70, 48)])
    seen = {name: torch.zeros(tensor.numel(), dtype=torch.int) for name, tensor in whole.items()}
    losses = []
    for name, offset, piece in itertools.chain(*run_ranks(ranks, loaded_by, [folder, run], engine, target)):
        if name == "loss":
            losses.append(float(piece[0]))
            continue
        wanted = whole[name].flatten()[offset : offset + len(piece)]
        torch.testing.assert_close(torch.from_numpy(piece), wanted, rtol=0, atol=1e-9)
        seen[name][offset : offset + len(piece)] += 1
    assert all((counts >= 2).all() for counts in seen.values()), "from the folder and from the run"
    assert max(losses) == pytest.approx(min(losses), rel=1e-6)


def test_more_ids_leave_the_logits_of_the_old_ones_unchanged(run):
    source = open_run(run).weights
    target = dataclasses.replace(source.model, vocab_size=V + 10)
    with torch.device("meta"):
        larger = Transformer(target)
    larger.to_empty(device="cpu")
    with torch.no_grad():
        fill = weight_loader(source, target)
        for name, tensor in larger.named_parameters():
            fill(Shard(f"model/{name}", tuple(tensor.shape), 0, tensor.view(-1)))
        tokens_BT = torch.arange(32).view(2, 16)
        before, after = load_transformer(source)(tokens_BT), larger(tokens_BT)
    assert torch.equal(after[..., :V], before)
    mean = before.mean(-1, keepdim=True).expand(-1, -1, 10)
    torch.testing.assert_close(after[..., V:], mean, atol=1e-5, rtol=0)


def test_the_mean_of_checkpoints_is_the_mean_of_their_weights(run):
    each = [dict(load_transformer(open_run(run, step).weights).named_parameters()) for step in (2, 3)]
    mean = open_run(run, average=2)
    assert mean.origin == {"run": "run", "step": 3, "mean_of_steps": [2, 3]}
    for name, parameter in load_transformer(mean.weights).named_parameters():
        wanted = ((each[0][name].double() + each[1][name].double()) / 2).float()
        assert torch.equal(parameter, wanted)
    assert open_run(run, 2, average=2).origin["mean_of_steps"] == [1, 2]
    with pytest.raises(CheckpointError, match=r"4 checkpoints .*: 3, 2, 1"):
        open_run(run, average=4)


# ---------------------------------------------------------------- refusals


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def indexed(path: Path, index: str) -> None:
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    (path / "model.safetensors.index.json").write_text(index)


def tie(path: Path) -> None:
    """A separate head although config.json ties it to the embedding; some programs write such folders by mistake."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def as_int8(path: Path) -> None:
    change_tensors(path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}))


def as_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def as_pointer(path: Path) -> None:
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


REFUSED = {
    "pickle": (as_pickle, r"pytorch_model\.bin"),
    "truncated": (cut, r"model\.safetensors"),
    "header": (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 100), r"model\.safetensors"),
    "dtype": (as_int8, r"model\.norm\.weight .* I8.*F32, BF16, F16"),
    "missing tensor": (lambda path: change_tensors(path, lambda t: t.pop("lm_head.weight")), r"lm_head\.weight"),
    "extra tensor": (lambda path: change_tensors(path, lambda t: t.update(extra=torch.zeros(1))), "extra"),
    "path outside": (lambda path: indexed(path, '{"weight_map": {"a": "../x.safetensors"}}'), r"'\.\./x\.safetensors'"),
    "missing file": (lambda path: indexed(path, '{"weight_map": {"a": "model-2.safetensors"}}'), r"'model-2\.safetensors'"),
    "index": (lambda path: indexed(path, "{}"), r"model\.safetensors\.index\.json"),
    "git lfs": (as_pointer, "git lfs pull"),
    "tied head": (tie, r"lm_head\.weight .*tie_word_embeddings"),
}
"""Damage to a folder, and what the message must name."""


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_does_not_match_its_config_is_refused(name, folder, tmp_path):
    damage, named = REFUSED[name]
    shutil.copytree(folder, copy := tmp_path / "hf")
    open_hf_folder(copy)
    damage(copy)
    with pytest.raises(UnsupportedModel, match=named):
        open_hf_folder(copy)


def test_leftovers_that_transformers_ignores_are_ignored(folder, tmp_path):
    """A tied head that is stored as well, and the index of an earlier save."""
    shutil.copytree(folder, copy := tmp_path / "hf")
    change_tensors(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    tie(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}')
    tokens_BT = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_transformer(open_hf_folder(copy).weights)(tokens_BT), theirs(tokens_BT).logits)


def test_an_unreadable_tokenizer_is_refused_but_a_missing_one_is_not(folder, tmp_path, capsys):
    shutil.copytree(folder, copy := tmp_path / "hf")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        import_model(copy, tmp_path / "out")
    (copy / "tokenizer.json").unlink()
    assert import_model(copy, tmp_path / "out")["compared"]["tokenizer"] is None
    assert "tokenizer.json" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_imported(folder, tmp_path):
    shutil.copytree(folder, copy := tmp_path / "hf")
    change_tensors(copy, lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    with pytest.raises(ConversionError, match=r"model\.norm\.weight"):
        import_model(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_shared_expert_gate_other_than_zero_is_refused(tmp_path):
    folder = make_hf_folder(tmp_path / "hf", open_run(make_run(tmp_path / "run", model_of("qwen2_moe"), None)).weights)
    change_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.shared_expert_gate.weight"].fill_(0.1))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.shared_expert_gate\.weight"):
        open_hf_folder(folder)


def test_weights_of_a_different_model_are_refused(run):
    source = open_run(run).weights
    for change in (dict(rope_theta=5e5), dict(hidden_size=96), dict(vocab_size=V - 1), dict(qk_norm=False)):
        with pytest.raises(UnsupportedModel, match=next(iter(change))):
            weight_loader(source, dataclasses.replace(source.model, **change))


# ---------------------------------------------------------------- memory


@pytest.mark.slow
def test_conversion_needs_little_memory_for_a_model_of_any_size(tmp_path):
    """1.5 GiB of weights in each direction raise the peak by less than 0.5 GiB over that of a tiny model."""
    peaks = [peak_of_conversion(tmp_path / str(width), width) for width in (64, 2048)]
    assert peaks[1] - peaks[0] < 0.5 * 2**30, peaks


def peak_of_conversion(folder: Path, width: int) -> int:
    """Peak memory in bytes of a process that exports a model and imports it again, without the verification."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from pretrain.interop import convert
from pretrain.interop import weights
from pretrain.interop.load import TrainedModel
from tests.models import model_of

class Ones:
    model = model_of("llama", hidden_size={width}, num_hidden_layers=6, head_dim=64, vocab_size=32000)

    def read(self, name, start, into):
        into.fill_(0.25)

convert.compare_with_transformers = lambda *rest: {{}}  # the comparison may load a model
out = Path({str(folder)!r})
convert.export_model(TrainedModel(Ones(), None, None, False, None, {{}}), out / "hf", "bf16", 10**9)
convert.import_model(out / "hf", out / "back")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
