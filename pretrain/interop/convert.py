"""From a run to a Hugging Face folder, with a certificate, and from a Hugging Face folder to one like that of a run.

Both write into a hidden folder beside the output and rename it when all is done and proved: the output is whole or not there.
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

from pretrain import UserError
from pretrain.checkpoint.storage import write_file
from pretrain.config import Config, DataConfig, RunConfig, SyntheticConfig, TokenizerConfig, TrainConfig
from pretrain.files import sync_folder
from pretrain.interop.load import OWN_TOKENIZER, Trained, open_folder, open_run
from pretrain.interop.verify import VerificationError, certify
from pretrain.interop.weights import DTYPES, CheckpointWeights, write_checkpoint, write_folder
from pretrain.model import hf_mapping
from pretrain.model.flops import num_parameters
from pretrain.report.progress import Progress
from pretrain.schema import to_dict, to_yaml

_NOT_OF_A_TOKENIZER = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".py", ".index.json")
_OF_A_MODEL = ("config.json", "generation_config.json", "certificate.json")


class ConversionError(UserError):
    """Nothing was written; the message says why."""


def export_run(
    run: Path,
    output: Path,
    step: str | int | None = None,
    average: int = 1,
    dtype: str = "fp32",
    max_file_bytes: int = 5 * 10**9,
    scope: str = "auto",
) -> dict[str, Any]:
    """Writes a checkpoint of `run` (or the mean of `average` of them) to the Hugging Face folder `output`. -> its certificate.

    Raises ConversionError where the folder would not hold the model, and what `open_run` raises.
    """
    print(f"verifying {run}", file=sys.stderr, flush=True)
    return export(open_run(run, step, average), output, dtype, max_file_bytes, scope)


def export(trained: Trained, output: Path, dtype: str, max_file_bytes: int = 5 * 10**9, scope: str = "auto") -> dict[str, Any]:
    """As `export_run`, for what is open already. Raises DataError, too, where the tokenizer is not the model's."""
    try:
        hf_mapping.model_type(trained.model)
    except hf_mapping.UnsupportedModel as error:
        raise ConversionError(f"transformers cannot hold this model: {error}") from None
    trained.load_tokenizer()
    with _whole_or_absent(Path(output)) as folder:
        size = DTYPES[dtype].itemsize * num_parameters(trained.model).total
        try:
            with Progress("writing", size) as progress:
                files = write_folder(folder, trained.weights, dtype, max_file_bytes, progress.update)
        except ValueError as error:
            raise ConversionError(str(error)) from None
        _write_settings(folder, trained, dtype)
        certificate = _certificate(folder, trained, dtype, scope) | {"files": files}
        _write_json(folder / "certificate.json", certificate)
    print(f"{output}: {certificate['verdict']}, see certificate.json")
    return certificate


def _certificate(folder: Path, trained: Trained, dtype: str | None, scope: str) -> dict[str, Any]:
    """Raises ConversionError where transformers and the model differ."""
    try:
        found = certify(folder, trained, dtype, scope, lambda text: print(text, file=sys.stderr, flush=True))
    except VerificationError as error:
        raise ConversionError(
            f"refused, and nothing is left of it: transformers and this program do not compute the same ({error}); this is a "
            "fault of this program or of the installed transformers, report it"
        ) from error
    return {
        "verdict": "transformers computes what the model computes",
        "made_from": trained.origin,
        "dtype": dtype or "fp32",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")},
        "compared": found,
    }


def _write_settings(folder: Path, trained: Trained, dtype: str) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if trained.tokenizer is not None:
        from transformers import AutoTokenizer

        _copy_tokenizer(trained.tokenizer, folder)
        _begin_as_trained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = {name: getattr(tokenizer, name) for name in special}
        first = tokenizer("")["input_ids"]
        if set(first) - {tokenizer.eos_token_id} and trained.config and not trained.config.model.from_pretrained:
            print(
                f"note: this tokenizer makes texts begin with {tokenizer.decode(first)}, which training never showed to the "
                "model: it writes better from prompts that are encoded with add_special_tokens=False",
                file=sys.stderr,
            )
    name = str(DTYPES[dtype]).removeprefix("torch.")
    _write_json(folder / "config.json", hf_mapping.to_config(trained.model, name, special))
    _write_json(folder / "generation_config.json", {key: value for key, value in special.items() if value is not None})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """All files of the tokenizer's folder; what of a model may lie beside them, and code, is left there."""
    for path in sorted(source.iterdir()):
        ours = path.name.startswith(".") or path.name.endswith(_NOT_OF_A_TOKENIZER) or path.name in _OF_A_MODEL
        if path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and not ours:
            shutil.copyfile(path, folder / path.name)


def _begin_as_trained(folder: Path) -> None:
    """Our tokenizers have a <|bos|> that no data of ours holds; a text begins after the end of another. Programs that put the
    tokenizer's first token before a text (lm-eval does) must put that one, or they measure a model that saw a stranger."""
    if (folder / "tokenizer_info.json").is_file():
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"bos_token": config["eos_token"]}, indent=1) + "\n", encoding="utf-8")


def import_folder(source: Path, output: Path, scope: str = "auto") -> dict[str, Any]:
    """Writes the model of a Hugging Face folder as a run's folder without a history: config.yaml, a checkpoint of step 0, the
    tokenizer. -> its certificate. Raises ConversionError, UnsupportedModel, DataError (of the tokenizer), OSError."""
    trained = open_folder(source)
    if trained.tokenizer is None:
        print(f"{source}: has no tokenizer.json, so the model comes without a tokenizer", file=sys.stderr)
    with _whole_or_absent(Path(output)) as folder:
        path = None
        if trained.tokenizer is not None:
            (folder / OWN_TOKENIZER).mkdir()
            _copy_tokenizer(trained.tokenizer, folder / OWN_TOKENIZER)
            path = str(Path(output) / OWN_TOKENIZER)
        config = Config(
            run=RunConfig(name=Path(output).name, directory=str(Path(output).parent)),
            model=trained.model,
            tokenizer=TokenizerConfig(path=path),
            data=DataConfig(
                synthetic=SyntheticConfig(kind="uniform"), sequence_length=min(1024, trained.model.max_position_embeddings)
            ),
            train=TrainConfig(max_steps=1),
        )
        head = (
            f"# The model of {Path(source).name}, converted: no run. Only model and tokenizer count, the other sections are\n"
            "# placeholders. To train on from here, set model.from_pretrained to this folder in settings of your own.\n"
        )
        write_file(folder / "config.yaml", [(head + to_yaml(config)).encode()])
        state = {"model": asdict(trained.model), "settings": to_dict(config), "val_loss": None}
        state["tokenizer"] = trained.tokenizer_fingerprint
        try:
            with Progress("writing", 4 * num_parameters(trained.model).total) as progress:
                written = write_checkpoint(folder / "checkpoints", trained.weights, state, progress.update)
        except ValueError as error:
            raise ConversionError(f"{source}: {error}") from None
        copy = trained._replace(weights=CheckpointWeights(written))
        certificate = _certificate(Path(source), copy, None, scope)
        _write_json(folder / "certificate.json", certificate)
    print(f"{output}: {certificate['verdict']}; ready for --run and for model.from_pretrained")
    return certificate


@contextlib.contextmanager
def _whole_or_absent(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes it at the end, or is removed. Raises ConversionError where something is there."""
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
        error.filename = error.filename or str(output)  # a full disk does not say where
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, [(json.dumps(content, indent=1) + "\n").encode()])
    path.chmod(0o644)
