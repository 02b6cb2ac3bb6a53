"""Latency records with what they are of, one to a line of a file: what a prediction is learned from and held to."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from archsearch.latency import Backend
from archsearch.operations import Operation, operations
from archsearch.score import LatencyRecord
from snapgen import seeds, settings
from snapgen.arch import Architecture
from snapgen.errors import InputError
from snapgen.settings import Settings
from spaces.space import Space

TRIES = 100
"""Random points for each architecture wanted, after which a space is said not to have so many."""


AGREEMENT = 0.03
"""Of the two lowest of several measurements, at which they are taken for undisturbed."""

IDLE_PERCENT = 15
"""Of all processors together, under which the machine counts as idle."""


class Timed(Settings):
    """One architecture's latency record, and the input that it was taken with."""

    architecture: Architecture
    latent_size: int
    context_tokens: int
    record: LatencyRecord

    @property
    def key(self) -> tuple[str, int, int]:
        """What was timed: architecture id, latent size, context tokens."""
        return self.architecture.id, self.latent_size, self.context_tokens

    def operations(self) -> list[Operation]:
        """What was timed, operation by operation."""
        return operations(self.architecture, self.latent_size, context_tokens=self.context_tokens)


def read(path: Path) -> list[Timed]:
    """Every record of a JSON-lines file; a last line that a killed writer left torn is passed over.

    Raises:
        InputError: naming the file and the line that is no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(path, "does not exist", "make it with archsearch latency sample") from None
    except UnicodeDecodeError:
        raise InputError(path, "is not text (not UTF-8)", "name a file of JSON lines") from None
    except OSError as error:
        raise InputError(path, (error.strerror or "cannot be read").lower(), "name a readable file") from None
    return [_parsed(line, path, number) for number, line in enumerate(_whole_lines(text), start=1) if line.strip()]


def _whole_lines(text: str) -> list[str]:
    return text[: text.rfind("\n") + 1].splitlines()


def _parsed(line: str, path: Path, number: int) -> Timed:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(path, "is not JSON", "remove or mend the line", place=f"line {number}") from None
    return settings.parse(values, Timed, source=path, place=f"line {number}")


def claim(path: Path) -> None:
    """Make the file, if it is missing, before anything is spent on what goes there.

    Raises:
        InputError: if it can not be written.
    """
    try:
        path.open("ab").close()
    except OSError as error:
        raise InputError(
            path, (error.strerror or "can not be written").lower(), "name a file in a folder that is there"
        ) from None


def append(path: Path, timed: Timed) -> None:
    """Add a record to a file, which is made if it is missing; a torn last line is cut off first."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(timed.model_dump(mode="json", exclude_defaults=True), allow_nan=False).encode() + b"\n")


def by_net(path: Path, latent_size: int, context_tokens: int) -> dict[str, list[LatencyRecord]]:
    """A file's records of such an input, by architecture id; none where there is no file.

    Raises:
        InputError: as `read`.
    """
    found: dict[str, list[LatencyRecord]] = defaultdict(list)
    for timed in read(path) if path.exists() else []:
        if timed.key[1:] == (latent_size, context_tokens):
            found[timed.key[0]].append(timed.record)
    return found


def lowest(records: Iterable[Timed]) -> list[Timed]:
    """Of several records of one thing the one with the lowest median, in the order of their first.

    What disturbs a measurement only ever adds to it.
    """
    best: dict[tuple[str, int, int], Timed] = {}
    for timed in records:
        known = best.setdefault(timed.key, timed)
        if timed.record.median_ms < known.record.median_ms:
            best[timed.key] = timed
    return list(best.values())


def drawn(space: Space, count: int, *, seed: int) -> list[Architecture]:
    """So many different random architectures of a space, all within its limits; more begin with the same ones.

    Raises:
        InputError: if random points do not find so many.
    """
    from archsearch.cost import cost

    rng = random.Random(seeds.derive(seed, space.digest, "timings"))
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


def settled(medians: Sequence[float], least: int = 3) -> bool:
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
    """Measure architectures into a file until each is `settled`, at most so many times; what is there counts.

    They take turns (`in_turns`), so that a busy spell does not meet one alone.

    Args:
        ready: called before each measurement, which it may hold up (`wait_until_idle`).
        failed: told an architecture that could not be timed, and why; it is not tried again.

    Yields:
        The share of the architectures that are done.
    """
    known = by_net(path, space.latent_size, space.context_tokens)
    records = {arch.id: known[arch.id] for arch in archs}
    where = {"latent_size": space.latent_size, "context_tokens": space.context_tokens}

    def keep(arch: Architecture, record: LatencyRecord) -> None:
        append(path, Timed(**where, architecture=arch, record=record))

    yield from in_turns(backend, archs, records, keep=keep, least=least, most=most, ready=ready, failed=failed, **where)


def in_turns(
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
    """Measure architectures until each is `settled`, at most so many times, all once before any is measured twice.

    Predictions are the same every time, so one of each does.

    Args:
        records: what there is of each, by id; what is measured is added.
        keep: given each record as it comes.
        ready: as `collect`.
        failed: as `collect`; without it the failure is raised.

    Yields:
        The share of the architectures that are done.
    """
    from archsearch.latency import LatencyFailure

    def done(taken: Sequence[LatencyRecord]) -> bool:
        return (
            settled([record.median_ms for record in taken], least)
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
            except LatencyFailure as failure:
                if failed is None:
                    raise
                failed(arch, str(failure))
                waiting.remove(arch)
            else:
                if done(taken):
                    waiting.remove(arch)
            yield 1 - len(waiting) / len(archs)
