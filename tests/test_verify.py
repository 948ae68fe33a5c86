"""Every kind of change to a converted folder is detected; an unchanged folder passes, with figures in its report."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from pretrain.data import tokenizer_training
from pretrain.data.indexed import DataError
from pretrain.data.tokenizer import Tokenizer
from pretrain.interop import convert, verify
from pretrain.interop.convert import ConversionError, export_model, import_model
from pretrain.interop.load import open_run
from pretrain.interop.verify import VerificationError, compare_with_transformers
from pretrain.model import hf_mapping
from tests.models import FAMILIES, V, make_run, make_tokenizer, model_of, moe


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_folder):
    """(a trained model, its Hugging Face folder)."""
    folder = tmp_path_factory.mktemp("exported")
    trained = open_run(make_run(folder / "run", model_of("llama", num_hidden_layers=3), tokenizer_folder))
    export_model(trained, folder / "hf")
    return trained, folder / "hf"


VARIANTS = ("qwen3_window", "mixtral_window", "qwen3_moe_window", "qwen2_moe_window", "glm4_moe_qk")
"""Families that join what others have one by one."""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [pytest.param(family, "bf16", marks=[pytest.mark.slow] * (family in VARIANTS)) for family in FAMILIES]
    + [(family, dtype) for family in ("llama", "glm4_moe") for dtype in ("fp32", "fp16")],
)
def test_every_family_passes_whole_and_layer_by_layer(family, dtype, tmp_path, tokenizer_folder):
    run = make_run(tmp_path / "run", model_of(family), tokenizer_folder)
    for scope in ("whole", "layers") if dtype == "bf16" else ("whole",):
        written = export_model(open_run(run), tmp_path / scope, dtype=dtype, scope=scope)
        assert written == json.loads((tmp_path / scope / "certificate.json").read_text())
        found = written["compared"]
        assert found["scope"] == scope and found["weights"]["difference"] == 0.0
        assert found["logits"]["difference"] <= 1e-5 and found["logits"]["positions"] == 128
        assert "sliding_window" not in found  # the batch is longer than its 8 tokens
        assert found["loss"]["ours"] == pytest.approx(found["loss"]["transformers"], abs=1e-5)
        if scope == "whole":
            assert found["generation"] == {"tokens": 16, "asked": 16}
        if dtype != "fp32" and scope == "whole":
            assert 0 < abs(found["loss"]["before_rounding"] - found["loss"]["ours"]) < 0.05


REAL_WIDTHS = {
    "llama3": dict(hidden_size=4096, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                   intermediate_size=14336),
    "qwen3_moe": dict(hidden_size=2048, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                      moe=moe(num_experts=32, num_experts_per_tok=8, moe_intermediate_size=768)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", REAL_WIDTHS)
def test_logits_agree_at_realistic_width(family, tmp_path):
    run = make_run(tmp_path / "run", model_of(family, **REAL_WIDTHS[family]), None)
    found = export_model(open_run(run), tmp_path / "hf", scope="whole")["compared"]
    assert found["logits"]["difference"] <= 1e-5


# ---------------------------------------------------------------- mutants


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write_tensors(folder: Path, changed: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def drop_head(folder: Path) -> None:
    write_tensors(folder, {name: tensor for name, tensor in tensors(folder).items() if name != "lm_head.weight"})


def tie(folder: Path) -> None:
    drop_head(folder)
    change_config(folder, tie_word_embeddings=True)


def permute_queries(folder: Path) -> None:
    """Reorders rotary weights from halves to interleaved pairs, the layout of other formats."""
    changed = tensors(folder)
    for name, tensor in changed.items():
        if "q_proj" in name or "k_proj" in name:
            changed[name] = tensor.view(-1, 2, 6, 48).transpose(1, 2).reshape(tensor.shape)
    write_tensors(folder, changed)


def keep_padding(folder: Path) -> None:
    changed = tensors(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed[name] = torch.cat([changed[name], torch.zeros(64, 48)])
    write_tensors(folder, changed)
    change_config(folder, vocab_size=V + 64)


def swapped(name: str, one: str, other: str) -> str:
    return name.replace(one, other) if one in name else name.replace(other, one)


def swap(folder: Path, one: str, other: str) -> None:
    write_tensors(folder, {swapped(name, one, other): tensor for name, tensor in tensors(folder).items()})


def round_weights(folder: Path) -> None:
    write_tensors(folder, {name: tensor.bfloat16() for name, tensor in tensors(folder).items()})


def change_one_weight(folder: Path) -> None:
    changed = tensors(folder)
    changed["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-7
    write_tensors(folder, changed)


def other_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "other", ignore_errors=True)
    texts = ["another text altogether, from which training makes other pieces: numbers, letters, sentences " * 20]
    tokenizer_training.train(texts, folder / "other", vocab_size=V, describe=dict)
    for path in (folder / "other").iterdir():
        shutil.copy(path, folder / path.name)
    shutil.rmtree(folder / "other")


def other_tokenizer_json(folder: Path) -> None:
    """Replaces only the file that transformers reads."""
    shutil.copytree(folder, kept := folder.with_name("kept"))
    other_tokenizer(folder)
    for name in ("tokenizer.model", "tokenizer_info.json"):
        shutil.copy(kept / name, folder / name)


ROPE = {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
MUTANTS = {
    "dropped head": (drop_head, r"lm_head\.weight"),
    "tied": (tie, "tie_word_embeddings .*True"),
    "permuted queries and keys": (permute_queries, r"[qk]_proj\.weight"),
    "padded rows": (keep_padding, "vocab_size .*384"),
    "rope base": (lambda folder: change_config(folder, **ROPE), "rope_theta .*500000"),
    "gate and up": (lambda folder: swap(folder, "gate_proj", "up_proj"), r"(gate|up)_proj\.weight"),
    "layers": (lambda folder: swap(folder, "layers.0.", "layers.1."), r"layers\.[01]\."),
    "one weight": (change_one_weight, r"layers\.1\.mlp\.up_proj\.weight"),
    "dtype": (round_weights, r"torch\.bfloat16.*torch\.float32"),
    "epsilon": (lambda folder: change_config(folder, rms_norm_eps=1e-3), "rms_norm_eps"),
    "layers lost": (lambda folder: change_config(folder, num_hidden_layers=2), "num_hidden_layers .*2"),
    "class": (lambda folder: change_config(folder, model_type="qwen3"), "qk_norm .*True"),
    "tokenizer": (other_tokenizer, "fingerprint"),
    "tokenizer of transformers": (other_tokenizer_json, r"the tokenizer gives \["),
}
"""Changes to a folder, and what the message must name."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_detected(name, exported, tmp_path):
    trained, good = exported
    mutate, named = MUTANTS[name]
    shutil.copytree(good, folder := tmp_path / "hf")
    mutate(folder)
    with pytest.raises(VerificationError, match=named):
        compare_with_transformers(folder, trained, "fp32", "whole")


@pytest.mark.parametrize("name", [name for name in MUTANTS if "tokenizer" not in name and name != "one weight"])
def test_the_results_of_transformers_alone_reveal_a_mutant(name, exported, tmp_path):
    """Comparing settings and weights could miss a mistake that this program makes both in writing and in reading."""
    trained, good = exported
    shutil.copytree(good, folder := tmp_path / "hf")
    MUTANTS[name][0](folder)
    with pytest.raises(VerificationError):
        verify._compare_whole(folder, trained, torch.float32)


@pytest.mark.parametrize(
    ("family", "scope"),
    [("mixtral", "whole"), ("mixtral", "layers"), ("qwen3_moe", "whole"), ("llama3", "layers"), ("glm4_moe", "layers")]
    + [("mistral", "whole")],
)
def test_a_bug_in_the_mapping_is_detected_and_leaves_no_output(family, scope, tmp_path, tokenizer_folder, monkeypatch):
    """Writer and reader agree on the wrong names, so only transformers reveals the bug."""
    run = make_run(tmp_path / "run", model_of(family), tokenizer_folder)
    real_tensors, real_config = hf_mapping.tensors, hf_mapping.to_config
    pair = (".w1.", ".w3.") if family == "mixtral" else ("gate_proj", "up_proj")

    def tensors_with_swapped_names(model):
        for tensor in real_tensors(model):
            yield tensor._replace(name=swapped(tensor.name, *pair))

    def to_config(model, *rest):
        return real_config(dataclasses.replace(model, rope_scaling=None, sliding_window=None), *rest)

    if family in ("llama3", "mistral"):
        monkeypatch.setattr(hf_mapping, "to_config", to_config)
    else:
        monkeypatch.setattr(hf_mapping, "tensors", tensors_with_swapped_names)
    with pytest.raises(ConversionError, match="logits differ"):
        export_model(open_run(run), tmp_path / "hf", scope=scope)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_report_admits_that_a_window_longer_than_the_batch_was_not_tested(tmp_path):
    run = make_run(tmp_path / "run", model_of("mistral", sliding_window=4096), None)
    assert "sliding_window" in export_model(open_run(run), tmp_path / "hf")["compared"]


@pytest.mark.parametrize("scope", ["whole", "layers"])
def test_an_imported_model_is_verified_too(scope, exported, tmp_path, monkeypatch):
    _, good = exported
    found = import_model(good, tmp_path / "in", scope)
    assert found["compared"]["logits"]["difference"] <= 1e-5
    assert found == json.loads((tmp_path / "in" / "certificate.json").read_text())
    real = hf_mapping.from_config
    monkeypatch.setattr(hf_mapping, "from_config", lambda *given: real(*given) | {"rope_theta": 5e5})
    with pytest.raises(ConversionError, match="logits differ"):
        import_model(good, tmp_path / "wrong", scope)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_tokenizer_replaced_after_training_is_refused(tmp_path, tokenizer_folder):
    shutil.copytree(tokenizer_folder, mine := tmp_path / "tokenizer")
    run = make_run(tmp_path / "run", model_of("llama"), mine)
    export_model(open_run(run), tmp_path / "before")
    fingerprint = Tokenizer.load(mine).fingerprint
    other_tokenizer(mine)
    with pytest.raises(DataError, match=fingerprint):
        export_model(open_run(run), tmp_path / "after")
    with pytest.raises(DataError, match=fingerprint):
        open_run(run).load_tokenizer()  # as evaluation and generation do


def test_a_converted_model_can_be_moved_with_its_tokenizer(tmp_path, tokenizer_folder, monkeypatch):
    export_model(open_run(make_run(tmp_path / "run", model_of("llama"), tokenizer_folder)), tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    import_model(Path("hf"), Path("in"))
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    moved = open_run(tmp_path / "elsewhere")
    assert moved.load_tokenizer().fingerprint == Tokenizer.load(tokenizer_folder).fingerprint


def test_a_full_disk_is_reported_with_the_output_and_leaves_none(tmp_path):
    run, (soft, hard) = make_run(tmp_path / "run", model_of("llama"), None), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path / 'hf'}'"):
            export_model(open_run(run), tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_first_token_that_training_never_used_is_reported(tmp_path, tokenizer_folder, capsys):
    """Tokenizers of published models put a token before each text; our token files only put one after each document."""
    (tmp_path / "t").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, tmp_path / "t")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    begin = [("<|bos|>", library.token_to_id("<|bos|>"))]
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<|bos|> $A", special_tokens=begin)
    library.save(str(tmp_path / "t" / "tokenizer.json"))
    for folder, reported in ((tmp_path / "t", True), (tokenizer_folder, False)):
        export_model(open_run(make_run(tmp_path / f"run-{reported}", model_of("llama"), folder)), tmp_path / f"hf-{reported}")
        assert ("<|bos|>" in capsys.readouterr().err) == reported


def test_weights_too_large_for_the_dtype_are_refused(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", model_of("llama"), None)
    trained = open_run(run)
    real = trained.weights.read

    def read(name, start, into):
        real(name, start, into)
        into *= 1e6

    monkeypatch.setattr(trained.weights, "read", read)
    with pytest.raises(ConversionError, match=r"torch\.float16 .*; use bf16 or fp32"):
        convert.export_model(trained, tmp_path / "hf", "fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
