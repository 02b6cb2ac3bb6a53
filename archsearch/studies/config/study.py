"""Configuration of a study: space, objectives, constraints, sampler, budget, storage and protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PrivateAttr, field_validator, model_validator

from archsearch.library import RUNS, STUDIES, FolderName, Kind, NamedConfig, read_named
from archsearch.protocol import MAX_SEEDS, EvaluationProtocol
from archsearch.score import OBJECTIVES, QUALITY_METRICS
from archsearch.spaces.loading import load_space, with_proxy
from archsearch.spaces.space import Space
from archsearch.studies.config.ablation import AblationConfig, space_of_rows
from archsearch.studies.config.evolution import EvolutionConfig
from archsearch.studies.config.runs import RungsConfig, SeedsConfig
from snapgen.config import Config, rule
from snapgen.errors import InputError
from snapgen.training.trackers import TrackerName

MetricName = Annotated[str, Field(json_schema_extra={"enum": [*OBJECTIVES]})]
"""The name of one of a score's numbers."""

SamplerName = Literal["ehvi", "gp", "tpe", "nsga2", "nsga3", "random", "qmc", "grid"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)


class SamplerConfig(Config):
    """Optuna sampler that proposes candidates, with its own options, e.g. ``{name: gp, options: {…}}``."""

    name: SamplerName = "gp"
    """Expected hypervolume improvement with known costs (ehvi, for one quality number and costs or latency, where it is
    the default), one of Optuna's own: Gaussian process (gp, the default otherwise), TPE, NSGA-II, NSGA-III, random or
    quasi-Monte Carlo (qmc), or every architecture of a small space once, in a balanced order (grid)."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Keyword arguments of that Optuna sampler."""


class LatencyConfig(Config):
    """Source of latency: a device that measures it, or a prediction. ``options`` are the backend's own."""

    device: str = "host"
    """Device that latency comes from: host, coreml, coreai, iphone, or predicted: with a profile or a JSON file."""
    threads: int | None = Field(default=1, ge=1, le=1024)
    """CPU threads of one forward pass on the host; None: leave it to the backend. Core ML has no such setting."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further settings of the device; see its own table below."""
    remote: bool = False
    """Whether `archsearch serve-device` processes on the study's storage measure it, not the searching process."""
    provisional: str | None = None
    """Prediction (predicted:…) to use until a remote device's measurement arrives; None: wait for the
    measurement before training."""
    wait_for_measurement: bool = True
    """Whether a trained candidate waits for its measurement. If false, the prediction stands until the measurement
    arrives."""

    @rule
    def _provisional_needs_remote(self) -> None:
        if self.provisional is not None and not self.remote:
            raise ValueError("provisional is for a remote device; set remote: true or remove it")
        if self.provisional is not None and not self.provisional.startswith("predicted:"):
            raise ValueError(f"provisional {self.provisional!r:.60} is not a prediction; write predicted:DEVICE")
        if not self.wait_for_measurement and self.provisional is None:
            raise ValueError("wait_for_measurement: false needs a prediction; give provisional: predicted:DEVICE")

    @property
    def backend_options(self) -> dict[str, Any]:
        """Keyword arguments of the backend. Apple's runtimes have no thread setting."""
        threaded = self.threads is not None and self.device not in ("coreml", "coreai", "iphone")
        return ({"threads": self.threads} if threaded else {}) | self.options


class SupernetAuditConfig(Config):
    """Compute behind inherited weights, needed to audit candidates that inherit them."""

    supernet_images: int = Field(ge=1, le=1_000_000_000_000)
    """Number of images that the inherited net was trained on; each candidate is charged its share of them."""
    scratch_steps: int = Field(ge=1, le=1_000_000_000)
    """Steps of a short run from new weights. The audit's long run, from new weights, takes factor times as many."""


class StudyConfig(NamedConfig):
    """Configuration of one study, as written in its YAML.

    Settings that change the meaning of a score or the order of the candidates are fixed once the study has begun. The
    budget, the number of workers and the folder of artifacts may change between runs
    (`archsearch.studies.storage.database`).
    """

    name: FolderName
    """Name of the study and of its run folder under runs/; by default the name of the file."""
    space: str
    """A shipped space, or the path of a space's YAML file, relative to this file or to the current directory."""
    proxy: str | None = None
    """Another space with the same knobs, named as `space` is. Its candidate of the same choices, the twin, is trained
    in place of the candidate, for its quality; cost and latency stay the candidate's."""
    objectives: tuple[MetricName, ...] = Field(default=("validation_loss", "latency_ms"), min_length=1)
    """Numbers to minimize: validation_loss, frechet_distance, kernel_distance, latency_ms, params, macs,
    activation_bytes."""
    constraints: dict[MetricName, float] = Field(default_factory=dict)
    """Upper bounds on any of the same numbers. The space's own constraints apply as well."""
    sampler: SamplerConfig = SamplerConfig()
    """Sampler that proposes candidates: a name, or a name with options. By default ehvi, where the objectives are one
    quality number and cost or latency, else gp."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of everything random in the study."""
    seeds: SeedsConfig | None = None
    """Numbers of training seeds, which spend most where it matters; None: each candidate has all of
    protocol.train_seeds."""
    rungs: RungsConfig | None = None
    """Steps at which a candidate's training pauses, so that the hopeless are not trained to the end; None: none."""
    start_from: str | None = None
    """Another study of the same protocol whose scored candidates this one begins with: a shipped study, a YAML file, a
    run, or a table of its scores (.jsonl). They are not trained again, and do not count as trials."""
    initial_points: tuple[dict[str, int], ...] = ()
    """Points to score first, each mapping a knob to the index of its choice; default: base and references."""
    ablation: AblationConfig | None = None
    """Makes the study an ablation on the space's base: its rows are its candidates and its budget."""
    evolve: EvolutionConfig | None = None
    """Makes the study an evolution of one network, block by block; its rounds are its trials."""
    supernet_audit: SupernetAuditConfig | None = None
    """Needed to audit a study whose candidates inherit weights (protocol.init_from)."""
    trials: int | None = Field(default=None, ge=1, le=10_000_000)
    """Number of candidates to score. Infeasible and repeated candidates do not count."""
    time_budget_minutes: float | None = Field(default=None, gt=0)
    """Running time over all runs of the study, in minutes. No trial is started that would probably exceed it."""
    workers: int = Field(default=1, ge=1, le=256)
    """Worker processes on this machine."""
    threads_per_worker: int = Field(default=1, ge=1, le=1024)
    """CPU threads of each worker."""
    checkpoint_minutes: float = Field(default=5, ge=0)
    """Minutes between checkpoints of a candidate's training, from which a killed one resumes; 0: at every report."""
    log_with: tuple[TrackerName, ...] = ()
    """Trackers that are told the loss of every candidate's short runs: tensorboard, trackio, wandb, mlflow. They work
    offline."""
    storage: str | None = None
    """Optuna storage URL; None: an SQLite file in the run folder."""
    artifacts: str | None = None
    """Folder for samples and weights; None: one in the run folder. Workers on several machines need a shared one."""
    latency: LatencyConfig = LatencyConfig()
    """Measurement or prediction of latency."""
    protocol: EvaluationProtocol = EvaluationProtocol()
    """Everything that a quality number depends on."""

    _source: str = PrivateAttr(default="study")

    @field_validator("objectives")
    @classmethod
    def _objectives_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for i, name in enumerate(names):
            if name not in OBJECTIVES:
                raise ValueError(f"unknown objective {name!r:.60}; use {', '.join(OBJECTIVES)}")
            if name in names[:i]:
                raise ValueError(f"{name} is listed twice; remove one")
        return names

    @field_validator("constraints")
    @classmethod
    def _constraints_are_known(cls, limits: dict[str, float]) -> dict[str, float]:
        for name, limit in limits.items():
            if name not in OBJECTIVES:
                raise ValueError(f"unknown constraint {name!r:.60}; use {', '.join(OBJECTIVES)}")
            if limit <= 0:
                raise ValueError(f"{name} cannot be {limit:g}; give a number above 0")
        return limits

    @field_validator("sampler", mode="before", json_schema_input_type=SamplerName | SamplerConfig)
    @classmethod
    def _sampler_by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _sampler_for_the_objectives(cls, values: Any) -> Any:
        """Choose ehvi, where no sampler is named and the objectives are those that it is for."""
        if not isinstance(values, dict) or values.keys() & {"ablation", "evolve"}:
            return values
        names = values.get("objectives", cls.model_fields["objectives"].default)
        sampler = values.get("sampler", {})
        if not isinstance(sampler, dict) or "name" in sampler or not _suits_ehvi(names):
            return values
        return {**values, "sampler": {"name": "ehvi", **sampler}}

    @model_validator(mode="before")
    @classmethod
    def _as_many_seeds_as_the_front_has(cls, values: Any) -> Any:
        """Name the protocol's seeds, as many as the front gets, where they are not given."""
        seeds = values.get("seeds") if isinstance(values, dict) else None
        front = seeds.get("front", SeedsConfig().front) if isinstance(seeds, dict) else None
        protocol = values.get("protocol", {}) if front else None
        if not isinstance(front, int) or not isinstance(protocol, dict) or "train_seeds" in protocol:
            return values
        seeds_of_all = [*range(min(front, MAX_SEEDS))]  # of more seeds.front is the mistake, not the protocol
        return {**values, "protocol": {**protocol, "train_seeds": seeds_of_all}}

    @rule
    def _seeds_fit(self) -> None:
        if self.seeds is None:
            return
        if not self.searches_by_quality:
            raise ValueError("seeds is for studies that search by a quality number; remove it")
        listed = len(self.protocol.train_seeds)
        if self.seeds.front != listed:
            front = self.seeds.front
            raise ValueError(f"seeds.front is {front}, but protocol.train_seeds lists {listed}; list as many")

    @rule
    def _rungs_fit(self) -> None:
        if self.rungs is None:
            return
        if not self.searches_by_quality or len(self.quality_objectives) != 1:
            raise ValueError("rungs is for studies that search by one quality objective; remove it")
        if len(self.first_seeds) > 1:
            raise ValueError("rungs needs candidates that begin with one seed; give seeds: {first: 1}")
        if (last := self.rungs.steps[-1]) >= self.protocol.steps:
            raise ValueError(f"rungs.steps has {last}, but protocol.steps is {self.protocol.steps}; remove or lower it")

    @rule
    def _has_a_budget(self) -> None:
        if self.trials is None and self.time_budget_minutes is None and self.ablation is None and self.evolve is None:
            raise ValueError("has no budget; give trials, time_budget_minutes or both")

    @rule
    def _ehvi_has_its_objectives(self) -> None:
        if self.sampler.name == "ehvi" and not _suits_ehvi(self.objectives):
            names = ", ".join(self.objectives)
            raise ValueError(
                f"sampler ehvi needs one quality objective and others of cost or latency, not {names}; change them or "
                "use gp"
            )

    @rule
    def _supernet_audit_needs_inheritance(self) -> None:
        if self.supernet_audit is not None and self.protocol.init_from is None:
            raise ValueError(
                "supernet_audit is for candidates that inherit weights; give protocol.init_from or remove it"
            )

    @rule
    def _proxy_has_something_to_train(self) -> None:
        if self.proxy is None:
            return
        if not self.trains:
            raise ValueError("proxy is for a study that trains; add a quality objective or remove it")
        for name in ("ablation", "evolve", "supernet_audit"):
            if getattr(self, name) is not None:
                raise ValueError(f"proxy cannot be combined with {name}; remove one")

    @rule
    def _start_is_of_a_search(self) -> None:
        if self.start_from is not None and not self.searches_by_quality:
            raise ValueError("start_from is for studies that search by a quality number; remove it")

    @property
    def trains(self) -> bool:
        """Whether candidates are trained, because an objective or a constraint is a quality number."""
        return any(name in QUALITY_METRICS for name in (*self.objectives, *self.constraints))

    @property
    def searches_by_quality(self) -> bool:
        """Whether a sampler proposes candidates, and they are trained."""
        return self.trains and self.ablation is None and self.evolve is None

    @property
    def quality_objectives(self) -> tuple[str, ...]:
        """Names of the objectives that are quality numbers."""
        return tuple(name for name in self.objectives if name in QUALITY_METRICS)

    @property
    def first_seeds(self) -> tuple[int, ...]:
        """Training seeds of a new candidate."""
        seeds = self.protocol.train_seeds
        return seeds if self.seeds is None else seeds[: self.seeds.first]

    @property
    def folder(self) -> Path:
        """Folder of the run, under the current directory."""
        return RUNS / self.name

    @property
    def url(self) -> str:
        """Optuna URL of the study's storage."""
        return self.storage or f"sqlite:///{self.folder / 'study.db'}"

    @property
    def artifact_folder(self) -> Path:
        """Folder of samples and weights."""
        return Path(self.artifacts) if self.artifacts else self.folder / "artifacts"

    def load_space(self) -> Space:
        """The space of the candidates: the space named in the settings, or the rows of the ablation on its base.

        Raises:
            InputError: if the space or a row is invalid, or the proxy's knobs are not the space's.
        """
        with self.error_context("space"):
            space = load_space(self.space)
        if self.proxy is not None:
            with self.error_context("proxy"):
                space = with_proxy(space, load_space(self.proxy))
        return space if self.ablation is None else space_of_rows(self.ablation, space, source=self.source)


def _suits_ehvi(objectives: object) -> bool:
    """Whether a study of these objectives, which may be no objectives at all, can use the sampler ehvi."""
    if not isinstance(objectives, list | tuple) or len(objectives) < 2:
        return False
    return sum(name in QUALITY_METRICS for name in objectives) == 1


def load_config(name_or_path: str | Path, kind: Kind = "search") -> StudyConfig:
    """Load a shipped study by its name, or a study's YAML file by its path.

    Paths of spaces, and of what it starts from, are tried relative to the study's file first, then relative to the
    current directory.

    Args:
        name_or_path: name of a shipped study, optionally with its kind (``ablation/emoji``), or path of a YAML file.
        kind: kind of study in which a name without a kind is looked up first.

    Raises:
        InputError: if the file does not exist or is invalid.
    """
    settings = _read(name_or_path, kind)
    if settings.ablation is None or settings.ablation.published_from is None:
        return settings
    ablation = _with_published(settings.ablation, source=settings.source)
    return settings.model_copy(update={"ablation": ablation})


def _read(name_or_path: str | Path, kind: Kind) -> StudyConfig:
    path, values = read_named(name_or_path, (kind, *(other for other in STUDIES if other != kind)))
    settings = StudyConfig.parse(values, path)
    named = {key: getattr(settings, key) for key in ("space", "proxy", "start_from")}
    relative = {key: path.parent / name for key, name in named.items() if name and Path(name).suffix}
    return settings.model_copy(update={key: str(found) for key, found in relative.items() if found.exists()})


def _with_published(ablation: AblationConfig, *, source: str) -> AblationConfig:
    """The ablation with the published numbers of ``published_from`` in the rows that have none of their own."""
    reference = _read(str(ablation.published_from), "ablation").ablation
    if reference is None:
        problem = f"{ablation.published_from} is not an ablation"
        raise InputError(source, problem, "name an ablation", place="ablation.published_from")
    rows = {
        name: row.model_copy(update={"published": reference.rows[name].published})
        if name in reference.rows and not row.published
        else row
        for name, row in ablation.rows.items()
    }
    origin = {
        key: getattr(ablation, key) or getattr(reference, key) for key in ("published_source", "published_protocol")
    }
    return ablation.model_copy(update={"rows": rows, **origin})
