"""Studies from Python: run or load one, and look at its candidates as data frames and objects."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pandas

from archsearch.library import Kind
from archsearch.reports.ablation import report as ablation_report
from archsearch.reports.study import candidates as candidate_table
from archsearch.reports.study.data import load_study_data
from archsearch.reports.study_report import write_report
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.evolution import run as evolution
from archsearch.studies.experiments import ablation as ablation_run, ablation_results, proxy_audit
from archsearch.studies.lookup import stored_config
from archsearch.studies.search import candidates, run as search_run, weights
from archsearch.studies.search.candidates import Recommendation, eligible, load_candidates, pareto_front
from archsearch.studies.search.known_scores import is_table
from archsearch.studies.storage import database
from archsearch.studies.storage.record import Candidate
from snapgen.config import Config
from snapgen.models.unet import UNet
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline


class Study:
    """A study that has begun: running, killed or finished. Every call reads its storage anew.

    `search`, `ablate`, `evolve` and `load_study` make one.

    Attributes:
        config: the study's settings.
        optuna_study: Optuna's own study, for Optuna's own tools.
    """

    def __init__(self, config: StudyConfig, optuna_study: optuna.Study, *, source: str = "") -> None:
        self.config = config
        self.optuna_study = optuna_study
        self._source = source or config.name

    @property
    def name(self) -> str:
        """The study's name, which its folder under ``runs/`` has too."""
        return self.config.name

    def candidates(self) -> pandas.DataFrame:
        """Every candidate, a row each: the columns of the report's CSV, a column ``knob …`` for each knob.

        Raises:
            InputError: if nothing is scored yet.
        """
        return candidate_table.candidates(load_study_data(self.optuna_study))

    def front(self) -> pandas.DataFrame:
        """The candidates on the Pareto front, with the columns of `candidates`, by the first objective.

        Raises:
            InputError: if nothing is scored yet.
        """
        data = load_study_data(self.optuna_study)
        return candidate_table.candidates(data).set_index("trial").loc[list(data.front)].reset_index()

    def best(self, objective: str | None = None) -> Candidate:
        """The recommended candidate: the front's knee, the network that evolving ended with, or the best of one number.

        Args:
            objective: any number of a score, such as ``latency_ms`` or ``params``; None: the front's knee.

        Raises:
            InputError: if nothing is scored yet, or no candidate has the number.
        """
        return self.recommend(objective).candidate

    def recommend(self, objective: str | None = None) -> Recommendation:
        """The candidate that `best` gives, with the reason."""
        return candidates.best(self.optuna_study, objective=objective)

    def candidate(self, which: int | str) -> Candidate:
        """One candidate.

        Args:
            which: a trial's number, ``"best"``, or a name: ``"base"``, ``"final"`` or that of one of the space's
                references.

        Raises:
            InputError: if there is none.
        """
        return candidates.candidate_of(self.optuna_study, which)

    def load_unet(self, which: int | str = "best") -> UNet:
        """Load the trained U-Net of a candidate, on the CPU and in evaluation mode: averaged weights of its first seed.

        Args:
            which: as `candidate` takes it.

        Raises:
            InputError: if there is no such candidate, it was not trained, or its weights are missing or damaged.
        """
        return weights.load_unet(self.optuna_study, self.candidate(which))

    def load_pipeline(self, which: int | str = "best") -> SnapGenPipeline:
        """Load a pipeline that draws prompts with a candidate's trained U-Net, as the study sampled it.

        Args:
            which: as `candidate` takes it.

        Raises:
            InputError: as `load_unet`, or if the study trains in pixel space.
        """
        return weights.load_pipeline(self.optuna_study, self.candidate(which))

    def ablation(self) -> pandas.DataFrame:
        """The table of an ablation, a row for each of its rows: the columns of its CSV.

        Raises:
            InputError: if the study is not an ablation.
        """
        return ablation_report.frame(ablation_results.load_results(self.optuna_study))

    def report(self, path: str | Path | None = None, *, compare_with: Study | None = None) -> Path:
        """Write the report: one HTML file that needs no network, and a CSV beside it.

        Args:
            path: the file; None: in the study's folder under ``runs/``. An ablation's may be .html, .md, .tex or .csv,
                and the other forms are put beside it. A .jsonl has the scores alone, for another study to start from.
            compare_with: another study to show beside this one.

        Returns:
            The file's path.

        Raises:
            InputError: if nothing is scored yet, or the file cannot be written.
        """
        if self.config.ablation is not None and (path is None or not is_table(path)):
            out = self.config.folder / "ablation.html" if path is None else Path(path)
            return ablation_report.write_ablation(ablation_results.load_results(self.optuna_study), out)
        out = self.config.folder / "report.html" if path is None else Path(path)
        other = None if compare_with is None else compare_with.optuna_study
        return write_report(self.optuna_study, out, source=self._source, compare_with=other)

    def retry(self) -> None:
        """Let the next run of the study try again what was given up: candidates, and a remote device's measurements."""
        search_run.retry_given_up(self.config)

    def _summary(self) -> tuple[str, list[Candidate]]:
        """One line, and the front."""
        every = load_candidates(self.optuna_study)
        front = pareto_front(every, candidates.objectives(self.optuna_study))
        return f"{self.name}: {len(every)} candidates, {len(eligible(every))} scored, {len(front)} on the front", front

    def __repr__(self) -> str:
        return f"<Study {self._summary()[0]}>"

    def _repr_html_(self) -> str:
        """The line of ``repr`` and the front's numbers, for notebooks."""
        line, front = self._summary()
        names = candidates.objectives(self.optuna_study)
        rows = [{"trial": c.number, "name": c.name or "", **{name: c.value(name) for name in names}} for c in front]
        table = pandas.DataFrame(rows).to_html(index=False, float_format="{:.4g}".format) if rows else ""
        return f"<p>Study {html.escape(line)}</p>{table}"


def search(
    study: str | Path | StudyConfig,
    *,
    trials: int | None = None,
    workers: int | None = None,
    storage: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Study:
    """Run a search to the end of its budget, or resume it; the same call resumes a killed one.

    Args:
        study: a shipped study's name, a YAML file, or settings.
        trials: candidates to score, if not as many as the settings say.
        workers: worker processes on this machine. They start from nothing, and do not run the calling script or
            notebook again.
        storage: where the study is, if not where the settings say: an Optuna URL.
        quiet: show warnings only.
        **settings: any other setting of `StudyConfig`, such as ``seed=1``; of a group of settings those that are given,
            such as ``protocol={"steps": 200}``.

    Raises:
        InputError: if something is wrong with the settings or what they name, or the study was begun with others.
        KeyboardInterrupt: once the trials under way have been put back.
    """
    config = _configured(study, "search", trials=trials, workers=workers, storage=storage, settings=settings)
    return Study(config, search_run.search(config, quiet=quiet), source=_source_of(study))


def ablate(
    study: str | Path | StudyConfig,
    *,
    quality: str | None = None,
    workers: int | None = None,
    storage: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Study:
    """Score every row of an ablation, or resume it; ``ablation()`` of the result is its table.

    Args:
        study: a shipped ablation's name, a YAML file, or settings.
        quality: a number of `archsearch.score.Quality` to train every row for and to rank by.
        workers, storage, quiet, **settings: as `search` takes them.

    Raises:
        InputError: as `search`, or if the study is not an ablation.
    """
    config = _configured(study, "ablation", workers=workers, storage=storage, settings=settings)
    config = ablation_run.train_rows_too(config, quality)
    return Study(config, ablation_run.ablate(config, quiet=quiet), source=_source_of(study))


def evolve(
    study: str | Path | StudyConfig,
    *,
    storage: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Study:
    """Evolve a trained network to a latency, block by block, or resume it.

    Args:
        study: a shipped evolution's name, a YAML file, or settings.
        storage, quiet, **settings: as `search` takes them.

    Raises:
        InputError: as `search`, if the settings do not say how to evolve, or no network of the space meets the target.
    """
    config = _configured(study, "evolution", storage=storage, settings=settings)
    return Study(config, evolution.evolve(config, quiet=quiet), source=_source_of(study))


def load_study(study: str | Path | StudyConfig, *, storage: str | None = None) -> Study:
    """Load a study that has begun, to read; it may be running, or have been killed.

    Args:
        study: a shipped study's name (``"emoji"``, ``"ablation/emoji"``), the name of a run under ``runs/``, a YAML
            file, or settings.
        storage: where the study is, if not where its settings say.

    Raises:
        InputError: if there is none.
    """
    if storage is not None and not isinstance(study, StudyConfig):
        study = load_config(study).with_overrides(storage=storage)
    if isinstance(study, StudyConfig):
        config = study.with_overrides(storage=storage)
        return Study(config, database.load_study(config))
    optuna_study = database.open_study(str(study))
    return Study(stored_config(optuna_study), optuna_study, source=str(study))


def audit(
    study: str | Path | StudyConfig | Study,
    *,
    factor: int = proxy_audit.FACTOR,
    candidates: int | None = None,
    storage: str | None = None,
    quiet: bool = False,
) -> pandas.DataFrame:
    """Train a study's candidates several times as long, and say how far its scores can be trusted; resumes.

    Args:
        study: what `load_study` takes, or a study.
        factor: steps of the long run over the short one's.
        candidates: at most this many, spread over the ranking; None: all that are scored.
        storage, quiet: as `search` takes them.

    Returns:
        An agreement a row: Spearman's rank correlation ``rho`` of a ``score`` with a ``target`` over ``n`` candidates,
        with its 95 % interval. The study's report shows them from now on.

    Raises:
        InputError: if the study has too few scored candidates, or as `search`.
    """
    config = (study if isinstance(study, Study) else load_study(study, storage=storage)).config
    rows = proxy_audit.audit(config, factor=factor, candidates=candidates, quiet=quiet)
    return pandas.DataFrame([asdict(row) for row in rows])


def _configured(
    study: str | Path | StudyConfig, kind: Kind, *, settings: Mapping[str, Any], **overrides: Any
) -> StudyConfig:
    """Settings of a study with some changed: a group of settings field by field, everything else as a whole."""
    config = study if isinstance(study, StudyConfig) else load_config(study, kind)
    changes = dict(settings)
    for name, value in settings.items():
        group = getattr(config, name, None)
        if isinstance(group, Config) and isinstance(value, Mapping):
            changes[name] = {**group.model_dump(mode="json"), **value}
    return config.with_changes(changes).with_overrides(**overrides)


def _source_of(study: str | Path | StudyConfig) -> str:
    """How the command line names the study."""
    return "" if isinstance(study, StudyConfig) else str(study)
