from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from archsearch.score import Cost
from archsearch.studies.experiments import counted_effects
from snapgen.architecture.schema import Architecture
from tests.archsearch.reports import factory


@pytest.fixture(scope="package", autouse=True)
def _made_up_costs() -> Iterator[None]:
    """Count the neighbors of candidates as the factory counts, which takes no time, and never into the usual cache."""

    def cost(arch: Architecture, *_: Any, **__: Any) -> Cost:
        params, macs = factory.counted(arch)
        return Cost(params=int(params), macs=int(macs), activation_bytes=90_000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("archsearch.cost.counter.cost", cost)
        patch.setattr(counted_effects, "CACHE_REVISION", -1)
        yield
