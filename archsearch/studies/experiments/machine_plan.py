"""Plan of a study on machines that one does not have: training time, memory and cost of a candidate and of all."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from archsearch.cost.counter import cost
from archsearch.library.machines import Cluster
from archsearch.studies.config.study import StudyConfig
from snapgen.errors import InputError
from snapgen.progress import format_duration

USUAL_FACTOR = 8
"""Pixels along a side of an image for one of the latent, of an autoencoder that is not on this machine."""

PASSES = 3
"""Forward passes that a training step costs: its own, and two for the gradients."""


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
