"""Tabular benchmarks from Python: a table as a data frame and as an Optuna objective, and searches replayed on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pandas

from archsearch.api.study import Study
from archsearch.reports.tabular.replay import Comparison, compare
from archsearch.stats.pareto import front
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.tabular import export, file
from archsearch.studies.tabular.predictors import splits
from archsearch.studies.tabular.replay import settings_of
from archsearch.studies.tabular.table import BenchmarkTable


class Table:
    """A table that `load_table` read and checked.

    Attributes:
        table: the architectures and runs as objects.
    """

    def __init__(self, path: str | Path) -> None:
        self.table: BenchmarkTable = file.load_table(path)

    def __repr__(self) -> str:
        table = self.table
        return f"Table({table.source!r}: {len(table.entries):,} architectures, {len(table.runs):,} runs)"

    def frame(self) -> pandas.DataFrame:
        """Every training run, a row each, with the columns of the file."""
        # Only an empty cell is missing: a choice of a knob may be called null.
        return pandas.read_csv(self.table.source, skiprows=1, keep_default_na=False, na_values=[""])

    def pareto_front(self, *names: str) -> pandas.DataFrame:
        """The architectures that no other one is at least as good as in all numbers and better in one, by id.

        Args:
            *names: numbers to minimize: scores (means over the table's seeds), ``latency_ms``, ``params``, ``macs``, or
                a profile of the predicted latencies; default: ``validation_loss`` and ``latency_ms``.

        Returns:
            Those numbers and the choices of every knob, the best in the first number first.

        Raises:
            InputError: if a name is not in the table.
        """
        names = names or ("validation_loss", "latency_ms")
        self.table.check_objectives(names)
        numbers = pandas.DataFrame({name: self.table.numbers(name) for name in names}).dropna()
        points = [*numbers.itertuples(index=False, name=None)]
        best = {*front(points)}
        kept = numbers[[point in best for point in points]]
        choices = {i: self.table.space.labels(self.table.entries[i].point) for i in kept.index}
        found = kept.join(pandas.DataFrame.from_dict(choices, orient="index"))
        return found.sort_values(names[0]).rename_axis("architecture_id")

    def splits(self) -> pandas.DataFrame:
        """The splits of each architecture, by id: ``train``, ``validation`` or ``test``, and for each of the two splits
        out of distribution (``depth``, ``width``) ``train`` or ``test``."""
        return pandas.DataFrame.from_dict(splits(self.table), orient="index").rename_axis("architecture_id")

    def objective(self, *names: str, seeds: Sequence[int] | None = None) -> Callable[[optuna.Trial], tuple[float, ...]]:
        """An Optuna objective that looks its values up; see `BenchmarkTable.objective`.

        Args:
            *names: numbers to minimize; default: ``validation_loss`` and ``latency_ms``.
            seeds: seeds of the runs whose mean a score is; None: the first of the table's.

        Raises:
            InputError: if a name or a seed is not in the table.
        """
        return self.table.objective(names or ("validation_loss", "latency_ms"), seeds=seeds)


def load_table(path: str | Path) -> Table:
    """Load a table that ``archsearch tabulate`` wrote.

    Raises:
        InputError: if the file is missing, damaged or incomplete.
    """
    return Table(path)


def tabulate(*studies: Study, path: str | Path, full_size: str | None = None) -> Table:
    """Write the table of all runs of some studies, the first of which scored every architecture of its space.

    Args:
        *studies: studies that have begun; further ones add runs of the first one's architectures.
        path: the file; its name ends in .csv or .csv.gz.
        full_size: a space with the same knobs, of whose candidates costs are counted and latencies predicted.

    Raises:
        InputError: if the studies do not fit together, or runs are missing.
    """
    file.write_table(export.tabulate([study.optuna_study for study in studies], full_size=full_size), Path(path))
    return load_table(path)


def replay(
    study: str | Path | StudyConfig,
    table: str | Path,
    *,
    settings: Sequence[str] = (),
    seeds: int = 30,
    trials: int | None = None,
) -> Comparison:
    """Run a study's searches on a table, in seconds each.

    Args:
        study: a shipped study's name, a YAML file, or settings.
        table: the table's file.
        settings: to compare with: each a sampler's name, or settings as YAML such as ``{sampler: gp, seeds: null}``.
        seeds: searches of each setting.
        trials: candidates of a search, if not as many as the settings say.

    Raises:
        InputError: if the table is damaged, or the study is not of its space and protocol.
    """
    config = study if isinstance(study, StudyConfig) else load_config(study)
    return compare(table, settings_of(config, [str(setting) for setting in settings], trials=trials), seeds=seeds)
