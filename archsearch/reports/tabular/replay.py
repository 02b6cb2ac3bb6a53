"""Comparison of searches that were replayed on a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas

from archsearch.reports.rendering import tables
from archsearch.reports.rendering.plotting import Figure, lines
from archsearch.reports.tabular.report import figures_page
from archsearch.score import OBJECTIVES
from archsearch.stats.medians import Median, median
from archsearch.studies.tabular.convergence import Trace, Truth
from archsearch.studies.tabular.file import load_table
from archsearch.studies.tabular.replay import Setting, replay, true_points
from archsearch.studies.tabular.table import BenchmarkTable
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write_texts
from snapgen.progress import ProgressCallback, ignore_progress

TARGET = 0.99
"""Share of the true front's hypervolume that counts as having found the front."""

CHECKPOINTS = (12, 24, 50, 100, 200)
"""Numbers of candidates after which searches are compared."""

POINTS = 60
"""Number of points of a line in a figure."""

MOMENTS = 4
"""Number of times at which searches are compared, evenly spaced up to the end of the shortest."""


@dataclass(frozen=True)
class Comparison:
    """Searches of several settings on one table.

    Attributes:
        traces: by label of the setting, a search per seed.
        objectives: names of what was minimized.
        seeds: the table's seeds, of whose runs true values are means.
        is_timed: whether the runs' durations were measured alike, so that simulated times mean something.
        table_runs: number of runs in the table that a search could have made.
    """

    traces: Mapping[str, Sequence[Trace]]
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    is_timed: bool
    table_runs: int

    def by_candidates(self) -> pandas.DataFrame:
        """Medians after numbers of candidates: a row per setting and number."""
        most = self._shortest("candidates")
        counts = [*(float(count) for count in CHECKPOINTS if count < most), most]
        return self._rows("candidates", counts, Trace.after_candidates)

    def by_seconds(self) -> pandas.DataFrame:
        """Medians at simulated times: a row per setting and time."""
        moments = [self._shortest("seconds") * (i + 1) / MOMENTS for i in range(MOMENTS)]
        return self._rows("seconds", moments, Trace.after_seconds)

    def _shortest(self, by: Literal["candidates", "seconds"]) -> float:
        """Where the first of all searches ends."""
        return min(float(getattr(trace, by)[-1]) for traces in self.traces.values() for trace in traces)

    def _rows(
        self, by: str, marks: Sequence[float], at: Callable[[Trace, float], tuple[float, float]]
    ) -> pandas.DataFrame:
        rows: list[dict[str, object]] = []
        for label, traces in self.traces.items():
            for mark in marks:
                volumes, regrets = zip(*(at(trace, mark) for trace in traces), strict=True)
                rows.append({"setting": label, by: mark, **_columns("hypervolume", median(volumes))})
                rows[-1] |= _columns("regret", median(regrets))
        return pandas.DataFrame(rows)

    def to_front(self) -> pandas.DataFrame:
        """Costs of finding the front: candidates, runs, their share of the table's, and simulated seconds.

        Infinite where more than half of the searches end before.
        """
        rows: list[dict[str, object]] = []
        for label, traces in self.traces.items():
            candidates, runs, seconds = zip(*(trace.reaches(TARGET) for trace in traces), strict=True)
            found = sum(map(math.isfinite, candidates))
            rows.append({"setting": label, "searches": len(traces), "found": found})
            rows[-1] |= _columns("candidates", median(candidates)) | _columns("runs", median(runs))
            rows[-1]["share"] = median(runs).value / self.table_runs
            rows[-1] |= _columns("seconds", median(seconds))
        return pandas.DataFrame(rows)

    def figures(self) -> dict[str, Figure]:
        """Median share of the true front's hypervolume, by candidates and by simulated time: a line per setting."""
        counts = [float(i + 1) for i in range(int(self._shortest("candidates")))]
        moments = [self._shortest("seconds") * (i + 1) / POINTS for i in range(POINTS)]
        by_count = self._rows("candidates", counts, Trace.after_candidates)
        by_time = self._rows("seconds", moments, Trace.after_seconds)
        by_time["minutes"] = by_time["seconds"] / 60
        y = "Share of the true front's hypervolume"
        return {
            "By candidates": _lines(by_count, "candidates", "Candidates", y),
            "By simulated time": _lines(by_time, "minutes", "Minutes of simulated time", y),
        }

    def frame(self) -> pandas.DataFrame:
        """Every score of every search: a row each."""
        parts = []
        for label, traces in self.traces.items():
            for seed, trace in enumerate(traces):
                columns = {"architecture_id" if k == "architecture_ids" else k: v for k, v in vars(trace).items()}
                parts.append(pandas.DataFrame({"setting": label, "seed": seed, **columns}))
        return pandas.concat(parts, ignore_index=True)

    def markdown(self) -> str:
        """The three tables: medians over the seeds with their 95 % intervals."""
        candidates, seconds, found = self.by_candidates(), self.by_seconds(), self.to_front()
        return "\n\n".join(
            [
                self._explanation(),
                _table(candidates, "candidates", lambda n: f"{n:.0f}").strip(),
                _table(seconds, "seconds", lambda s: f"{s / 60:.1f} min" if s >= 60 else f"{s:.1f} s").strip(),
                tables.markdown(
                    [
                        "setting",
                        f"reached {TARGET:.0%} of the hypervolume",
                        "candidates",
                        "runs",
                        "of the table's runs",
                        "minutes",
                    ],
                    [
                        [
                            row["setting"],
                            f"{row['found']} of {row['searches']}",
                            _cell(row, "candidates", ".0f"),
                            _cell(row, "runs", ".0f"),
                            _share(row["share"]),
                            _cell(row, "seconds", ".1f", scale=1 / 60),
                        ]
                        for row in found.to_dict("records")
                    ],
                ),
            ]
        )

    def _explanation(self) -> str:
        searches, first = len(next(iter(self.traces.values()))), OBJECTIVES[self.objectives[0]].label
        has_interval = not math.isnan(median([0.0] * searches).low)
        shown = "[95 % interval]" if has_interval else "(of fewer than six searches an interval cannot be told)"
        text = (
            f"Medians of {searches} searches {shown}. Hypervolume: of all candidates so far at their true values, as a "
            "share of the true front's; the reference point is the worst value of each objective and a tenth of its "
            f"range more. Regret: by how much the true {first} of the candidate that looks best in it is above the "
            f"lowest. True values are means over the table's seeds ({', '.join(map(str, self.seeds))}): the runs that "
            "the searches are told of, so their noise counts as truth."
        )
        if not self.is_timed:
            text += (
                "\n\nThe durations of this table's runs are those of their trials, on machines busy or not: simulated "
                "times are rough. `archsearch tabulate --time-runs` times all runs alike."
            )
        return text


def compare(
    table: str | Path,
    settings: Sequence[Setting],
    *,
    seeds: int,
    processes: int | None = None,
    progress: ProgressCallback = ignore_progress,
) -> Comparison:
    """Run searches of several settings on a table, and compare them; see `archsearch.studies.tabular.replay.replay`."""
    loaded = load_table(table)
    truth = _truth(loaded, settings)
    histories = replay(table, settings, seeds=seeds, processes=processes, progress=progress)
    traces = {
        setting.label: [Trace.of(history, truth) for history in searches]
        for setting, searches in zip(settings, histories, strict=True)
    }
    return Comparison(
        traces,
        objectives=settings[0].config.objectives,
        seeds=loaded.seeds,
        is_timed=loaded.header.run_seconds == "timed",
        table_runs=len(loaded.entries) * len(loaded.seeds),
    )


def _truth(table: BenchmarkTable, settings: Sequence[Setting]) -> Truth:
    """The true values that all settings search.

    Raises:
        InputError: if no architecture meets the limits, or a setting searches others, whose front is another one.
    """
    points = [true_points(table, setting.config) for setting in settings]
    for setting, others in zip(settings, points, strict=True):
        if others != points[0]:
            problem = "has other objectives or limits than the study, and so another front"
            raise InputError(setting.config.source, problem, "replay a study of its own with them")
    return Truth(points[0])


def _columns(name: str, value: Median) -> dict[str, float]:
    return {name: value.value, f"{name} low": value.low, f"{name} high": value.high}


def _lines(frame: pandas.DataFrame, by: str, x: str, y: str) -> Figure:
    by_label = frame.groupby("setting", sort=False)
    return lines({str(k): [*zip(part[by], part["hypervolume"], strict=True)] for k, part in by_label}, x, y)


def _table(frame: pandas.DataFrame, by: str, shown: Callable[[float], str]) -> str:
    """One row per setting, a column of hypervolume and one of regret per mark."""
    marks = list(dict.fromkeys(frame[by]))
    header = ["setting", *(f"hypervolume, {shown(m)}" for m in marks), *(f"regret, {shown(m)}" for m in marks)]
    rows = []
    for label, part in frame.groupby("setting", sort=False):
        cells = part.to_dict("records")
        rows.append([str(label), *(_cell(c, "hypervolume", ".3f") for c in cells)])
        rows[-1] += [_cell(c, "regret", ".4f") for c in cells]
    return tables.markdown(header, rows)


def _share(share: float) -> str:
    return "–" if math.isinf(share) else f"{share:.1%}"


def _cell(row: Mapping[Any, Any], name: str, spec: str, *, scale: float = 1.0) -> str:
    value, low, high = (row[key] * scale for key in (name, f"{name} low", f"{name} high"))
    if math.isinf(value):
        return "–"
    if math.isnan(low):
        return format(value, spec)
    return f"{value:{spec}} [{low:{spec}}, {'–' if math.isinf(high) else format(high, spec)}]"


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write the tables as Markdown, and beside them every score as CSV and the figures as HTML.

    Args:
        out: a path that ends in .md, .csv or .html; the other files get the same name.

    Raises:
        InputError: if a file cannot be written.
    """
    atomic_write_texts(
        {
            out.with_suffix(".md"): comparison.markdown() + "\n",
            out.with_suffix(".csv"): tables.csv(comparison.frame(), "%.6g"),
            out.with_suffix(".html"): figures_page(
                "Searches replayed",
                {"Medians": comparison.figures()},
                headline="Medians over the searches; the page beside this one has their intervals.",
            ),
        }
    )
