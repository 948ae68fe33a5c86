"""Flags, errors and exit statuses that all programs in launch/ and tools/ share. Imports no torch."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pretrain import UserError

INTERRUPTED, OUTPUT_CLOSED = 130, 141
_FIRST_RANK_SECONDS = 10  # in which it reports what all ranks of its machine have refused


def run(main: Callable[[list[str]], int | None]) -> int:
    """Calls `main` with the command line's words and returns the exit status.

    UserError and OSError become one line `program: message` on standard error, once per node for an error of all its ranks; any
    other exception is a bug and keeps its traceback. Ctrl-C is 130. When the reader of standard output has gone (`| head`) the
    program ends without a message, with the status that a shell gives for SIGPIPE, 141.
    """
    program = Path(sys.argv[0]).stem
    if hasattr(sys.stdout, "reconfigure"):  # texts of any language, on a terminal that may show only one
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its own flush
        return OUTPUT_CLOSED
    except (UserError, OSError) as error:
        if is_to_report():
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        return getattr(error, "status", UserError.status)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def is_to_report() -> bool:
    """Whether this rank is to print the error that ends it. One that all ranks meet is printed by the first of each machine.

    When any rank exits, torch's launcher ends the others at once, perhaps before the first one has printed the message: under
    this launcher, another rank waits here to be ended. If that does not happen the error is its own.
    """
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]  # a shell may hold some of them
    if not all(map(str.isdecimal, numbers)) or int(numbers[2]) == 0:
        return True
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(_FIRST_RANK_SECONDS)
    return True


def make_parser(description: str | None, **options) -> argparse.ArgumentParser:
    """A parser that shows `description`, a module's docstring, as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number of at least `least`."""

    def convert(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"got {number}, must be at least {least}")
        return number

    convert.__name__ = "whole number"  # argparse names the type when int() fails
    return convert


# ---------------------------------------------------------------- flags that several programs share


def add_settings(parser: argparse.ArgumentParser) -> None:
    """`--config FILE`, and in the help that any setting may follow; `parse_with_settings` reads both."""
    parser.allow_abbrev = False  # settings are flags too
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML settings; repeat to override")
    parser.add_argument_group(
        "settings", "--section.key value sets one key, as for launch/pretrain.py (its --help lists all keys)"
    )


def parse_with_settings(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(flags of the program, words for `pretrain.config.load`)."""
    options, rest = parser.parse_known_args(argv)
    return options, [word for path in options.config for word in ("--config", path)] + rest


def add_trained_model(parser: argparse.ArgumentParser, *, average: bool = False) -> None:
    """`--run`, `--model`, `--step`, `--last-weights` and, if wanted, `--average`: which trained model; `check_trained_model`
    checks them."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="FOLDER", help="a run, runs/<name>")
    source.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face model")
    parser.add_argument("--step", metavar="N|best", help="with --run: the checkpoint of this step, or best (lowest "
                        "validation loss); default: the newest")  # fmt: skip
    parser.add_argument("--last-weights", action="store_true", help="with --run: the weights of the last step, also where the "
                        "run kept an average of its weights (optimizer.average_decay)")  # fmt: skip
    if average:
        parser.add_argument("--average", type=at_least(1), default=1, metavar="N", help="with --run: the mean of the N "
                            "checkpoints up to --step (default: %(default)s)")  # fmt: skip


def check_trained_model(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with status 2 if the flags of `add_trained_model` contradict each other."""
    if options.step not in (None, "best") and not options.step.isdecimal():
        parser.error(f"--step: got {options.step!r}, allowed: a number or best")
    used = {"--step": options.step, "--last-weights": options.last_weights, "--average": getattr(options, "average", 1) != 1}
    given = [flag for flag, value in used.items() if value]
    if options.model and given:
        parser.error(f"{' and '.join(given)} can only be used with --run: a Hugging Face folder holds one model")
