"""Optuna storage, leases of trials, and the queue of trials."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.storage.database import artifact_store, open_storage, open_study
    from archsearch.studies.storage.record import TrialRecord
    from archsearch.studies.storage.trial_queue import TrialQueue
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["TrialQueue", "TrialRecord", "artifact_store", "open_storage", "open_study"]
