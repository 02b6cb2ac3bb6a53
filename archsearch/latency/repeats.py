"""Repeated latency measurements of networks until two measurements agree."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import psutil

from archsearch.cost.counter import cost
from archsearch.latency.base import MeasurementError
from archsearch.score import LatencyRecord
from archsearch.spaces.space import Space
from snapgen import seeding
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.progress import ProgressCallback, ignore_progress

TRIES = 100
"""Number of random points per requested architecture before a space is considered too small."""

AGREEMENT = 0.03
"""Relative difference of the two lowest measurements up to which they count as undisturbed."""

IDLE_PERCENT = 15
"""CPU utilization of the whole machine up to which it counts as idle."""


def sample_architectures(space: Space, count: int, *, seed: int) -> list[Architecture]:
    """Sample distinct architectures that satisfy a space's constraints.

    A larger count with the same seed starts with the same architectures.

    Raises:
        InputError: if random points do not yield that number of architectures.
    """
    rng = random.Random(seeding.derive_seed(seed, space.digest, "timings"))
    sampled: dict[str, Architecture] = {}
    tried: set[str] = set()
    for _ in range(count * TRIES):
        if len(sampled) == count:
            break
        arch = space.architecture(space.sample(rng))
        if arch.id not in tried:
            tried.add(arch.id)
            if not space.constraints or space.meets_constraints(
                cost(arch, space.latent_size, context_tokens=space.context_tokens)
            ):
                sampled[arch.id] = arch
    if len(sampled) < count:
        problem = f"{count * TRIES} random points had {len(sampled)} different architectures within the constraints"
        raise InputError(space.source, problem, "ask for fewer")
    return list(sampled.values())


def is_repeatable(medians: Sequence[float], min_repeats: int = 3) -> bool:
    """Whether there are at least ``min_repeats`` measurements and the two lowest agree within `AGREEMENT`.

    A process on the same core slows down entire measurements, each usually by a different factor. The lowest time is
    therefore considered undisturbed once it has been reached twice.
    """
    ordered = sorted(medians)
    return len(ordered) >= max(min_repeats, 2) and ordered[1] <= ordered[0] * (1 + AGREEMENT)


def wait_until_idle() -> None:
    """Block until the machine has been idle for a second."""
    while psutil.cpu_percent(interval=1) > IDLE_PERCENT:
        pass


Measure = Callable[[Architecture], LatencyRecord]
"""Measures the latency of a network, and raises as `archsearch.latency.base.Backend.measure`."""


def measure_round_robin(
    measure: Measure,
    archs: Sequence[Architecture],
    records: Mapping[str, list[LatencyRecord]],
    *,
    save: Callable[[Architecture, LatencyRecord], None],
    min_repeats: int = 3,
    max_repeats: int = 8,
    ready: Callable[[], None] = lambda: None,
    failed: Callable[[Architecture, str], None] | None = None,
    progress: ProgressCallback = ignore_progress,
) -> None:
    """Measure architectures in rounds, each once per round, until the measurements of each agree (`is_repeatable`).

    A period of load thus does not affect a single one. Predicted latencies are deterministic, so they are not repeated.

    Args:
        measure: measures the architectures.
        archs: architectures to measure.
        records: existing records by architecture id, which count; new records are appended.
        save: called with each new record, e.g. `archsearch.latency.records.SampleFile.append`.
        min_repeats: fewest measurements per architecture.
        max_repeats: most measurements per architecture, whether or not they agree.
        ready: called before each measurement; may block, e.g. `wait_until_idle`.
        failed: called with an architecture that could not be measured and the reason; it is not tried again. None: the
            error is raised.
        progress: called after each measurement, with the fraction of the architectures that are done.
    """

    def done(measured: Sequence[LatencyRecord]) -> bool:
        return (
            is_repeatable([record.median_ms for record in measured], min_repeats)
            or len(measured) >= max(max_repeats, min_repeats)
            or any(record.source == "predicted" for record in measured)
        )

    waiting = list(archs)
    for repeat in range(1, max(max_repeats, min_repeats) + 1):
        for arch in list(waiting):
            measured = records[arch.id]
            try:
                if len(measured) < repeat and not done(measured):
                    ready()
                    record = measure(arch)
                    save(arch, record)
                    measured.append(record)
            except MeasurementError as failure:
                if failed is None:
                    raise
                failed(arch, str(failure))
                waiting.remove(arch)
            else:
                if done(measured):
                    waiting.remove(arch)
            progress(1 - len(waiting) / len(archs))
