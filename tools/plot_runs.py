"""Draws the loss curves of one or more runs into a PNG file.

Shows the training loss (raw and smoothed), validation losses and the reference losses of the data.

example: python tools/plot_runs.py runs/first runs/second --output both.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.report.plot import AXIS_TITLES, plot_runs
from pretrain.run import command_line


def main(argv: list[str]) -> None:
    """Raises RecordsError when a run cannot be drawn, OSError."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, runs/<name>")
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="picture to write (default: RUN/plots/loss.png; of several runs: loss.png)"
    )
    parser.add_argument("--x", choices=AXIS_TITLES, default="tokens", help="horizontal axis (default: %(default)s)")
    options = parser.parse_args(argv)
    output = options.output or (options.runs[0] / "plots" / "loss.png" if len(options.runs) == 1 else Path("loss.png"))
    plot_runs(options.runs, output, options.x)
    print(output)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
