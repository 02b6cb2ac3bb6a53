"""The end of a trial that others, who took its worker for dead, may have ended before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def end(
    storage: BaseStorage,
    trial_id: int,
    state: Literal["COMPLETE", "FAIL"],
    values: Sequence[float] | None = None,
    /,
    **attrs: Any,
) -> bool:
    """Note attributes and end a trial; False, and nothing changes, if it has ended already."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        for key, value in attrs.items():
            storage.set_trial_user_attr(trial_id, key, value)
        storage.set_trial_state_values(trial_id, TrialState[state], values)
    except UpdateFinishedTrialError:
        return False
    return True
