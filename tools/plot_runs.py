"""Draw the loss curves of one or more runs into a PNG file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.report.plot import AXIS_TITLES, PlotError, plot_runs


def main() -> int:
    """Returns the exit status: 0, or 2 when a run cannot be drawn."""
    parser = argparse.ArgumentParser(
        description="Draw training loss (raw and smoothed), validation losses and the reference lines of the data.",
        epilog="example: python tools/plot_runs.py runs/first runs/second --output both.png",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, as runs/NAME")
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="picture to write (one run: RUN/plots/loss.png, several: loss.png here)"
    )
    parser.add_argument("--x", choices=AXIS_TITLES, default="tokens", help="horizontal axis (tokens)")
    arguments = parser.parse_args()
    output = arguments.output or (arguments.runs[0] / "plots" / "loss.png" if len(arguments.runs) == 1 else Path("loss.png"))
    try:
        plot_runs(arguments.runs, output, arguments.x)
    except (PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
