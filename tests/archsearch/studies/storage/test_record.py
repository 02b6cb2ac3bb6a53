"""Trials are read and written in one place, which names the attribute that someone has damaged."""

from __future__ import annotations

import ast
import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from archsearch.score import Cost, Score
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.remote.queue import MeasurementQueue, MeasurementSpec
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage import record, study_trials
from archsearch.studies.storage.database import load_study, open_storage
from archsearch.studies.storage.leases import worker_identity
from archsearch.studies.storage.record import Candidate, TrialRecord
from archsearch.studies.storage.rounds import EvolutionRound
from archsearch.studies.storage.study_trials import StudyTrials
from archsearch.studies.storage.trial_queue import TrialQueue
from snapgen.architecture.presets import preset
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer
from tests.records import latency_record

Make = Callable[..., StudyConfig]
PACKAGE = Path(record.__file__).parents[2]

FIELDS: dict[str, Any] = {
    "retry_of": 0,
    "name": "base",
    "phase": "training seed 0",
    "fraction": 0.5,
    "score": Score(cost=Cost(params=1, macs=2, activation_bytes=3), latency=latency_record(4.0)),
    "reused_from": 0,
    "round": EvolutionRound.model_validate(
        {
            **{"number": 0, "phase": "robust", "parent": None, "removed": (), "copied": (), "worths": ()},
            **{"metric": "validation_loss", "quality": {"value": 1, "low": 1, "high": 1}, "predicted_ms": 1},
            **{"steps": 1, "training_macs": 1, "next": "stop"},
        }
    ),
    "exceeded": "latency_ms 4, limit 3",
    "error": "RuntimeError: boom",
    "rejected": True,
    "withdrawn": True,
    "lost": True,
}
STORED = {"phase": "stage", "round": "evolution", "exceeded": "infeasible", "rejected": "refused"}


def in_memory() -> optuna.Study:
    return optuna.create_study()


def test_what_is_written_is_read_and_keeps_its_stored_name() -> None:
    study, arch = in_memory(), preset("snapgen-emoji")
    TrialRecord.create(study, "RUNNING", worker=worker_identity())
    trial_id = TrialRecord.create(study, "RUNNING", worker=worker_identity(), slot=0)
    assert type(StudyTrials(study).read()[1]) is TrialRecord
    TrialRecord.write(study._storage, trial_id, architecture_id=arch.id, architecture=arch, **FIELDS)
    TrialRecord.write_sampler_attrs(study._storage, trial_id, {"nsga2:generation": 3})
    found = StudyTrials(study).read()[1]
    assert isinstance(found, Candidate)
    assert {name: getattr(found, name) for name in FIELDS} == FIELDS
    assert (found.architecture, found.worker, found.slot, found.state) == (arch, worker_identity(), 0, "running")
    assert found.sampler_attrs == {"nsga2:generation": 3}
    stored = study.get_trials()[1].user_attrs
    names = {STORED.get(name, name) for name in FIELDS}
    assert stored.keys() == {"worker", "slot", "architecture", "architecture_id"} | names
    assert stored == json.loads(json.dumps(stored))


def test_a_field_that_no_trial_has_is_not_written() -> None:
    study = in_memory()
    with pytest.raises(KeyError):
        TrialRecord.create(study, "RUNNING", worker=worker_identity(), stage="cost")
    assert study.get_trials() == []


def test_an_error_cannot_control_a_terminal() -> None:
    study = in_memory()
    trial_id = TrialRecord.create(study, "RUNNING", worker=worker_identity(), slot=0)
    TrialRecord.end(study._storage, trial_id, error="no \x1b[2Jfile\nhere")
    assert StudyTrials(study).read()[0].error == "no \ufffd[2Jfile\nhere"


def test_trials_of_others_are_left_out() -> None:
    study = in_memory()
    study.add_trial(optuna.trial.create_trial(value=1.0))
    TrialRecord.create(study, "RUNNING", worker=worker_identity())
    assert [(t.number, t.slot) for t in StudyTrials(study).read()] == [(1, 0)]


def test_what_has_not_changed_is_parsed_once(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = TrialQueue(search(settings(trials=2), quiet=True, scorer=QuickScorer), settings(trials=4))
    claimed = queue.claim()
    assert isinstance(claimed, TrialRecord)
    before, parsed = list(queue.trials()), []
    parse = record.read_trial
    monkeypatch.setattr(
        study_trials,
        "read_trial",
        lambda study, t, *how, **slot: parsed.append(t.number) or parse(study, t, *how, **slot),
    )
    assert list(queue.trials()) == before
    assert parsed == []
    queue.write(claimed.trial_id, fraction=0.5)
    assert list(queue.trials()) == [*before[:2], before[2].model_copy(update={"fraction": 0.5})]
    assert parsed == [2]


DAMAGE = {
    "a number out of range": ("score", lambda s: s["cost"].update(params=-1), "score.cost.params: -1 is too small"),
    "an unknown key": ("architecture", lambda a: a.update(wings=2), "architecture.wings: unknown key"),
    "another type": ("stage", lambda _: 7, "stage: 7 is not a text"),
    "a key less": ("worker", lambda w: w.pop("pid") and None, "worker.pid: is required, but missing"),
    "a trial that never was": ("retry_of", lambda _: 99, "retry_of: 99 is not a trial"),
    "a list for a number": ("retry_of", lambda _: [1], "retry_of: [1] is not a trial"),
    "no score": ("score", None, "score is missing although the trial is scored"),
    "no architecture": ("architecture", None, "architecture is missing although the trial is scored"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_attribute_is_named_in_one_line(settings: Make, how: str) -> None:
    search(settings(trials=2), quiet=True, scorer=QuickScorer)
    key, change, words = DAMAGE[how]
    edit(settings(), key, change)
    for read in (load_candidates, lambda _: search(settings(trials=3), quiet=True, scorer=QuickScorer)):
        with pytest.raises(InputError) as caught:
            read(load_study(settings()))
        assert str(caught.value).startswith(f"trial 1 of study {settings().name}: {words}")
        assert str(caught.value).endswith("; restore the study's database, or begin it anew under another name")


def test_an_attribute_that_is_no_json_is_one_line(settings: Make) -> None:
    search(settings(trials=2), quiet=True, scorer=QuickScorer)
    with sqlite3.connect(settings().url.removeprefix("sqlite:///")) as file:
        file.execute("UPDATE trial_user_attributes SET value_json = '{' WHERE key = 'score'")
    with pytest.raises(InputError, match=rf"^study {settings().name}: an attribute of a trial is not JSON"):
        load_candidates(load_study(settings()))


def test_a_damaged_measurement_is_named(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    queue = MeasurementQueue(storage, MeasurementSpec("host", 8, 77, {}))
    queue.request(preset("snapgen-emoji"))
    with sqlite3.connect(tmp_path / "study.db") as file:
        file.execute("UPDATE trial_user_attributes SET value_json = '7' WHERE key = 'architecture_id'")
    assert queue.claim() is None
    (told,) = queue.refuse_damaged()
    assert re.fullmatch(
        r"a request in 'latency of host.*' is damaged and refused: architecture_id: .* is not a text", told
    )
    assert list(queue.refuse_damaged()) == []


def edit(settings: StudyConfig, key: str, change: Callable[[Any], Any] | None) -> None:
    """Change an attribute of trial 1 in the database file, or delete it."""
    with sqlite3.connect(settings.url.removeprefix("sqlite:///")) as file:
        (trial_id,) = file.execute("SELECT trial_id FROM trials WHERE number = 1").fetchone()
        where = "trial_id = ? AND key = ?"
        found = file.execute(f"SELECT value_json FROM trial_user_attributes WHERE {where}", (trial_id, key)).fetchone()
        file.execute(f"DELETE FROM trial_user_attributes WHERE {where}", (trial_id, key))
        if change is not None:
            value = json.loads(found[0]) if found else None
            changed = change(value)
            text = json.dumps(value if changed is None else changed)
            file.execute(
                "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)", (trial_id, key, text)
            )


def test_nothing_else_touches_the_attributes_of_trials() -> None:
    """Outside the record attributes are read of studies only, and the samplers' own copy of a study has its own."""
    others = [path for path in PACKAGE.rglob("*.py") if path != Path(record.__file__)]
    assert len(others) > 100
    assert sorted(use for path in others for use in uses(path)) == [
        "archsearch/samplers/ehvi.py: user_attrs",
        "archsearch/studies/search/samplers.py: system_attrs",
    ]
    assert len(list(uses(Path(record.__file__)))) > 4


def uses(path: Path) -> list[str]:
    """Accesses to trials' attributes in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in (
            "user_attrs",
            "system_attrs",
            "set_trial_user_attr",
            "set_trial_system_attr",
        ):
            if node.attr != "user_attrs" or "study" not in ast.unparse(node.value):
                found.append(f"{path.relative_to(PACKAGE.parent)}: {node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "user_attrs":
            found.append(f"{path.relative_to(PACKAGE.parent)}: {node.arg}")
    return found
