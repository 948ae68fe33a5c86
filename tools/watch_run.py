"""Shows how a run is doing, while it runs and afterwards.

On a terminal the picture follows the run until it is done: its curve with the reference losses, rates, time left, cost, the
last checkpoint and validation, and what went wrong. A run that does not exist yet is waited for; one that is killed, resumed or
restarted is still followed. Needs only the run's folder, which may be on a file system that another machine writes to.

Into a pipe or a file it prints a picture when the run has news, at most once a minute (--every).

--html writes a page about the run, with every curve, in one file that needs no network; runs write runs/<name>/report.html
at their end, too.

examples:
  python tools/watch_run.py runs/quickstart
  python tools/watch_run.py runs/first runs/second --once
  python tools/watch_run.py runs/quickstart --html report.html
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pretrain import UserError
from pretrain.run import command_line
from pretrain.run.page import write_page
from pretrain.run.screen import frame
from pretrain.run.view import View


def main(argv: list[str]) -> None:
    """Raises UserError for a run that does not exist where it must, OSError."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, runs/<name>")
    parser.add_argument("--once", action="store_true", help="print one picture and exit")
    parser.add_argument("--every", type=command_line.at_least(1), metavar="SECONDS", help="time between two looks at the run "
                        "(default: 1; into a pipe or a file: 60)")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page about one run, and exit")
    parser.add_argument("--ascii", action="store_true", help="draw with ASCII characters alone (default: where the terminal "
                        "has no others)")  # fmt: skip
    options = parser.parse_args(argv)
    views = [View(path) for path in options.runs]
    if options.html and len(views) > 1:
        parser.error("--html takes one run")
    if options.html or options.once:
        for view in views:
            if not (view.path / "metrics.jsonl").exists() and not (view.path / "run_state.json").exists():
                raise UserError(f"{view.path}: is not the folder of a run, such as runs/NAME; without --once and --html, the "
                                "program waits for it")  # fmt: skip
            view.read_all()
    if options.html:
        write_page(views[0], options.html)
        print(options.html)
        return
    console = Console()
    simple = options.ascii or not console.encoding.startswith("utf") or os.environ.get("TERM") in ("linux", "dumb")
    if options.once:
        show(console, picture(views, console, simple))
    elif console.is_terminal and not console.is_dumb_terminal:
        follow_on_screen(views, console, simple, options.every or 1)
    else:
        follow_in_lines(views, console, simple, options.every or 60)


def picture(views: list[View], console: Console, simple: bool) -> list[Text]:
    """All runs, one below another, on one screen."""
    width, height = console.size
    each = max(3, height // len(views))
    return [line for view in views for line in frame(view, width, each, ascii_only=simple)]


def follow_on_screen(views: list[View], console: Console, simple: bool, every: float) -> None:
    """Shows the runs until all are done; the last picture stays on the terminal."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not read_on(views):
            live.update(Group(*picture(views, console, simple)), refresh=True)
            time.sleep(0.05 if any(view.fraction_read < 1 for view in views) else every)
    show(console, picture(views, console, simple))


def follow_in_lines(views: list[View], console: Console, simple: bool, every: float) -> None:
    """Prints a picture when there is news, until all runs are done."""
    before = None
    while True:
        done = read_on(views)
        news = [(view.status().kind, view.heard, len(view.checkpoints)) for view in views]
        if any(view.fraction_read < 1 for view in views) and not done:
            continue
        if news != before:
            show(console, picture(views, console, simple))
            before = news
        if done:
            return
        time.sleep(every)


def read_on(views: list[View]) -> bool:
    """Reads what is new. -> whether all runs are done and read to their ends."""
    more = [view.refresh() for view in views]
    return not any(more) and all(view.state.get("status") == "done" for view in views)


def show(console: Console, lines: list[Text]) -> None:
    """Prints a picture."""
    with console.capture() as captured:
        console.print(*lines, sep="\n", no_wrap=True, crop=True)
    print(captured.get(), end="", flush=True)  # not by the console, which would hide that the reader of a pipe has exited


if __name__ == "__main__":
    sys.exit(command_line.run(main))
