"""A storage that waits for a database that is away, because its server restarts or the network is down."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError, OperationalError, PendingRollbackError

from snapgen.errors import InputError

PATIENCE_SECONDS = 600.0
"""Longest outage that a search survives."""

_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 10.0
_TEMPORARY = ("08", "57P", "40", "53300")
"""SQL states of outages: no connection, a server that stops or starts, a lost race, too many clients."""

_patience: ContextVar[float] = ContextVar("patience", default=PATIENCE_SECONDS)

T = TypeVar("T")

# Optuna tells every error in reading, with the whole query, before it is raised.
logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Wait so long for a database that is away, inside the block and in this thread."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


def is_outage(error: BaseException) -> bool:
    """Whether an error of a database says that it is away, rather than that it refuses; a file never is."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    if isinstance(cause, PendingRollbackError):  # after an outage within a transaction
        return True
    if not isinstance(cause, DBAPIError) or isinstance(cause.orig, sqlite3.Error):
        return False
    state = getattr(cause.orig, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_TEMPORARY)
    return cause.connection_invalidated or isinstance(cause, OperationalError)


def wait_out(call: Callable[[], T]) -> T:
    """Call again and again while the database is away, as long as patience lasts.

    Raises:
        InputError: if the study was deleted in the meantime.
    """
    deadline, pause = time.monotonic() + _patience.get(), _PAUSE_SECONDS
    while True:
        try:
            return call()
        except KeyError:  # Optuna's, for a study or a trial that is not there
            raise InputError("the study", "was deleted while it was in use", "begin it again") from None
        except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
            if not is_outage(error) or time.monotonic() >= deadline:
                raise
        if pause == _PAUSE_SECONDS and multiprocessing.parent_process() is None:
            minutes = _patience.get() / 60
            print(f"the database is away; waiting for it, at most {minutes:.0f} minutes", file=sys.stderr, flush=True)
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


class PatientStorage(RDBStorage):
    """Optuna's storage in a database, whose calls wait while the database is away."""

    def set_trial_state_values(self, trial_id: int, state: TrialState, *more: Any, **named: Any) -> bool:
        """Set a trial's state; True, too, if it has that state because the answer to a first attempt was lost."""
        attempts = 0

        def once() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                done = super(PatientStorage, self).set_trial_state_values(trial_id, state, *more, **named)
            except optuna.exceptions.UpdateFinishedTrialError:
                if attempts == 1:
                    raise
                done = False
            return done or (attempts > 1 and super(PatientStorage, self).get_trial(trial_id).state == state)

        return wait_out(once)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Running trials without a heartbeat for the grace period; Optuna leaves out those that never had one."""

        def read() -> list[int]:
            with _create_scoped_session(self.scoped_session, True) as session:
                now = session.execute(sqlalchemy.func.now()).scalar()
                beats = (
                    session.query(models.TrialModel.trial_id, models.TrialHeartbeatModel.heartbeat)
                    .outerjoin(models.TrialHeartbeatModel)
                    .filter(models.TrialModel.state == TrialState.RUNNING, models.TrialModel.study_id == study_id)
                )
                assert now is not None
                oldest = now.replace(tzinfo=None) - timedelta(seconds=self.grace_period or 0)
                return [trial_id for trial_id, beat in beats if beat is None or beat < oldest]

        return wait_out(read)


def _patient(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(RDBStorage, name))
    def call(*arguments: Any, **named: Any) -> Any:
        return wait_out(lambda: getattr(RDBStorage, name)(*arguments, **named))

    return call


for _name in (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_trial_user_attrs",
    "get_trial_system_attrs",
    "get_all_studies",
    "_create_new_trial",
    "_set_trial_param",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial",
    "_get_trials",
    "record_heartbeat",
):
    setattr(PatientStorage, _name, _patient(_name))
