"""A running trial's point is read while it is written, knob by knob."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from archsearch.spaces.loading import load_space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.proposer import Proposer
from archsearch.studies.search.run import search
from archsearch.studies.storage.record import TrialRecord
from archsearch.studies.storage.trial_queue import TrialQueue
from tests.archsearch.studies.quick import QuickScorer


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_half_a_point_is_not_used(settings: Callable[..., StudyConfig], sampler: str) -> None:
    chosen = settings(trials=12, sampler=sampler)
    study = search(chosen.with_overrides(trials=4), quiet=True, scorer=QuickScorer)
    space, queue = load_space(chosen.space), TrialQueue(study, chosen)
    other, claim = queue.claim(), queue.claim()
    assert isinstance(other, TrialRecord)
    assert isinstance(claim, TrialRecord)
    proposer = Proposer(chosen, space, study)
    first = proposer.propose(claim, queue.trials())
    half = dict(list(space.base_point.items())[:3])
    queue.set_point(other.trial_id, half, proposer.choices)
    queue.write(other.trial_id, architecture=space.base, architecture_id="of another worker")
    assert proposer.propose(claim, queue.trials()).point == first.point
