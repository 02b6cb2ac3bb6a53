"""How long a search takes: from its trials if some are scored, else from a few training steps of the base.

On machines that one does not have, from what the base's training computes.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from archsearch.cost.counter import cost
from archsearch.library.machines import Cluster
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.scorer import ArchsearchScorer, ScorerFactory
from archsearch.studies.storage.database import load_study, stored_attrs
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.errors import InputError
from snapgen.progress import format_duration, ignore_progress

STEPS = 8
"""Training steps that are timed."""

USUAL_FACTOR = 8
"""Pixels along a side of an image for one of the latent, of an autoencoder that is not on this machine."""

PASSES = 3
"""Forward passes that a training step costs: its own, and two for the gradients."""


@dataclass(frozen=True)
class SearchTime:
    """An estimate of a search's duration.

    Attributes:
        name: name of the study.
        candidates: number of candidates that are left; None: as many as the time budget allows.
        workers: number of candidates that are scored at a time.
        seconds_each: seconds that one takes.
        source: what that was taken from.
        budget_seconds: seconds that are left of the time budget; None: there is none.
    """

    name: str
    candidates: int | None
    workers: int
    seconds_each: float
    source: str
    budget_seconds: float | None

    @property
    def seconds(self) -> float:
        """Seconds that are left."""
        by_count = [] if self.candidates is None else [self.candidates * self.seconds_each / self.workers]
        by_time = [] if self.budget_seconds is None else [self.budget_seconds]
        return min([*by_count, *by_time])

    @property
    def text(self) -> str:
        """The estimate in a sentence."""
        left = "as many candidates as fit" if self.candidates is None else f"{self.candidates} candidates are left"
        limit = "" if self.budget_seconds is None else f", of {format_duration(self.budget_seconds)} at most"
        each = f"{format_duration(self.seconds_each)} each by {self.source}"
        return f"{self.name}: {left}, {each}, {self.workers} at a time: about {format_duration(self.seconds)}{limit}"


def search_time(settings: StudyConfig, *, scorer: ScorerFactory = ArchsearchScorer) -> SearchTime:
    """Estimate the duration of a search, or of the rest of it. Data are prepared and cached as by the search itself.

    Raises:
        InputError: as `archsearch.studies.search.run.search`, for what the settings name.
    """
    trials = StudyTrials(load_study(settings)).read() if "settings" in stored_attrs(settings) else None
    scored, busy = (len(trials.scored), trials.busy_seconds()) if trials is not None else (0, 0.0)
    median = trials.median_seconds() if trials is not None else None
    budget = None if settings.time_budget_minutes is None else max(0.0, 60 * settings.time_budget_minutes - busy)
    if median is not None:
        each, source = median, f"the median of {scored} scored"
    else:
        each, source = _timed(settings, scorer), f"the time of {STEPS} training steps of the base"
    left = None if settings.trials is None else max(0, settings.trials - scored)
    return SearchTime(settings.name, left, settings.workers, each, source, budget)


def _timed(settings: StudyConfig, scorer: ScorerFactory) -> float:
    """Seconds that a candidate takes if it is like the base: the rest of its training at the speed of some steps."""
    steps = min(STEPS, settings.protocol.steps)
    protocol = {**settings.protocol.model_dump(mode="json"), "steps": steps}
    short = settings.with_changes({"protocol": protocol, "rungs": None})
    space = settings.load_space()
    built = scorer(short, space)
    base = (space.proxy or space).base
    built.check(base)
    began = time.monotonic()
    built.cost(space.base)
    if settings.latency.remote is False:
        built.latency(space.base)
    fixed = time.monotonic() - began
    if not settings.trains:
        return fixed
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        seeds = settings.first_seeds[:1]
        quality = built.quality(base, seeds=seeds, progress=ignore_progress, artifacts=Path(folder))
        whole = time.monotonic() - began
    training = quality.training_seconds
    one = training * settings.protocol.steps / steps + max(0.0, whole - training)
    return fixed + one * len(settings.first_seeds)


@dataclass(frozen=True)
class StudyOnMachines:
    """A study on a cluster, each processor of which trains one candidate at a time."""

    name: str
    cluster: Cluster
    candidates: int | None
    """None if the study has no number of trials."""
    macs_per_candidate: float
    """Training with the first seeds of the base architecture, or of its twin."""
    seconds_per_candidate: float
    seconds: float | None
    dollars_per_candidate: float | None
    dollars: float | None

    @property
    def text(self) -> str:
        """The plan, what it leaves out, and what it assumes."""
        each = f"{format_duration(self.seconds_per_candidate)}{_price(self.dollars_per_candidate)}"
        many = "as many candidates as fit" if self.candidates is None else f"{self.candidates:,} candidates"
        total = "" if self.seconds is None else f": about {format_duration(self.seconds)}{_price(self.dollars)}"
        return (
            f"{self.name} on {self.cluster.count} × {self.cluster.name}: {many}, one a processor at a time, "
            f"{each} each ({self.macs_per_candidate:.2e} MACs, by the base){total}.\n"
            f"Further seeds, sampling, evaluation and latency are not in it. {self.cluster.assumptions}"
        )


def _price(dollars: float | None) -> str:
    return "" if dollars is None else f" and ${dollars:,.2f}"


def plan_study_on(config: StudyConfig, cluster: Cluster) -> StudyOnMachines:
    """Plan a study by the cost of its base, at which candidates of the space lie about.

    Sampling, evaluation and latency are not in it.

    Raises:
        InputError: if the space cannot be read.
    """
    from snapgen.autoencoders.autoencoder import load_autoencoder  # slow to import

    protocol, space = config.protocol, config.load_space()
    base, factor = (space.proxy or space).base, USUAL_FACTOR
    with contextlib.suppress(InputError):
        factor = load_autoencoder(protocol.autoencoder).factor
    latent = protocol.resolution // factor
    images = protocol.steps * protocol.batch_size * len(config.first_seeds)
    macs = float(PASSES * images * cost(base, latent, context_tokens=protocol.context_tokens).macs)
    seconds = cluster.seconds(macs, "float32", processors=1)
    rounds = None if config.trials is None else -(-config.trials // cluster.count)
    hourly = cluster.machine.dollars_per_hour
    total = None if rounds is None else rounds * seconds
    return StudyOnMachines(
        name=config.name,
        cluster=cluster,
        candidates=config.trials,
        macs_per_candidate=macs,
        seconds_per_candidate=seconds,
        seconds=total,
        dollars_per_candidate=None if hourly is None else hourly * seconds / 3600,
        dollars=None if total is None else cluster.dollars(total),
    )
