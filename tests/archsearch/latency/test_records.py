"""Files of records: they come back as they were, survive a killed writer, and are gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from archsearch import cli
from archsearch.latency import records, repeats
from archsearch.latency.base import MeasurementError
from archsearch.latency.records import LatencySample
from archsearch.score import LatencyRecord, RuntimeMismatch
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import Space
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.records import latency_record
from tests.snapgen.nets import tiny


def timed(ms: float = 1.0, arch: Architecture | None = None) -> LatencySample:
    return LatencySample(architecture=arch or tiny(), latent_size=8, context_tokens=5, record=latency_record(ms))


class Clock:
    """A backend that takes the given times, and fails for an architecture."""

    def __init__(self, times: Sequence[float], *, fails: str = "") -> None:
        self.times, self.fails, self.asked = iter(times), fails, list[str]()

    def measure(self, arch: Architecture, *_: int) -> LatencyRecord:
        self.asked.append(arch.id)
        if arch.id == self.fails:
            raise MeasurementError("it does not run")
        return latency_record(next(self.times))


def collect(measure: repeats.Measure, space: Space, archs: list[Architecture], path: Path, **how: Any) -> None:
    file = records.SampleFile(path, space.latent_size, space.context_tokens)
    repeats.measure_round_robin(measure, archs, file.records(), save=file.append, **how)


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("emoji")


@pytest.fixture(scope="module")
def archs(space: Space) -> list[Architecture]:
    return repeats.sample_architectures(space, 4, seed=0)


def test_records_come_back_from_a_file(tmp_path: Path) -> None:
    written = [timed(1.5), timed(2.5, tiny({"rope": True}))]
    for one in written:
        records.append(tmp_path / "records.jsonl", one)
    assert records.load_samples(tmp_path / "records.jsonl") == written


def test_a_torn_line_is_passed_over_and_then_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records.append(path, timed(1))
    with path.open("a") as file:
        file.write('{"architecture": {"down')
    assert len(records.load_samples(path)) == 1
    records.append(path, timed(2))
    assert [one.record.median_ms for one in records.load_samples(path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "line 2"),
        ('{"architecture": {}}', "line 2.architecture"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "records.jsonl"
    records.append(path, timed())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="line 2") as raised:
        records.load_samples(path)
    assert problem in str(raised.value)


def test_the_lowest_of_several_counts() -> None:
    other = tiny({"rope": True})
    kept = records.fastest_per_net([timed(3), timed(9, other), timed(2), timed(4)])
    assert [(one.architecture.id, one.record.median_ms) for one in kept] == [(tiny().id, 2), (other.id, 9)]


def test_latencies_of_two_runtimes_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    mac = timed(3)
    core_ml = mac.record.model_copy(update={"runtime": "Core ML, coremltools 9.0"})
    core_ai = mac.record.model_copy(update={"runtime": "Core AI, coreai-core 1.0.0b3"})
    records.append(path, mac.model_copy(update={"record": core_ml}))
    answer = CliRunner().invoke(cli.app, ["latency", "verify", str(path)])
    assert answer.exit_code == 0
    assert "different" not in answer.stdout
    records.append(path, mac.model_copy(update={"record": core_ai}))
    with pytest.raises(RuntimeMismatch, match="Core AI and Core ML"):
        records.fastest_per_net(records.load_samples(path))
    assert CliRunner().invoke(cli.app, ["latency", "verify", str(path)]).exit_code == 1
    answer = CliRunner().invoke(cli.app, ["latency", "verify", str(path), "--json"])
    found = json.loads(answer.stdout)
    assert found["runtime"] == {"Core ML": 1, "Core AI": 1}
    assert len(found["machine"]) == len(found["operating system"]) == 1


@pytest.mark.parametrize(
    ("medians", "is_so"),
    [([1], False), ([1, 1], False), ([1, 1.6, 1.6], False), ([1.6, 1, 1.02], True), ([1.6, 1.61, 1], False)],
)
def test_settled_is_when_the_two_lowest_agree(medians: list[float], is_so: bool) -> None:
    assert repeats.is_repeatable(medians) is is_so


def test_more_architectures_begin_with_the_same_ones(space: Space, archs: list[Architecture]) -> None:
    assert repeats.sample_architectures(space, 2, seed=0) == archs[:2]
    assert repeats.sample_architectures(space, 2, seed=1) != archs[:2]
    assert len({arch.id for arch in archs}) == 4


def test_a_space_without_so_many_architectures_says_so(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "TRIES", 3)
    with pytest.raises(InputError, match="had 0 different architectures within the constraints; ask for fewer"):
        repeats.sample_architectures(replace(space, constraints={"params": 1.0}), 1, seed=0)


def test_each_is_measured_until_two_agree(space: Space, archs: list[Architecture], tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    clock = Clock([1, 2, 1.01, 3.5, 1.02, 2.9, 2.01])
    shares: list[float] = []
    collect(clock.measure, space, archs[:2], path, progress=shares.append)
    a, b = (arch.id for arch in archs[:2])
    assert clock.asked == [a, b, a, b, a, b, b], "all once before any twice"
    assert shares[-1] == 1
    assert [one.record.median_ms for one in records.fastest_per_net(records.load_samples(path))] == [1, 2]


def test_what_is_there_is_not_measured_again(space: Space, archs: list[Architecture], tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with pytest.raises(StopIteration):  # killed before the fourth
        collect(Clock([1, 2, 3]).measure, space, archs, path)
    again = Clock([4, *[1, 2, 3, 4] * 2])
    collect(again.measure, space, archs, path)
    assert again.asked == [archs[3].id, *[arch.id for arch in archs] * 2]
    done = Clock([])
    collect(done.measure, space, archs, path)
    assert done.asked == []


def test_one_that_never_settles_is_given_up(space: Space, archs: list[Architecture], tmp_path: Path) -> None:
    clock = Clock([1, 2, 4, 8, 16])
    collect(clock.measure, space, archs[:1], tmp_path / "records.jsonl", max_repeats=3)
    assert len(clock.asked) == 3


def test_a_net_that_cannot_be_measured_is_reported_and_skipped(
    space: Space, archs: list[Architecture], tmp_path: Path
) -> None:
    failures, shares = [], []
    clock = Clock([2, 2, 2], fails=archs[0].id)
    collect(
        clock.measure,
        space,
        archs[:2],
        tmp_path / "r.jsonl",
        failed=lambda arch, why: failures.append((arch.id, why)),
        progress=shares.append,
    )
    assert shares[-1] == 1
    assert failures == [(archs[0].id, "it does not run")]
    assert clock.asked.count(archs[0].id) == 1


def test_it_waits_until_the_machine_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([90.0, 40.0, 3.0, 90.0])
    monkeypatch.setattr(repeats.psutil, "cpu_percent", lambda **_: next(busy))
    repeats.wait_until_idle()
    assert next(busy) == 90
