"""Where a study lives: Optuna's storage and its artifact store, and nothing else."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.library import RUNS, shipped
from archsearch.protocol import ResolvedProtocol
from archsearch.studies.config.study import StudyConfig, load_config
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.artifacts import FileSystemArtifactStore
    from optuna.storages import RDBStorage

HEARTBEAT_SECONDS = 20
GRACE_SECONDS = 120
"""A trial whose worker, on another machine, has not been heard of for so long is run again."""

BUSY_SECONDS = 60
"""How long one process waits for another to finish writing to the same SQLite file."""

FIXED = ("objectives", "limits", "sampler", "seed", "latency", "plan", "evolve")
"""Settings that a study keeps from its first run to its last; its space and its protocol besides."""

_SQLITE = "sqlite:///"

_ALREADY_MADE = ("already exists", "UNIQUE constraint", "duplicate key")


def open_storage(url: str, *, source: str = "storage", create: bool = True) -> RDBStorage:
    """Optuna's storage at a URL, with heartbeats, and on SQLite in a mode that suits several processes.

    Args:
        source: who named the URL, for errors.
        create: whether a missing SQLite file, and its folder, are made.

    Raises:
        InputError: naming what is wrong with the URL or what it leads to.
    """
    _check(url, source, create=create)
    for tries_left in reversed(range(5)):
        try:
            with storage_errors(url, source):
                return _open(url)
        except InputError as error:
            # Two processes that make a new file's tables at the same moment: one of them finds them made.
            if tries_left == 0 or not any(said in error.problem for said in _ALREADY_MADE):
                raise
            time.sleep(0.2)
    raise AssertionError("not reached")


def _open(url: str) -> RDBStorage:
    import optuna
    import sqlalchemy

    on_sqlite = url.startswith("sqlite")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if on_sqlite and url.startswith(_SQLITE):
            # Readers and a writer do not wait for each other; the mode stays with the file.
            with contextlib.closing(sqlite3.connect(url.removeprefix(_SQLITE), timeout=BUSY_SECONDS)) as file:
                file.execute("PRAGMA journal_mode=WAL")
        arguments = {"connect_args": {"timeout": BUSY_SECONDS}} if on_sqlite else {"pool_pre_ping": True}
        storage = optuna.storages.RDBStorage(
            url, engine_kwargs=arguments, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS
        )
    if on_sqlite:
        # In this mode a killed process loses nothing; the power failing may cost the last seconds.
        sqlalchemy.event.listen(storage.engine, "connect", lambda file, _: file.execute("PRAGMA synchronous=NORMAL"))
        storage.engine.dispose()
    return storage


def _check(url: str, source: str, *, create: bool) -> None:
    import sqlalchemy

    remedy = "write e.g. sqlite:///runs/name/study.db or postgresql+psycopg://user@host/database"
    try:
        parsed = sqlalchemy.make_url(url)
        parsed.get_dialect()
    except sqlalchemy.exc.NoSuchModuleError:
        raise InputError(
            source, f"no database is called {url.partition(':')[0]!r:.60}", remedy, place="storage"
        ) from None
    except ImportError as error:
        raise _not_installed(error, source) from None
    except (sqlalchemy.exc.ArgumentError, ValueError, TypeError):
        raise InputError(source, f"{url!r:.80} is not an Optuna URL", remedy, place="storage") from None
    if "{" in url or "}" in url:
        raise InputError(source, "Optuna takes braces in a URL for its own", "rename the path", place="storage")
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed.database, source, remedy, create=create)


def _check_file(database: str | None, source: str, remedy: str, *, create: bool) -> None:
    if not database or database == ":memory:":
        raise InputError(source, "a study in memory can not be resumed", remedy, place="storage")
    path = Path(database)
    try:
        if path.is_dir():
            raise InputError(path, "is a folder", f"name a file in it, e.g. {path / 'study.db'}")
        if not path.exists() and not create:
            raise InputError(path, "does not exist: the study has not begun", "run archsearch search first")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            path, (error.strerror or "can not be made").lower(), "name a file that can be written"
        ) from None


@contextlib.contextmanager
def storage_errors(url: str, source: str = "storage") -> Iterator[None]:
    """Says in one line why a database could not be used."""
    import optuna
    import sqlalchemy

    shown = url.removeprefix(_SQLITE) if url.startswith(_SQLITE) else _without_password(url)
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, sqlite3.Error) as error:
        cause = error.__cause__ or getattr(error, "orig", None) or error
        problem = " ".join(str(getattr(cause, "orig", None) or cause).split())[:200]
        remedies = {
            "not a database": "it is damaged or no study; move it away or name another file",
            "malformed": "it is damaged; move it away or name another file",
            "locked": "another program holds it; close that one",
            "readonly": "make the file and its folder writable",
            "unable to open": "check the path and its permissions",
        }
        remedy = next((r for key, r in remedies.items() if key in problem), "check the URL and that the server runs")
        raise InputError(shown, problem, remedy) from None
    except ImportError as error:
        raise _not_installed(error, source) from None
    except RuntimeError as error:
        if "schema" not in str(error):
            raise
        raise InputError(shown, "was written by another version of Optuna", "run: optuna storage upgrade") from None


def _not_installed(error: ImportError, source: str) -> InputError:
    name = error.name or "psycopg[binary]"  # psycopg without its library raises an ImportError of no name
    return InputError(source, f"{name} is not installed", f"pip install '{name}'", place="storage")


def _without_password(url: str) -> str:
    import sqlalchemy

    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return "storage"


def load_study(settings: StudyConfig) -> Study:
    """A study that has begun, to read; it may be running, or have been killed.

    Raises:
        InputError: if there is none.
    """
    import optuna

    storage = open_storage(settings.url, source=settings.source, create=False)
    try:
        with storage_errors(settings.url), silence_optuna():
            return optuna.load_study(study_name=settings.name, storage=storage)
    except KeyError:
        others = ", ".join(optuna.get_all_study_names(storage)) or "none"
        problem = f"has no study {settings.name!r} (it has: {others})"
        raise InputError(settings.url, problem, "run archsearch search first") from None


def open_study(where: StudyConfig | str) -> Study:
    """`load_study`, from settings, a shipped study's name, a YAML file, or the name of a run under ``runs/``."""
    if isinstance(where, str):
        run = StudyConfig(name=where, space="", trials=1) if where not in shipped("search") and _is_run(where) else None
        where = run or load_config(where)
    return load_study(where)


def _is_run(name: str) -> bool:
    return "/" not in name and (RUNS / name / "study.db").is_file()


def create_or_resume(settings: StudyConfig, attrs: Mapping[str, Any]) -> Study:
    """The study to work on: a new one, or the same one again.

    Args:
        attrs: what a report needs beside the trials: ``space`` with its digest, ``protocol``, ``protocol_hash``,
            ``machine``.

    Raises:
        InputError: if it was begun with other settings, naming the first that differs.
    """
    import optuna

    storage = open_storage(settings.url, source=settings.source)
    with storage_errors(settings.url), silence_optuna():
        study = optuna.create_study(
            study_name=settings.name,
            storage=storage,
            directions=["minimize"] * len(settings.objectives),
            load_if_exists=True,
        )
        known = study.user_attrs
        if "settings" in known:
            ensure_unchanged(settings, attrs, known)
        # "settings" last: where it is, a killed first run had written the others.
        ours = {**attrs, "artifacts": str(settings.artifact_folder.absolute())}
        ours["settings"] = settings.model_dump(mode="json")
        for key, value in ours.items():
            if key != "machine" or key not in known:
                study.set_user_attr(key, value)
        study.set_metric_names(list(settings.objectives))
    return study


def ensure_unchanged(settings: StudyConfig, attrs: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse to go on with a study under settings that would give its numbers another meaning."""

    def refuse(place: str, problem: str) -> None:
        remedy = f"give the study a new name, or put it back (the study of that name is in {settings.url})"
        raise InputError(settings.source, problem, remedy, place=place)

    given = settings.model_dump(mode="json")
    begun_with = StudyConfig.model_validate(known["settings"]).model_dump(mode="json")
    for field in FIXED:
        if given[field] != begun_with[field]:
            refuse(field, f"was {_short(begun_with[field])} when {settings.name} began")
    if attrs["space"]["digest"] != known["space"]["digest"]:
        key = next(k for k in attrs["space"] if k != "digest" and attrs["space"][k] != known["space"].get(k))
        refuse(f"space.{key}", f"the space has changed since {settings.name} began")
    if attrs["protocol_hash"] != known["protocol_hash"]:
        ours, theirs = (ResolvedProtocol.model_validate(a["protocol"]) for a in (attrs, known))
        place, _, difference = (ours.first_difference(theirs) or "revision: of the code").partition(": ")
        refuse(f"protocol.{place}", f"{difference} when {settings.name} began")


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def artifact_store(study: Study) -> FileSystemArtifactStore:
    """Where a study's samples and weights are."""
    from optuna.artifacts import FileSystemArtifactStore

    folder = Path(study.user_attrs["artifacts"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = (error.strerror or "can not be made").lower()
        raise InputError(folder, problem, "name a folder that can be written under artifacts") from None
    return FileSystemArtifactStore(folder)


@contextlib.contextmanager
def silence_optuna() -> Iterator[None]:
    """Without Optuna's own lines."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
