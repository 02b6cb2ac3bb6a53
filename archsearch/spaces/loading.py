"""Loading of a search space from its YAML file. Errors name the location of the mistake."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from archsearch.library import locate
from archsearch.spaces.knob import Knob, label, read_knob
from archsearch.spaces.space import BASE, LARGEST_COUNT, TRIES, Point, Space
from snapgen import config, seeding
from snapgen.architecture import overrides, presets
from snapgen.architecture.schema import MAX_BLOCKS, Architecture
from snapgen.config import Config
from snapgen.errors import InputError, all_of


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{label(value)} is not a number; write a number")
    return value


_Count = Annotated[int, Field(strict=True, ge=1, le=65536)]
_UpperBound = Annotated[float, BeforeValidator(_not_bool), Field(gt=0)]  # not strict: YAML reads 2.5e6 as text


class BlockKnobsConfig(Config):
    """Adds a knob for the number of blocks of each type in each layer of the base that has any."""

    extra_copies: Annotated[int, Field(strict=True, ge=0, le=MAX_BLOCKS)] = 1
    """Number of blocks that a layer may have in addition to the base's."""


class SpaceConfig(Config):
    """Schema of a space's file; spaces/README.md explains the keys."""

    # `_base` checks it, and knows where the file is.
    base: Annotated[Any, BeforeValidator(lambda value: value, json_schema_input_type=str | Architecture)]
    """The architecture that the knobs change: a preset's name, an architecture's file beside this one, or the
    architecture itself."""
    latent_size: _Count
    """Height and width of the latent for which cost and latency are taken."""
    context_tokens: _Count = 77
    """Length of the context for which cost and latency are taken."""
    knobs: dict[str, Any] | None = Field(default=None, min_length=1)
    """Knobs by name: a path and its values, or a name and what each of its choices changes."""
    blocks: BlockKnobsConfig | None = None
    """Adds a knob for the number of blocks of each kind in each layer of the base."""
    constraints: Mapping[Literal["params", "macs", "activation_bytes"], _UpperBound] = Field(default={})
    """Upper bounds on a candidate's cost."""
    references: dict[str, dict[str, Any]] = Field(default={})
    """Designs that every study of the space scores beside its base: knob to choice, the base's where a knob is not
    named."""


def load_space(name_or_path: str | Path) -> Space:
    """Load a shipped space by name, or a space from a YAML file.

    Raises:
        InputError: naming the file, the location in it and the remedy.
    """
    path = locate(name_or_path, ("space",))
    file = config.load_yaml(path, SpaceConfig)
    source = str(path)
    base = _base(file, path)
    if file.knobs is None and file.blocks is None:
        raise InputError(path, "is required if blocks is not given", "give knobs, blocks or both", place="knobs")
    choices_by_knob = dict(file.knobs or {})
    if file.blocks is not None:
        base, block_counts = _with_block_knobs(base, file.blocks.extra_copies)
        for name in choices_by_knob.keys() & block_counts.keys():
            raise InputError(source, "is already added by blocks", "remove it", place=f"knobs.{name}")
        choices_by_knob = block_counts | choices_by_knob
    levels = len(base.down)
    read = [functools.partial(read_knob, name, c, levels, source=source) for name, c in choices_by_knob.items()]
    knobs = tuple(all_of(read))
    constraints = {str(name): upper_bound for name, upper_bound in file.constraints.items()}
    space = Space(path.stem, source, base, knobs, file.latent_size, file.context_tokens, constraints, {})
    _check_layers(space)
    _check_disjoint(space)
    _check_base(space)
    _check_choices(space)
    references = {name: _reference(space, name, choices) for name, choices in file.references.items()}
    return dataclasses.replace(space, references=references)


def with_proxy(space: Space, proxy: Space) -> Space:
    """A space with the candidates of another one, the twins, trained in place of its own (`Space.twin`).

    Raises:
        InputError: if the other space has other knobs, or cannot build the twin of the base or of a reference.
    """
    for knob, other in itertools.zip_longest(space.knobs, proxy.knobs):
        here, there = _describe(knob), _describe(other)
        if here != there:
            problem = f"is {there} here and {here} in {space.source}"
            remedy = "give both spaces the same knobs, in one order, each with as many choices"
            raise InputError(proxy.source, problem, remedy, place=f"knobs.{(knob or other).name}")
    for name, point in space.reference_points().items():
        with _choice_errors(proxy, "knobs", f"the twin of {name} of {space.source} is invalid: "):
            proxy.architecture(point)
    return dataclasses.replace(space, proxy=proxy)


def _describe(knob: Knob | None) -> str:
    return f"{knob.name} with {len(knob.choices)} choices" if knob is not None else "missing"


def _base(file: SpaceConfig, path: Path) -> Architecture:
    if isinstance(file.base, dict):
        base = config.parse_config(file.base, Architecture, source=path, place="base")
    elif not isinstance(file.base, str):
        problem = f"must be a preset, a path or an architecture, not {label(file.base)}"
        raise InputError(path, problem, f"name one of {', '.join(presets.NAMES)}", place="base")
    elif file.base in presets.NAMES:
        base = presets.preset(file.base)
    else:
        architecture_file = path.parent / file.base
        if not architecture_file.is_file():
            problem = f"{file.base!r} is neither a preset nor a file in this folder"
            raise InputError(path, problem, f"name one of {', '.join(presets.NAMES)}, or a file", place="base")
        base = Architecture.load(architecture_file)
    base.validate_latent_size(file.latent_size, source=path, place="latent_size")
    return base


def _with_block_knobs(base: Architecture, extra_copies: int) -> tuple[Architecture, dict[str, list[int]]]:
    """The base with explicit layers, and choices 0 … count + extra_copies for the number of blocks in each layer."""
    from snapgen.architecture import block_index  # imports torch, which is slow, and few spaces need it

    base = block_index.with_explicit_layers(base)
    counts = {
        f"{site}.layers[{i}].{field}": count
        for site, level, _ in base.named_levels()
        for i, layer in enumerate(level.layers or ())
        for field, count in zip(overrides.COUNTS, layer, strict=True)
    }
    return base, {name: [*range(count + extra_copies + 1)] for name, count in counts.items() if count}


def _check_layers(space: Space) -> None:
    """Check that every layer that a knob names exists in the base."""
    for knob in space.knobs:
        for choice, changes in enumerate(knob.settings):
            with _choice_errors(space, knob.location(choice)):
                for path in changes:
                    overrides.validate_path(space.base, path)


def _check_disjoint(space: Space) -> None:
    """Check that no two knobs set the same field: the later one would silently override the earlier one."""
    owners: dict[tuple[str | int, ...], tuple[Knob, str]] = {}
    for knob in space.knobs:
        for field, path in knob.fields(len(space.base.down)).items():
            conflicts = (owner for owned, owner in owners.items() if owner[0] is not knob and _overlap(field, owned))
            other, other_path = next(conflicts, (knob, path))
            if other is not knob:
                problem = f"{path} sets a field that {other_path} of the knob {other.name!r} sets too"
                raise InputError(space.source, problem, "leave it to one of them", place=f"knobs.{knob.name}")
            owners[field] = knob, path


def _overlap(a: tuple[str | int, ...], b: tuple[str | int, ...]) -> bool:
    """Whether two fields are equal, or one is a block count of a layer and the other covers all layers of its level."""
    for layer, level in ((a, b), (b, a)):
        if "layers" in layer[:-1] and level in (
            (*layer[:-3], "layers"),
            (*layer[:-3], overrides.COUNTS[int(layer[-1])]),
        ):
            return True
    return a == b


def _check_base(space: Space) -> None:
    """Check that the base is a point of the space."""
    for knob in space.knobs:
        if knob.current_choice(space.base) is None:
            raise InputError(
                space.source,
                "every choice changes the base, so that the base would not be a point of its own space",
                "add the base's value as a choice, or change the base",
                place=f"knobs.{knob.name}",
            )
    if space.architecture(space.base_point).id != space.base.id:
        problem = "choices that each leave the base unchanged change it in combination"
        raise InputError(
            space.source, problem, "set the fields of the base to the values of these choices", place="base"
        )


def _check_choices(space: Space) -> None:
    """Check that every choice is valid on its own or in some combination with other knobs' choices."""
    for knob in space.knobs:
        for choice in range(len(knob.choices)):
            point = {**space.base_point, knob.name: choice}
            if not space.valid(point) and not any(map(space.valid, _points_with(space, knob, choice))):
                problem = "is invalid with every combination of the other knobs' choices: "
                with _choice_errors(space, knob.location(choice), problem):
                    space.architecture(point)


def _points_with(space: Space, knob: Knob, choice: int) -> Iterator[Point]:
    """Points with that choice: all of them in a small space; else one or two other knobs changed, then random ones."""
    fixed = {knob.name: choice}
    others = [other for other in space.knobs if other is not knob]
    if math.prod(len(other.choices) for other in others) <= LARGEST_COUNT:
        for point in itertools.product(*(range(len(other.choices)) for other in others)):
            yield fixed | dict(zip((other.name for other in others), point, strict=True))
        return
    moves = [{other.name: i} for other in others for i in range(len(other.choices))]
    pairs = itertools.combinations(moves, 2)
    yield from ({**space.base_point, **fixed, **move} for move in moves)
    yield from ({**space.base_point, **fixed, **a, **b} for a, b in itertools.islice(pairs, 10 * TRIES))
    rng = random.Random(seeding.derive_seed(0, knob.name, choice))
    for _ in range(TRIES):
        yield {other.name: rng.randrange(len(other.choices)) for other in others} | fixed


def _reference(space: Space, name: str, choices: Mapping[str, object]) -> Point:
    place = f"references.{name}"
    if name == BASE:
        raise InputError(space.source, "this name is reserved for the base", "use another name", place=place)
    point = dict(space.base_point)
    by_name = {knob.name: knob for knob in space.knobs}
    for knob_name, choice in choices.items():
        here = f"{place}.{knob_name}"
        if knob_name not in by_name:
            raise InputError(space.source, "is not a knob", f"use one of: {', '.join(by_name)}", place=here)
        knob = by_name[knob_name]
        if label(choice) not in knob.choices:
            problem = f"{label(choice)} is not one of the knob's choices"
            raise InputError(space.source, problem, f"use one of: {', '.join(knob.choices)}", place=here)
        point[knob_name] = knob.choices.index(label(choice))
    with _choice_errors(space, place):
        space.architecture(point)
    return point


@contextmanager
def _choice_errors(space: Space, place: str, before: str = "") -> Iterator[None]:
    """Re-raise what is wrong with an architecture as a mistake at a place of the space's file."""
    try:
        yield
    except ValueError as error:
        problem, remedy = config.problem_and_remedy(error, "change the choice")
        raise InputError(space.source, f"{before}{problem}", remedy, place=place) from None
