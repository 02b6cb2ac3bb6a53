from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.run import search
from archsearch.studies.storage import database
from snapgen.errors import InputError
from tests.archsearch.studies.quick import SPACE, QuickScorer

Make = Callable[..., StudyConfig]


def run(settings: StudyConfig) -> Any:
    return search(settings, quiet=True, scorer=QuickScorer)


def refused(settings: StudyConfig) -> str:
    with pytest.raises(InputError) as caught:
        run(settings)
    line = str(caught.value)
    assert "\n" not in line
    assert "; " in line
    return line


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("study.db", "is not an Optuna URL"),
        ("", "is not an Optuna URL"),
        ("nosuch://host/base", "unknown database 'nosuch'"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///folder", "is a folder"),
        ("sqlite:///a{b}.db", "braces"),
        ("sqlite:////proc/none/study.db", "name a writable file"),
        ("mysql+nosuchdriver://host/base", "unknown database"),
        ("oracle+cx_oracle://host/base", "is not installed"),
        ("postgresql+psycopg://nobody@127.0.0.1:1/none", "check the URL and that the server runs"),
    ],
)
def test_a_bad_url_is_one_line(settings: Make, tmp_path: Path, url: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    if "psycopg" in url:
        pytest.importorskip("psycopg")
    if url == "":
        pytest.skip("an empty storage is the default one")
    assert words in refused(settings(storage=url))


SECRETS = (
    "postgresql+psycopg://me:s3cret@127.0.0.1:1/none",
    "postgresql+psycopg://127.0.0.1:1/none?user=me&password=s3cret",
    "postgresql+psycopg:/me:s3cret@127.0.0.1:1/none",
    "me:s3cret@127.0.0.1",
    "postgresql+psycopg://me:pa@s3cret@127.0.0.1:1/none",
    "postgresql+psycopg://me:s3cret@127.0.0.1:port/none",
    "postgresql+psycopg://me:{s3cret}@127.0.0.1:1/none",
    "nosuch://me:s3cret@127.0.0.1/none",
)


@pytest.mark.parametrize("url", SECRETS)
def test_no_password_is_printed(settings: Make, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("psycopg")
    assert "s3cret" not in refused(settings(storage=url))
    assert "s3cret" not in database.without_password(url)
    assert "s3cret" not in "".join(capfd.readouterr())


def test_no_password_is_stored(settings: Make, server: str) -> None:
    study = run(settings(storage=f"{server}{'&' if '?' in server else '?'}sslpassword=s3cret", trials=1))
    assert study.user_attrs["settings"]["storage"]
    assert "s3cret" not in str([study.user_attrs, study.trials])


def test_an_address_without_a_password_is_whole() -> None:
    for url in ("sqlite:///runs/a/study.db", "sqlite:////tmp/a b.db", "postgresql+psycopg://me@host:5432/base?x=1"):
        assert database.without_password(url) == url


def test_a_password_is_not_printed(settings: Make) -> None:
    pytest.importorskip("psycopg")
    assert "s3cret" not in refused(settings(storage="postgresql+psycopg://me:s3cret@127.0.0.1:1/none"))


@pytest.mark.parametrize("content", [b"not a database, but long enough to be taken for one" * 40, os.urandom(8192)])
def test_a_file_that_is_no_database(settings: Make, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.db"
    path.write_bytes(content)
    line = refused(settings(storage=f"sqlite:///{path}"))
    assert line.startswith(str(path))
    assert path.read_bytes() == content


def test_a_truncated_database(settings: Make, tmp_path: Path) -> None:
    path = tmp_path / "cut.db"
    run(settings(storage=f"sqlite:///{path}", trials=2))
    path.write_bytes(path.read_bytes()[:5000])
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    assert str(path) in refused(settings(storage=f"sqlite:///{path}", trials=3))


def test_a_locked_database(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    path = tmp_path / "locked.db"
    holder = sqlite3.connect(path)
    holder.execute("BEGIN EXCLUSIVE")
    assert "another program holds it" in refused(settings(storage=f"sqlite:///{path}"))
    holder.close()


def test_reading_makes_no_file(settings: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has not begun; run archsearch search first"):
        database.load_study(settings(name="absent"))
    assert not (tmp_path / "runs").exists()


def test_a_study_that_another_process_begins_while_it_is_opened(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(trials=2)
    run(config)
    begun = database.stored_attrs(config)
    # As its format and its attributes are before the other process writes them.
    reads: Iterator[dict[str, Any]] = iter([{}, {}])
    monkeypatch.setattr(optuna.Study, "user_attrs", property(lambda _: next(reads, begun)))
    assert database.stored_attrs(config) == begun


def test_another_studys_file(settings: Make) -> None:
    run(settings(trials=2, storage="sqlite:///one.db"))
    with pytest.raises(InputError, match=r"no study 'other' \(it has: quick\)"):
        database.load_study(settings(name="other", storage="sqlite:///one.db"))


def test_a_run_is_found_by_its_name(settings: Make) -> None:
    run(settings(trials=2))
    assert database.open_study("quick").study_name == "quick"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"seed": 4}, "seed"),
        ({"objectives": ("params", "latency_ms")}, "objectives"),
        ({"constraints": {"params": 1e9}, "seed": 4}, "constraints"),
        ({"sampler": "random"}, "sampler"),
        ({"latency": {"threads": 2}}, "latency"),
        ({"protocol": {"steps": 7}}, "protocol.steps"),
    ],
)
def test_going_on_with_other_settings_is_refused(settings: Make, changes: dict[str, Any], place: str) -> None:
    run(settings(trials=2))
    line = refused(settings(trials=3, **changes))
    assert line.startswith(f"study: {place}: ")
    assert "give the study a new name" in line


@pytest.mark.parametrize(
    ("begun", "changed", "words"),
    [
        (
            {},
            {"objectives": ("params", "latency_ms")},
            "objectives: was [validation_loss, latency_ms] when quick began",
        ),
        ({}, {"seeds": {"first": 1, "front": 2}}, "seeds: was null when quick began"),
        (
            {"constraints": {"params": 1e9}},
            {"seed": 4},
            "constraints: was {params: 1000000000.0} when quick began",
        ),
        ({}, {"protocol": {"train_seeds": [2]}}, "protocol.train_seeds: [2] against [0, 1] when quick began"),
    ],
)
def test_stored_settings_are_shown_as_in_yaml(
    settings: Make, begun: dict[str, Any], changed: dict[str, Any], words: str
) -> None:
    run(settings(trials=2, **begun))
    assert f"study: {words}; " in refused(settings(trials=3, **changed))


def test_going_on_with_another_space_is_refused(settings: Make, tmp_path: Path) -> None:
    run(settings(trials=2))
    again = settings(trials=3)
    (tmp_path / "space.yaml").write_text(SPACE.replace("[2, 3, 4]", "[2, 4]"))
    assert refused(again).startswith("study: space.knobs: ")


def test_budget_workers_and_artifacts_may_change(settings: Make, tmp_path: Path) -> None:
    run(settings(trials=2))
    study = run(settings(trials=4, workers=1, threads_per_worker=2, artifacts=str(tmp_path / "elsewhere")))
    assert len([t for t in study.get_trials() if t.state.name == "COMPLETE"]) == 4
    assert len(list((tmp_path / "elsewhere").iterdir())) == 8


def test_an_artifact_folder_that_cannot_be_is_refused_at_once(settings: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "set artifacts to a writable folder" in refused(settings(artifacts=str(tmp_path / "file" / "folder")))


def test_the_space_not_found(settings: Make) -> None:
    assert "nowhere" in refused(settings(space="nowhere"))


def test_a_storage_opened_twice_keeps_its_locks(tmp_path: Path) -> None:
    """A process that closes a file loses all its locks on it, SQLite's too: another one then deletes the WAL in use."""
    path = tmp_path / "study.db"
    first = database.open_storage(f"sqlite:///{path}")
    study = optuna.create_study(storage=first, study_name="first")
    database.open_storage(f"sqlite:///{path}")
    other = (
        f"import sqlite3; c = sqlite3.connect({str(path)!r}); c.execute('select * from studies').fetchall(); c.close()"
    )
    subprocess.run([sys.executable, "-c", other], check=True)
    assert path.with_name("study.db-wal").exists(), "the other process thought that it was the last one"
    study.add_trial(optuna.create_trial(value=1.0))
    assert [trial.value for trial in optuna.load_study(study_name="first", storage=f"sqlite:///{path}").trials] == [1]
