"""The pass of the U-Net that a latency is of: at which size, and how many such passes an image takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class TimedPass:
    """The forward pass that a study's latencies are of.

    Attributes:
        latent_size: height and width of its latent.
        context_tokens: length of its context.
        steps: sampling steps of an image under the study's protocol; None if nothing is trained.
        guidance_scale: guidance scale of the sampling; any but 1 takes two passes a step.
        trained_latent_size: height and width of the latents that candidates are trained on; None if unknown.
        trained_resolution: height and width of the images that they are trained on, in pixels.
        twin: name of the space whose candidates are trained in place of the study's own, if it has a proxy.
    """

    latent_size: int
    context_tokens: int
    steps: int | None = None
    guidance_scale: float = 1
    trained_latent_size: int | None = None
    trained_resolution: int | None = None
    twin: str | None = None

    @classmethod
    def of_study(cls, attrs: Mapping[str, Any]) -> Self:
        """The pass of a study, from its attributes."""
        space, protocol = attrs["space"], attrs.get("protocol", {})
        protocol = protocol.get("protocol", protocol)
        return cls(
            latent_size=space["latent_size"],
            context_tokens=space["context_tokens"],
            steps=protocol.get("num_inference_steps"),
            guidance_scale=protocol.get("guidance_scale", 1),
            trained_latent_size=attrs.get("trained_latent_size"),
            trained_resolution=protocol.get("resolution"),
            twin=space.get("proxy", {}).get("name"),
        )

    @property
    def text(self) -> str:
        """The pass in words."""
        size = _square(self.latent_size)
        if self.trained_latent_size and self.trained_resolution:
            size += f" ({self.latent_size * self.trained_resolution // self.trained_latent_size} px)"
        return f"one pass of the U-Net at batch size 1, a latent of {size} and {self.context_tokens} context tokens"

    @property
    def passes(self) -> int | None:
        """Passes that an image takes under the study's protocol."""
        return None if self.steps is None else self.steps * (1 if self.guidance_scale == 1 else 2)

    def image(self, milliseconds: float) -> str:
        """How long an image takes with so many milliseconds a pass; empty if no protocol says how it is sampled."""
        if self.passes is None:
            return ""
        each = "" if self.guidance_scale == 1 else f", two passes each for guidance {self.guidance_scale:g}"
        return (
            f"an image of the protocol's {self.steps} steps{each} takes {self.passes} passes, "
            f"{milliseconds * self.passes:.3g} ms, without text encoder and decoder"
        )

    @property
    def mismatch(self) -> str:
        """Sentence on a study that trains candidates at another latent than it times them at; empty for others."""
        if self.trained_latent_size in (None, self.latent_size):
            return ""
        who = f"Twins in {self.twin}" if self.twin else "Candidates"
        trained = f"{_square(self.trained_latent_size)} ({self.trained_resolution} px)"
        return (
            f"{who} are trained at a latent of {trained}, but cost and latency are those at "
            f"{_square(self.latent_size)}: quality and latency are not of the same images."
        )


def _square(size: int | None) -> str:
    return f"{size} × {size}"
