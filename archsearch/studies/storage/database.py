"""Storage of a study: Optuna's database and its artifact store, and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna import Study
from optuna.storages import RDBStorage

from archsearch.library import is_run
from archsearch.protocol import ResolvedProtocol
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.storage.attributes import FORMAT, check_attributes, parse_errors
from archsearch.studies.storage.outages import PATIENCE_SECONDS, PatientStorage, patience, wait_out
from snapgen import files
from snapgen.config import as_yaml
from snapgen.errors import InputError, os_errors

HEARTBEAT_SECONDS = 20
"""Interval between two heartbeats of a running trial."""

GRACE_SECONDS = 120
"""A trial on another machine is run again if its worker has sent no heartbeat for this long."""

BUSY_SECONDS = 60
"""Longest time that a process waits for another one to finish writing to the same SQLite file."""

FIXED_SETTINGS = (
    "objectives",
    "constraints",
    "sampler",
    "seed",
    "seeds",
    "rungs",
    "latency",
    "initial_points",
    "evolve",
)
"""Settings that may not change once a study has begun, in addition to its space, its protocol and what it starts from
(`archsearch.studies.search.start`)."""

_SECRET = re.compile("pass|pwd|secret|token", re.IGNORECASE)
_SQLITE = "sqlite:///"
_PSYCOPG = "postgresql://", "postgresql+psycopg"

_CONNECTION = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""Settings of libpq with which a connection that the network has lost is noticed within a minute."""

_REACHED: set[str] = set()
"""Databases that this process has reached: where one is away, it is waited for."""

_ALREADY_CREATED = ("already exists", "UNIQUE constraint", "duplicate key")


def open_storage(url: str, *, source: str = "storage", create: bool = True) -> RDBStorage:
    """Open Optuna's storage at a URL, with heartbeats; SQLite files are set up for several processes.

    Args:
        source: file or option that named the URL, for error messages.
        create: whether to create a missing SQLite file and its folder.

    Raises:
        InputError: if the URL is invalid or the database cannot be opened.
    """
    _check(url, source, create=create)
    for tries_left in reversed(range(5)):
        try:
            with storage_errors(url, source), patience(PATIENCE_SECONDS if url in _REACHED else 0):
                storage = wait_out(lambda: _open(url))
            _REACHED.add(url)
            return storage
        except InputError as error:
            # Two processes created the tables of a new file at the same moment: retry, now that the tables exist.
            if tries_left == 0 or not any(message in error.problem for message in _ALREADY_CREATED):
                raise
            time.sleep(0.2)
    raise AssertionError("not reached")


def expect(url: str) -> None:
    """Wait for a database where it is away: another process of this search has just reached it."""
    _REACHED.add(url)


def _open(url: str) -> RDBStorage:
    on_sqlite = url.startswith("sqlite")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if on_sqlite and url.startswith(_SQLITE):
            # WAL: readers and a writer do not block each other. The mode is stored in the file.
            with contextlib.closing(sqlite3.connect(url.removeprefix(_SQLITE), timeout=BUSY_SECONDS)) as file:
                file.execute("PRAGMA journal_mode=WAL")
        connection: dict[str, Any] = _CONNECTION if url.startswith(_PSYCOPG) else {}
        arguments = {"timeout": BUSY_SECONDS} if on_sqlite else connection
        storage = PatientStorage(
            url,
            engine_kwargs={"connect_args": arguments, "pool_pre_ping": not on_sqlite},
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
        )
    if on_sqlite:
        # With WAL, synchronous=NORMAL loses nothing if a process is killed; a power cut may lose the last seconds.
        sqlalchemy.event.listen(storage.engine, "connect", lambda file, _: file.execute("PRAGMA synchronous=NORMAL"))
        storage.engine.dispose()
    return storage


def _check(url: str, source: str, *, create: bool) -> None:
    remedy = "write e.g. sqlite:///runs/name/study.db or postgresql+psycopg://user@host/database"
    try:
        parsed = sqlalchemy.make_url(url)
        parsed.get_dialect()
    except sqlalchemy.exc.NoSuchModuleError:
        raise InputError(source, f"unknown database {url.partition(':')[0]!r:.60}", remedy, place="storage") from None
    except ImportError as error:
        raise _not_installed(error, source) from None
    except (sqlalchemy.exc.ArgumentError, ValueError, TypeError):
        shown = "the text" if "@" in url or _SECRET.search(url) else f"{url!r:.80}"
        raise InputError(source, f"{shown} is not an Optuna URL", remedy, place="storage") from None
    if "@" in (parsed.host or ""):
        problem = "has a password or a name with an @ in it"
        raise InputError(source, problem, "write %40 in its place", place="storage")
    if "{" in url or "}" in url:
        raise InputError(source, "Optuna does not accept braces in a URL", "rename the path", place="storage")
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed.database, source, remedy, create=create)


def _check_file(database: str | None, source: str, remedy: str, *, create: bool) -> None:
    if not database or database == ":memory:":
        raise InputError(source, "a study in memory cannot be resumed", remedy, place="storage")
    path = Path(database)
    with os_errors(path, "name a writable file", "cannot be created"):
        if path.is_dir():
            raise InputError(path, "is a folder", f"name a file in it, e.g. {path / 'study.db'}")
        if not path.exists() and not create:
            raise InputError(path, "does not exist: the study has not begun", "run archsearch search first")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_is_optunas(path)


def _check_is_optunas(path: Path) -> None:
    """Raise if an SQLite file has tables, but none of Optuna's, which would be made in it; a damaged one passes."""
    files.check_regular(path)
    uri, wait = f"{path.absolute().as_uri()}?mode=ro", min(5, BUSY_SECONDS)  # one that is locked passes
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(uri, timeout=wait, uri=True)) as file:
        tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and not tables & {"studies", "version_info"}:
            raise InputError(path, "is a database of another program", "name another file")


def database_errors() -> tuple[type[Exception], ...]:
    """Classes of the errors that a database raises through a study."""
    return sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, sqlite3.Error


@contextlib.contextmanager
def storage_errors(url: str, source: str = "storage") -> Iterator[None]:
    """Convert errors of the database raised inside the block into an `InputError` of one line."""
    shown = url.removeprefix(_SQLITE) if url.startswith(_SQLITE) else without_password(url)
    try:
        yield
    except database_errors() as error:
        cause = error.__cause__ or getattr(error, "orig", None) or error
        problem = " ".join(str(getattr(cause, "orig", None) or cause).split())[:200]
        remedies = {
            "not a database": "it is damaged or not a study; move it away or name another file",
            "malformed": "it is damaged; move it away or name another file",
            "locked": "another program holds it; close that one",
            "readonly": "make the file and its folder writable",
            "disk is full": "free disk space; the same command resumes",
            "disk I/O": "check the disk; the same command resumes",
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
    name = error.name or "psycopg[binary]"  # psycopg without libpq raises an ImportError without a name
    return InputError(source, f"{name} is not installed", f"pip install '{name}'", place="storage")


def without_password(url: str) -> str:
    """An Optuna URL as it may be shown and stored, without what is secret in it."""
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError, TypeError):
        return "storage"
    secret = [name for name in parsed.query if _SECRET.search(name)]
    host = parsed.host and parsed.host.rpartition("@")[2]  # before which the rest of a password may stand
    login = sqlalchemy.URL.create(parsed.drivername, parsed.username, None, host, parsed.port, parsed.database)
    return login.set(query=parsed.difference_update_query(secret).query).render_as_string(hide_password=False)


def load_study(settings: StudyConfig) -> Study:
    """Load a study that has begun; it may be running, finished or killed.

    Raises:
        InputError: if the storage or the study does not exist, or the study is damaged or another program's.
    """
    storage = open_storage(settings.url, source=settings.source, create=False)
    with storage_errors(settings.url), parse_errors(without_password(settings.url)), silence_optuna():
        names = optuna.get_all_study_names(storage)
        if settings.name not in names:
            problem = f"has no study {settings.name!r} (it has: {', '.join(names) or 'none'})"
            raise InputError(without_password(settings.url), problem, "run archsearch search first")
        study = optuna.load_study(study_name=settings.name, storage=storage)
        check_attributes(study)
    return study


def stored_attrs(settings: StudyConfig) -> dict[str, Any]:
    """User attributes of a study; empty if it has not begun. Keeps no connection, of which a server has few."""
    try:
        storage = open_storage(settings.url, source=settings.source, create=False)
    except InputError:
        return {}
    try:
        with storage_errors(settings.url), parse_errors(without_password(settings.url)), silence_optuna():
            if settings.name not in optuna.get_all_study_names(storage):
                return {}
            study = optuna.load_study(study_name=settings.name, storage=storage)
            return check_attributes(study, begun=False)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def open_study(where: str) -> Study:
    """Load the study whose settings `study_config` finds."""
    return load_study(study_config(where))


def study_config(where: str) -> StudyConfig:
    """Settings with the name and the storage of a study.

    Args:
        where: a shipped study's name, a YAML file, or the name of a run under ``runs/``.
    """
    return StudyConfig(name=where, space="", trials=1) if is_run(where) else load_config(where)


def same_storage(a: str, b: str) -> bool:
    """Whether two Optuna URLs name one storage; a relative SQLite file is one of the current directory."""
    return _canonical(a) == _canonical(b)


def storage_digest(url: str) -> str:
    """Short name of a storage, which differs from that of every other one."""
    return hashlib.sha256(_canonical(url).encode()).hexdigest()[:8]


def _canonical(url: str) -> str:
    is_file = url.startswith(_SQLITE)
    return str(Path(url.removeprefix(_SQLITE)).resolve()) if is_file else without_password(url)


def create_or_resume(settings: StudyConfig, attrs: Mapping[str, Any]) -> Study:
    """Create a study, or resume it if it exists.

    Args:
        attrs: user attributes that a report needs beside the trials: ``space`` with its digest, ``protocol``,
            ``protocol_hash`` and ``machine``.

    Raises:
        InputError: if the study began with other settings; it names the first one that differs.
    """
    storage = open_storage(settings.url, source=settings.source)
    with storage_errors(settings.url), silence_optuna():
        with parse_errors(without_password(settings.url)):
            study = optuna.create_study(
                study_name=settings.name,
                storage=storage,
                directions=["minimize"] * len(settings.objectives),
                load_if_exists=True,
            )
        existing = check_attributes(study, begun=False)
        if len(study.directions) != len(settings.objectives):
            raise changed_setting(settings, "objectives", f"were {len(study.directions)} when {settings.name} began")
        if "settings" in existing:
            ensure_unchanged(settings, attrs, existing)
        # "settings" is written last: if it is there, all other attributes were written before it.
        new_attrs = {"format": FORMAT, **attrs, "artifacts": str(settings.artifact_folder.absolute())}
        storage_url = settings.storage and without_password(settings.storage)
        new_attrs["settings"] = {**settings.model_dump(mode="json"), "storage": storage_url}
        for key, value in new_attrs.items():
            if key != "machine" or key not in existing:
                study.set_user_attr(key, value)
        study.set_metric_names(list(settings.objectives))
    return study


def rename(study: Study) -> str:
    """Give a study the first free name of ``NAME-1``, ``NAME-2``, … in its storage, and return it."""
    storage, old = study._storage, study.study_name
    taken = set(optuna.get_all_study_names(storage))
    new = next(name for i in itertools.count(1) if (name := f"{old}-{i}") not in taken)
    statement = "UPDATE studies SET study_name = :new WHERE study_id = :id AND study_name = :old"
    backend: Any = getattr(storage, "_backend", storage)
    with backend.engine.begin() as connection:  # Optuna itself cannot rename a study
        connection.execute(sqlalchemy.text(statement), {"new": new, "id": study._study_id, "old": old})
    return new


def ensure_unchanged(settings: StudyConfig, attrs: Mapping[str, Any], existing: Mapping[str, Any]) -> None:
    """Raise if the study was created with settings that would make its scores incomparable.

    Args:
        attrs: attributes of the run that starts now.
        existing: attributes stored when the study began.

    Raises:
        InputError: if an objective, constraint, sampler, seed, latency setting, the space or the protocol has changed.
    """
    now = settings.model_dump(mode="json")
    before = StudyConfig.model_validate(existing["settings"]).model_dump(mode="json")
    for field in FIXED_SETTINGS:
        if now[field] != before[field]:
            problem = f"was {as_yaml(before[field], max_length=80)} when {settings.name} began"
            raise changed_setting(settings, field, problem)
    if attrs["space"]["digest"] != existing["space"]["digest"]:
        keys = [key for key in (*attrs["space"], "proxy") if key not in ("name", "digest")]
        key = next(key for key in keys if attrs["space"].get(key) != existing["space"].get(key))
        place, what = ("proxy", "the proxy") if key == "proxy" else (f"space.{key}", "the space")
        raise changed_setting(settings, place, f"{what} has changed since {settings.name} began")
    if attrs["protocol_hash"] != existing["protocol_hash"]:
        current, stored = (ResolvedProtocol.model_validate(a["protocol"]) for a in (attrs, existing))
        place, _, difference = (current.first_difference(stored) or "revision: of the code").partition(": ")
        raise changed_setting(settings, f"protocol.{place}", f"{difference} when {settings.name} began")


def changed_setting(settings: StudyConfig, place: str, problem: str) -> InputError:
    """The error for a setting that may not change once the study has begun."""
    where = without_password(settings.url)
    remedy = f"give the study a new name, or restore the setting (the existing study is in {where})"
    return InputError(settings.source, problem, remedy, place=place)


@contextlib.contextmanager
def silence_optuna() -> Iterator[None]:
    """Suppress Optuna's log lines below a warning."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
