"""Records of a study's trials: the one place where trials are read from Optuna's storage and written to it.

A record's fields are user attributes of the trial, under the field's name or its alias, and what Optuna itself knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, Generic, Literal, Self, TypeVar

from optuna import Study
from optuna.artifacts import ArtifactMeta
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import BaseModel, ConfigDict, Field, model_validator

from archsearch.score import Cost, LatencyRecord, Quality, Score, metric_label
from archsearch.studies.storage.attributes import Printable, parse_errors
from archsearch.studies.storage.rounds import EvolutionRound
from snapgen.architecture.schema import Architecture
from snapgen.config import Config, parse_config
from snapgen.errors import InputError

State = Literal["waiting", "running", "scored", "infeasible", "failed", "paused"]

_STATES: Mapping[str, State] = {
    "WAITING": "waiting",
    "RUNNING": "running",
    "COMPLETE": "scored",
    "PRUNED": "infeasible",
    "FAIL": "failed",
}
"""States of a record by the names of Optuna's; a pruned trial with a rung is paused."""

_ARTIFACT, _CONSTRAINT = "artifacts:", "constraints"
"""Prefixes of the system attributes in which Optuna stores a trial's artifacts and constraints."""

_UNSCORED = Score(cost=Cost(params=0, macs=0, activation_bytes=0))
"""Score of a trial whose cost is not known."""


class WorkerIdentity(Config):
    """Process that works on a trial (`archsearch.studies.storage.leases`); pid and start are unique on a host."""

    host: str
    pid: int
    started: float = 0.0


class Rung(Config):
    """A training run as it was when it paused."""

    step: int
    quality: Quality
    """Quality after that step; not comparable with that after the whole run."""


class StoredTrial(Config):
    """Common to the trials of searches and of latency studies."""

    model_config = ConfigDict(extra="ignore", validate_by_name=True, validate_by_alias=True)

    trial_id: int
    number: int
    """Optuna's number of the trial."""
    state: State
    worker: WorkerIdentity | None = None
    architecture_id: str | None = None
    architecture: Architecture | None = None

    @classmethod
    def read(cls, study: Study, trial: FrozenTrial, **fields: Any) -> Self:
        """The record of a trial; ``fields`` replace what is stored.

        Raises:
            InputError: if an attribute is damaged; it names the study, the trial and the attribute.
        """
        values = {**trial.user_attrs, "trial_id": trial._trial_id, "number": trial.number}
        values |= {"state": _STATES[trial.state.name], **fields}
        try:
            return parse_config(values, cls, source=f"trial {trial.number} of study {study.study_name}")
        except InputError as error:
            raise damaged(error.source, error.problem, error.place) from None

    @classmethod
    def create(cls, study: Study, state: Literal["WAITING", "RUNNING", "FAIL"], **fields: Any) -> int:
        """Create a trial with some fields; returns its id in the storage."""
        template = create_trial(state=TrialState[state], user_attrs=cls._attributes(fields))
        return int(study._storage.create_new_trial(study._study_id, template_trial=template))

    @classmethod
    def write(cls, storage: BaseStorage, trial_id: int, **fields: Any) -> None:
        """Store fields of a trial; Optuna raises `UpdateFinishedTrialError` if the trial has ended."""
        for key, value in cls._attributes(fields).items():
            storage.set_trial_user_attr(trial_id, key, value)

    @staticmethod
    def write_sampler_attrs(storage: BaseStorage, trial_id: int, attrs: Mapping[str, Any]) -> None:
        """Store what the sampler needs when it is asked again."""
        for key, value in attrs.items():
            storage.set_trial_system_attr(trial_id, key, value)

    @staticmethod
    def write_artifact(storage: BaseStorage, trial_id: int, artifact: ArtifactMeta) -> None:
        """Store what Optuna knows of a file of a trial."""
        storage.set_trial_system_attr(trial_id, _ARTIFACT + artifact.artifact_id, json.dumps(asdict(artifact)))

    @classmethod
    def end(cls, storage: BaseStorage, trial_id: int, values: Sequence[float] | None = None, **fields: Any) -> bool:
        """Store fields of a trial and end it, as complete with ``values``, else as failed; False if it had ended."""
        try:
            cls.write(storage, trial_id, **fields)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE if values else TrialState.FAIL, values)
        except UpdateFinishedTrialError:
            return False
        return True

    @classmethod
    def _attributes(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields as user attributes: plain data by their stored names."""
        plain = {name: _plain(value) for name, value in fields.items()}
        return {cls.model_fields[name].alias or name: value for name, value in plain.items()}


Stored = TypeVar("Stored", bound=StoredTrial)


class TrialRecord(StoredTrial):
    """All that a study stores about one trial of a search."""

    worker: WorkerIdentity
    slot: int
    """Index in the study's plan; a trial that retries another has the same slot."""
    retry_of: int | None = None
    """Number of the trial that this one retries."""
    continues: int | None = None
    """Number of the trial of the same architecture that this one continues, beyond a rung or with a further seed."""
    continued_seconds: float = 0.0
    """Duration of the trials that continue this one."""
    trained: Architecture | None = None
    """The twin that is trained in place of the architecture, in a study with a proxy."""
    name: str | None = None
    """"base" or the name of a reference, if the candidate is one."""
    point: dict[str, int]
    """Index of the choice of each knob."""
    sampler_attrs: dict[str, Any]
    """System attributes that the sampler needs when it is asked again, e.g. a generation."""
    started: datetime | None
    ended: datetime | None

    phase: str = Field(default="", alias="stage")
    """Name of the step that a running trial is at."""
    fraction: float = 0.0
    """Share of that phase that is done."""
    score: Score = _UNSCORED
    """The score, as far as it is known."""
    reused_from: int | None = None
    """Number of the trial of the same architecture whose score was reused."""
    reused_study: str | None = None
    """Another study of the same protocol whose quality was reused, and the trial there."""
    rungs: tuple[Rung, ...] = ()
    """The rung at which the trial ended, if it did; of a candidate, all its rungs."""
    given: bool = False
    """Whether the study began with this candidate and its quality, so that it does not count against the budget."""
    round: EvolutionRound | None = Field(default=None, alias="evolution")
    """The round, in a study that evolves a network."""
    artifacts: dict[str, str]
    """Artifact ids by file name."""

    constraints: dict[str, float]
    """Relative excess over each limit, by the name of the limited number; feasible at 0 and below."""
    exceeded: Printable | None = Field(default=None, alias="infeasible")
    """Limits for which the trial was ended, and by how much they are broken."""
    error: Printable | None = None
    """The error that scoring raised."""
    rejected: bool = Field(default=False, alias="refused")
    """Whether the candidate cannot be scored at all, so that its slot is not retried."""
    killed: bool = False
    """Whether the machine killed the worker, as it does with little memory: rarely the candidate's fault."""
    reopens: bool = False
    """Whether the trial only reopens its slot, so that the failures before it no longer count."""
    withdrawn: bool = False
    """Whether the worker was stopped, which is not a failure of the candidate."""
    lost: bool = False
    """Whether another worker claimed the slot at the same moment."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in ("architecture", "score"):
            if self.state in ("scored", "infeasible") and name not in self.model_fields_set:
                raise ValueError(f"{name} is missing although the trial is {self.state}")
        return self

    @property
    def infeasible(self) -> str | None:
        """Limits that are broken, and by how much. A scored candidate can break a limit on its quality."""
        excess = ", ".join(f"{name} by {value:.1%}" for name, value in self.constraints.items() if value > 0)
        return self.exceeded or excess or None

    @property
    def uses_budget(self) -> bool:
        """Whether the trial counts against the budget: a new candidate that did not reuse an earlier score."""
        is_new = self.continues is None and self.reused_from is None and not self.given
        return is_new and self.state in ("scored", "paused")

    @property
    def is_reused(self) -> bool:
        """Whether the quality was measured by another trial, of this study or of another one."""
        return self.reused_from is not None or self.reused_study is not None

    @property
    def runs(self) -> int:
        """Number of training runs, one per seed, behind the score."""
        return self.score.quality.runs if self.score.quality else 0

    @property
    def seconds(self) -> float:
        """Duration of the trial and of those that continue it, up to now if it is running."""
        own = ((self.ended or datetime.now()) - self.started).total_seconds() if self.started else 0.0
        return own + self.continued_seconds

    def with_score(self, **changes: LatencyRecord | Quality) -> Self:
        """The record with some parts of its score replaced."""
        return self.model_copy(update={"score": self.score.model_copy(update=changes)})

    def value(self, objective: str) -> float:
        """One number of the score.

        Raises:
            archsearch.score.MissingScore: if the score lacks it.
        """
        return self.score.value(objective)

    def label(self, objective: str) -> str:
        """Display name of one number of the score."""
        quality = self.score.quality
        extractor, proxy = (quality.extractor, quality.proxy) if quality else ("", None)
        return metric_label(objective, extractor, proxy, [self.score.latency] if self.score.latency else [])


class Candidate(TrialRecord):
    """The record of a trial whose architecture is chosen."""

    architecture: Architecture
    attempts: int = 1
    """Number of trials of the slot so far."""

    @property
    def id(self) -> str:
        """The architecture's id, which takes time to derive and is stored."""
        return self.architecture_id or self.architecture.id


class MeasurementRecord(StoredTrial):
    """A trial of a latency study: a measurement that a search requests and a device makes."""

    architecture_id: str
    architecture: Architecture
    record: LatencyRecord | None = None
    refused: str | None = None
    """Why this kind of device cannot measure the architecture."""
    died: bool = False
    """Whether the device process died."""
    given_back: bool = False
    """Whether the device was stopped or lost, which is not the fault of the architecture."""
    duplicate: bool = False
    """Whether another trial for the same architecture is valid instead."""
    reopens: bool = False
    """Whether the trial only says that refusals and deaths before it no longer count."""


class TrialReader(Generic[Stored]):
    """Reads a study's trials again and again, and parses what is new or had not ended at the last read.

    A trial that has ended never changes. A storage numbers the trials of a study one after the other, each within the
    transaction that creates it, so what a process sees of them has no gaps, and one that it has not seen yet has a
    higher number than all that it has.

    Args:
        parse: the record of a trial; None leaves the trial out.
    """

    def __init__(self, study: Study, parse: Callable[[FrozenTrial], Stored | None]) -> None:
        self._study, self._parse = study, parse
        self._seen = 0
        self._unfinished: dict[int, FrozenTrial] = {}

    def changes(self) -> Iterator[Stored]:
        """Records that are new or have changed since they were read last; call it again when it has ended.

        Raises:
            InputError: if a trial's attributes are damaged. That trial is read again by the next call.
        """
        with parse_errors(f"study {self._study.study_name}", "an attribute of a trial"):
            every = self._study.get_trials(deepcopy=False)
        for number in [*self._unfinished, *range(self._seen, len(every))]:
            t = every[number]
            if t.number != number:
                raise damaged(f"study {self._study.study_name}", f"trial {number} is missing")
            if t == self._unfinished.get(number):
                continue
            record = self._parse(t)
            self._seen = max(self._seen, number + 1)
            self._unfinished[number] = t
            if t.state.is_finished():
                del self._unfinished[number]
            if record is not None:
                yield record


def read_trial(study: Study, t: FrozenTrial, slots: Mapping[int, int], *, new_slot: int) -> TrialRecord | None:
    """The record of a trial made by a worker; None for others (e.g. added by hand).

    Args:
        slots: slot of each earlier trial by number, and of the trial itself if it was read before.
        new_slot: slot of the trial if it is the first of its own.

    Raises:
        InputError: if the trial's attributes are damaged.
    """
    if "worker" not in t.user_attrs:
        return None
    for key in ("retry_of", "continues"):
        earlier = t.user_attrs.get(key)
        if earlier is not None and not (isinstance(earlier, int) and earlier in slots and earlier < t.number):
            raise damaged(f"trial {t.number} of study {study.study_name}", f"{earlier!r:.20} is not a trial", key)
    # Slots follow from what is fixed when a trial is created, so that all workers agree.
    slot = slots.get(t.number, slots.get(t.user_attrs.get("retry_of", -1), new_slot))
    stored = t.system_attrs
    states: dict[str, State] = {"state": "paused"} if t.state.name == "PRUNED" and "rungs" in t.user_attrs else {}
    with parse_errors(f"trial {t.number} of study {study.study_name}"):
        uploads = [json.loads(value) for key, value in stored.items() if key.startswith(_ARTIFACT)]
        artifacts = {upload["filename"]: upload["artifact_id"] for upload in uploads}
        constraints = t.constraints
    return (Candidate if "architecture" in t.user_attrs else TrialRecord).read(
        study,
        t,
        slot=slot,
        point={knob: int(t.distributions[knob].to_internal_repr(choice)) for knob, choice in t.params.items()},
        sampler_attrs={key: v for key, v in stored.items() if not key.startswith((_ARTIFACT, _CONSTRAINT))},
        started=t.datetime_start,
        ended=t.datetime_complete,
        artifacts=artifacts,
        constraints=constraints,
        **states,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def damaged(source: str, problem: str, place: str = "") -> InputError:
    """The error for a trial that cannot be read."""
    return InputError(source, problem, "restore the study's database, or begin it anew under another name", place=place)


Record = TypeVar("Record", bound=TrialRecord)


def fold(trials: Iterable[Record]) -> list[Record]:
    """The trials of new candidates, with the scores, rungs, artifacts and durations of those that continue them."""
    folded: dict[int, Record] = {}
    for t in trials:
        if t.continues is None:
            folded[t.number] = t
        elif t.state in ("scored", "paused") and (first := folded.get(t.continues)) is not None:
            folded[t.continues] = _continued(first, t)
    return list(folded.values())


def _continued(first: Record, t: Record) -> Record:
    changes: dict[str, Any] = {
        "continued_seconds": first.continued_seconds + t.seconds,
        "rungs": first.rungs + t.rungs,
        "artifacts": {**first.artifacts, **t.artifacts},
    }
    if t.runs > first.runs:
        changes |= {"score": t.score, "constraints": t.constraints, "state": t.state}
    return first.model_copy(update=changes)
