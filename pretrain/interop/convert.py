"""Converts a trained model to a Hugging Face folder, or a Hugging Face folder to one that looks like a run, and verifies both.

Both write into a hidden folder beside the output and rename it at the end: the output is complete and verified, or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.config import Config, DataConfig, RunConfig, SyntheticConfig, TokenizerConfig, TrainConfig
from pretrain.data.tokenizer import INFO
from pretrain.files import sync_folder, write_atomically
from pretrain.interop.load import OWN_TOKENIZER, TrainedModel, open_hf_folder
from pretrain.interop.verify import VerificationError, compare_with_transformers
from pretrain.interop.weights import DTYPES, CheckpointWeights, ConversionError, write_checkpoint, write_hf_folder
from pretrain.model import hf_mapping
from pretrain.model.flops import num_parameters
from pretrain.report.progress import Progress
from pretrain.schema import to_dict, to_yaml

REPORT = "certificate.json"
"""The verification report in a converted folder."""
_NOT_TOKENIZER_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".py", ".index.json")
_MODEL_FILES = ("config.json", "generation_config.json", REPORT)


def export_model(
    trained: TrainedModel, output: Path, dtype: str = "fp32", max_file_bytes: int = 5 * 10**9, scope: str = "auto"
) -> dict[str, Any]:
    """Writes a model to the new Hugging Face folder `output` and returns the verification report.

    scope: see `compare_with_transformers`. Raises ConversionError, OSError, and DataError if the tokenizer is not the model's.
    """
    try:
        hf_mapping.model_type(trained.model)
    except hf_mapping.UnsupportedModel as error:
        raise ConversionError(f"transformers cannot represent this model: {error}") from None
    trained.load_tokenizer()
    with _complete_or_absent(Path(output)) as folder:
        size = DTYPES[dtype].itemsize * num_parameters(trained.model).total
        with Progress("writing", size) as progress:
            files = write_hf_folder(folder, trained.weights, dtype, max_file_bytes, progress.update)
        _write_settings(folder, trained, dtype)
        report = _verify(folder, trained, dtype, scope) | {"files": files}
        _write_json(folder / REPORT, report)
    print(f"{output}: {report['verdict']}, see {REPORT}")
    return report


def import_model(source: Path, output: Path, scope: str = "auto") -> dict[str, Any]:
    """Converts the Hugging Face folder `source` to the new folder `output` and returns the verification report.

    The output looks like a run without a history: config.yaml, a checkpoint of step 0, the tokenizer. Raises ConversionError,
    UnsupportedModel, DataError (the tokenizer cannot be used), OSError.
    """
    trained, output = open_hf_folder(source), Path(output)
    if trained.tokenizer is None:
        print(f"{source}: has no tokenizer.json, so the converted model has no tokenizer", file=sys.stderr)
    with _complete_or_absent(output) as folder:
        if trained.tokenizer is not None:
            (folder / OWN_TOKENIZER).mkdir()
            _copy_tokenizer(trained.tokenizer, folder / OWN_TOKENIZER)
        config = _placeholder_config(trained, output)
        head = (
            f"# A model converted from {Path(source).name}, not a run: the sections other than model and tokenizer are\n"
            "# placeholders. To train it further, set model.from_pretrained to this folder in your own settings.\n"
        )
        write_atomically(folder / "config.yaml", head + to_yaml(config))
        state = {"model": asdict(trained.model), "settings": to_dict(config), "val_loss": None}
        state |= {"tokenizer": trained.tokenizer_fingerprint, "hugging_face": trained.hugging_face}
        with Progress("writing", 4 * num_parameters(trained.model).total) as progress:
            written = write_checkpoint(folder / "checkpoints", trained.weights, state, progress.update)
        converted = trained._replace(weights=CheckpointWeights(written))
        report = _verify(Path(source), converted, None, scope)
        _write_json(folder / REPORT, report)
    print(f"{output}: {report['verdict']}; ready for --run and for model.from_pretrained")
    return report


def _verify(folder: Path, trained: TrainedModel, dtype: str | None, scope: str) -> dict[str, Any]:
    """The verification report. Raises ConversionError if transformers and this program compute different results."""
    try:
        compared = compare_with_transformers(folder, trained, dtype, scope)
    except VerificationError as error:
        raise ConversionError(
            f"verification failed, output removed: transformers gives different results ({error}); this is a bug in this "
            "program or in the installed transformers, please report it"
        ) from error
    return {
        "verdict": "transformers computes what the model computes",
        "made_from": trained.origin,
        "dtype": dtype or "fp32",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        "compared": compared,
    }


def _write_settings(folder: Path, trained: TrainedModel, dtype: str) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files."""
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if trained.tokenizer is not None:
        from transformers import AutoTokenizer

        _copy_tokenizer(trained.tokenizer, folder)
        _adapt_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = {name: getattr(tokenizer, name) for name in special}
        first = tokenizer("")["input_ids"]
        from_scratch = trained.config and not trained.config.model.from_pretrained and not trained.hugging_face
        if from_scratch and set(first) - {tokenizer.eos_token_id}:
            print(
                f"note: this tokenizer starts every text with {tokenizer.decode(first)}, which the model never saw in "
                "training; for better texts, encode prompts with add_special_tokens=False",
                file=sys.stderr,
            )
    name = str(DTYPES[dtype]).removeprefix("torch.")
    kept = trained.hugging_face or {"config": {}, "generation_config": None}
    config = hf_mapping.to_config(trained.model, name, special) | kept["config"]
    _write_json(folder / "config.json", config)
    generation = {key: config[key] for key in special if config[key] is not None}
    _write_json(folder / "generation_config.json", kept["generation_config"] or generation)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies all files of a tokenizer's folder except code and the files of a model that may lie beside them."""
    for path in sorted(source.iterdir()):
        skipped = path.name.startswith(".") or path.name.endswith(_NOT_TOKENIZER_FILES) or path.name in _MODEL_FILES
        if path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and not skipped:
            shutil.copyfile(path, folder / path.name)


def _adapt_tokenizer(folder: Path) -> None:
    """Makes every transformers since 4.50 read the tokenizer as `tokenizer.json` defines it, and start texts as in training.

    Tokenizer classes of single models rebuild parts of it, in different ways in versions 4 and 5. Files of version 5 may name a
    class that version 4 lacks, and list special tokens under a key that version 4 reads as an object.

    Our own tokenizers have a <|bos|> that our token files never contain; in training, a text follows the end of another one.
    Programs that put bos_token before a text (lm-eval does) would otherwise measure the model on a token that it never saw.
    """
    path, other = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    prefix = (json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"] or {}).get(
        "add_prefix_space"
    )
    for file, fixed in ((path, {"tokenizer_class": "PreTrainedTokenizerFast"}), (other, {})):
        if not file.is_file() and not fixed:
            continue
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if isinstance(extra := config.get("extra_special_tokens"), list):
            del config["extra_special_tokens"]
            config["additional_special_tokens"] = [*(config.get("additional_special_tokens") or []), *extra]
        if fixed and prefix is not None:  # version 4 applies the key, whose default is false, to tokenizer.json
            fixed["add_prefix_space"] = prefix
        if fixed and (folder / INFO).is_file():
            fixed["bos_token"] = config["eos_token"]
        _write_json(file, config | fixed)


def _placeholder_config(trained: TrainedModel, output: Path) -> Config:
    """Settings of a run whose only meaningful sections are model and tokenizer."""
    return Config(
        run=RunConfig(name=output.name, directory=str(output.parent)),
        model=trained.model,
        tokenizer=TokenizerConfig(path=str(output / OWN_TOKENIZER) if trained.tokenizer else None),
        data=DataConfig(
            synthetic=SyntheticConfig(kind="uniform"), sequence_length=min(1024, trained.model.max_position_embeddings)
        ),
        train=TrainConfig(max_steps=1),
    )


@contextlib.contextmanager
def _complete_or_absent(output: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `output` at the end, or removed after an error. Raises ConversionError, OSError."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ConversionError(f"{output}: exists already; choose another --output, or remove it first")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)
        sync_folder(folder)
        os.replace(folder, output)
        sync_folder(output.parent)
    except OSError as error:
        error.filename = error.filename or str(output)  # the error of a full disk names no file
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
