"""Studies that another program made or that were tampered with end in one line, and nothing is written into them."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from archsearch import cli
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from snapgen.errors import InputError
from tests.archsearch.studies import quick

Tamper = Callable[[sqlite3.Connection], object]
TRIALS = 6


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study of the quick scorer."""
    folder = tmp_path_factory.mktemp("begun")
    with contextlib.chdir(folder):
        settings = quick.settings(folder, trials=TRIALS, sampler="random")
        search(settings, quiet=True, scorer=quick.QuickScorer)
        values = settings.model_dump(mode="json", exclude={"space"})
        (folder / "study.yaml").write_text(yaml.safe_dump({**values, "space": "space.yaml"}))
    return folder


def study_attr(key: str, change: Callable[[Any], Any]) -> Tamper:
    def tamper(database: sqlite3.Connection) -> None:
        [(stored,)] = database.execute("select value_json from study_user_attributes where key = ?", [key])
        text = json.dumps(change(json.loads(stored)))
        database.execute("update study_user_attributes set value_json = ? where key = ?", [text, key])

    return tamper


def trial_attr(key: str, value: object) -> Tamper:
    text = value if isinstance(value, str) else json.dumps(value)
    return lambda database: database.execute(
        "update trial_user_attributes set value_json = ? where key = ? and trial_id = 3", [text, key]
    )


def added(kind: str, key: str, text: str) -> Tamper:
    return sql(f"insert into trial_{kind}_attributes (trial_id, key, value_json) values (3, '{key}', '{text}')")


def sql(*statements: str) -> Tamper:
    return lambda database: [database.execute(statement) for statement in statements]


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {k: v for k, v in values.items() if k != key}


def with_value(**changes: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {**values, **changes}


TAMPERED: dict[str, Tamper] = {
    "settings not JSON": sql("update study_user_attributes set value_json = '{' where key = 'settings'"),
    "settings a list": study_attr("settings", lambda _: [1]),
    "settings without objectives": study_attr("settings", with_value(objectives=[])),
    "settings of unknown objectives": study_attr("settings", with_value(objectives=["beauty"])),
    "settings of other objectives": study_attr("settings", with_value(objectives=["params", "macs", "latency_ms"])),
    "settings of a number's place": study_attr("settings", with_value(latency=3)),
    "settings gone": sql("delete from study_user_attributes where key = 'settings'"),
    "space a text": study_attr("space", lambda _: "emoji"),
    "space without base": study_attr("space", without("base")),
    "space of other knobs": study_attr("space", with_value(knobs=[])),
    "space gone": sql("delete from study_user_attributes where key = 'space'"),
    "protocol a number": study_attr("protocol", lambda _: 1),
    "protocol incomplete": study_attr("protocol", without("data_digest")),
    "protocol gone": sql("delete from study_user_attributes where key = 'protocol'"),
    "protocol hash gone": sql("delete from study_user_attributes where key = 'protocol_hash'"),
    "protocol hash a list": study_attr("protocol_hash", lambda _: []),
    "machine a text": study_attr("machine", lambda _: "PC"),
    "artifacts a number": study_attr("artifacts", lambda _: 3),
    "artifacts gone": sql("delete from study_user_attributes where key = 'artifacts'"),
    "all attributes gone": sql("delete from study_user_attributes"),
    "maximize": sql("update study_directions set direction = 'MAXIMIZE'"),
    "one maximized": sql("update study_directions set direction = 'MAXIMIZE' where objective = 0"),
    "one direction": sql("delete from study_directions where objective = 1"),
    "no direction": sql("delete from study_directions"),
    "unknown direction": sql("update study_directions set direction = 'SIDEWAYS'"),
    "point out of range": sql("update trial_params set param_value = 99 where trial_id = 3"),
    "point negative": sql("update trial_params set param_value = -1 where trial_id = 3"),
    "point of other knobs": sql("update trial_params set param_name = 'x' || param_name where trial_id = 3"),
    "point incomplete": sql("delete from trial_params where trial_id = 3 and param_name like '%ffn%'"),
    "distribution not JSON": sql("update trial_params set distribution_json = '{' where trial_id = 3"),
    "distribution unknown": sql(
        """update trial_params set distribution_json = '{"name": "Odd", "attributes": {}}' where trial_id = 3"""
    ),
    "score not JSON": trial_attr("score", "{"),
    "score a number": trial_attr("score", 3),
    "score without quality": trial_attr("score", {"cost": {"params": 1, "macs": 1, "activation_bytes": 1}}),
    "score gone": sql("delete from trial_user_attributes where key = 'score' and trial_id = 3"),
    "score not a number": sql(
        'update trial_user_attributes set value_json = replace(value_json, \'"params": \', \'"params": NaN, "x": \')'
        " where key = 'score' and trial_id = 3"
    ),
    "score of another protocol": sql(
        'update trial_user_attributes set value_json = replace(value_json, \'"protocol_hash": "\', '
        "'\"protocol_hash\": \"f') where key = 'score' and trial_id = 3"
    ),
    "architecture a text": trial_attr("architecture", "emoji"),
    "architecture of another id": trial_attr("architecture_id", "0" * 12),
    "architecture gone": sql("delete from trial_user_attributes where key = 'architecture' and trial_id = 3"),
    "worker a text": trial_attr("worker", "me"),
    "worker gone": sql("delete from trial_user_attributes where key = 'worker' and trial_id = 3"),
    "constraints a text": added("system", "constraints", "3"),
    "constraint a text": added("system", "constraints:x", "[]"),
    "artifact a number": added("system", "artifacts:x", "3"),
    "values gone": sql("delete from trial_values where trial_id = 3"),
    "values infinite": sql("update trial_values set value = null, value_type = 'INF_POS' where trial_id = 3"),
    "state unknown": sql("update trials set state = 'ASLEEP' where trial_id = 3"),
    "date not a date": sql("update trials set datetime_start = 'yesterday' where trial_id = 3"),
    "retry of no trial": sql(
        "insert into trial_user_attributes (trial_id, key, value_json) values (3, 'retry_of', '77')"
    ),
    "continues no trial": sql(
        "insert into trial_user_attributes (trial_id, key, value_json) values (3, 'continues', '77')"
    ),
    "continues itself": sql(
        "insert into trial_user_attributes (trial_id, key, value_json) values (3, 'continues', '2')"
    ),
    "trials gone": sql("delete from trials where trial_id < 4"),
    "tables gone": sql("drop table trials"),
    "attributes' table gone": sql("drop table study_user_attributes"),
    "version gone": sql("delete from version_info"),
    "version of the future": sql("update version_info set schema_version = 99"),
    "revision unknown": sql("update alembic_version set version_num = 'v99'"),
}

COMMANDS = {
    "report": ["report", "study.yaml", "--out", "page.html"],
    "export": ["report", "study.yaml", "--out", "scores.jsonl"],
    "best": ["best", "study.yaml"],
    "cost": ["cost", "study.yaml:best"],
    "tabulate": ["tabulate", "study.yaml"],
}
MAY_SUCCEED = {
    "worker gone",
    "values gone",
    "values infinite",
    "architecture of another id",
    "version gone",
    "version of the future",
    "point negative",
}
"""Such a trial is not a candidate's, or what has changed is not read; Optuna reads -1 as the last of the choices."""


@pytest.fixture
def folder(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["archsearch", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capfd.readouterr().err


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i % 8 else []) for i, name in enumerate(TAMPERED)]
)
def test_a_tampered_study_is_told_in_one_line(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder / "runs" / "quick" / "study.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        with database:
            TAMPERED[name](database)
        database.execute("pragma wal_checkpoint(truncate)")
    lines = []
    for command, arguments in COMMANDS.items():
        status, err = run(arguments, monkeypatch, capfd)
        assert status in (0, 2), f"{command}: {err}"
        assert len(err.splitlines()) == (status == 2), f"{command}: {err}"
        lines += err.splitlines()
    try:
        search(quick.settings(folder, trials=TRIALS, sampler="random"), quiet=True, scorer=quick.QuickScorer)
    except InputError as error:
        lines.append(str(error))
    assert lines or name in MAY_SUCCEED


def foreign(directions: list[str], trials: int, name: str = "quick") -> str:
    """Storage with a study that another program made."""
    url = f"sqlite:///{Path('foreign.db').absolute()}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, storage=url, directions=directions)
    study.optimize(lambda trial: [trial.suggest_float("x", 0, 1)] * len(directions), n_trials=trials)
    return url


@pytest.mark.parametrize(
    ("directions", "trials"),
    [(["minimize"] * 2, 3), (["minimize"], 3), (["maximize", "minimize"], 0), (["maximize"], 2)],
)
def test_a_foreign_study_is_neither_read_nor_written_into(
    folder: Path, directions: list[str], trials: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url = foreign(directions, trials)
    before = "".join(sqlite3.connect("foreign.db").iterdump())
    with pytest.raises(InputError):
        search(quick.settings(folder, trials=TRIALS, storage=url), quiet=True, scorer=quick.QuickScorer)
    for arguments in COMMANDS.values():
        if arguments[0] != "cost":
            status, err = run([*arguments, "--storage", url], monkeypatch, capfd)
            assert (status, len(err.splitlines())) == (2, 1), err
    assert "".join(sqlite3.connect("foreign.db").iterdump()) == before


def test_a_foreign_study_beside_ones_own_is_left_alone(folder: Path) -> None:
    """Scores are taken from the other studies on a storage; from one that cannot be read, they are not."""
    url = foreign(["maximize"], 2, name="other")
    search(quick.settings(folder, trials=TRIALS, storage=url), quiet=True, scorer=quick.QuickScorer)
    assert len(load_study(quick.settings(folder, storage=url)).trials) == TRIALS


def test_a_database_of_another_program_is_not_written_into(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect("bookmarks.db")) as database, database:
        database.execute("create table bookmarks (url text)")
    before = Path("bookmarks.db").read_bytes()
    with pytest.raises(InputError, match="is a database of another program; name another file"):
        search(quick.settings(folder, storage="sqlite:///bookmarks.db"), quiet=True, scorer=quick.QuickScorer)
    assert Path("bookmarks.db").read_bytes() == before
