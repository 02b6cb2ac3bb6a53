"""Two versions of archsearch on one storage."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.remote.queue import MeasurementQueue, MeasurementSpec, requested_specs
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.attributes import FORMAT
from archsearch.studies.storage.database import load_study, open_storage
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer

Make = Callable[..., StudyConfig]


@pytest.mark.parametrize("stored", [FORMAT + 1, 0, "2", None])
def test_a_study_of_another_format_is_neither_searched_nor_read(settings: Make, stored: object) -> None:
    study = search(settings(trials=2), quiet=True, scorer=QuickScorer)
    assert study.user_attrs["format"] == FORMAT
    study.set_user_attr("format", stored)
    said = rf"study quick: has format .*, and this version .* format {FORMAT}; use"
    with pytest.raises(InputError, match=said):
        search(settings(trials=3), quiet=True, scorer=QuickScorer)
    with pytest.raises(InputError, match=said):
        load_study(settings())
    assert len(study.get_trials()) == 2


def test_its_scores_are_not_taken(settings: Make) -> None:
    other = search(settings(name="other", trials=2), quiet=True, scorer=QuickScorer)
    other.set_user_attr("format", FORMAT + 1)
    url = settings(name="other").url
    candidates = load_candidates(search(settings(trials=2, storage=url), quiet=True, scorer=QuickScorer))
    assert [c.reused_study for c in candidates] == [None, None]


def test_requests_of_another_format_are_not_served(settings: Make) -> None:
    storage, spec = open_storage(settings().url), MeasurementSpec("quick", 8, 16, {})
    MeasurementQueue(storage, spec)._study.set_user_attr("format", FORMAT + 1)
    assert list(requested_specs(storage, "quick")) == []
    with pytest.raises(InputError, match="has format 2"):
        MeasurementQueue(storage, spec)


def test_a_study_of_before_formats_were_stored_is_read(settings: Make) -> None:
    study = search(settings(trials=2), quiet=True, scorer=QuickScorer)
    from optuna.storages._rdb import models
    from optuna.storages._rdb.storage import _create_scoped_session

    with _create_scoped_session(study._storage._backend.scoped_session) as session:  # type: ignore[attr-defined]
        session.query(models.StudyUserAttributeModel).filter_by(key="format").delete()
    assert "format" not in load_study(settings()).user_attrs
    assert len(load_candidates(search(settings(trials=4), quiet=True, scorer=QuickScorer))) == 4
