"""Seconds of a run, from parts of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol
from archsearch.studies.tabular import run_times
from archsearch.studies.tabular.run_times import RunTimes, part_of
from snapgen.architecture.presets import preset
from snapgen.errors import InputError

ONCE, STEP = 3.0, 0.25
"""Seconds that every run takes once, and for each step."""
ARCH = preset("snapgen-emoji")


@pytest.fixture
def protocol() -> ResolvedProtocol:
    names = ("data", "autoencoder", "text_encoder", "feature_extractor")
    return ResolvedProtocol(protocol=EvaluationProtocol(), **{f"{name}_digest": "d" for name in names})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of each run that was timed; the clock is of their time alone."""
    steps: list[int] = []

    class Evaluator:
        device = torch.device("cpu")

        def __init__(self, protocol: EvaluationProtocol) -> None:
            self.protocol = protocol

        def score(self, *_: Any, **__: Any) -> None:
            steps.append(self.protocol.steps)

    clock = SimpleNamespace(process_time=lambda: sum(ONCE + STEP * n for n in steps))
    monkeypatch.setattr(run_times, "CandidateEvaluator", Evaluator)
    monkeypatch.setattr(run_times, "time", clock)
    return steps


def test_parts_are_extended_to_the_whole_but_for_what_a_run_takes_once(
    trained: list[int], protocol: ResolvedProtocol, tmp_path: Path
) -> None:
    assert RunTimes(tmp_path, protocol).seconds(ARCH) == pytest.approx(ONCE + STEP * 240)
    assert trained == [30, 30, 7], "once to load what every run needs"


def test_what_was_measured_is_kept(trained: list[int], protocol: ResolvedProtocol, tmp_path: Path) -> None:
    first = RunTimes(tmp_path, protocol).seconds(ARCH)
    trained.clear()
    assert RunTimes(tmp_path, protocol).seconds(ARCH) == pytest.approx(first)
    assert trained == []
    longer = protocol.model_copy(update={"protocol": EvaluationProtocol(steps=480)})
    assert RunTimes(tmp_path, longer).seconds(ARCH) == pytest.approx(ONCE + STEP * 480), "of another protocol"


@pytest.mark.parametrize("line", ['{"architecture_id": 3', '{"architecture_id": "a", "seconds": -1}', "[]"])
def test_a_damaged_file_is_one_line(line: str, protocol: ResolvedProtocol, tmp_path: Path) -> None:
    (tmp_path / f"run_times-{protocol.hash}.jsonl").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"run_times-.*\.jsonl: line 1"):
        RunTimes(tmp_path, protocol)


def test_a_part_is_a_protocol_of_its_own() -> None:
    part = part_of(EvaluationProtocol(steps=4, num_samples=0, train_seeds=(3, 4)), 8)
    assert (part.steps, part.num_samples, part.train_seeds) == (1, 0, (3,))
    assert EvaluationProtocol.model_validate(part.model_dump()) == part
