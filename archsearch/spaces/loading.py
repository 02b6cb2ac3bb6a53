"""A space from its YAML file, with the place of each mistake in it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from archsearch.library import shipped
from archsearch.spaces.knob import Knob, label, read_knob
from archsearch.spaces.space import BASE, LARGEST_COUNT, TRIES, Point, Space
from snapgen import config, seeding
from snapgen.architecture import overrides, presets
from snapgen.architecture.schema import MOST, Architecture
from snapgen.config import Config
from snapgen.errors import InputError

NAMES = tuple(shipped("space"))
"""The shipped spaces."""


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{label(value)} is not a number; write a number")
    return value


_Count = Annotated[int, Field(strict=True, ge=1, le=65536)]
_Most = Annotated[float, BeforeValidator(_not_bool), Field(gt=0)]  # not strict: YAML reads 2.5e6 as text


class BlockKnobsConfig(Config):
    """A knob for the number of blocks of a kind in each layer of the base that has any."""

    copies: Annotated[int, Field(strict=True, ge=0, le=MOST)] = 1
    """Blocks that a layer may have beyond the base's."""


class SpaceConfig(Config):
    """The form of a space's file; what the keys mean is in spaces/README.md."""

    base: Any
    latent: _Count
    context_tokens: _Count = 77
    knobs: dict[str, Any] | None = Field(default=None, min_length=1)
    blocks: BlockKnobsConfig | None = None
    limits: Mapping[Literal["params", "macs", "activation_bytes"], _Most] = Field(default={})
    references: dict[str, dict[str, Any]] = Field(default={})


def load_space(name_or_path: str | Path) -> Space:
    """The shipped space of that name, or the one in the file.

    Raises:
        InputError: naming the file, the place and the remedy.
    """
    path = _find(name_or_path)
    file = config.load_yaml(path, SpaceConfig)
    source = str(path)
    base = _base(file, path)
    if file.knobs is None and file.blocks is None:
        raise InputError(path, "is required where no blocks may vary", "give knobs, blocks or both", place="knobs")
    written = dict(file.knobs or {})
    if file.blocks is not None:
        base, counted = _with_blocks(base, file.blocks.copies)
        for name in written.keys() & counted.keys():
            raise InputError(source, "is a knob of blocks already", "remove it", place=f"knobs.{name}")
        written = counted | written
    knobs = tuple(read_knob(name, choices, len(base.down), source=source) for name, choices in written.items())
    limits = {str(name): most for name, most in file.limits.items()}
    space = Space(path.stem, source, base, knobs, file.latent, file.context_tokens, limits, {})
    _check_layers(space)
    _check_apart(space)
    _check_base(space)
    _check_choices(space)
    references = {name: _reference(space, name, choices) for name, choices in file.references.items()}
    return dataclasses.replace(space, references=references)


def _find(name_or_path: str | Path) -> Path:
    if str(name_or_path) in NAMES:
        return shipped("space")[str(name_or_path)]
    path = Path(name_or_path)
    if not path.suffix and len(path.parts) < 2 and not path.exists():
        raise InputError(str(name_or_path), "is no shipped space", f"use {', '.join(NAMES)} or the path of a YAML file")
    return path


def _base(file: SpaceConfig, path: Path) -> Architecture:

    if isinstance(file.base, dict):
        base = config.parse_config(file.base, Architecture, source=path, place="base")
    elif not isinstance(file.base, str):
        problem = f"must be a preset, a path or an architecture, not {label(file.base)}"
        raise InputError(path, problem, f"name one of {', '.join(presets.NAMES)}", place="base")
    elif file.base in presets.NAMES:
        base = presets.preset(file.base)
    else:
        beside = path.parent / file.base
        if not beside.is_file():
            problem = f"{file.base!r} is no preset, and no file beside this one"
            raise InputError(path, problem, f"name one of {', '.join(presets.NAMES)}, or a file", place="base")
        base = Architecture.load(beside)
    base.check_latent(file.latent, source=path, place="latent")
    return base


def _with_blocks(base: Architecture, copies: int) -> tuple[Architecture, dict[str, list[int]]]:
    """The base with its layers written out, and a knob for each count of blocks: from none to so many more."""
    from snapgen.architecture import block_index  # torch is slow to come, and few spaces need it

    base = block_index.with_explicit_layers(base)
    counts = {
        f"{site}.layers[{i}].{kind}": count
        for site, given, _ in base.sites()
        for i, layer in enumerate(given.layers or ())
        for kind, count in zip(overrides.COUNTS, layer, strict=True)
    }
    return base, {name: [*range(count + copies + 1)] for name, count in counts.items() if count}


def _check_layers(space: Space) -> None:
    """A knob may name a layer only where the base has it."""
    for knob in space.knobs:
        for choice, changes in enumerate(knob.settings):
            for path in changes:
                try:
                    overrides.validate_path(space.base, path)
                except ValueError as error:
                    problem, remedy = _reason(error)
                    raise InputError(space.source, problem, remedy, place=knob.place(choice)) from None


def _check_apart(space: Space) -> None:
    """No two knobs may set the same field: the later would win in silence, and the other mean nothing."""
    owners: dict[tuple[str | int, ...], tuple[Knob, str]] = {}
    for knob in space.knobs:
        for field, path in knob.fields(len(space.base.down)).items():
            others = (known for rival, known in owners.items() if known[0] is not knob and _same(field, rival))
            other, other_path = next(others, (knob, path))
            if other is not knob:
                problem = f"{path} sets a field that {other_path} of the knob {other.name!r} sets too"
                raise InputError(space.source, problem, "leave it to one of them", place=f"knobs.{knob.name}")
            owners[field] = knob, path


def _same(one: tuple[str | int, ...], other: tuple[str | int, ...]) -> bool:
    """Whether two fields are one, or one is a layer's count and the other its site's layers or their sum."""
    for layer, whole in ((one, other), (other, one)):
        if "layers" in layer[:-1] and whole in (
            (*layer[:-3], "layers"),
            (*layer[:-3], overrides.COUNTS[int(layer[-1])]),
        ):
            return True
    return one == other


def _check_base(space: Space) -> None:
    for knob in space.knobs:
        if knob.choice_of(space.base) is None:
            raise InputError(
                space.source,
                "every choice changes the base, which would be no point of its own space",
                "add the base's value as a choice, or change the base",
                place=f"knobs.{knob.name}",
            )
    if space.architecture(space.base_point).id != space.base.id:
        problem = "choices that each leave the base as it is change it together"
        raise InputError(space.source, problem, "set them in the base to what they are among the choices", place="base")


def _check_choices(space: Space) -> None:
    """Every choice must fit: alone on the base, or in some combination with others."""
    for knob in space.knobs:
        for choice in range(len(knob.choices)):
            try:
                space.architecture({**space.base_point, knob.name: choice})
            except ValueError as error:
                if any(map(space.valid, _with(space, knob, choice))):
                    continue
                problem, remedy = _reason(error)
                problem = f"fits with none of the other knobs' choices: {problem}"
                raise InputError(space.source, problem, remedy, place=knob.place(choice)) from None


def _with(space: Space, knob: Knob, choice: int) -> Iterator[Point]:
    """Points with that choice: all in a small space; else one and two other knobs moved, then random ones."""
    fixed = {knob.name: choice}
    others = [other for other in space.knobs if other is not knob]
    if math.prod(len(other.choices) for other in others) <= LARGEST_COUNT:
        for point in itertools.product(*(range(len(other.choices)) for other in others)):
            yield fixed | dict(zip((other.name for other in others), point, strict=True))
        return
    moves = [{other.name: i} for other in others for i in range(len(other.choices))]
    pairs = itertools.combinations(moves, 2)
    yield from ({**space.base_point, **fixed, **one} for one in moves)
    yield from ({**space.base_point, **fixed, **one, **two} for one, two in itertools.islice(pairs, 10 * TRIES))
    rng = random.Random(seeding.derive_seed(0, knob.name, choice))
    for _ in range(TRIES):
        yield {other.name: rng.randrange(len(other.choices)) for other in others} | fixed


def _reference(space: Space, name: str, choices: Mapping[str, object]) -> Point:
    place = f"references.{name}"
    if name == BASE:
        raise InputError(space.source, "the base is a reference already", "use another name", place=place)
    point = dict(space.base_point)
    by_name = {knob.name: knob for knob in space.knobs}
    for knob_name, choice in choices.items():
        here = f"{place}.{knob_name}"
        if knob_name not in by_name:
            raise InputError(space.source, "is no knob", f"use one of: {', '.join(by_name)}", place=here)
        knob = by_name[knob_name]
        if label(choice) not in knob.choices:
            problem = f"{label(choice)} is none of the knob's choices"
            raise InputError(space.source, problem, f"use one of: {', '.join(knob.choices)}", place=here)
        point[knob_name] = knob.choices.index(label(choice))
    try:
        space.architecture(point)
    except ValueError as error:
        problem, remedy = _reason(error)
        raise InputError(space.source, problem, remedy, place=place) from None
    return point


def _reason(error: ValueError) -> tuple[str, str]:
    """Problem and remedy from what an architecture that does not fit together says."""
    errors = getattr(error, "errors", None)
    message = str(errors(include_url=False)[0]["msg"] if errors else error).removeprefix("Value error, ")
    problem, _, remedy = message.partition("; ")
    return problem, remedy or "change the choice"
