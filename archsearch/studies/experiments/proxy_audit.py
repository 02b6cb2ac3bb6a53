"""The audit of a study's scores: do they repeat, and do they foretell a run several times as long?

The study's scored candidates are trained again under its protocol with ``factor`` times the steps and another seed. How
well each short score ranks them as the long run does is set beside what mere size, compute and speed do, and is taken
again with latency or MACs held: a score that only follows compute is no better than counting.

Where candidates inherit a trained net's weights, the long run is from new weights, as that of a network made for good
is. Short runs from new weights stand beside, with the compute that inheriting costs: a candidate's steps of training
on, and its share of the trained net's own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from archsearch.score import QUALITY_METRICS
from archsearch.stats.estimate import Estimate
from archsearch.stats.rank_correlation import FEWEST, spearman
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import Candidate, eligible, load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.search.scorer import ArchsearchScorer, ScorerFactory
from archsearch.studies.storage.database import load_study
from snapgen.errors import InputError

FACTOR = 5
FROM_SCRATCH = "from scratch at equal compute"
BASELINES = ("params", "macs", "latency_ms")
AS_IS = "as is"
HELD = {"latency_ms": "at equal latency", "macs": "at equal MACs"}


@dataclass(frozen=True)
class Row:
    """One agreement: Spearman's rank correlation over ``n`` candidates, with its 95 % interval.

    Attributes:
        score: what was ranked by. A baseline ranks the larger candidate as the better one.
        target: what it should foretell: the same score with another seed, or a score of the long run.
        kind: `AS_IS`, or what was held (`HELD`).
        rho: None where it could not be taken, as when what is held is the score itself.
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
) -> list[Row]:
    """Train a study's candidates ``factor`` times as long, and say how its scores agree with that.

    The long runs are a study of their own beside the audited one, in the same storage, as are the runs from new weights
    of a study whose candidates inherit theirs; the same call resumes them.

    The study keeps the rows in its attribute ``audit``, where the report finds them.

    Args:
        factor: of the long run's steps to the short one's; at least 2, and 5 or more to mean much.
        candidates: at most so many, evenly spread over the ranking by the first metric; None: all that are scored.

    Raises:
        InputError: if the study has too few scored candidates, or inherits weights and does not say what they cost, or
            as `search`.
    """
    if factor < 2:
        raise InputError("--factor", f"is {factor}; the long run must be longer", "give 2 or more")
    if settings.protocol.inherit is not None and settings.elastic is None:
        problem = "is missing, so nothing says what the inherited weights cost"
        raise InputError(settings.source, problem, "give supernet_images and scratch_steps", place="elastic")
    short = eligible(load_candidates(load_study(settings)))
    if len(short) < FEWEST:
        problem = f"has {len(short)} scored candidates; an audit needs {FEWEST}"
        raise InputError(settings.name, problem, "run archsearch search first")
    equal = None if settings.elastic is None else _equal_steps(settings, short)
    short = _spread(short, candidates or len(short))
    runs = [_long(settings, short, factor)]
    runs += [] if equal is None else [_from_scratch(settings, short, equal)]
    found = [short]
    for run in runs:
        done = {c.architecture.id: c for c in eligible(load_candidates(search(run, quiet=quiet, scorer=scorer)))}
        found = [[c for c in these if c.architecture.id in done] for these in found]
        found.append([done[c.architecture.id] for c in found[0]])
    rows = audit_table(*found, against=_told(settings, factor))
    load_study(settings).set_user_attr("audit", [asdict(row) for row in rows])
    return rows


def _spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    ranked = sorted(candidates, key=lambda c: (c.value("validation_loss"), c.slot))
    count = min(count, len(ranked))
    kept = {round(i * (len(ranked) - 1) / max(1, count - 1)) for i in range(count)}
    return sorted((ranked[i] for i in kept), key=lambda c: c.slot)


def _long(settings: StudyConfig, short: Sequence[Candidate], factor: int) -> StudyConfig:
    """The study of the long runs: the same points, more steps, a seed that the short runs have not used."""
    steps = settings.elastic.scratch_steps if settings.elastic else settings.protocol.steps
    seeds = [max(settings.protocol.seeds) + 1]
    return _again(settings, short, f"{settings.name}-audit-{factor}x", {"steps": steps * factor, "seeds": seeds})


def _from_scratch(settings: StudyConfig, short: Sequence[Candidate], steps: int) -> StudyConfig:
    """The study of the short runs from new weights, by the same seeds."""
    return _again(settings, short, f"{settings.name}-audit-scratch-{steps}", {"steps": steps})


def _again(settings: StudyConfig, short: Sequence[Candidate], name: str, protocol: dict[str, Any]) -> StudyConfig:
    """A study of the same points under another protocol, from new weights."""
    changes: dict[str, Any] = {
        "name": name,
        "storage": settings.url,
        "plan": [candidate.point for candidate in short],
        "trials": len(short),
        "minutes": None,
        "sampler": {"name": "random"},
        "limits": {},
        "elastic": None,
        "protocol": {**settings.protocol.model_dump(mode="json"), "inherit": None, **protocol},
    }
    return settings.with_changes(changes)


def _equal_steps(settings: StudyConfig, scored: Sequence[Candidate]) -> int:
    """Steps from new weights for the compute that scoring by inherited ones comes to, for each of so many candidates.

    Counted in MACs. Passes of the trained net count whole, though robust training leaves blocks out: the runs from new
    weights get the benefit of that.
    """
    from archsearch.cost.counter import cost

    assert settings.elastic is not None
    space, protocol = settings.load_space(), settings.protocol
    whole = cost(space.base, space.latent_size, context_tokens=space.context_tokens).macs
    mean = statistics.fmean(c.score.cost.macs for c in scored)
    share = settings.elastic.supernet_images / len(scored) / len(protocol.seeds) / protocol.batch
    return protocol.steps + math.ceil(share * whole / mean)


def _told(settings: StudyConfig, factor: int) -> str:
    if settings.elastic is None:
        return f"a run {factor}× as long"
    return f"a run from scratch of {factor * settings.elastic.scratch_steps:,} steps"


def audit_table(
    short: Sequence[Candidate], long: Sequence[Candidate], scratch: Sequence[Candidate] = (), *, against: str
) -> list[Row]:
    """Every agreement of the short scores and the baselines, of the same architectures in the same order.

    Args:
        scratch: short runs from new weights, where the short ones inherit theirs.
        against: the long run in words.
    """
    held = {kind: [c.value(name) for c in short] for name, kind in HELD.items()}
    metrics = [name for name in QUALITY_METRICS if all(_has(c, name) for c in (*short, *long, *scratch))]
    rows = []
    for name in metrics:
        first, second = ([_by_seed(c, name)[i] for c in short] for i in (0, -1))
        if all(len(_by_seed(c, name)) > 1 for c in short):
            rows += _rows(name, "itself with another seed", first, second, held)
    for target in metrics:
        truth = [c.value(target) for c in long]
        foretold = f"{target} of {against}"
        for name in (*metrics, *BASELINES):
            sign = -1 if name in BASELINES else 1
            rows += _rows(name, foretold, [sign * c.value(name) for c in short], truth, held)
        for name in metrics if scratch else ():
            rows += _rows(f"{name} {FROM_SCRATCH}", foretold, [c.value(name) for c in scratch], truth, held)
    return rows


def _rows(score: str, target: str, a: Sequence[float], b: Sequence[float], held: dict[str, list[float]]) -> list[Row]:
    rows = []
    for kind, given in {AS_IS: None, **held}.items():
        one = spearman(a, b, given)
        rho, low, high = (one.rho, one.low, one.high) if one else (None, None, None)
        rows.append(Row(score, target, kind, rho, low, high, len(a)))
    return rows


def _has(candidate: Candidate, name: str) -> bool:
    return getattr(candidate.score.quality, name, None) is not None


def _by_seed(candidate: Candidate, name: str) -> tuple[float, ...]:
    estimate: Estimate = getattr(candidate.score.quality, name)
    return estimate.by_seed or (estimate.value,)
