"""Requests that somebody damaged are refused, and the good ones behind them are served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import pytest

from archsearch.latency.base import MeasurementError
from archsearch.score import LatencyRecord
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.remote import server
from archsearch.studies.remote.queue import STUDY_PREFIX, MeasurementQueue, MeasurementSpec
from archsearch.studies.storage.database import open_storage
from snapgen.architecture.schema import Architecture
from tests.archsearch.studies.quick import quick_record

ORDER: dict[str, Any] = {"device": "quick", "latent_size": 8, "context_tokens": 16, "options": {}}


class Backend:
    def measure(self, arch: Architecture, *_: int) -> LatencyRecord:
        if arch.rope:
            raise RecursionError("maximum recursion depth exceeded")
        return quick_record(arch)


def serve(url: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    monkeypatch.setattr(server, "POLL_SECONDS", 0.01)
    lines: list[str] = []
    made = server.serve(url, "quick", {}, log=lines.append, idle_seconds=0.05, make=lambda *_: Backend())
    return made, lines[1:]


@pytest.mark.parametrize(
    "poison",
    [
        {"latent_size": "8"},
        {"latent_size": 0},
        {"latent_size": 10**9},
        {"context_tokens": None},
        {"options": ["threads"]},
        {"more": 1},
        {"device": ["quick"]},
    ],
)
def test_an_order_that_is_damaged(
    settings: Callable[..., StudyConfig], monkeypatch: pytest.MonkeyPatch, poison: dict[str, Any]
) -> None:
    url, arch = settings().url, settings().load_space().base
    storage = open_storage(url)
    good = MeasurementQueue(storage, MeasurementSpec(**ORDER))
    bad = optuna.create_study(study_name=f"{STUDY_PREFIX}a", storage=storage)
    bad.set_user_attr("order", {**ORDER, **poison})
    for order in ("no order", None, [1]):
        optuna.create_study(study_name=f"{STUDY_PREFIX}{order}", storage=storage).set_user_attr("order", order)
    bad.enqueue_trial({})
    good.request(arch)
    made, lines = serve(url, monkeypatch)
    assert made == 1
    assert good.answer(arch) == quick_record(arch)
    assert sum("is damaged and left out" in line for line in lines) == (poison != {"device": ["quick"]})


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"architecture_id": "x"},
        {"architecture_id": "x", "architecture": 3},
        {"architecture_id": "x", "architecture": {"down": []}},
        {"architecture_id": None, "architecture": None, "worker": "me"},
    ],
)
def test_a_request_that_is_damaged(
    settings: Callable[..., StudyConfig], monkeypatch: pytest.MonkeyPatch, attrs: dict[str, Any]
) -> None:
    url, arch = settings().url, settings().load_space().base
    queue = MeasurementQueue(open_storage(url), MeasurementSpec(**ORDER))
    queue._study.enqueue_trial({}, user_attrs=attrs)
    queue.request(arch)
    made, lines = serve(url, monkeypatch)
    assert made == 1
    assert queue.answer(arch) == quick_record(arch)
    assert "is damaged and refused: " in lines[0]
    assert "refused" in queue._study.get_trials()[0].user_attrs
    assert serve(url, monkeypatch) == (0, [])


def test_an_architecture_that_breaks_the_device(
    settings: Callable[..., StudyConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, arch = settings().url, settings().load_space().base
    queue = MeasurementQueue(open_storage(url), MeasurementSpec(**ORDER))
    breaking = arch.model_copy(update={"rope": True})
    queue.request(breaking)
    queue.request(arch)
    assert serve(url, monkeypatch)[0] == 1
    with pytest.raises(MeasurementError, match="RecursionError: maximum recursion depth"):
        queue.answer(breaking)
