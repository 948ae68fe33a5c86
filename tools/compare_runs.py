"""Says why two runs differ: what differs in meaning, and the first step whose losses differ by more than the noise.

    python tools/compare_runs.py runs/a runs/b [--twin runs/a_again] [--json FILE]

--twin FOLDER  a repetition of the first run: what the two differ by is the noise. Without it, rounding is the noise of runs
               that read the same samples from the same weights, and the scatter of their lines that of others.
--json FILE    also writes what was found as JSON.

Exit status: 0 compared, 2 a folder holds no run, or FILE cannot be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.doctor.compare_runs import CompareError, differences, parting, read_side, verdict


def main() -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--twin", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        a, b = (read_side(path) for path in options.runs)
        found = differences(a, b)
        where = parting(a, b, found, read_side(options.twin) if options.twin else None)
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for each in found:
        print(f"{'bends the curve' if each.bends else 'should only round':18} {each.what}: {each.text}")
    equal = "not even the first line" if where.equal_to is None else f"up to step {where.equal_to}"
    print(f"{where.common} common lines; equal to the last bit: {equal}; noise: {where.noise}")
    if where.step is not None:
        mine, theirs = where.losses
        print(f"first beyond the noise: step {where.step}, {mine:.6f} and {theirs:.6f} (allowed {where.allowed:.2g})")
    print(verdict(a, b, found, where))
    if options.json:
        content = {"differences": [each._asdict() for each in found], "parting": where._asdict()}
        try:
            options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"error: --json: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
