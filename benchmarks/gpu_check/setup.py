"""What every part is told: where it runs, how large, and for how long."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Setup:
    """A part's circumstances; it goes to the part's process as JSON.

    Attributes:
        device: ``cuda`` or ``cpu``.
        small: whether everything is made small, so that a CPU takes seconds for it.
        out: the folder that is sent; grids of images go there.
        work: a folder for everything else, removed at the end; beside it is what parts share.
        reference: the JSON file of the CPU's losses.
        seconds: after which the part is ended.
    """

    device: str
    small: bool
    out: str
    work: str
    reference: str
    seconds: float
    began: float = field(default_factory=time.monotonic)

    def to_json(self) -> str:
        """For `from_json`, in another process."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "began"})

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """A setup whose clock begins now."""
        return cls(**json.loads(text))

    @property
    def folder(self) -> Path:
        """Where a part may write what is not sent."""
        return Path(self.work)

    @property
    def shared(self) -> Path:
        """Where the parts of one check share what they make."""
        return self.folder.parent

    def left(self) -> float:
        """Seconds until the part is ended."""
        return self.began + self.seconds - time.monotonic()
