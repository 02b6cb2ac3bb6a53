"""How a table of blocks is filled: apart from the table, for studies are read without what builds nets."""

from __future__ import annotations

from pydantic import Field

from snapgen.config import Config


class BlockTableConfig(Config):
    """How a table is filled."""

    copies: int = Field(default=3, ge=1, le=16)
    """More of a block in the net that its copies' cost is taken from."""
    check: int = Field(default=20, ge=0, le=1000)
    """Random sub-networks that the sums are held to."""
    seed: int = Field(default=0, ge=0)
    """Of these."""
    least: int = Field(default=3, ge=1, le=100)
    """Measurements of each net; predictions are taken once."""
    most: int = Field(default=8, ge=1, le=100)
    """And further ones until the two lowest agree, up to so many."""
