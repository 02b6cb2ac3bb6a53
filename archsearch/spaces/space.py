"""Search spaces: a base architecture, knobs that vary it, constraints on cost, and reference designs.

spaces/README.md describes the file format; `archsearch.spaces.loading.load_space` reads it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

from archsearch.spaces.knob import Knob
from snapgen.architecture import overrides
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

Point = Mapping[str, int]
"""One point of a space: the index of the choice of every knob, by the knob's name."""

BASE = "base"
"""Name of the base's own point among the references."""

TRIES = 1000
"""Number of random points tried before a space is considered to have no valid point."""

LARGEST_COUNT = 4096
"""Largest number of points up to which a space is counted exhaustively."""


@dataclass(frozen=True)
class Space:
    """A search space over architectures.

    Attributes:
        name: name of a shipped space, or the file's stem.
        source: path of the file that the space was read from.
        base: architecture that the knobs change; always a point of the space.
        knobs: knobs in the order of the file. No two set the same field, so their order has no effect.
        latent_size: height and width of the latent at which cost and latency are determined.
        context_tokens: length of the context at which cost and latency are determined.
        constraints: upper bounds on a candidate's cost, by name (`params`, `macs`, `activation_bytes`).
        references: designs that studies compare candidates with, by name.
        proxy: another space with the same knobs, whose candidates are trained in place of this space's own (`twin`).
            Its own constraints and references are not used.
    """

    name: str
    source: str
    base: Architecture
    knobs: tuple[Knob, ...]
    latent_size: int
    context_tokens: int
    constraints: Mapping[str, float]
    references: Mapping[str, Point]
    proxy: Space | None = None

    def architecture(self, point: Point) -> Architecture:
        """The architecture at a point.

        Raises:
            ValueError: if its choices, or those of its twin, are not valid in combination; the message names the cause.
        """
        if self.proxy is not None:
            self.proxy.architecture(point)
        return overrides.apply_overrides(self.base, self.changes(point))

    def twin(self, point: Point) -> Architecture | None:
        """The architecture that is trained in place of the point's own; None without a proxy."""
        return self.proxy.architecture(point) if self.proxy is not None else None

    def changes(self, point: Point) -> dict[str, Any]:
        """Overrides of the base for all choices of the point."""
        assert point.keys() == self._by_name.keys(), f"{sorted(point)} are not the knobs of {self.name}"
        chosen = (knob.changes(point[knob.name]) for knob in self.knobs)
        return {path: value for changes in chosen for path, value in changes.items()}

    def labels(self, point: Point) -> dict[str, str]:
        """Label of each knob's choice at the point, by the knob's name."""
        return {knob.name: knob.choices[point[knob.name]] for knob in self.knobs}

    def valid(self, point: Point) -> bool:
        """Whether the point's choices are valid in combination. Constraints on cost are not checked."""
        try:
            self.architecture(point)
        except ValueError:
            return False
        return True

    def meets_constraints(self, costs: HasCosts) -> bool:
        """Whether an architecture's costs satisfy every constraint."""
        return all(getattr(costs, name) <= upper_bound for name, upper_bound in self.constraints.items())

    def size(self) -> int:
        """Number of points. Some may be invalid, and several may be the same architecture (see `distinct`)."""
        return math.prod(len(knob.choices) for knob in self.knobs)

    def log_size(self) -> float:
        """Base-10 logarithm of `size`."""
        return math.log10(self.size())

    def points(self) -> Iterator[dict[str, int]]:
        """Iterate over every point, valid or not, in the order of the knobs."""
        for choices in itertools.product(*(range(len(knob.choices)) for knob in self.knobs)):
            yield dict(zip(self._by_name, choices, strict=True))

    def point_of(self, arch: Architecture) -> dict[str, int] | None:
        """The point of an architecture; None if it is not one of the space's."""
        choices = {knob.name: knob.current_choice(arch) for knob in self.knobs}
        point = {name: choice for name, choice in choices.items() if choice is not None}
        return point if len(point) == len(choices) and self._id(point) == arch.id else None

    def distinct_points(self) -> Iterator[dict[str, int]]:
        """Iterate over the valid points, of those with the same architecture only the first, in the order of the knobs.

        For spaces of at most `LARGEST_COUNT` points.
        """
        assert self.size() <= LARGEST_COUNT, f"{self.name} is too large to enumerate"
        seen: set[str | None] = {None}
        for point in self.points():
            if (arch_id := self._id(point)) not in seen:
                seen.add(arch_id)
                yield point

    def sample(self, rng: random.Random) -> dict[str, int]:
        """Draw a valid point uniformly at random.

        Args:
            rng: source of randomness, e.g. ``random.Random(derive_seed(seed, trial, "point"))``.

        Raises:
            InputError: if `TRIES` random points in a row are invalid.
        """
        for _ in range(TRIES):
            point = {knob.name: rng.randrange(len(knob.choices)) for knob in self.knobs}
            if self.valid(point):
                return point
        problem = f"{TRIES} random points in a row were invalid combinations of choices"
        raise InputError(self.source, problem, "remove choices that are rarely valid", place="knobs")

    def neighbors(self, point: Point) -> Iterator[dict[str, int]]:
        """Valid points that differ from this one in a single knob, and by one step if its choices are ordered."""
        for knob in self.knobs:
            for choice in knob.adjacent_choices(point[knob.name]):
                neighbor = {**point, knob.name: choice}
                if self.valid(neighbor):
                    yield neighbor

    @cached_property
    def base_point(self) -> dict[str, int]:
        """The point of the base architecture."""
        point = {knob.name: knob.current_choice(self.base) for knob in self.knobs}
        assert None not in point.values(), "load_space rejects a base that is not a point of its space"
        return {name: choice for name, choice in point.items() if choice is not None}

    def reference_points(self, names: Iterable[str] | None = None) -> dict[str, dict[str, int]]:
        """Points to evaluate first, by name: the base and all references, or only those in ``names``.

        Raises:
            KeyError: for an unknown name.
        """
        names = (BASE, *self.references) if names is None else tuple(names)
        return {name: dict(self.base_point if name == BASE else self.references[name]) for name in names}

    def distinct(self, *, samples: int = 100, seed: int = 0) -> tuple[int, bool]:
        """Number of valid architectures with different ids, and whether that number is exact.

        Spaces of up to `LARGEST_COUNT` points are counted exhaustively. For larger ones the number is estimated: a
        random point that shares its architecture with m - 1 others counts as 1/m of an architecture. Here m is the
        product, over the knobs, of the number of choices that leave the id unchanged; this is exact if the knobs'
        redundancies are independent of each other.
        """
        if self.size() <= LARGEST_COUNT:
            return sum(1 for _ in self.distinct_points()), True
        rng = random.Random(seed)
        total = 0.0
        for _ in range(samples):
            point = {knob.name: rng.randrange(len(knob.choices)) for knob in self.knobs}
            arch_id = self._id(point)
            others = ([{**point, knob.name: i} for i in range(len(knob.choices))] for knob in self.knobs)
            same = (sum(other == point or self._id(other) == arch_id for other in row) for row in others)
            total += 1 / math.prod(same) if arch_id is not None else 0
        # integer arithmetic: the size may exceed the range of a float
        return self.size() * round(1e6 * total / samples) // 10**6, False

    def _id(self, point: Point) -> str | None:
        try:
            return self.architecture(point).id
        except ValueError:
            return None

    @cached_property
    def digest(self) -> str:
        """Hex digest (16 digits) of the space's content; its name and the path of its file are not included."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON-serializable data, stored with a study. Points are written with their labels."""
        return {"name": self.name, "digest": self.digest, **self._content()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> Self:
        """The space that `to_dict` wrote.

        Args:
            source: file that the data come from.

        Raises:
            InputError: if the data are damaged.
        """
        try:
            knobs = tuple(
                Knob(knob["name"], tuple(knob["choices"]), tuple(knob["changes"]), knob["ordered"])
                for knob in values["knobs"]
            )
            choices = {knob.name: knob.choices for knob in knobs}
            space = cls(
                values["name"],
                source,
                Architecture.model_validate(values["base"]),
                knobs,
                values["latent_size"],
                values["context_tokens"],
                values["constraints"],
                {
                    reference: {name: choices[name].index(label) for name, label in labels.items()}
                    for reference, labels in values["references"].items()
                },
                cls.from_dict(values["proxy"], source=source) if "proxy" in values else None,
            )
            is_damaged = not isinstance(space.name, str) or space.digest != values["digest"]
            if len(choices) < len(knobs) or any(not len({*k.choices}) == len(k.settings) > 0 for k in knobs):
                raise ValueError("two knobs or two choices have the same name, or a choice has no changes")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(source, "its space is damaged", "restore the file", place="space") from None
        if is_damaged:
            raise InputError(source, "its space is damaged: the digest differs", "restore the file", place="space")
        return space

    def _content(self) -> dict[str, Any]:
        return {
            "base": self.base.model_dump(mode="json"),
            "latent_size": self.latent_size,
            "context_tokens": self.context_tokens,
            "knobs": [knob.to_dict() for knob in self.knobs],
            "constraints": dict(self.constraints),
            "references": {name: self.labels(point) for name, point in self.references.items()},
            **({"proxy": self.proxy.to_dict()} if self.proxy is not None else {}),
        }

    @cached_property
    def _by_name(self) -> dict[str, Knob]:
        return {knob.name: knob for knob in self.knobs}


class HasCosts(Protocol):
    """Costs of one forward pass, e.g. those that `archsearch.cost.counter.cost` returns."""

    @property
    def params(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def activation_bytes(self) -> int: ...


class CostFunction(Protocol):
    """Interface of `archsearch.cost.counter.cost`."""

    def __call__(self, arch: Architecture, latent_size: int, *, context_tokens: int) -> HasCosts: ...
