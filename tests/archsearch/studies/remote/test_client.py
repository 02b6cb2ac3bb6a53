"""A search whose latency is measured elsewhere: asked for before training, predicted meanwhile, never lost."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from archsearch.devices import BACKENDS
from archsearch.latency.base import MeasurementError
from archsearch.score import LatencyRecord
from archsearch.spaces.space import Space
from archsearch.studies.config.study import LatencyConfig, StudyConfig
from archsearch.studies.remote import client, server as device
from archsearch.studies.remote.client import RemoteLatency, measurement_spec
from archsearch.studies.remote.queue import MeasurementQueue
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study, open_storage
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer, quick_latency, quick_record
from tests.archsearch.studies.search.test_run import numbers, scored, until

Make = Callable[..., StudyConfig]
Start = Callable[..., BaseProcess]

AWAY = {"device": "quick", "remote": True}


class Away(QuickScorer):
    """Quick scores, but for the latency, which a device elsewhere takes."""

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        super().__init__(settings, space)
        self._remote = RemoteLatency(settings, space)

    def latency(self, arch: Architecture) -> LatencyRecord:
        return self._remote.request(arch)

    def final_latency(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:
        return self._remote.final(arch, first)


class Quick:
    """A device with the quick scorer's latencies."""

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        assert (latent_size, context_tokens) == (8, 77)
        time.sleep(float(os.environ.get("QUICK_SECONDS", "0")))
        if log := os.environ.get("MEASURED_LOG"):
            with Path(log).open("a") as file:
                file.write(arch.id + "\n")
        if arch.rope:
            raise MeasurementError("RoPE does not compile here")
        return quick_record(arch)


class Guess:
    """Predicts a constant, with an interval around it."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def measure(self, arch: Architecture, *_: int) -> LatencyRecord:
        ends = {"median_ms": self.ms, "lower_quartile_ms": self.ms, "upper_quartile_ms": self.ms}
        told = {**ends, "source": "predicted", "interval_ms": (0.5 * self.ms, 2 * self.ms)}
        return quick_record(arch).model_copy(update=told)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Callable[[StudyConfig], contextlib.AbstractContextManager[None]]:
    """A device on a thread, for as long as the block runs."""
    monkeypatch.setattr(client, "POLL_SECONDS", 0.02)

    @contextlib.contextmanager
    def serve(settings: StudyConfig) -> Iterator[None]:
        server = device._Server(open_storage(settings.url), "quick", {}, lambda _: None, lambda *_: Quick())
        over = threading.Event()

        def go_on() -> None:
            while not over.is_set():
                if not server.serve_one():
                    time.sleep(0.02)

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    return serve


def test_a_search_waits_for_its_device(settings: Make, serving: Any) -> None:
    chosen = settings(trials=5, latency=AWAY)
    with serving(chosen):
        done = load_candidates(search(chosen, quiet=True, scorer=Away))
    assert len(scored(done)) == 5
    for candidate in scored(done):
        assert candidate.value("latency_ms") == quick_latency(candidate.architecture)
        assert candidate.score.latency is not None
        assert candidate.score.latency.source == "measured"


def test_what_the_device_refuses_fails_and_the_search_goes_on(settings: Make, serving: Any) -> None:
    chosen = settings(trials=6, latency=AWAY, sampler="random")
    path = Path(chosen.space)
    text = path.read_text().replace("  all.ffn_ratio: [2, 3, 4]", "  rope: [false, true]")
    path.write_text(text.replace("all.ffn_ratio: 2, ", "rope: true, "))
    with serving(chosen):
        done = load_candidates(search(chosen, quiet=True, scorer=Away))
    failed = [c for c in done if c.state == "failed"]
    assert len(scored(done)) == 6
    assert failed
    assert all(not c.architecture.rope for c in scored(done))
    assert all(c.architecture.rope and c.attempts == 1 for c in failed)


def guessed(settings: StudyConfig, ms: float) -> RemoteLatency:
    made = RemoteLatency(settings, settings.load_space())
    made._provisional = Guess(ms)
    return made


def queue_of(settings: StudyConfig) -> MeasurementQueue:
    space = settings.load_space()
    return MeasurementQueue(
        open_storage(settings.url), measurement_spec(settings.latency, space.latent_size, space.context_tokens)
    )


def measure_one(settings: StudyConfig) -> None:
    queue = queue_of(settings)
    claimed = queue.claim()
    assert claimed is not None
    assert queue.complete(claimed, Quick().measure(claimed.architecture, 8, 77))


def test_a_prediction_stands_provisional_and_the_measurement_in_the_end(settings: Make) -> None:
    chosen = settings(latency={**AWAY, "provisional": "predicted:iphone-15-pro"})
    arch = chosen.load_space().base
    asked = guessed(chosen, 7.0)
    first = asked.request(arch)
    assert (first.source, first.median_ms) == ("predicted", 7.0)
    timer = threading.Timer(0.3, measure_one, [chosen])
    timer.start()
    settled = asked.final(arch, first)
    timer.join()
    assert (settled.source, settled.median_ms) == ("measured", quick_latency(arch))
    assert asked.request(arch) == settled
    assert asked.final(arch, settled) is settled


def test_without_waiting_the_prediction_stands_until_the_measurement_comes(settings: Make) -> None:
    chosen = settings(latency={**AWAY, "provisional": "predicted:iphone-15-pro", "wait_for_measurement": False})
    arch = chosen.load_space().base
    asked = guessed(chosen, 7.0)
    first = asked.request(arch)
    assert asked.final(arch, first) is first
    measure_one(chosen)
    assert asked.final(arch, first).source == "measured"


def test_a_prediction_too_wide_for_the_limit_is_not_used(settings: Make) -> None:
    away = {**AWAY, "provisional": "predicted:iphone-15-pro"}
    chosen = settings(latency=away, constraints={"latency_ms": 10.0})
    arch = chosen.load_space().base
    assert guessed(chosen, 3.0).request(arch).source == "predicted"
    timer = threading.Timer(0.3, measure_one, [chosen])
    timer.start()
    assert guessed(chosen, 7.0).request(arch).source == "measured"  # 3.5 to 14 ms
    timer.join()


class Hasty(Away):
    """Never waits: predictions stand."""

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        super().__init__(settings, space)
        self._remote._provisional = Guess(7.0)


def test_a_report_takes_the_measurements_that_came_later(settings: Make) -> None:
    chosen = settings(
        trials=3, latency={**AWAY, "provisional": "predicted:iphone-15-pro", "wait_for_measurement": False}
    )
    study = search(chosen, quiet=True, scorer=Hasty)
    assert {c.value("latency_ms") for c in scored(load_candidates(study))} == {7.0}
    measure_one(chosen)
    sources = [c.score.latency.source for c in scored(load_candidates(study)) if c.score.latency]
    assert sorted(sources) == ["measured", "predicted", "predicted"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"provisional": "predicted:x"}, "set remote: true"),
        ({"remote": True, "provisional": "host"}, "write predicted:DEVICE"),
        ({"remote": True, "wait_for_measurement": False}, "give provisional"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LatencyConfig.model_validate(given)


def test_an_unknown_prediction_is_told_before_anything_is_asked(settings: Make) -> None:
    chosen = settings(latency={**AWAY, "provisional": "predicted:abacus"})
    with pytest.raises(InputError, match="abacus"):
        RemoteLatency(chosen, chosen.load_space())


# --- killed at random ---


def search_in(folder: Path, settings: StudyConfig, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    search(settings, quiet=True, scorer=Away)


def serve_in(folder: Path, url: str, kind: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    make = BACKENDS["host"] if kind == "host" else lambda _: Quick()
    with Path("device.log").open("a", buffering=1) as log:
        device.serve(url, kind, {}, log=lambda line: print(line, file=log), make=lambda _, o: make(o))


def kill_at_random(
    settings: StudyConfig, start: Start, folder: Path, *, kills: int, environment: dict[str, str]
) -> None:
    """Two searchers and two devices, one of the four killed and started again at random moments."""
    rng = random.Random(5)
    kind = settings.latency.device
    makers = [lambda: start(search_in, folder, settings, environment)] * 2
    makers += [lambda: start(serve_in, folder, settings.url, kind, environment)] * 2
    processes = [make() for make in makers]
    until(lambda: numbers(settings, "COMPLETE"), seconds=300)
    measuring = False
    for _ in range(kills):
        time.sleep(rng.uniform(0.05, 1.5))
        victim = rng.randrange(4)
        process = processes[victim]
        if process.is_alive():
            if victim >= 2 and not measuring:  # one device dies in a measurement, the others at any moment
                with contextlib.suppress(AssertionError):
                    until(lambda: any(t.state == "running" for t in queue_of(settings).trials()), seconds=2)
                    measuring = True
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        processes[victim] = makers[victim]()
    for process in processes[:2]:
        process.join()
    assert [process.exitcode for process in processes[:2]] == [0, 0]
    for process in processes[2:]:
        process.kill()
        process.join()


def check_all_scored_once(settings: StudyConfig, trials: int) -> None:
    done = scored(load_candidates(load_study(settings)))
    assert len(done) == len({c.architecture.id for c in done}) == trials
    queue = queue_of(settings)
    complete = [t for t in queue.trials() if t.state == "scored"]
    assert len(complete) == len({t.architecture_id for t in complete})
    records = queue.records()
    assert all(c.score.latency == records[c.architecture.id] for c in done)
    assert not [t for t in queue.trials() if t.state == "running"]


def test_killed_at_four_random_moments(settings: Make, start: Start, tmp_path: Path) -> None:
    chosen = settings(trials=8, latency=AWAY)
    kill_at_random(chosen, start, tmp_path, kills=4, environment={"QUICK_SECONDS": "0.15"})
    check_all_scored_once(chosen, 8)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_with_host_devices_on_postgresql(
    settings: Make, start: Start, tmp_path: Path, server: str
) -> None:
    chosen = settings(name="away", trials=24, storage=server, latency={"device": "host", "remote": True})
    kill_at_random(chosen, start, tmp_path, kills=20, environment={"QUICK_SECONDS": "0.3"})
    check_all_scored_once(chosen, 24)
    told = (tmp_path / "device.log").read_text()
    died = [t for t in queue_of(chosen).trials() if t.died]
    assert died
    # A search that waits for such a measurement queues it again, too, and devices say what they queued themselves.
    queued = {int(number) for number in re.findall(r"measurement (\d+): its device died; it is queued again", told)}
    assert queued <= {t.number for t in died}
