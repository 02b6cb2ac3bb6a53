"""Latency measurements that a search asks for and a device somewhere else makes: waiting trials of a latency study.

Each device, latent and set of options has a study of its own in the search's storage. A request is a waiting trial, the
storage's atomic change of its state the claim; nothing else is between the searches and the devices, and nothing
listens on a port. Every architecture is measured once: of several trials for one that are waiting, running or done, the
one of the lowest number counts, and whoever claims another drops it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from archsearch.latency.base import MeasurementError
from archsearch.score import LatencyRecord
from archsearch.studies.storage.database import silence_optuna
from archsearch.studies.storage.leases import end_trial, is_dead, send_heartbeat, worker_identity
from snapgen.architecture.schema import Architecture

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

PREFIX = "latency of "
DEATHS = 5
"""A candidate in whose measurement so many device processes died is given up."""

LIVE = ("WAITING", "RUNNING", "COMPLETE")


@dataclass(frozen=True)
class MeasurementSpec:
    """What is measured: on which kind of device, with which of its options, at which latent and context."""

    device: str
    latent_size: int
    context_tokens: int
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The latency study's name."""
        text = json.dumps(dict(self.options), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{PREFIX}{self.device}, latent {self.latent_size}, {self.context_tokens} tokens, {digest}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {**vars(self), "options": dict(self.options)}


@dataclass(frozen=True)
class ClaimedMeasurement:
    """A measurement that is ours to make."""

    trial_id: int
    number: int
    architecture: Architecture


class MeasurementQueue:
    """One latency study, for those who ask and those who measure."""

    def __init__(self, storage: RDBStorage, order: MeasurementSpec) -> None:
        import optuna

        self.order, self._storage = order, storage
        with silence_optuna():
            self._study = optuna.create_study(
                study_name=order.name, storage=storage, directions=["minimize"], load_if_exists=True
            )
        if "order" not in self._study.user_attrs:
            self._study.set_user_attr("order", order.to_dict())

    def trials(self) -> list[FrozenTrial]:
        """All trials, each with what is known of it."""
        return self._study.get_trials(deepcopy=False)

    # Those who ask

    def request(self, arch: Architecture) -> None:
        """Ask for a measurement, unless there is one, or one under way, or it was refused."""
        mine = [t for t in self.trials() if t.user_attrs["architecture_id"] == arch.id]
        if not _live(mine) and _refusal(mine) is None:
            self._enqueue(arch.id, arch.model_dump(mode="json"))

    def answer(self, arch: Architecture) -> LatencyRecord | None:
        """The measurement of an architecture, once it is made.

        Raises:
            LatencyFailure: if it can not be made on that device; it says why.
        """
        mine = [t for t in self.trials() if t.user_attrs["architecture_id"] == arch.id]
        if done := [t for t in mine if t.state.name == "COMPLETE"]:
            return LatencyRecord.model_validate(done[0].user_attrs["record"])
        if not _live(mine) and (reason := _refusal(mine)):
            raise MeasurementError(reason)
        return None

    def records(self) -> dict[str, LatencyRecord]:
        """All measurements by architecture id."""
        done = [t for t in reversed(self.trials()) if t.state.name == "COMPLETE"]
        return {t.user_attrs["architecture_id"]: LatencyRecord.model_validate(t.user_attrs["record"]) for t in done}

    def _enqueue(self, arch_id: str, arch: Mapping[str, Any]) -> None:
        from optuna.trial import TrialState, create_trial

        attrs = {"architecture_id": arch_id, "architecture": dict(arch)}
        self._storage.create_new_trial(
            self._study._study_id, template_trial=create_trial(state=TrialState.WAITING, user_attrs=attrs)
        )

    # Those who measure

    def claim(self) -> ClaimedMeasurement | None:
        """The first waiting measurement, ours from now on; None: nothing waits."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        for t in [t for t in self.trials() if t.state.name == "WAITING"]:
            # Before the claim, so that one who dies just after it is missed at once; others may write theirs too.
            with suppress(UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(t._trial_id, "worker", worker_identity())
                send_heartbeat(self._storage, t._trial_id)
                if not self._storage.set_trial_state_values(t._trial_id, TrialState.RUNNING):
                    continue
                self._storage.set_trial_user_attr(t._trial_id, "worker", worker_identity())
                if self._counts(t):
                    return ClaimedMeasurement(
                        t._trial_id, t.number, Architecture.model_validate(t.user_attrs["architecture"])
                    )
                end_trial(self._storage, t._trial_id, "FAIL", duplicate=True)
        return None

    def _counts(self, claimed: FrozenTrial) -> bool:
        same = [t for t in self.trials() if t.user_attrs["architecture_id"] == claimed.user_attrs["architecture_id"]]
        return all(t.number >= claimed.number for t in _live(same))

    def tell(self, claimed: ClaimedMeasurement, record: LatencyRecord) -> bool:
        """Keep a measurement; False if others took us for dead and it is theirs now."""
        told = record.model_dump(mode="json")
        return end_trial(self._storage, claimed.trial_id, "COMPLETE", [record.median_ms], record=told)

    def refuse(self, claimed: ClaimedMeasurement, reason: str) -> None:
        """Say that this architecture can not be measured here, whoever tries."""
        end_trial(self._storage, claimed.trial_id, "FAIL", refused=reason)

    def give_back(self, claimed: ClaimedMeasurement) -> None:
        """Let another device make it: this one was stopped or lost, which says nothing of the architecture."""
        if end_trial(self._storage, claimed.trial_id, "FAIL", given_back=True):
            self._enqueue(claimed.architecture.id, claimed.architecture.model_dump(mode="json"))

    # The dead

    def bury(self) -> list[int]:
        """Put back what dead devices left: those of this machine at once, of others when their heartbeat has stopped.

        Returns:
            The numbers of the trials whose device was found dead by us.
        """
        running = [t for t in self.trials() if t.state.name == "RUNNING"]
        stale = set(self._storage._get_stale_trial_ids(self._study._study_id))
        dead = [t for t in running if t._trial_id in stale or is_dead(t.user_attrs.get("worker", {}))]
        buried = [t.number for t in dead if end_trial(self._storage, t._trial_id, "FAIL", died=True)]
        by_arch: dict[str, list[FrozenTrial]] = {}
        for t in self.trials():
            by_arch.setdefault(t.user_attrs["architecture_id"], []).append(t)
        for arch_id, tried in by_arch.items():
            if not _live(tried) and _refusal(tried) is None:
                self._enqueue(arch_id, tried[0].user_attrs["architecture"])
        return buried


def _live(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if t.state.name in LIVE]


def _refusal(trials: Sequence[FrozenTrial]) -> str | None:
    """Why an architecture is not tried again."""
    reasons = [t.user_attrs["refused"] for t in trials if "refused" in t.user_attrs]
    if reasons:
        return str(reasons[0])
    died = sum("died" in t.user_attrs for t in trials)
    return f"{died} device processes died in its measurement" if died >= DEATHS else None


def orders(storage: RDBStorage, device: str) -> Iterator[MeasurementSpec]:
    """Everything that has been asked of a kind of device in a storage."""
    import optuna

    for name in sorted(optuna.get_all_study_names(storage)):
        if name.startswith(PREFIX):
            attrs = optuna.load_study(study_name=name, storage=storage).user_attrs
            if attrs.get("order", {}).get("device") == device:
                yield MeasurementSpec(**attrs["order"])
