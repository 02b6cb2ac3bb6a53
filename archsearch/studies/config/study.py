"""What a study is: its space, what it minimises under which limits, its sampler, budget, storage and protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from archsearch.library import RUNS, STUDIES, FolderName, Kind, read_named
from archsearch.protocol import EvaluationProtocol
from archsearch.score import OBJECTIVES, QUALITY_METRICS
from archsearch.spaces.loading import load_space
from archsearch.studies.config.ablation import AblationConfig, space_of
from archsearch.studies.config.evolution import EvolutionConfig
from snapgen import config
from snapgen.config import Config
from snapgen.errors import InputError

if TYPE_CHECKING:
    from archsearch.spaces.space import Space


SAMPLERS = ("gp", "tpe", "nsga2", "nsga3", "random", "qmc")


class SamplerConfig(Config):
    """Which Optuna sampler proposes candidates, and its own options, e.g. ``{name: gp, options: {…}}``."""

    name: Literal["gp", "tpe", "nsga2", "nsga3", "random", "qmc"] = "gp"
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)


class LatencyConfig(Config):
    """Where latency is taken. ``options`` are the backend's own."""

    device: str = "host"
    threads: int | None = Field(default=1, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)
    remote: bool = False
    """Measured by ``archsearch device`` processes on the study's storage, not by the searching process."""
    meanwhile: str | None = None
    """Of a remote device: the prediction (``predicted:…``) to go on with while a measurement waits; None: wait."""
    wait: bool = True
    """Whether a trained candidate waits for its measurement; if not, a prediction stands until there is one."""

    @model_validator(mode="after")
    def _predicts_what_is_away(self) -> Self:
        if self.meanwhile is not None and not self.remote:
            raise ValueError("meanwhile is for a remote device; set remote: true or remove it")
        if self.meanwhile is not None and not self.meanwhile.startswith("predicted:"):
            raise ValueError(f"meanwhile {self.meanwhile!r:.60} is no prediction; write predicted:DEVICE")
        if not self.wait and self.meanwhile is None:
            raise ValueError("wait: false needs a prediction to go on with; give meanwhile: predicted:DEVICE")
        return self

    @property
    def backend_options(self) -> dict[str, Any]:
        """What the backend is made with; Core ML's have no threads to set."""
        threaded = self.threads is not None and self.device not in ("coreml", "iphone")
        return ({"threads": self.threads} if threaded else {}) | self.options


class SupernetAuditConfig(Config):
    """What stands beside the scores of candidates that inherit their weights when they are audited."""

    supernet_images: int = Field(ge=1)
    """That the net whose weights are inherited was trained on: each candidate answers for its share of them."""
    scratch_steps: int = Field(ge=1)
    """Of a short run from new weights; the long run, from new weights, is the audit's factor times as long."""


class StudyConfig(Config):
    """One study, as its YAML has it.

    Whatever changes the meaning of a score or the order of the candidates is fixed once the study has begun; the
    budget, the number of workers and where artifacts go may change between runs
    (`archsearch.studies.storage.database`).
    """

    name: FolderName
    space: str
    objectives: tuple[str, ...] = Field(default=("validation_loss", "latency_ms"), min_length=1)
    limits: dict[str, float] = Field(default_factory=dict)
    """Most that a candidate may have of any of the score's numbers; the space's own limits hold besides."""
    sampler: SamplerConfig = SamplerConfig()
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    plan: tuple[dict[str, int], ...] = ()
    """Points to score first, knob to the index of its choice, instead of the base and the references."""
    ablation: AblationConfig | None = None
    """With it the study is an ablation on the space's base: its rows are all its candidates, and its budget."""
    evolve: EvolutionConfig | None = None
    """With it the study is a network that evolves in the space, block by block; its rounds are its trials."""
    elastic: SupernetAuditConfig | None = None
    """For the audit of a study whose protocol has candidates inherit their weights (`EvaluationProtocol.inherit`)."""
    trials: int | None = Field(default=None, ge=1)
    """Candidates to score. Infeasible and repeated ones do not count."""
    minutes: float | None = Field(default=None, gt=0)
    """Of running time, over all runs of the study; no trial is begun that would probably overrun it."""
    workers: int = Field(default=1, ge=1, le=256)
    threads: int = Field(default=1, ge=1)
    """Of each worker."""
    storage: str | None = None
    """Any Optuna URL; None: SQLite in the run's folder."""
    artifacts: str | None = None
    """Folder of samples and weights; None: in the run's folder. Workers of several machines need a shared one."""
    latency: LatencyConfig = LatencyConfig()
    protocol: EvaluationProtocol = EvaluationProtocol()

    _source: str = PrivateAttr(default="study")

    @field_validator("objectives")
    @classmethod
    def _are_of_the_score(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for i, name in enumerate(names):
            if name not in OBJECTIVES:
                raise ValueError(f"unknown objective {name!r:.60}; use {', '.join(OBJECTIVES)}")
            if name in names[:i]:
                raise ValueError(f"{name} is there twice; remove one")
        return names

    @field_validator("limits")
    @classmethod
    def _are_on_the_score(cls, limits: dict[str, float]) -> dict[str, float]:
        for name, most in limits.items():
            if name not in OBJECTIVES:
                raise ValueError(f"unknown limit {name!r:.60}; use {', '.join(OBJECTIVES)}")
            if most <= 0:
                raise ValueError(f"{name} can not be {most:g}; give a number above 0")
        return limits

    @field_validator("sampler", mode="before")
    @classmethod
    def _sampler_by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if self.trials is None and self.minutes is None and self.ablation is None and self.evolve is None:
            raise ValueError("no budget; give trials, minutes or both")
        return self

    @model_validator(mode="after")
    def _is_elastic_by_inheritance(self) -> Self:
        if self.elastic is not None and self.protocol.inherit is None:
            raise ValueError("elastic is for candidates that inherit weights; give protocol.inherit or remove it")
        return self

    @property
    def source(self) -> str:
        """The file it was read from, for errors."""
        return self._source

    @property
    def trains(self) -> bool:
        """Whether candidates are trained: some objective or limit is on quality."""
        return any(name in QUALITY_METRICS for name in (*self.objectives, *self.limits))

    @property
    def folder(self) -> Path:
        """The run's folder, under the current directory."""
        return RUNS / self.name

    @property
    def url(self) -> str:
        """Where the study is stored."""
        return self.storage or f"sqlite:///{self.folder / 'study.db'}"

    @property
    def artifact_folder(self) -> Path:
        """Where samples and weights go."""
        return Path(self.artifacts) if self.artifacts else self.folder / "artifacts"

    def overridden(self, **changes: Any) -> StudyConfig:
        """These settings with those that are not None changed, and checked again."""
        given = {key: value for key, value in changes.items() if value is not None}
        return self.with_changes(given) if given else self

    def with_changes(self, given: Mapping[str, Any]) -> StudyConfig:
        """These settings with some changed, and checked again."""
        changed = config.parse_config({**self.model_dump(mode="json"), **given}, StudyConfig, source=self.source)
        changed._source = self._source
        return changed

    def load_space(self) -> Space:
        """The space of its candidates: the one that it names, or its ablation's rows on that one's base.

        Raises:
            InputError: naming the file, the place and the remedy.
        """

        with error_context(self, "space"):
            space = load_space(self.space)
        return space if self.ablation is None else space_of(self.ablation, space, source=self.source)


@contextmanager
def error_context(settings: StudyConfig, place: str) -> Iterator[None]:
    """Says of a mistake in something that a study names where the study names it."""
    try:
        yield
    except InputError as error:
        what = ": ".join(part for part in (error.source, error.place, error.problem) if part)
        raise InputError(settings.source, what, error.remedy, place=place) from None


def load_config(name_or_path: str | Path, kind: Kind = "search") -> StudyConfig:
    """A shipped study by its name, or one's own by its path.

    A space named by a path is looked for beside the study's file first, then from the current directory.

    Args:
        name_or_path: either; a name may say its kind, as ``ablation/emoji``.
        kind: where a name without its kind is looked for first.

    Raises:
        InputError: naming the file, the place and the remedy.
    """
    found = _read(name_or_path, kind)
    if found.ablation is None or found.ablation.published_from is None:
        return found
    with_published = found.model_copy(update={"ablation": _with_published(found.ablation, source=found.source)})
    with_published._source = found.source
    return with_published


def _read(name_or_path: str | Path, kind: Kind) -> StudyConfig:
    path, values = read_named(name_or_path, (kind, *(other for other in STUDIES if other != kind)))
    found = config.parse_config(values, StudyConfig, source=path)
    beside = path.parent / found.space
    if Path(found.space).suffix and beside.exists():
        found = found.model_copy(update={"space": str(beside)})
    found._source = str(path)
    return found


def _with_published(ablation: AblationConfig, *, source: str) -> AblationConfig:
    """The ablation with another one's published numbers beside the rows that have none."""
    other = _read(str(ablation.published_from), "ablation").ablation
    if other is None:
        problem = f"{ablation.published_from} is no ablation"
        raise InputError(source, problem, "name one that is", place="ablation.published_from")
    rows = {
        name: row.model_copy(update={"published": other.rows[name].published})
        if name in other.rows and not row.published
        else row
        for name, row in ablation.rows.items()
    }
    whence = {key: getattr(ablation, key) or getattr(other, key) for key in ("published_source", "published_protocol")}
    return ablation.model_copy(update={"rows": rows, **whence})
