"""The queue between searches and devices: asked once, claimed by one, never lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archsearch.latency.base import DeviceLostError, MeasurementError
from archsearch.score import LatencyRecord
from archsearch.spaces.loading import load_space
from archsearch.studies.remote import server
from archsearch.studies.remote.queue import MAX_DEVICE_DEATHS, MeasurementQueue, MeasurementSpec, requested_specs
from archsearch.studies.remote.server import serve
from archsearch.studies.storage.database import open_storage
from archsearch.studies.storage.leases import worker_identity
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.archsearch.studies.quick import quick_latency, quick_record

ORDER = MeasurementSpec("quick", 8, 16, {"threads_per_worker": 1})


@pytest.fixture
def archs() -> list[Architecture]:
    """Three of the quick start's architectures."""
    space = load_space("emoji")
    points = [*space.reference_points().values(), *space.neighbors(space.base_point)]
    return [space.architecture(point) for point in points[:3]]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.db'}"
    else:
        yield request.getfixturevalue("server")


@pytest.fixture
def ask(url: str, request: pytest.FixtureRequest) -> Callable[[], MeasurementQueue]:
    """A process's own view of one queue."""
    order = MeasurementSpec(request.node.name, 8, 16, {})
    return lambda: MeasurementQueue(open_storage(url), order)


Ask = Callable[[], MeasurementQueue]


class Backend:
    """Measures at once, or fails as it is told."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.measured = error, list[str]()

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        assert (latent_size, context_tokens) == (8, 16)
        if self.error is not None:
            raise self.error
        self.measured.append(arch.id)
        return quick_record(arch)


def test_asked_twice_it_is_measured_once(ask: Ask, archs: list[Architecture]) -> None:
    one, other = ask(), ask()
    for queue in (one, other, one):
        queue.request(archs[0])
    assert one.answer(archs[0]) is None
    claimed = other.claim()
    assert claimed is not None
    assert claimed.architecture == archs[0]
    assert one.claim() is None
    assert other.complete(claimed, quick_record(archs[0]))
    one.request(archs[0])
    assert one.claim() is None
    assert one.answer(archs[0]) == quick_record(archs[0])
    assert one.records() == {archs[0].id: quick_record(archs[0])}


def test_the_first_asked_is_the_first_claimed(ask: Ask, archs: list[Architecture]) -> None:
    queue = ask()
    for arch in archs:
        queue.request(arch)
    claims = [queue.claim() for _ in archs]
    assert [c.architecture.id for c in claims if c] == [arch.id for arch in archs]


def test_of_two_requests_at_once_one_counts(ask: Ask, archs: list[Architecture]) -> None:
    queue = ask()
    for _ in range(3):
        queue._enqueue(archs[0])
    claimed = queue.claim()
    assert claimed is not None
    assert claimed.number == 0
    assert ask().claim() is None  # both others are dropped
    assert queue.complete(claimed, quick_record(archs[0]))
    assert [t.state for t in queue.trials()] == ["scored", "failed", "failed"]


def test_what_is_given_back_waits_again(ask: Ask, archs: list[Architecture]) -> None:
    queue = ask()
    queue.request(archs[0])
    for _ in range(MAX_DEVICE_DEATHS + 1):
        claimed = queue.claim()
        assert claimed is not None
        queue.release(claimed)
    assert queue.answer(archs[0]) is None
    assert queue.claim() is not None


def test_what_is_refused_is_not_asked_again(ask: Ask, archs: list[Architecture]) -> None:
    queue = ask()
    queue.request(archs[0])
    claimed = queue.claim()
    assert claimed is not None
    queue.reject(claimed, "does not compile there")
    queue.request(archs[0])
    assert queue.claim() is None
    assert queue.reap_dead() == []
    assert queue.claim() is None
    with pytest.raises(MeasurementError, match="does not compile there"):
        queue.answer(archs[0])


def _die(queue: MeasurementQueue, monkeypatch: pytest.MonkeyPatch) -> int:
    """Claim as a process that has ended since."""
    dead = worker_identity().model_copy(update={"pid": 2**22 - 1})
    with monkeypatch.context() as patched:
        patched.setattr("archsearch.studies.remote.queue.worker_identity", lambda: dead)
        claimed = queue.claim()
    assert claimed is not None
    return claimed.number


def test_the_dead_give_theirs_back(ask: Ask, archs: list[Architecture], monkeypatch: pytest.MonkeyPatch) -> None:
    queue = ask()
    queue.request(archs[0])
    number = _die(queue, monkeypatch)
    other = ask()
    assert other.reap_dead() == [number]
    assert queue.reap_dead() == []
    again = other.claim()
    assert again is not None
    assert again.architecture == archs[0]
    assert queue.reap_dead() == []  # the living keep theirs


def test_whoever_was_taken_for_dead_tells_nothing(
    ask: Ask, archs: list[Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, other = ask(), ask()
    queue.request(archs[0])
    claimed = queue.claim()
    assert claimed is not None
    monkeypatch.setattr("archsearch.studies.remote.queue.is_dead", lambda _: True)
    assert other.reap_dead() == [claimed.number]
    monkeypatch.undo()
    assert not queue.complete(claimed, quick_record(archs[0]))
    assert queue.answer(archs[0]) is None
    assert other.claim() is not None


def test_a_stopped_heartbeat_is_a_death(ask: Ask, archs: list[Architecture], monkeypatch: pytest.MonkeyPatch) -> None:
    queue = ask()
    queue.request(archs[0])
    with monkeypatch.context() as patched:
        patched.setattr(
            "archsearch.studies.remote.queue.worker_identity",
            lambda: worker_identity().model_copy(update={"host": "another machine"}),
        )
        claimed = queue.claim()
    assert claimed is not None
    assert queue.reap_dead() == []
    monkeypatch.setattr(queue._storage, "grace_period", -1)
    assert queue.reap_dead() == [claimed.number]
    assert queue.claim() is not None


def test_a_candidate_that_kills_devices_is_given_up(
    ask: Ask, archs: list[Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = ask()
    queue.request(archs[0])
    for _ in range(MAX_DEVICE_DEATHS):
        _die(queue, monkeypatch)
        queue.reap_dead()
    assert queue.claim() is None
    with pytest.raises(MeasurementError, match=f"{MAX_DEVICE_DEATHS} device processes died in its measurement"):
        queue.answer(archs[0])


# --- serving ---


@pytest.fixture
def waiting(tmp_path: Path, archs: list[Architecture]) -> tuple[str, MeasurementQueue]:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    queue = MeasurementQueue(open_storage(url), ORDER)
    for arch in archs:
        queue.request(arch)
    return url, queue


def serve_with(url: str, backend: Backend, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[int, list[str]]:
    monkeypatch.setattr(server, "POLL_SECONDS", 0.01)
    lines: list[str] = []
    made = serve(url, "quick", {}, log=lines.append, idle_seconds=0.05, make=lambda *_: backend, **more)
    return made, lines


def test_a_device_serves_all_that_waits(
    waiting: tuple[str, MeasurementQueue], archs: list[Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, queue = waiting
    backend = Backend()
    made, lines = serve_with(url, backend, monkeypatch)
    assert (made, backend.measured) == (3, [arch.id for arch in archs])
    assert [queue.answer(arch) for arch in archs] == [quick_record(arch) for arch in archs]
    assert lines[1] == f"measurement 0 ({archs[0].id}): {quick_latency(archs[0]):.4g} ms"


def test_another_kind_of_device_is_not_served(waiting: tuple[str, MeasurementQueue], archs: list[Architecture]) -> None:
    url, queue = waiting
    assert list(requested_specs(open_storage(url), "iphone")) == []
    assert list(requested_specs(open_storage(url), "quick")) == [ORDER]
    assert queue.answer(archs[0]) is None


@pytest.mark.parametrize("error", [MeasurementError("does not load"), InputError("latent", "is odd", "halve it")])
def test_what_can_not_be_measured_is_refused_and_the_rest_served(
    waiting: tuple[str, MeasurementQueue], archs: list[Architecture], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    url, queue = waiting
    made, lines = serve_with(url, Backend(error), monkeypatch)
    assert made == 0
    assert len(lines) == 4
    with pytest.raises(MeasurementError, match=r"does not load|is odd"):
        queue.answer(archs[2])


def test_a_lost_device_ends_in_one_line_and_gives_back(
    waiting: tuple[str, MeasurementQueue], archs: list[Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, queue = waiting
    with pytest.raises(InputError, match=r"quick: was unplugged; measurement 0 .* is queued again; plug it in"):
        serve_with(url, Backend(DeviceLostError("was unplugged", "plug it in")), monkeypatch)
    assert queue.answer(archs[0]) is None
    assert serve_with(url, Backend(), monkeypatch)[0] == 3


def test_an_interrupt_gives_back(
    waiting: tuple[str, MeasurementQueue], archs: list[Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, queue = waiting
    with pytest.raises(KeyboardInterrupt):
        serve_with(url, Backend(KeyboardInterrupt()), monkeypatch)
    assert queue.answer(archs[0]) is None
    assert serve_with(url, Backend(), monkeypatch)[0] == 3


def test_a_death_is_told(waiting: tuple[str, MeasurementQueue], monkeypatch: pytest.MonkeyPatch) -> None:
    url, queue = waiting
    number = _die(queue, monkeypatch)
    made, lines = serve_with(url, Backend(), monkeypatch)
    assert made == 3
    assert f"measurement {number}: its device died; it is queued again" in lines


def test_a_device_that_can_not_be_used_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="abacus"):
        serve(f"sqlite:///{tmp_path / 'study.db'}", "abacus", {}, log=lambda _: None)
