"""Paths to the fields of an architecture, and overrides given by them.

Examples: ``down[0].channels``, ``up[1:].num_kv_heads``, ``mid.ffn_ratio``, ``time.hidden_dim``, ``qk_norm``.
``levels[i]`` means ``down[i]`` and ``up[i]`` together, ``all`` every level on both ways and the middle. Indices and
slices are Python's. ``down[0].layers[1].num_transformers`` names one layer, where the layers are written out
(`snapgen.architecture.block_index.with_explicit_layers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from snapgen.architecture.schema import Architecture, BlocksConfig, LevelConfig, TimeEmbeddingConfig

COUNTS = ("num_res_blocks", "num_transformers")
"""Fields of a layer, in the order of its pair in ``layers``."""

_STEP = re.compile(r"(?P<name>[a-z_]+)(?:\[(?P<index>-?\d+|(?:-?\d+)?:(?:-?\d+)?)\])?")


def resolve_path(path: str, levels: int) -> list[tuple[str | int, ...]]:
    """List the fields that a path names in an architecture of ``levels`` levels.

    A field is a tuple of keys, e.g. ``("down", 0, "channels")``. For a layer it is ``("down", 0, "layers", 1, 0)``,
    whose last number is an index into `COUNTS`; whether that layer exists is checked by `validate_path`.

    Raises:
        ValueError: if the path names no field; the message suggests a valid path.
    """
    steps = []
    for text in path.split("."):
        match = _STEP.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a step of a path; write e.g. levels[0:2].self_attention")
        steps.append((match["name"], match["index"]))
    fields = list(_expand(path, steps, levels))
    if not fields:
        raise ValueError(f"{path!r} matches none of the {levels} levels; use indices from 0 to {levels - 1}")
    return fields


def _expand(path: str, steps: list[tuple[str, str | None]], levels: int) -> Iterator[tuple[str | int, ...]]:
    (head, index), *rest = steps
    if not rest and index is None and head in Architecture.model_fields and head not in ("down", "up", "mid", "time"):
        yield (head,)
        return
    if len(rest) == 2 and rest[0][0] == "layers" and head in ("down", "up", "levels", "all", "mid"):
        yield from _expand_layer(f"{head}.layers" if index is None else f"{head}[{index}].layers", rest, levels)
        return
    if len(rest) != 1 or rest[0][1] is not None:
        raise ValueError(
            f"{path!r} is not a knob; name a field such as levels[0].channels, mid.num_kv_heads or qk_norm"
        )
    field = rest[0][0]
    single: dict[str, type[BlocksConfig] | type[TimeEmbeddingConfig]] = {
        "mid": BlocksConfig,
        "time": TimeEmbeddingConfig,
    }
    fields = single.get(head, LevelConfig).model_fields
    if head not in ("down", "up", "levels", "all", *single):
        raise ValueError(f"unknown part {head!r}; use down, up, levels, all, mid, time or a field of the architecture")
    if field not in fields or (head == "all" and field not in BlocksConfig.model_fields):
        raise ValueError(f"unknown field {field!r} of {head}; use one of: {', '.join(sorted(fields))}")
    if index is not None and (head in single or head == "all"):
        raise ValueError(f"{head} takes no index; write {head}.{field}")
    if head in single:
        yield (head, field)
        return
    for way in ("down", "up") if head in ("levels", "all") else (head,):
        yield from ((way, i, field) for i in _indices(index, levels))
    if head == "all":
        yield ("mid", field)


def _expand_layer(sites: str, rest: list[tuple[str, str | None]], levels: int) -> Iterator[tuple[str | int, ...]]:
    (_, layer), (count, index) = rest
    if layer is None or not layer.isdecimal():
        raise ValueError(f"{sites} takes one index, from 0; write e.g. {sites}[1].num_transformers")
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
    """Raise if a path names a layer that this architecture does not have.

    Raises:
        ValueError: if there is no such layer, or the layers are not written out.
    """
    values = arch.model_dump(mode="json")
    for field in resolve_path(path, len(arch.down)):
        _parent(values, field)


def apply_overrides(arch: Architecture, changes: Mapping[str, Any]) -> Architecture:
    """Set the fields of each path to its value, in order, then validate the resulting architecture.

    Raises:
        ValueError: if a path names no field, or the result is not a valid architecture.
    """
    values = arch.model_dump(mode="json")
    for path, value in changes.items():
        for field in resolve_path(path, len(arch.down)):
            _parent(values, field)[field[-1]] = value
    return Architecture.model_validate(values)


def are_applied(arch: Architecture, changes: Mapping[str, Any]) -> bool:
    """Whether every field that the overrides set has the value that they give it."""
    values = arch.model_dump(mode="json")
    try:
        return all(
            _parent(values, field)[field[-1]] == value
            for path, value in changes.items()
            for field in resolve_path(path, len(arch.down))
        )
    except ValueError:  # a layer that the architecture does not have
        return False


def _parent(values: Any, field: tuple[str | int, ...]) -> Any:
    """The mapping or list that contains a field, within the plain data of an architecture."""
    *keys, last = field
    if "layers" in keys:
        site, layer = field[:-3], int(keys[-1])
        layers = _parent(values, (*site, "layers")).get("layers")
        name = site[0] if len(site) == 1 else f"{site[0]}[{site[1]}]"
        if layers is None:
            raise ValueError(
                f"the layers of {name} are not written out; give it layers, or name {name}.{COUNTS[int(last)]}"
            )
        if layer >= len(layers):
            raise ValueError(f"{name} has no layer {layer}; use indices from 0 to {len(layers) - 1}")
    parent = values
    for key in keys:
        parent = parent[key]
    return parent
