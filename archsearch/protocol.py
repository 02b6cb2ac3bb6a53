"""The protocol: everything that a quality number depends on. Its hash travels with the number."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from snapgen.config import Config
from snapgen.training.short_run import ShortRunConfig

REVISION = 1
"""Of the code that turns a protocol into numbers; raised whenever the same protocol would give other numbers."""


def _enough(samples: int) -> int:
    if 0 < samples < 8:
        raise ValueError("a distance needs at least 8 samples; write 0 for no distances")
    return samples


Samples = Annotated[int, Field(ge=0), AfterValidator(_enough)]
"""Images drawn for the distances; 0: none."""


class EvaluationProtocol(ShortRunConfig):
    """How a candidate is trained and judged. The defaults are the quick start's (benchmarks/short_run.py)."""

    data: str = "emoji"
    """`emoji`, a folder of images, or webdataset shards."""
    resolution: int = Field(default=32, ge=8, le=4096)
    """Of the images, in pixels."""
    autoencoder: str = "emoji"
    """Of the latents: a name or a folder."""
    text: str = "minilm"
    """The text encoder: a name or a folder."""
    context_tokens: int = Field(default=16, ge=1, le=512)
    sampler_steps: int = Field(default=10, ge=1, le=1000)
    """Euler steps."""
    guidance: float = Field(default=2, ge=0, le=100)
    """Classifier-free guidance scale; 1: none."""
    samples: Samples = 256
    """Images drawn for the distances; 0: no distances."""
    extractor: str = "efficientnet-lite0"
    """Of the distances' features: a name, or the path of the FID Inception weights."""
    feature_resolution: int = Field(default=64, ge=32, le=1024)
    """Images are brought to it before the extractor (which may have a size of its own: Inception's is 299)."""
    validation_pairs: int = Field(default=512, ge=2)
    """Fixed (image, t, noise) triples behind the validation loss."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1, max_length=64)] = (0, 1)
    """Of the training runs, each a candidate's whole score; the score is their mean."""
    inherit: str | None = None
    """Folder of a trained U-Net (`archsearch.quality.supernet`) whose weights candidates begin with; None: new
    weights."""

    @model_validator(mode="after")
    def _distinct_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice; name each once")
        return self


_NAMES_FILES = {
    "data": "data_digest",
    "autoencoder": "autoencoder_digest",
    "text": "text_digest",
    "extractor": "extractor_digest",
}


_OF_SAMPLES = ("sampler_steps", "guidance", "extractor", "feature_resolution")


class ResolvedProtocol(Config):
    """A protocol with the digests of what it names: all that two numbers must share to be compared."""

    protocol: EvaluationProtocol
    data_digest: str
    """Of the images and captions, both splits."""
    autoencoder_digest: str
    text_digest: str
    extractor_digest: str
    """Empty where no samples are drawn."""
    inherit_digest: str = ""
    """Of the U-Net whose weights candidates begin with; empty where they begin with new ones."""
    revision: int = REVISION

    @property
    def hash(self) -> str:
        """16 hex digits, equal exactly when `first_difference` finds none.

        What is named counts by its content, not by where it lies; what samples are drawn with does not count where none
        are.
        """
        text = json.dumps(self._identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def first_difference(self, other: ResolvedProtocol) -> str | None:
        """The first field that tells two protocols apart, with both values; None if nothing does."""
        ours, theirs = self._identity(), other._identity()
        for name in ours | theirs:
            one, another = ours.get(name), theirs.get(name)
            if one == another:
                continue
            a, b = getattr(self.protocol, name, one), getattr(other.protocol, name, another)
            if a == b:
                a, b = f"{a} with digest {one}", another
            return f"{name}: {a} against {b}"
        return None

    def _identity(self) -> dict[str, Any]:
        values = self.protocol.model_dump(mode="json")
        values |= {name: getattr(self, digest) for name, digest in _NAMES_FILES.items()}
        if not self.protocol.samples:
            values |= dict.fromkeys(_OF_SAMPLES)
        if self.protocol.inherit is None:
            del values["inherit"]  # so that the hash of every other protocol is what it was before there was this one
        else:
            values["inherit"] = self.inherit_digest
        return values | {"revision": self.revision}
