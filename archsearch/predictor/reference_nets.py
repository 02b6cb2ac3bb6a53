"""Nets that published figures refer to, by name, as lists of operations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from archsearch.cost.operations import Operation, module_operations, operations
from snapgen.architecture import presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.presets import TINY_DECODER
from snapgen.architecture.schema import Architecture
from snapgen.config import Config
from snapgen.errors import InputError


class ReferenceNet(Config):
    """A net and its input size."""

    name: str
    """A preset, ``tiny-decoder``, a reference of a shipped space (``snapgen/row 1``), or a file."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the architecture, by path."""
    latent: int = Field(default=128, ge=1)
    tokens: int = Field(default=77, ge=1)
    batch: int = Field(default=1, ge=1)

    def __hash__(self) -> int:
        return hash(self.digest())

    def operations(self) -> list[Operation]:
        """Operations of one forward pass; ``tiny-decoder`` is the decoder of the paper's size.

        Raises:
            InputError: for an unknown name, or a latent size that the net does not support.
        """
        arch = self.architecture
        if arch is None:
            return _decoder_operations(self.latent, batch=self.batch)
        return operations(arch, self.latent, context_tokens=self.tokens, batch=self.batch)

    @property
    def architecture(self) -> Architecture | None:
        """Its architecture; None for ``tiny-decoder``.

        Raises:
            InputError: for an unknown name.
        """
        return None if self.name == TINY_DECODER else apply_overrides(architecture(self.name), self.changes)


def architecture(name: str, *, other_names: Sequence[str] = (TINY_DECODER,)) -> Architecture:
    """The architecture of a preset, a space's reference, or a JSON or YAML file.

    Args:
        name: any of these.
        other_names: further names that the caller accepts, for the error message.

    Raises:
        InputError: if it does not exist.
    """
    from archsearch.library import shipped
    from archsearch.spaces.loading import load_space

    space, _, reference = name.partition("/")
    if space in shipped("space") and reference and not Path(name).exists():
        shipped_space = load_space(space)
        points = shipped_space.reference_points()
        if reference in points:
            return shipped_space.architecture(points[reference])
        if not Path(name).suffix:
            raise InputError(name, f"the space {space} has no reference {reference!r:.60}", f"use {', '.join(points)}")
    return presets.resolve(name, other_names=other_names)


def _decoder_operations(latent: int, *, batch: int) -> list[Operation]:
    import torch

    from snapgen.autoencoders.tiny_decoder import PAPER, TinyDecoder

    with torch.device("meta"):
        decoder = TinyDecoder(**PAPER).eval()
        return module_operations(decoder, torch.empty(batch, PAPER["latent_channels"], latent, latent))
