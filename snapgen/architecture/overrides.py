"""Paths into an architecture, and changes made along them.

``down[0].channels``, ``up[1:].kv_heads``, ``mid.ffn_ratio``, ``time.width``, ``qk_norm``; ``stages[i]`` is ``down[i]``
and ``up[i]`` together, ``all`` is every stage and the middle. Indices and slices are Python's. ``mid.layers[1]`` is a
layer of a site whose layers are written out (`snapgen.architecture.block_index.with_explicit_layers`):
``down[0].layers[1].transformers``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from snapgen.architecture.schema import Architecture, BlocksConfig, LevelConfig, TimeEmbeddingConfig

COUNTS = ("residual_blocks", "transformers")
"""What a layer has, in the order of its pair in ``layers``."""

_STEP = re.compile(r"(?P<name>[a-z_]+)(?:\[(?P<index>-?\d+|(?:-?\d+)?:(?:-?\d+)?)\])?")


def resolve_path(path: str, levels: int) -> list[tuple[str | int, ...]]:
    """The fields that a path names in an architecture of so many levels, e.g. ``("down", 0, "channels")``.

    Of a layer it is ``("down", 0, "layers", 1, 0)``, the last number as in `COUNTS`; whether there is such a layer, an
    architecture alone can say (`validate_path`).

    Raises:
        ValueError: if it names none; the message says what would.
    """
    steps = []
    for part in path.split("."):
        match = _STEP.fullmatch(part)
        if not match:
            raise ValueError(f"{part!r} is not a step of a path; write e.g. stages[0:2].self_attention")
        steps.append((match["name"], match["index"]))
    found = list(_expand(path, steps, levels))
    if not found:
        raise ValueError(f"{path!r} names no stage of {levels}; use indices from 0 to {levels - 1}")
    return found


def _expand(path: str, steps: list[tuple[str, str | None]], levels: int) -> Iterator[tuple[str | int, ...]]:
    (head, index), *rest = steps
    if not rest and index is None and head in Architecture.model_fields and head not in ("down", "up", "mid", "time"):
        yield (head,)
        return
    if len(rest) == 2 and rest[0][0] == "layers" and head in ("down", "up", "stages", "all", "mid"):
        yield from _of_layer(f"{head}.layers" if index is None else f"{head}[{index}].layers", rest, levels)
        return
    if len(rest) != 1 or rest[0][1] is not None:
        raise ValueError(f"{path!r} is not a knob; name a field such as stages[0].channels, mid.kv_heads or qk_norm")
    field = rest[0][0]
    homes: dict[str, type[BlocksConfig] | type[TimeEmbeddingConfig]] = {
        "mid": BlocksConfig,
        "time": TimeEmbeddingConfig,
    }
    fields = homes.get(head, LevelConfig).model_fields
    if head not in ("down", "up", "stages", "all", *homes):
        raise ValueError(f"unknown part {head!r}; use down, up, stages, all, mid, time or a field of the architecture")
    if field not in fields or (head == "all" and field not in BlocksConfig.model_fields):
        raise ValueError(f"unknown field {field!r} of {head}; use one of: {', '.join(sorted(fields))}")
    if index is not None and (head in homes or head == "all"):
        raise ValueError(f"{head} takes no index; write {head}.{field}")
    if head in homes:
        yield (head, field)
        return
    for way in ("down", "up") if head in ("stages", "all") else (head,):
        yield from ((way, i, field) for i in _indices(index, levels))
    if head == "all":
        yield ("mid", field)


def _of_layer(sites: str, rest: list[tuple[str, str | None]], levels: int) -> Iterator[tuple[str | int, ...]]:
    (_, layer), (count, index) = rest
    if layer is None or not layer.isdecimal():
        raise ValueError(f"{sites} takes one index, from 0; write e.g. {sites}[1].transformers")
    if count not in COUNTS or index is not None:
        raise ValueError(f"unknown field {count!r} of a layer; use one of: {', '.join(COUNTS)}")
    for site in resolve_path(sites, levels):
        yield (*site, int(layer), COUNTS.index(count))


def _indices(index: str | None, levels: int) -> range:
    if index is None:
        return range(levels)
    if ":" in index:
        start, stop = (int(end) if end else None for end in index.split(":"))
        return range(levels)[slice(start, stop)]
    i = int(index)
    return range(levels)[i : i + 1 or None] if -levels <= i < levels else range(0)


def validate_path(arch: Architecture, path: str) -> None:
    """Refuse a path that names what an architecture of as many levels may have, but this one has not: a layer.

    Raises:
        ValueError: if a site has no such layer, or its layers are not written out.
    """
    values = arch.model_dump(mode="json")
    for field in resolve_path(path, len(arch.down)):
        _home(values, field)


def apply_overrides(arch: Architecture, changes: Mapping[str, Any]) -> Architecture:
    """The architecture with each path's fields set to its value, in order, then checked as a whole.

    Raises:
        ValueError: if a path names nothing, or the result is no architecture.
    """
    values = arch.model_dump(mode="json")
    for path, value in changes.items():
        for field in resolve_path(path, len(arch.down)):
            _home(values, field)[field[-1]] = value
    return Architecture.model_validate(values)


def _home(values: Any, field: tuple[str | int, ...]) -> Any:
    """What holds a field, in an architecture's plain data."""
    *way, last = field
    if "layers" in way:
        site, layer = field[:-3], int(way[-1])
        layers = _home(values, (*site, "layers")).get("layers")
        name = site[0] if len(site) == 1 else f"{site[0]}[{site[1]}]"
        if layers is None:
            raise ValueError(
                f"the layers of {name} are not written out; give it layers, or name {name}.{COUNTS[int(last)]}"
            )
        if layer >= len(layers):
            raise ValueError(f"{name} has no layer {layer}; use indices from 0 to {len(layers) - 1}")
    home = values
    for step in way:
        home = home[step]
    return home
