"""Arguments of every part: device, size, folders and time limit."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Setup:
    """Arguments of a part, passed to its process as JSON.

    Attributes:
        device: ``cuda`` or ``cpu``.
        small: whether to use small networks and few steps, which take seconds on a CPU.
        out: folder of the results, for grids of images.
        work: working folder of the part, removed at the end; its parent is shared by all parts.
        reference: JSON file of the reference losses on the CPU.
        seconds: time limit of the part.
        began: when the part started, in `time.monotonic` seconds.
    """

    device: str
    small: bool
    out: str
    work: str
    reference: str
    seconds: float
    began: float = field(default_factory=time.monotonic)

    def to_json(self) -> str:
        """Serialize for `from_json` in another process."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "began"})

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """Create a setup whose time limit starts now."""
        return cls(**json.loads(text))

    @property
    def folder(self) -> Path:
        """Working folder of the part."""
        return Path(self.work)

    @property
    def shared(self) -> Path:
        """Folder shared by all parts of one check."""
        return self.folder.parent

    def left(self) -> float:
        """Seconds left until the time limit."""
        return self.began + self.seconds - time.monotonic()
