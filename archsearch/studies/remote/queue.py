"""Queue of latency measurements that a search requests and a remote device makes: the trials of a latency study.

Each combination of device, latent size, context length and options has a latency study in the search's storage. A
request is a waiting trial, and a claim is the storage's atomic change of its state; there is no other connection
between searches and devices, and nothing listens on a port. Every architecture is measured once: of several trials for
it that are waiting, running or done, the one with the lowest number is valid, and whoever claims another one drops it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from archsearch.latency.base import MeasurementError
from archsearch.score import LatencyRecord
from archsearch.studies.storage.attributes import FORMAT, check_format, has_format
from archsearch.studies.storage.database import silence_optuna
from archsearch.studies.storage.leases import SilenceWatch, is_dead, send_heartbeat, worker_identity
from archsearch.studies.storage.record import MeasurementRecord, TrialReader
from snapgen.architecture.schema import Architecture
from snapgen.config import problem_and_remedy
from snapgen.errors import InputError

STUDY_PREFIX = "latency of "
"""Beginning of the names of the studies that are queues of measurements."""
LARGEST_LATENT, LONGEST_CONTEXT = 4096, 65536
MAX_DEVICE_DEATHS = 5
"""An architecture is rejected once this many device processes have died while measuring it."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class MeasurementSpec:
    """Specification of measurements: kind of device, its options, latent size and context length.

    Raises:
        pydantic.ValidationError: if a field is missing or wrong.
    """

    device: str
    latent_size: Annotated[int, Field(ge=1, le=LARGEST_LATENT)]
    context_tokens: Annotated[int, Field(ge=1, le=LONGEST_CONTEXT)]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the latency study."""
        text = json.dumps(dict(self.options), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{STUDY_PREFIX}{self.device}, latent {self.latent_size}, {self.context_tokens} tokens, {digest}"


class MeasurementQueue:
    """Queue of one latency study, used by searches and by devices."""

    def __init__(self, storage: RDBStorage, spec: MeasurementSpec) -> None:
        self.spec, self._storage = spec, storage
        with silence_optuna():
            self._study = optuna.create_study(
                study_name=spec.name, storage=storage, directions=["minimize"], load_if_exists=True
            )
        check_format(self._study)
        if "order" not in self._study.user_attrs:
            self._study.set_user_attr("format", FORMAT)
            self._study.set_user_attr("order", asdict(spec))

        self._watch = SilenceWatch(storage, self._study._study_id)
        self._reader = TrialReader(self._study, self._parse)
        self._damaged: dict[int, str] = {}
        self._records: dict[int, MeasurementRecord] = {}
        self._unfinished: dict[int, MeasurementRecord] = {}
        self._by_architecture: dict[str, dict[int, MeasurementRecord]] = {}
        self._unanswered: set[str] = set()

    def trials(self) -> list[MeasurementRecord]:
        """All requests and measurements, by number."""
        self._read()
        return list(self._records.values())

    def _read(self) -> None:
        for t in self._reader.changes():
            self._records[t.number] = t
            self._by_architecture.setdefault(t.architecture_id, {})[t.number] = t
            if t.state in ("waiting", "running"):
                self._unfinished[t.number] = t
            else:
                self._unfinished.pop(t.number, None)
            attempts = self._attempts(t.architecture_id)
            is_unanswered = not _active(attempts) and _rejection(attempts) is None
            (self._unanswered.add if is_unanswered else self._unanswered.discard)(t.architecture_id)

    def _parse(self, t: FrozenTrial) -> MeasurementRecord | None:
        try:
            return MeasurementRecord.read(self._study, t)
        except InputError as error:  # one request that somebody damaged must not keep the others waiting
            self._damaged[t._trial_id] = f"{error.place}: {error.problem}"
            return None

    def _attempts(self, architecture_id: str) -> list[MeasurementRecord]:
        return list(self._by_architecture.get(architecture_id, {}).values())

    # Used by searches

    def request(self, arch: Architecture) -> None:
        """Request a measurement, unless it exists, waits, runs or was rejected."""
        self._read()
        attempts = self._attempts(arch.id)
        if not _active(attempts) and _rejection(attempts) is None:
            self._enqueue(arch)

    def answer(self, arch: Architecture) -> LatencyRecord | None:
        """The measurement of an architecture; None while it is pending.

        Raises:
            MeasurementError: if the device cannot run the architecture; the message is the reason.
        """
        self._read()
        attempts = self._attempts(arch.id)
        if done := [t.record for t in attempts if t.state == "scored"]:
            return done[0]
        if not _active(attempts) and (reason := _rejection(attempts)):
            raise MeasurementError(reason)
        return None

    def records(self) -> dict[str, LatencyRecord]:
        """All measurements by architecture id."""
        done = [t for t in reversed(self.trials()) if t.state == "scored"]
        return {t.architecture_id: t.record for t in done if t.record is not None}

    def _enqueue(self, arch: Architecture) -> None:
        MeasurementRecord.create(self._study, "WAITING", architecture_id=arch.id, architecture=arch)

    def reopen(self) -> None:
        """Let every architecture that was rejected be measured again when it is requested."""
        self._read()
        for attempts in map(self._attempts, list(self._by_architecture)):
            if not _active(attempts) and _rejection(attempts):
                arch = attempts[0].architecture
                fields = {"architecture_id": arch.id, "architecture": arch, "reopens": True}
                MeasurementRecord.create(self._study, "FAIL", **fields)

    # Used by devices

    def claim(self) -> MeasurementRecord | None:
        """Claim the first waiting measurement; None if none waits."""
        self._read()
        for t in [t for t in self._unfinished.values() if t.state == "waiting"]:
            # Identity and heartbeat are set before the claim, so that a death right after it is noticed at once. Other
            # devices may overwrite the identity until the claim succeeds, so it is set again.
            with suppress(UpdateFinishedTrialError):
                MeasurementRecord.write(self._storage, t.trial_id, worker=worker_identity())
                send_heartbeat(self._storage, t.trial_id)
                if not self._storage.set_trial_state_values(t.trial_id, TrialState.RUNNING):
                    continue
                MeasurementRecord.write(self._storage, t.trial_id, worker=worker_identity())
                self._read()
                if all(other.number >= t.number for other in _active(self._attempts(t.architecture_id))):
                    return t
                MeasurementRecord.end(self._storage, t.trial_id, duplicate=True)
        return None

    def refuse_damaged(self) -> Iterator[str]:
        """End the requests that cannot be read; gives a line for each that this call ended."""
        self._read()
        for trial_id, problem in self._damaged.items():
            if MeasurementRecord.end(self._storage, trial_id, refused=problem):
                yield f"a request in {self.spec.name!r} is damaged and refused: {problem}"
        self._damaged.clear()

    def complete(self, claimed: MeasurementRecord, record: LatencyRecord) -> bool:
        """Store a measurement; False if another device took this one for dead and has claimed the measurement."""
        return MeasurementRecord.end(self._storage, claimed.trial_id, [record.median_ms], record=record)

    def reject(self, claimed: MeasurementRecord, reason: str) -> None:
        """Record that this kind of device cannot measure the architecture; it is not tried again."""
        MeasurementRecord.end(self._storage, claimed.trial_id, refused=reason)

    def release(self, claimed: MeasurementRecord) -> None:
        """Return a measurement to the queue: this device was stopped or lost, which is not the architecture's fault."""
        if MeasurementRecord.end(self._storage, claimed.trial_id, given_back=True):
            self._enqueue(claimed.architecture)

    # Dead devices

    def reap_dead(self) -> list[int]:
        """Return the measurements of dead devices to the queue.

        Devices on this machine are noticed at once, others when their heartbeat has stopped.

        Returns:
            Numbers of the trials that this call ended.
        """
        self._read()
        running = [t for t in self._unfinished.values() if t.state == "running"]
        silent = self._watch.silent()
        dead = [t for t in running if t.trial_id in silent or (t.worker is not None and is_dead(t.worker))]
        reaped = [t.number for t in dead if MeasurementRecord.end(self._storage, t.trial_id, died=True)]
        self._read()
        for attempts in sorted(map(self._attempts, self._unanswered), key=lambda attempts: attempts[0].number):
            self._enqueue(attempts[0].architecture)
        return reaped


def _active(trials: Sequence[MeasurementRecord]) -> list[MeasurementRecord]:
    return [t for t in trials if t.state != "failed"]


def _rejection(trials: Sequence[MeasurementRecord]) -> str | None:
    """Why an architecture is not tried again; None if it may be."""
    reopened = max((i for i, t in enumerate(trials) if t.reopens), default=-1)
    since = trials[reopened + 1 :]
    reasons = [t.refused for t in since if t.refused is not None]
    if reasons:
        return reasons[0]
    died = sum(t.died for t in since)
    return f"{died} device processes died in its measurement" if died >= MAX_DEVICE_DEATHS else None


def requested_specs(
    storage: RDBStorage, device: str, *, damaged: Callable[[str], None] = lambda _: None
) -> Iterator[MeasurementSpec]:
    """Specifications of all measurements that were requested from a kind of device in a storage.

    Args:
        damaged: called with a line for each that cannot be read, which is left out.
    """
    for name in sorted(optuna.get_all_study_names(storage)):
        if not name.startswith(STUDY_PREFIX):
            continue
        study = optuna.load_study(study_name=name, storage=storage)
        order = study.user_attrs.get("order") if has_format(study) else None
        if not isinstance(order, dict) or order.get("device") != device:
            continue
        try:
            spec = MeasurementSpec(**order)
        except ValidationError as error:
            damaged(f"{name!r:.80} is damaged and left out: {problem_and_remedy(error)[0]}")
        else:
            yield spec
