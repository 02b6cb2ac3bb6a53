"""Audit of a study's scores: do they repeat, and do they predict the scores of a longer training run?

The study's scored candidates are trained again under its protocol with ``factor`` times the steps and another seed. The
rank correlation of each short score with the long run is compared with that of mere size, compute and latency, and is
repeated controlling for latency or MACs: a score that only follows compute is no better than counting MACs.

In a study with a proxy both runs are the twins', and so are the params and MACs that they are compared with. Latency is
that of the candidates: at equal latency of theirs the search chooses between twins.

If candidates inherit a trained net's weights, the long run starts from new weights, as a final training would. Short
runs from new weights are added for comparison, with the compute that inheriting costs: a candidate's own training steps
and its share of the inherited net's training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from archsearch.cost.counter import cost
from archsearch.score import QUALITY_METRICS, Cost
from archsearch.stats.estimate import Estimate
from archsearch.stats.rank_correlation import MIN_CANDIDATES, spearman
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import eligible, load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.search.scorer import ArchsearchScorer, ScorerFactory
from archsearch.studies.storage.database import load_study, stored_attrs
from archsearch.studies.storage.record import Candidate
from snapgen.errors import InputError
from snapgen.progress import format_duration

FACTOR = 5
"""Default ratio of the long run's steps to the short run's."""
FROM_SCRATCH = "from scratch at equal compute"
BASELINES = ("params", "macs", "latency_ms")
TWIN = " of the twin in "
AS_IS = "as is"
ITSELF = "itself with another seed"
CONTROLLED_FOR = {"latency_ms": "at equal latency", "macs": "at equal MACs"}


@dataclass(frozen=True)
class AgreementRow:
    """Spearman's rank correlation of a score with a target over ``n`` candidates, with its 95 % interval.

    In a study with a proxy each number says whose it is: the twin's or the candidate's.

    Attributes:
        score: the ranking score. A baseline ranks the larger candidate as the better one.
        target: the score to predict: the same score with another seed, or a score of the long run.
        kind: `AS_IS`, or the quantity controlled for (`CONTROLLED_FOR`).
        rho: the correlation; None if undefined, as when the score itself is controlled for.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of candidates.
    """

    score: str
    target: str
    kind: str
    rho: float | None
    low: float | None
    high: float | None
    n: int


def audit(
    settings: StudyConfig,
    *,
    factor: int = FACTOR,
    candidates: int | None = None,
    quiet: bool = False,
    scorer: ScorerFactory = ArchsearchScorer,
) -> list[AgreementRow]:
    """Train a study's candidates ``factor`` times as long, and correlate its scores with the long runs.

    The long runs are a separate study in the same storage, and so are the runs from new weights of a study whose
    candidates inherit theirs. The same call resumes them. The rows are stored in the study's attribute ``audit``, which
    the report reads.

    Args:
        factor: ratio of the long run's steps to the short run's; at least 2, preferably 5 or more.
        candidates: largest number of candidates, evenly spread over the ranking by the first metric; None: all scored.

    Raises:
        InputError: if the study has too few scored candidates, if it inherits weights without ``supernet_audit``, or
            for the reasons of `search`.
    """
    short, studies = _plan(settings, factor, candidates)
    groups = [short]  # short, long and scratch runs of the same architectures, in the same order
    for study in studies:
        done = {c.architecture.id: c for c in eligible(load_candidates(search(study, quiet=quiet, scorer=scorer)))}
        groups = [[c for c in group if c.architecture.id in done] for group in groups]
        groups.append([done[c.architecture.id] for c in groups[0]])
    long_run = f"a run {factor}× as long"
    if settings.supernet_audit is not None:
        long_run = f"a run from scratch of {factor * settings.supernet_audit.scratch_steps:,} steps"
    rows = audit_table(*groups, costs=_trained_costs(settings, groups[0]), long_run=long_run)
    load_study(settings).set_user_attr("audit", [asdict(row) for row in rows])
    return rows


def audit_time(settings: StudyConfig, *, factor: int = FACTOR, candidates: int | None = None) -> str:
    """How long `audit` takes, in a sentence, from the durations of the short runs.

    Raises:
        InputError: as `audit`.
    """
    short, studies = _plan(settings, factor, candidates)
    seconds, left = 0.0, 0
    for study in studies:
        begun = "settings" in stored_attrs(study)
        done = (
            {c.architecture.id for c in load_candidates(load_study(study)) if c.state == "scored"} if begun else set()
        )
        runs, steps = len(study.protocol.train_seeds), study.protocol.steps / settings.protocol.steps
        for c in (c for c in short if c.architecture.id not in done):
            assert c.score.quality is not None
            training = c.score.quality.training_seconds
            rest = 0.0 if c.is_reused else max(0.0, c.seconds - training)
            seconds += runs * (training * steps + rest) / max(1, c.runs)
            left += 1
    duration = format_duration(seconds / settings.workers)
    steps_in_words = ", ".join(f"{study.protocol.steps:,} steps" for study in studies)
    return f"{settings.name}: {left} runs of {steps_in_words} are left, about {duration} at the speed of the short runs"


def _plan(settings: StudyConfig, factor: int, candidates: int | None) -> tuple[list[Candidate], list[StudyConfig]]:
    """The candidates to audit, and the studies that train them again."""
    if factor < 2:
        raise InputError("--factor", f"is {factor}; the long run must be longer", "give 2 or more")
    if settings.protocol.init_from is not None and settings.supernet_audit is None:
        problem = "is missing, so the cost of the inherited weights is unknown"
        raise InputError(settings.source, problem, "give supernet_images and scratch_steps", place="supernet_audit")
    if not settings.trains:
        problem = "no quality is among them, so no candidate was trained"
        raise InputError(settings.source, problem, "audit a study that trains", place="objectives")
    short = eligible(load_candidates(load_study(settings)))
    if len(short) < MIN_CANDIDATES:
        problem = f"has {len(short)} scored candidates; an audit needs {MIN_CANDIDATES}"
        raise InputError(settings.name, problem, "run archsearch search first")
    scratch_steps = None if settings.supernet_audit is None else _equal_compute_steps(settings, short)
    short = _spread(short, candidates or len(short))
    # The long runs: the same points with more steps, and a seed that the short runs did not use.
    steps = settings.supernet_audit.scratch_steps if settings.supernet_audit else settings.protocol.steps
    longer = {"steps": steps * factor, "train_seeds": [max(settings.protocol.train_seeds) + 1]}
    studies = [_derived_study(settings, short, f"{settings.name}-audit-{factor}x", longer)]
    if scratch_steps is not None:  # the short runs from new weights, with the same seeds
        name = f"{settings.name}-audit-scratch-{scratch_steps}"
        studies.append(_derived_study(settings, short, name, {"steps": scratch_steps}))
    return short, studies


def _spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """``count`` candidates, evenly spread over the ranking by validation loss, in the order of their slots."""
    ranked = sorted(candidates, key=lambda c: (c.value("validation_loss"), c.slot))
    count = min(count, len(ranked))
    chosen = {round(i * (len(ranked) - 1) / max(1, count - 1)) for i in range(count)}
    return sorted((ranked[i] for i in chosen), key=lambda c: c.slot)


def _derived_study(
    settings: StudyConfig, short: Sequence[Candidate], name: str, protocol: dict[str, Any]
) -> StudyConfig:
    """A study of the same points with changes to the protocol, from new weights."""
    changes: dict[str, Any] = {
        "name": name,
        "storage": settings.url,
        "initial_points": [candidate.point for candidate in short],
        "trials": len(short),
        "time_budget_minutes": None,
        "sampler": {"name": "random"},
        "constraints": {},
        "supernet_audit": None,
        "seeds": None,
        "rungs": None,
        "start_from": None,
        "protocol": {**settings.protocol.model_dump(mode="json"), "init_from": None, **protocol},
    }
    return settings.with_changes(changes)


def _equal_compute_steps(settings: StudyConfig, scored: Sequence[Candidate]) -> int:
    """Training steps from new weights that cost as many MACs per candidate as scoring with inherited weights.

    That is the protocol's steps plus a share of the inherited net's training. Passes of the inherited net are counted
    in full, although robust training leaves blocks out, which favors the runs from new weights.
    """
    assert settings.supernet_audit is not None
    space, protocol = settings.load_space(), settings.protocol
    supernet_macs = cost(space.base, space.latent_size, context_tokens=space.context_tokens).macs
    mean_macs = statistics.fmean(c.score.cost.macs for c in scored)
    # supernet images per candidate and seed, in steps of the protocol's batch
    share = settings.supernet_audit.supernet_images / len(scored) / len(protocol.train_seeds) / protocol.batch_size
    return protocol.steps + math.ceil(share * supernet_macs / mean_macs)


def _trained_costs(settings: StudyConfig, candidates: Sequence[Candidate]) -> list[Cost]:
    """Costs of the networks that were trained: those of the candidates, or of their twins in a study with a proxy."""
    proxy = settings.load_space().proxy
    if proxy is None:
        return [c.score.cost for c in candidates]
    twins = [proxy.architecture(c.point) for c in candidates]
    return [cost(twin, proxy.latent_size, context_tokens=proxy.context_tokens) for twin in twins]


def audit_table(
    short: Sequence[Candidate],
    long: Sequence[Candidate],
    scratch: Sequence[Candidate] = (),
    *,
    costs: Sequence[Cost],
    long_run: str,
) -> list[AgreementRow]:
    """Correlate the short scores and the baselines with the long runs, over the same architectures in the same order.

    Args:
        short: candidates of the audited study.
        long: their long runs.
        scratch: their short runs from new weights, if the audited study inherits weights.
        costs: costs of what was trained of each.
        long_run: description of the long run, for the table.
    """
    qualities = [c.score.quality for c in (*short, *long, *scratch)]
    metrics = [name for name in QUALITY_METRICS if all(getattr(quality, name, None) for quality in qualities)]
    proxy = next((quality.proxy for quality in qualities if quality), None)
    twin, own = (f"{TWIN}{proxy}", " of the candidate") if proxy else ("", "")
    whose = {**dict.fromkeys([*QUALITY_METRICS, "params", "macs"], twin), "latency_ms": own}
    amounts = {name: [float(getattr(each, name)) for each in costs] for name in ("params", "macs")}
    amounts["latency_ms"] = [c.value("latency_ms") for c in short]
    controls = {kind + whose[name]: amounts[name] for name, kind in CONTROLLED_FOR.items()}
    rows = []
    for name in metrics:
        first_seed, last_seed = ([_by_seed(c, name)[i] for c in short] for i in (0, -1))
        if all(len(_by_seed(c, name)) > 1 for c in short):
            rows += _rows(name + twin, ITSELF, first_seed, last_seed, controls)
    for target in metrics:
        reference = [c.value(target) for c in long]
        predicted = f"{target}{twin} of {long_run}"
        for name in metrics:
            rows += _rows(name + twin, predicted, [c.value(name) for c in short], reference, controls)
        for name in BASELINES:  # larger nets are expected to reach lower losses
            rows += _rows(name + whose[name], predicted, [-value for value in amounts[name]], reference, controls)
        for name in metrics if scratch else ():
            rows += _rows(f"{name} {FROM_SCRATCH}", predicted, [c.value(name) for c in scratch], reference, controls)
    return rows


def _rows(
    score: str, target: str, a: Sequence[float], b: Sequence[float], controls: dict[str, list[float]]
) -> list[AgreementRow]:
    """Rank correlation of ``a`` and ``b``, plain and controlling for each of ``controls``."""
    rows = []
    for kind, control in {AS_IS: None, **controls}.items():
        correlation = spearman(a, b, control)
        rho, low, high = (correlation.value, correlation.low, correlation.high) if correlation else (None, None, None)
        rows.append(AgreementRow(score, target, kind, rho, low, high, len(a)))
    return rows


def _by_seed(candidate: Candidate, name: str) -> tuple[float, ...]:
    estimate: Estimate = getattr(candidate.score.quality, name)
    return estimate.by_seed or (estimate.value,)
