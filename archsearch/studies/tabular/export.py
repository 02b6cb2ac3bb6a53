"""Make a table from studies: one that scored every architecture of a space, and others of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optuna import Study

from archsearch.cost.counter import cost
from archsearch.predictor import profiles
from archsearch.predictor.backend import PredictedBackend
from archsearch.protocol import ResolvedProtocol
from archsearch.score import Cost, Curve, LatencyRecord, Quality
from archsearch.spaces.loading import load_space, with_proxy
from archsearch.spaces.space import Space
from archsearch.studies.search.candidates import eligible, load_candidates
from archsearch.studies.storage.record import Candidate
from archsearch.studies.tabular.checks import shared_seed
from archsearch.studies.tabular.table import ERROR_OF, LOWER_IS_BETTER, BenchmarkTable, Entry, Run, TableHeader
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.progress import ProgressCallback, ignore_progress

Predictors = Mapping[str, Callable[[Architecture, int, int], LatencyRecord]]
"""Functions that predict the latency of an architecture, by device profile."""


def tabulate(
    studies: Sequence[Study],
    *,
    full_size: str | None = None,
    seconds: Callable[[Architecture], float] | None = None,
    progress: ProgressCallback = ignore_progress,
) -> BenchmarkTable:
    """Make the table of the runs of some studies of one space.

    Args:
        studies: the first one determines the protocol, the costs and the latencies; further ones add runs of
            architectures that it has scored.
        full_size: a space with the same knobs, whose candidates of the same choices are the full-size twins: their cost
            is counted, and their latency predicted for every device profile.
        seconds: seconds of a run of an architecture under the first study's protocol, of which longer runs take as many
            more as they have steps more; those at another resolution keep the durations of their trials. None: all do.
        progress: called with the completed fraction.

    Raises:
        InputError: if the studies have different spaces, train nothing or share a protocol, or a further one has
            scored what the first one has not.
    """
    first_study = studies[0]
    space = Space.from_dict(first_study.user_attrs["space"], source=f"study {first_study.study_name}")
    large = None if full_size is None else with_proxy(load_space(full_size), space)
    scored = _scored(first_study)
    timed = {} if seconds is None else _timed(scored, seconds, progress)
    protocols, runs = _collect(studies, scored, timed)
    predictors = {name: PredictedBackend(profiles.model(name)).measure for name in profiles.NAMES if large is not None}
    entries = {}
    for done, candidate in enumerate(scored.values()):
        entries[candidate.architecture.id] = _entry(candidate, large, predictors)
        progress((done + 1) / len(scored), "counting the full-size twins")
    header = TableHeader(
        space=space.to_dict(),
        full_size=None if large is None else large.to_dict(),
        profiles=tuple(predictors),
        protocols=protocols,
        num_runs=len(runs),
        run_seconds="of trials" if seconds is None else "timed",
        curve_points=next(iter(protocols.values())).protocol.curve_points,
        **_conditions(first_study, next(iter(scored.values()))),
    )
    return BenchmarkTable(f"study {first_study.study_name}", header, space, entries, tuple(runs))


def _collect(
    studies: Sequence[Study], scored: Mapping[str, Candidate], timed: Mapping[str, float]
) -> tuple[dict[str, ResolvedProtocol], list[Run]]:
    """The protocols of some studies by hash, and all their runs.

    Args:
        scored: candidates of the first study, by architecture.
        timed: seconds of a run of each of them, if they were timed.
    """
    first_study = studies[0]
    protocols: dict[str, ResolvedProtocol] = {}
    runs: list[Run] = []
    for study in studies:
        name = f"study {study.study_name}"
        if study.user_attrs["space"]["digest"] != first_study.user_attrs["space"]["digest"]:
            raise InputError(name, f"has another space than study {first_study.study_name}", "export it on its own")
        protocol = ResolvedProtocol.model_validate(study.user_attrs["protocol"])
        if protocol.hash in protocols:
            raise InputError(name, "has the protocol of an earlier study", "leave one of the two out")
        protocols[protocol.hash] = protocol
        if (shared := shared_seed(protocols)) is not None:
            problem = f"has seed {shared[2]}, and so has an earlier study whose protocol differs in the seeds alone"
            raise InputError(name, problem, "leave one of the two out")
        first = next(iter(protocols.values())).protocol
        times_as_long = protocol.protocol.steps / first.steps
        is_timed = protocol.protocol.resolution == first.resolution
        for candidate in _scored(study).values():
            if candidate.architecture.id not in scored:
                problem = f"has scored architecture {candidate.architecture.id}, study {first_study.study_name} has not"
                raise InputError(name, problem, f"run study {first_study.study_name} to its end")
            own = timed.get(candidate.architecture.id) if is_timed else None
            runs += _runs(candidate, protocol, seconds=own and own * times_as_long)
    return protocols, runs


def _timed(
    scored: Mapping[str, Candidate], seconds: Callable[[Architecture], float], progress: ProgressCallback
) -> dict[str, float]:
    """Seconds of a run of each candidate, by architecture."""
    found = {}
    for arch_id, candidate in scored.items():
        found[arch_id] = seconds(candidate.trained or candidate.architecture)
        progress(len(found) / len(scored), "timing runs")
    return found


def _conditions(study: Study, some: Candidate) -> dict[str, Any]:
    """Fields of the header that say how a study, of which ``some`` is a candidate, trained and measured."""
    assert some.score.latency is not None
    assert some.score.quality is not None
    return {
        "extractor": some.score.quality.extractor,
        "latency_device": study.user_attrs["settings"]["latency"]["device"],
        "latency": some.score.latency,
        "machine": study.user_attrs.get("machine", {}),
    }


def _scored(study: Study) -> dict[str, Candidate]:
    """The scored candidates of a study that trains, by architecture.

    Raises:
        InputError: if there is none.
    """
    found = {
        c.architecture.id: c
        for c in eligible(load_candidates(study))
        if c.score.quality is not None and c.score.latency is not None
    }
    if not found:
        name = f"study {study.study_name}"
        raise InputError(name, "has no candidate with a quality and a latency", "run archsearch search first")
    return found


def _entry(candidate: Candidate, large: Space | None, predictors: Predictors) -> Entry:
    latency = candidate.score.latency
    assert latency is not None
    full_size: Cost | None = None
    predicted: dict[str, float] = {}
    if large is not None:
        arch, size, tokens = large.architecture(candidate.point), large.latent_size, large.context_tokens
        full_size = cost(arch, size, context_tokens=tokens)
        predicted = {name: measure(arch, size, tokens).median_ms for name, measure in predictors.items()}
    return Entry(
        id=candidate.architecture.id,
        point=candidate.point,
        cost=candidate.score.cost,
        quartiles_ms=(latency.lower_quartile_ms, latency.median_ms, latency.upper_quartile_ms),
        full_size=full_size,
        predicted_ms=predicted,
    )


def _runs(candidate: Candidate, protocol: ResolvedProtocol, *, seconds: float | None) -> Iterator[Run]:
    """The runs of a candidate, a seed each. Those of one that diverged have no scores."""
    quality = candidate.score.quality
    assert quality is not None
    seeds = protocol.protocol.train_seeds
    count = len(seeds) if quality.diverged else candidate.runs
    for i, seed in enumerate(seeds[:count]):
        yield Run(
            architecture_id=candidate.architecture.id,
            protocol_hash=protocol.hash,
            seed=seed,
            seconds=seconds or candidate.seconds / count,
            diverged=quality.diverged,
            scores={} if quality.diverged else dict(_scores(quality, i)),
            curve=quality.curves[i]
            if i < len(quality.curves) and not quality.diverged
            else Curve(steps=(), validation_loss=(), by_timestep=()),
        )


def _scores(quality: Quality, i: int) -> Iterator[tuple[str, float]]:
    """Scores of the run of the i-th seed."""
    for name in LOWER_IS_BETTER:
        if (estimate := getattr(quality, name)) is not None:
            yield name, estimate.by_seed[i]
            if name in ERROR_OF and i < len(estimate.errors):
                yield ERROR_OF[name], estimate.errors[i]
