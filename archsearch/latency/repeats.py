"""Time networks again and again until two measurements agree."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from archsearch.latency.base import Backend
from archsearch.latency.records import LatencySample, append, group_by_architecture
from archsearch.score import LatencyRecord
from archsearch.spaces.space import Space
from snapgen import seeding
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

TRIES = 100
"""Random points for each architecture wanted, after which a space is said not to have so many."""


AGREEMENT = 0.03
"""Of the two lowest of several measurements, at which they are taken for undisturbed."""


IDLE_PERCENT = 15
"""Of all processors together, under which the machine counts as idle."""


def sample_architectures(space: Space, count: int, *, seed: int) -> list[Architecture]:
    """So many different random architectures of a space, all within its limits; more begin with the same ones.

    Raises:
        InputError: if random points do not find so many.
    """
    from archsearch.cost.counter import cost

    rng = random.Random(seeding.derive_seed(seed, space.digest, "timings"))
    found: dict[str, Architecture] = {}
    tried: set[str] = set()
    for _ in range(count * TRIES):
        if len(found) == count:
            break
        arch = space.architecture(space.sample(rng))
        if arch.id not in tried:
            tried.add(arch.id)
            if not space.limits or space.within_limits(
                cost(arch, space.latent_size, context_tokens=space.context_tokens)
            ):
                found[arch.id] = arch
    if len(found) < count:
        problem = f"{count * TRIES} random points had {len(found)} different architectures within its limits"
        raise InputError(space.source, problem, "ask for fewer")
    return list(found.values())


def is_repeatable(medians: Sequence[float], least: int = 3) -> bool:
    """Whether there are so many measurements of one thing at least, and the two lowest agree within `AGREEMENT`.

    A neighbour on the same core slows whole measurements down, mostly each by another factor: what was reached twice,
    and not undercut by any other, is taken to be the undisturbed time.
    """
    ordered = sorted(medians)
    return len(ordered) >= max(least, 2) and ordered[1] <= ordered[0] * (1 + AGREEMENT)


def wait_until_idle() -> None:
    """Return once the machine has done next to nothing for a second."""
    while psutil.cpu_percent(interval=1) > IDLE_PERCENT:
        pass


def collect(
    backend: Backend,
    space: Space,
    archs: Sequence[Architecture],
    path: Path,
    *,
    least: int = 3,
    most: int = 8,
    ready: Callable[[], None] = lambda: None,
    failed: Callable[[Architecture, str], None] = lambda *_: None,
) -> Iterator[float]:
    """Measure architectures into a file until each is `is_repeatable`, at most so many times; what is there counts.

    They take turns (`measure_round_robin`), so that a busy spell does not meet one alone.

    Args:
        ready: called before each measurement, which it may hold up (`wait_until_idle`).
        failed: told an architecture that could not be timed, and why; it is not tried again.

    Yields:
        The share of the architectures that are done.
    """
    known = group_by_architecture(path, space.latent_size, space.context_tokens)
    records = {arch.id: known[arch.id] for arch in archs}
    where = {"latent_size": space.latent_size, "context_tokens": space.context_tokens}

    def keep(arch: Architecture, record: LatencyRecord) -> None:
        append(path, LatencySample(**where, architecture=arch, record=record))

    yield from measure_round_robin(
        backend, archs, records, keep=keep, least=least, most=most, ready=ready, failed=failed, **where
    )


def measure_round_robin(
    backend: Backend,
    archs: Sequence[Architecture],
    records: Mapping[str, list[LatencyRecord]],
    *,
    latent_size: int,
    context_tokens: int,
    keep: Callable[[Architecture, LatencyRecord], None],
    least: int,
    most: int,
    ready: Callable[[], None] = lambda: None,
    failed: Callable[[Architecture, str], None] | None = None,
) -> Iterator[float]:
    """Measure architectures until each is `is_repeatable`, at most so many times, all once before any is measured
    twice.

    Predictions are the same every time, so one of each does.

    Args:
        records: what there is of each, by id; what is measured is added.
        keep: given each record as it comes.
        ready: as `collect`.
        failed: as `collect`; without it the failure is raised.

    Yields:
        The share of the architectures that are done.
    """
    from archsearch.latency.base import MeasurementError

    def done(taken: Sequence[LatencyRecord]) -> bool:
        return (
            is_repeatable([record.median_ms for record in taken], least)
            or len(taken) >= max(most, least)
            or any(record.source == "predicted" for record in taken)
        )

    waiting = list(archs)
    for turn in range(1, max(most, least) + 1):
        for arch in list(waiting):
            taken = records[arch.id]
            try:
                if len(taken) < turn and not done(taken):
                    ready()
                    record = backend.measure(arch, latent_size, context_tokens)
                    keep(arch, record)
                    taken.append(record)
            except MeasurementError as failure:
                if failed is None:
                    raise
                failed(arch, str(failure))
                waiting.remove(arch)
            else:
                if done(taken):
                    waiting.remove(arch)
            yield 1 - len(waiting) / len(archs)
