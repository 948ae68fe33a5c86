"""Converts a checkpoint of a run to a Hugging Face folder, or a Hugging Face folder to a checkpoint.

    python tools/convert_checkpoint.py --run runs/X --output FOLDER [--step N|best] [--average N] [--dtype bf16]
    python tools/convert_checkpoint.py --model HF_FOLDER --output FOLDER

The first writes a folder that transformers, its pipelines and compatible servers load (safetensors, config.json, tokenizer),
and a verification report, certificate.json: transformers has loaded the folder, and its weights, logits, loss and generation
equal those of the model. If anything differs, the output is removed. The second writes a folder for --run and for
model.from_pretrained, verified in the same way.

Exit status: 0 done, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain import UserError
from pretrain.run import command_line


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_line.make_parser(__doc__)
    command_line.add_trained_model(parser, average=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="with --run: format of the weights (default: fp32)")
    parser.add_argument("--max-file-gb", type=float, default=5.0, metavar="GB",
                        help="with --run: size limit of a safetensors file (default: %(default)s)")  # fmt: skip
    parser.add_argument("--certify", choices=["auto", "whole", "layers"], default="auto", help="verify the whole model, or "
                        "layer by layer in less memory; auto: whole if it fits (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    command_line.check_trained_model(parser, options)
    if options.model and options.dtype:
        parser.error("--dtype belongs to --run: a checkpoint is always fp32")
    if not options.max_file_gb > 0:
        parser.error(f"--max-file-gb: got {options.max_file_gb}, must be above 0")
    return options


def convert(options: argparse.Namespace) -> None:
    """Raises UserError, OSError."""
    from pretrain.interop.convert import export_model, import_model  # only now: torch takes seconds
    from pretrain.interop.load import open_run

    if options.model:
        import_model(options.model, options.output, options.certify)
        return
    print(f"reading {options.run}", file=sys.stderr, flush=True)
    trained = open_run(options.run, options.step, options.average, options.last_weights)
    export_model(trained, options.output, options.dtype or "fp32", int(options.max_file_gb * 1e9), options.certify)


def main(argv: list[str]) -> int | None:
    """Raises UserError, OSError."""
    options = parse(argv)
    if not importlib.util.find_spec("transformers"):
        raise UserError("needs the package transformers: pip install 'pretrain[hf]'")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C, unfinished output is removed
    try:
        return convert(options)
    except KeyboardInterrupt:
        print("\nconvert_checkpoint: interrupted, output removed", file=sys.stderr)
        return command_line.INTERRUPTED


if __name__ == "__main__":
    sys.exit(command_line.run(main))
