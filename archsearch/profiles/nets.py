"""Nets by name, those of published figures among them, as the operations that a device's model predicts from."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from archsearch.operations import Operation, module_operations, operations
from snapgen import presets
from snapgen.arch import Architecture
from snapgen.settings import Settings

DECODER = "tiny-decoder"
"""The paper-size `snapgen.tiny_decoder`: no architecture, but a model predicts any module."""

_FOLDER = Path(__file__).parent / "nets"
_SHIPPED = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


class Net(Settings):
    """A net and the input that it is timed with."""

    name: str
    """A preset, ``tiny-decoder``, a reference of a shipped space (``snapgen/row 1``), or a file of ``nets/``."""
    latent: int = Field(default=128, ge=1)
    tokens: int = Field(default=77, ge=1)
    batch: int = Field(default=1, ge=1)

    def operations(self) -> list[Operation]:
        """Of one forward pass."""
        if self.name == DECODER:
            return decoder_operations(self.latent, batch=self.batch)
        return operations(architecture(self.name), self.latent, context_tokens=self.tokens, batch=self.batch)


def architecture(name: str) -> Architecture:
    """The architecture of a name as `Net` has it, or of a JSON or YAML file.

    Raises:
        InputError: if there is none.
    """
    from spaces.space import Space

    space, _, reference = name.partition("/")
    if name in _SHIPPED:
        return Architecture.load(_SHIPPED[name])
    if reference and not Path(name).exists() and space in _spaces():
        points = Space.load(space).points_of()
        if reference in points:
            return Space.load(space).architecture(points[reference])
    return presets.resolve(name)


def _spaces() -> tuple[str, ...]:
    from spaces.reading import NAMES

    return NAMES


def decoder_operations(latent: int, *, batch: int = 1) -> list[Operation]:
    """Of the paper-size tiny decoder on a square latent."""
    import torch

    from snapgen.tiny_decoder import PAPER, TinyDecoder

    with torch.device("meta"):
        decoder = TinyDecoder(**PAPER).eval()
        return module_operations(decoder, torch.empty(batch, PAPER["latent_channels"], latent, latent))
