"""Optuna storage, leases of trials, and the queue of trials."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.storage.artifacts import artifact_store as artifact_store
    from archsearch.studies.storage.database import (
        open_storage as open_storage,
        open_study as open_study,
    )
    from archsearch.studies.storage.record import TrialRecord as TrialRecord
    from archsearch.studies.storage.trial_queue import TrialQueue as TrialQueue
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
