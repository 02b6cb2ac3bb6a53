"""Spaces: what may vary in an architecture. A base, knobs over it, limits, and the designs to stand beside.

The file's form is in spaces/README.md; `archsearch.spaces.loading.load_space` reads one and says where each mistake is.
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
from typing import Any, Protocol

from archsearch.spaces.knob import Knob
from snapgen.architecture import overrides
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

Point = Mapping[str, int]
"""One member of a space: each knob's name and the index of its choice."""

BASE = "base"
"""The name of the base's own point beside the references."""

TRIES = 1000
"""Random points tried before a space is said to have no valid one."""

LARGEST_COUNT = 4096
"""Spaces of at most so many points are counted by going through them."""


@dataclass(frozen=True)
class Space:
    """What may vary.

    Attributes:
        name: the shipped space's name, or the file's without its ending.
        source: the file it was read from.
        base: the architecture that the knobs change; always one of the space's points.
        knobs: in the order of the file. No two set the same field, so their order does not matter.
        latent_size: height and width of the latent that cost and latency are counted at.
        context_tokens: the length of the context, likewise.
        limits: most that a candidate may cost, by the name of the cost (`params`, `macs`, `activation_bytes`).
        references: designs to stand beside, by name.
    """

    name: str
    source: str
    base: Architecture
    knobs: tuple[Knob, ...]
    latent_size: int
    context_tokens: int
    limits: Mapping[str, float]
    references: Mapping[str, Point]

    def architecture(self, point: Point) -> Architecture:
        """The architecture at a point.

        Raises:
            ValueError: if its choices do not fit together; the message says which part.
        """
        return overrides.apply_overrides(self.base, self.changes(point))

    def changes(self, point: Point) -> dict[str, Any]:
        """All that the point's choices change in the base."""
        assert point.keys() == self._by_name.keys(), f"{sorted(point)} are not the knobs of {self.name}"
        chosen = (knob.changes(point[knob.name]) for knob in self.knobs)
        return {path: value for changes in chosen for path, value in changes.items()}

    def labels(self, point: Point) -> dict[str, str]:
        """The point in words: each knob's name and what its choice is called."""
        return {knob.name: knob.choices[point[knob.name]] for knob in self.knobs}

    def valid(self, point: Point) -> bool:
        """Whether the point's choices fit together. Limits are no part of it: they are on cost."""
        try:
            self.architecture(point)
        except ValueError:
            return False
        return True

    def within_limits(self, costs: HasCosts) -> bool:
        """Whether an architecture's costs are within every limit."""
        return all(getattr(costs, name) <= most for name, most in self.limits.items())

    def size(self) -> int:
        """The number of points. Some may be invalid, and some may be the same architecture (`distinct`)."""
        return math.prod(len(knob.choices) for knob in self.knobs)

    def log_size(self) -> float:
        """Base-10 logarithm of `size`."""
        return math.log10(self.size())

    def points(self) -> Iterator[dict[str, int]]:
        """Every point, valid or not, in the order of the knobs."""
        for choices in itertools.product(*(range(len(knob.choices)) for knob in self.knobs)):
            yield dict(zip(self._by_name, choices, strict=True))

    def sample(self, rng: random.Random) -> dict[str, int]:
        """A random point among the valid ones, each as likely as another.

        Args:
            rng: e.g. ``random.Random(seeds.derive(seed, trial, "point"))``.

        Raises:
            InputError: if `TRIES` random points in a row are invalid.
        """
        for _ in range(TRIES):
            point = {knob.name: rng.randrange(len(knob.choices)) for knob in self.knobs}
            if self.valid(point):
                return point
        problem = f"choices do not fit together at {TRIES} random points in a row"
        raise InputError(self.source, problem, "take out choices that rarely fit", place="knobs")

    def neighbours(self, point: Point) -> Iterator[dict[str, int]]:
        """The valid points that differ from this one in a single knob, by one step where its choices are ordered."""
        for knob in self.knobs:
            for choice in knob.alternatives(point[knob.name]):
                neighbour = {**point, knob.name: choice}
                if self.valid(neighbour):
                    yield neighbour

    @cached_property
    def base_point(self) -> dict[str, int]:
        """The point that is the base itself."""
        point = {knob.name: knob.choice_of(self.base) for knob in self.knobs}
        assert None not in point.values(), "the reader refuses a base that is no point"
        return {name: choice for name, choice in point.items() if choice is not None}

    def points_of(self, names: Iterable[str] | None = None) -> dict[str, dict[str, int]]:
        """The points to try first, by name: the base's, then every reference's, or only those named.

        Raises:
            KeyError: for a name that is no reference.
        """
        wanted = (BASE, *self.references) if names is None else tuple(names)
        return {name: dict(self.base_point if name == BASE else self.references[name]) for name in wanted}

    def distinct(self, *, samples: int = 100, seed: int = 0) -> tuple[int, bool]:
        """How many valid architectures of different ids there are, and whether that number is exact.

        Up to `LARGEST_COUNT` points all are counted. Beyond, the number is estimated: a random point that shares its
        architecture with m - 1 others stands for 1/m of an architecture, and m is taken as the product, over the
        knobs, of the choices that leave the id as it is; that is exact where knobs do nothing independently.
        """
        if self.size() <= LARGEST_COUNT:
            return len({*map(self._id, self.points())} - {None}), True
        rng = random.Random(seed)
        found = 0.0
        for _ in range(samples):
            point = {knob.name: rng.randrange(len(knob.choices)) for knob in self.knobs}
            found += 1 / self._same(point) if self.valid(point) else 0
        return self.size() * round(1e6 * found / samples) // 10**6, False  # a size may be past every float

    def _same(self, point: Point) -> int:
        """About how many points are this one's architecture."""
        here = self._id(point)
        others = ([{**point, knob.name: i} for i in range(len(knob.choices))] for knob in self.knobs)
        return math.prod(sum(other == point or self._id(other) == here for other in row) for row in others)

    def _id(self, point: Point) -> str | None:
        try:
            return self.architecture(point).id
        except ValueError:
            return None

    @cached_property
    def digest(self) -> str:
        """Hex digest (16 digits) of all that makes the space; its name and the file's place are no part of it."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON: what a study keeps beside its trials. Points are written with their labels."""
        return {"name": self.name, "digest": self.digest, **self._content()}

    def _content(self) -> dict[str, Any]:
        return {
            "base": self.base.model_dump(mode="json"),
            "latent_size": self.latent_size,
            "context_tokens": self.context_tokens,
            "knobs": [knob.to_dict() for knob in self.knobs],
            "limits": dict(self.limits),
            "references": {name: self.labels(point) for name, point in self.references.items()},
        }

    @cached_property
    def _by_name(self) -> dict[str, Knob]:
        return {knob.name: knob for knob in self.knobs}


class HasCosts(Protocol):
    """The costs of one forward pass, as `archsearch.cost.counter.cost` counts them."""

    @property
    def params(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def activation_bytes(self) -> int: ...


class CostFunction(Protocol):
    """`archsearch.cost.counter.cost`, or anything like it."""

    def __call__(self, arch: Architecture, latent_size: int, *, context_tokens: int) -> HasCosts: ...
