"""Coverage of every interval and false verdicts of every verdict, by simulation.

Each case draws data whose truth is known, computes the interval with the code that reports use, and counts how often it
holds the truth; of data without any effect, how often the verdict is not “cannot tell”.

    OMP_NUM_THREADS=1 python -m benchmarks.intervals

Results: ``reports/results/statistics.md``. The tests hold the same cases with fewer draws.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from archsearch.reports.rendering import tables
from benchmarks.interval_cases import DRAWS, coverage, false_verdicts


def main() -> None:
    """Print the tables of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws of each case")
    draws = parser.parse_args().draws
    torch.set_num_threads(1)
    started = time.monotonic()
    parts = []
    for title, cases in (("Coverage of the intervals", coverage()), ("False verdicts", false_verdicts())):
        rows = [(c.name, c.condition, f"{c.nominal:.2f}", f"{c.rate(draws):.3f}") for c in cases]
        names = [row[0] if i == 0 or rows[i - 1][0] != row[0] else "" for i, row in enumerate(rows)]
        shown = [(name, *row[1:]) for name, row in zip(names, rows, strict=True)]
        parts.append(f"## {title}\n\n{tables.markdown(('', 'data', 'claimed', 'simulated'), shown, text_columns=2)}")
    print("\n".join(parts), end="")
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
