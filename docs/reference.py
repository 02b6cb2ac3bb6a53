"""Write docs/reference/*.md from the settings' own types: every field with its values, default and description.

    python docs/reference.py            # writes the pages
    python docs/reference.py --check    # exit status 1 if a page is not what it would write

A field's description is the string literal under it; a field without one is an error.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import BaseMetadata, Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from archsearch.block_latency.config import BlockTableConfig
from archsearch.latency.coreai import CoreAIConfig
from archsearch.latency.coreml import CoreMLConfig, IPhoneConfig
from archsearch.latency.host import HostConfig
from archsearch.latency.steady_state import SteadyStateConfig
from archsearch.predictor.backend import PredictedConfig
from archsearch.protocol import EvaluationProtocol, TeacherDistillationConfig
from archsearch.schemas import DERIVED_DEFAULTS, field_docstrings
from archsearch.spaces.loading import BlockKnobsConfig, SpaceConfig
from archsearch.studies.config.ablation import AblationConfig, AblationRowConfig, PublishedNumber
from archsearch.studies.config.evolution import EvolutionConfig
from archsearch.studies.config.runs import RungsConfig, SeedsConfig
from archsearch.studies.config.study import LatencyConfig, SamplerConfig, StudyConfig, SupernetAuditConfig
from archsearch.training.comparison import ComparisonConfig, SamplingOverride, VariantConfig
from archsearch.training.recipe import (
    ExpectedShapes,
    FigureConfig,
    FigureRow,
    Recipe,
    RecipeEvaluationConfig,
    TeacherSourceConfig,
)
from snapgen.architecture.schema import Architecture, BlocksConfig, LevelConfig, TimeEmbeddingConfig
from snapgen.autoencoders.training import DecoderTrainingConfig
from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.config import Config, as_yaml
from snapgen.coreml.package import PackageOptions
from snapgen.objectives.teacher import TeacherConfig
from snapgen.training.settings import DistillationConfig
from snapgen.training.stages import (
    AdversarialConfig,
    AdversarialDistillationStage,
    DecoderStage,
    FlowMatchingStage,
    ProgressiveDistillationStage,
    Stage,
)

FOLDER = Path(__file__).parent / "reference"
COMMAND = "python docs/reference.py"
LARGE: dict[Any, str] = {1 << 32: "2^32", 1 << 63: "2^63"}
NOTICE = f"<!-- Written by `{COMMAND}` from the settings' types; change those, then run it. -->"

Model = type[Config]


@dataclass(frozen=True)
class Section:
    """A table of one model's fields.

    Attributes:
        about: a sentence or two above the table.
        base: a model whose fields have a table of their own on the page, and are left out here.
    """

    model: Model
    title: str
    about: str
    base: Model | None = None


@dataclass(frozen=True)
class Page:
    """One page of the reference; models that its sections name have sections on it, or on another page."""

    name: str
    title: str
    about: str
    sections: tuple[Section, ...]


PAGES = (
    Page(
        "study",
        "Settings of a study",
        "A study is a YAML file. `archsearch search`, `ablate` and `evolve` run one. How to write one: "
        "[Studies and spaces of your own](../studies.md).",
        (
            Section(StudyConfig, "A study", "The top level of the file."),
            Section(SamplerConfig, "Sampler", "Under `sampler`. A name alone stands for the name with no options."),
            Section(LatencyConfig, "Latency", "Under `latency`. See [Latency](../latency.md)."),
            Section(HostConfig, "Options of the device host", "Under `latency.options` with `device: host`."),
            Section(CoreMLConfig, "Options of the device coreml", "Under `latency.options` with `device: coreml`."),
            Section(CoreAIConfig, "Options of the device coreai", "Under `latency.options` with `device: coreai`."),
            Section(IPhoneConfig, "Options of the device iphone", "Under `latency.options` with `device: iphone`."),
            Section(
                PredictedConfig,
                "Options of a predicted device",
                "Under `latency.options` with `device: predicted:…`.",
            ),
            Section(SteadyStateConfig, "Steady state", "Under `rule` of a device's options."),
            Section(PackageOptions, "Weights of a Core ML package", "Under `weights` of a Core ML device's options."),
            Section(AblationConfig, "Ablation", "Under `ablation`. See [The ablation table](../ablation.md)."),
            Section(AblationRowConfig, "A row of an ablation", "Under `ablation.rows`, by the row's name."),
            Section(PublishedNumber, "A published number", "Under a row's `published`, by its quantity."),
            Section(
                EvolutionConfig,
                "Evolution",
                "Under `evolve`. See [Evolve a network](../evolve.md). The paper gives none of these numbers; the "
                "defaults are our choice.",
            ),
            Section(BlockTableConfig, "Block table", "Under `evolve.table`, and the options of `latency blocks`."),
            Section(SeedsConfig, "Seeds", "Under `seeds`. See [Seeds](../studies.md#seeds)."),
            Section(RungsConfig, "Rungs", "Under `rungs`. See [Rungs](../studies.md#rungs)."),
            Section(SupernetAuditConfig, "Supernet audit", "Under `supernet_audit`. See [Ranking](../ranking.md)."),
        ),
    ),
    Page(
        "protocol",
        "Settings of an evaluation protocol",
        "A protocol is everything that a quality number depends on. It stands under `protocol` in a "
        "[study](study.md). Numbers of different protocols are never compared. The defaults are the quick start's.",
        (
            Section(EvaluationProtocol, "A protocol", "The optimizer's settings are part of it."),
            Section(TeacherDistillationConfig, "Distillation", "Under `distillation`."),
        ),
    ),
    Page(
        "space",
        "Settings of a space",
        "A space is a YAML file. `archsearch space show` prints one. How to write one, with paths and rules: "
        "[spaces/README.md](../../spaces/README.md).",
        (
            Section(SpaceConfig, "A space", "The top level of the file. Give `knobs`, `blocks` or both."),
            Section(BlockKnobsConfig, "Blocks as knobs", "Under `blocks`."),
        ),
    ),
    Page(
        "recipe",
        "Settings of a recipe",
        "A recipe is a YAML file. `archsearch train` trains one. See [Train a recipe](../train.md).",
        (
            Section(Recipe, "A recipe", "The top level of the file."),
            Section(TextEncoderConfig, "Text encoder", "An entry of `text_encoders`."),
            Section(TeacherSourceConfig, "Teacher", "Under `teacher`. Give `path` or `shape`."),
            Section(
                TeacherConfig,
                "Shape of a teacher",
                "Under `teacher.shape` and `expected_shapes.teacher`. The names are those of diffusers' "
                "`SD3Transformer2DModel`.",
            ),
            Section(RecipeEvaluationConfig, "Evaluation", "Under `evaluation`."),
            Section(FigureConfig, "Figure", "Under `figure`."),
            Section(FigureRow, "Row of a figure", "Under `figure.rows`."),
            Section(ExpectedShapes, "Expected shapes", "Under `expected_shapes`."),
            Section(
                Stage,
                "Every stage of a net",
                "Settings of the kinds `flow_matching`, `adversarial` and `progressive`.",
            ),
            Section(FlowMatchingStage, "Stage: flow_matching", "The settings of every stage of a net, and:", Stage),
            Section(
                AdversarialDistillationStage, "Stage: adversarial", "The settings of every stage of a net, and:", Stage
            ),
            Section(
                ProgressiveDistillationStage, "Stage: progressive", "The settings of every stage of a net, and:", Stage
            ),
            Section(DecoderStage, "Stage: decoder", "A stage that trains a decoder instead of a net on latents."),
            Section(DistillationConfig, "Distillation", "Under a stage's `distillation`."),
            Section(AdversarialConfig, "Adversarial", "Under an adversarial stage's `adversarial`."),
            Section(
                DecoderTrainingConfig,
                "Decoder training",
                "Under a decoder stage's `training`. The paper names the losses, not their weights; the defaults are "
                "our choice.",
            ),
        ),
    ),
    Page(
        "comparison",
        "Settings of a comparison",
        "A comparison is a YAML file. `archsearch compare-recipes` trains its variants. See "
        "[Distillation](../distillation.md#compare-recipes).",
        (
            Section(ComparisonConfig, "A comparison", "The top level of the file."),
            Section(VariantConfig, "A variant", "Under `variants`, by its name."),
            Section(SamplingOverride, "Sampling of a variant", "Under a variant's `sampling`."),
        ),
    ),
    Page(
        "architecture",
        "Settings of an architecture",
        "An architecture is a YAML or JSON file, or the `base` of a [space](space.md). `archsearch cost` and "
        "`latency measure` take one. A space's knobs and an ablation's rows name these fields by their paths.",
        (
            Section(Architecture, "An architecture", "The top level of the file."),
            Section(TimeEmbeddingConfig, "Time embedding", "Under `time`."),
            Section(LevelConfig, "A level on the way down or up", "An entry of `down` or `up`.", BlocksConfig),
            Section(BlocksConfig, "Blocks", "Settings of every entry of `down` and `up`, and of `mid`."),
        ),
    ),
)


def main() -> None:
    """Write the pages, or with --check compare them."""
    pages = {FOLDER / f"{page.name}.md": render(page) for page in PAGES}
    stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        if stale:
            sys.exit(f"docs/reference is stale ({', '.join(stale)}); run {COMMAND}")
        return
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages.items():
        path.write_text(text)


def render(page: Page) -> str:
    """The page as Markdown."""
    parts = [f"# {page.title}", NOTICE, page.about]
    for section in page.sections:
        header = "| setting | meaning | values | default |\n|---|---|---|---|"
        rows = [row(page, section.model, name, field) for name, field in fields(section)]
        parts += [f"## {section.title}", section.about, "\n".join([header, *rows])]
    return "\n\n".join(parts) + "\n"


def fields(section: Section) -> Iterator[tuple[str, FieldInfo]]:
    """The fields of a section's table: name and kind, then own ones, then those of bases."""
    left_out = section.base.model_fields if section.base else {}
    own = section.model.__annotations__
    listed = {n: f for n, f in section.model.model_fields.items() if n not in left_out or n in own}
    yield from sorted(listed.items(), key=lambda item: (item[0] != "name", item[0] != "kind", item[0] not in own))


def row(page: Page, model: Model, name: str, field: FieldInfo) -> str:
    """A field's line of the table."""
    meaning = descriptions(model).get(name)
    if meaning is None:
        sys.exit(f"{model.__module__}.{model.__name__}.{name} has no description; write a string literal under it")
    value = DERIVED_DEFAULTS.get((model, name)) or default(field)
    return f"| `{name}` | {meaning} | {kind(field.annotation, page, field.metadata)} | {value} |"


@cache
def descriptions(model: Model) -> dict[str, str]:
    """The string literals under a model's fields, those of its bases included; for a reader of YAML."""
    return {name: for_tables(text) for name, text in field_docstrings(model).items()}


def for_tables(text: str) -> str:
    """A description with names of settings as code, YAML's words for Python's values, and no references to our code."""
    text = re.sub(r" \(`(?:snapgen|archsearch)\.[^`]*`\)", "", text)
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", f"`{yaml}`", text)
    name = r"[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)*_[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)*|\{seed\}"
    return re.sub(rf"`[^`]*`|σ_rel|({name})", lambda match: f"`{match[0]}`" if match[1] else match[0], text)


def kind(annotation: Any, page: Page, metadata: Iterable[Any] = ()) -> str:
    """A type in words, with its bounds: what one may write in YAML."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(args[0], page, annotation.__metadata__)
    if origin in (Union, types.UnionType):
        some = [kind(arg, page) for arg in args if arg is not type(None)]
        null = ["`null`"] if type(None) in args else []
        return either([either(list(dict.fromkeys(some))) + bounds(metadata), *null])
    if origin is Literal:
        return either([f"`{value}`" for value in args])
    return plain(annotation, page) + bounds(metadata)


def plain(annotation: Any, page: Page) -> str:
    """A type that is neither a choice nor annotated."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        inner = [kind(arg, page) for arg in args if arg is not ...]
        return f"list of {inner[0]}" if args[-1] is ... else f"list of two: {', '.join(dict.fromkeys(inner))}"
    if origin in (dict, Mapping):
        return f"mapping of {kind(args[0], page)} to {kind(args[1], page)}"
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return link(annotation, page)
    return {int: "integer", float: "number", str: "text", bool: "`true` or `false`", Any: "any value"}[annotation]


def either(choices: Sequence[str]) -> str:
    """Choices with commas and an or."""
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def link(model: Model, page: Page) -> str:
    """A link to the section of a model."""
    for other in (page, *PAGES):
        for section in other.sections:
            if section.model is model:
                anchor = re.sub(r"[^\w]+", "-", section.title.lower()).strip("-")
                file = "" if other is page else f"{other.name}.md"
                return f"[{section.title[0].lower()}{section.title[1:]}]({file}#{anchor})"
    raise SystemExit(f"{model.__name__} has no section in docs/reference.py; add one")


def bounds(metadata: Iterable[Any]) -> str:
    """The bounds among a field's metadata, to stand behind its type."""
    some = list(limits(metadata))
    return f" {', '.join(some)}".replace("), (", ", ") if some else ""


def limits(metadata: Iterable[Any]) -> Iterator[str]:
    """The bounds, each in words."""
    for bound in metadata:
        match bound:
            case Ge(ge=value):
                yield f"≥ {value:,}"
            case Gt(gt=value):
                yield f"> {value:,}"
            case Le(le=value):
                yield f"≤ {value:,}"
            case Lt(lt=value):
                yield f"< {LARGE.get(value, value)}"
            case MultipleOf(multiple_of=value):
                yield f"that {value} divides"
            case MinLen(min_length=value):
                yield f"(at least {value})"
            case MaxLen(max_length=value):
                yield f"(at most {value})"
            case FieldInfo():
                yield from limits(bound.metadata)
            case BaseMetadata() if (pattern := getattr(bound, "pattern", None)) is not None:
                yield f"that matches `{pattern}`"


def default(field: FieldInfo) -> str:
    """A field's default, as YAML has it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, tuple) and value and all(isinstance(item, BaseModel) for item in value):
        return f"{len(value)} with its defaults"
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{as_yaml(changed)}`" if changed else "its defaults"
    return f"`{as_yaml(value)}`"


if __name__ == "__main__":
    main()
