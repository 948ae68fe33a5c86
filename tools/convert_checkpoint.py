"""Models out and in: a run's checkpoint to a Hugging Face folder, and back.

    python tools/convert_checkpoint.py --run runs/X --output FOLDER [--step N|best] [--average N] [--dtype bf16]
    python tools/convert_checkpoint.py --model HF_FOLDER --output FOLDER

The first writes what transformers, its pipelines and servers of such folders load (safetensors, config.json, tokenizer) and
certificate.json: transformers has loaded the folder, and weights, logits, loss and generation were found equal. If anything
differs, nothing is left at --output. The second writes a folder like that of a run, which --run and model.from_pretrained take,
and compares it with the same care.

Exit status: 0 done, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a run, runs/<name>")
    source.add_argument("--model", type=Path, help="Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--step", help="a checkpoint's step, or best (lowest validation loss); default: the newest")
    parser.add_argument("--average", type=int, default=1, metavar="N", help="mean of the N checkpoints that end with --step")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights written (default: fp32)")
    parser.add_argument("--max-file-gb", type=float, default=5.0, help="largest safetensors file in GB (default: %(default)s)")
    parser.add_argument(
        "--certify", choices=["auto", "whole", "layers"], default="auto",
        help="compare the whole model, or layer by layer in less memory; auto: whole where it fits",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.step not in (None, "best") and not options.step.isdecimal():
        parser.error(f"--step: got {options.step!r}, allowed: a number or best")
    if options.model and (options.step or options.average != 1 or options.dtype):
        parser.error("--step, --average and --dtype belong to --run: a folder has one model, and a checkpoint is fp32")
    if options.average < 1 or options.max_file_gb <= 0:
        parser.error("--average must be at least 1, --max-file-gb more than 0")
    return options


def convert(options: argparse.Namespace) -> int:
    """-> exit status."""
    from pretrain.checkpoint.manifest import CheckpointError
    from pretrain.config import ConfigError  # after the flags are known to be right: torch takes seconds
    from pretrain.data.indexed import DataError
    from pretrain.interop.convert import ConversionError, export_run, import_folder
    from pretrain.model.hf_mapping import UnsupportedModel

    try:
        if options.run:
            export_run(
                options.run, options.output, options.step, options.average, options.dtype or "fp32",
                int(options.max_file_gb * 1e9), options.certify,
            )  # fmt: skip
        else:
            import_folder(options.model, options.output, options.certify)
    except (ConversionError, CheckpointError, ConfigError, DataError, UnsupportedModel, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    """-> exit status."""
    options = parse(sys.argv[1:])
    if not importlib.util.find_spec("transformers"):
        print("convert_checkpoint: needs the package transformers: pip install 'pretrain[hf]'", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that what was written is removed
    try:
        return convert(options)
    except KeyboardInterrupt:
        print("\nconvert_checkpoint: interrupted; nothing is left of it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
