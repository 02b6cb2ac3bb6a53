"""Training runs of a candidate: how many seeds it is trained with, and where a run may pause."""

from __future__ import annotations

import itertools

from pydantic import Field, field_validator

from archsearch.protocol import MAX_SEEDS
from snapgen.config import Config, rule


class SeedsConfig(Config):
    """Number of training seeds of a candidate: those that may be on the front get more."""

    first: int = Field(default=1, ge=1)
    """Seeds with which a new candidate is trained."""
    front: int = Field(default=3, ge=1, le=MAX_SEEDS)
    """Seeds of the candidates that are likely to be on the front, by the end of the study."""

    @rule
    def _front_has_more(self) -> None:
        if self.front < self.first:
            raise ValueError(f"front is {self.front}, but first is {self.first}; raise front")


class RungsConfig(Config):
    """Steps of the training at which a candidate pauses; it goes on if it may still be on the front.

    A rung decides only while what is known there predicts the whole run well enough; until then all go on.
    """

    steps: tuple[int, ...] = Field(min_length=1)
    """Numbers of training steps, ascending, each below protocol.steps."""
    keep: int = Field(default=20, ge=0, le=1_000_000)
    """Paused trainings that stay on disk. Those of the others are deleted, and begin anew if they go on after all."""

    @field_validator("steps")
    @classmethod
    def _steps_ascend(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if steps[:1] < (1,):
            raise ValueError(f"a rung at step {steps[0]} comes before the first step; give a number above 0")
        for before, after in itertools.pairwise(steps):
            if after <= before:
                raise ValueError(f"{after} follows {before}; list the steps in ascending order, each once")
        return steps

    def after(self, step: int) -> int | None:
        """The next rung after a step; None: the run goes on to its end."""
        return next((rung for rung in self.steps if rung > step), None)
