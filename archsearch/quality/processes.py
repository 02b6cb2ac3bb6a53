"""Short runs in several processes, as started by ``accelerate launch -m archsearch evolve STUDY``.

The main process runs the study. The others follow it: they wait for the next training, take their share of every batch,
and wait again until the study is over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from archsearch.protocol import EvaluationProtocol
from snapgen.architecture.schema import Architecture

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainingJob:
    """A training that the other processes take part in; they get the weights from the main process."""

    architecture: Architecture
    protocol: EvaluationProtocol
    seed: int
    block_dropout: float
    checkpoint: Path | None
    until: int | None = None
    """Step at which it pauses; None: it runs to the end."""
    order_seed: int | None = None


def num_processes() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_follower() -> bool:
    """Whether this is one of several processes, and not the main one."""
    return num_processes() > 1 and not _accelerator().is_main_process


def announce(job: TrainingJob | None) -> None:
    """Tell the other processes what to train next; None: nothing more. Does nothing in a single process."""
    if num_processes() > 1:
        _broadcast(job)


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Let the other processes end when the block has ended. If it raises, the launcher ends them."""
    yield
    announce(None)


def receive() -> TrainingJob | None:
    """The next training, in a process that is not the main one; None: there is no more."""
    return _broadcast(None)


def _broadcast(job: TrainingJob | None) -> TrainingJob | None:
    """The main process's job."""
    from accelerate.utils import broadcast_object_list

    jobs = [job]
    _accelerator()
    broadcast_object_list(jobs)
    return jobs[0]


def _accelerator() -> Accelerator:
    from snapgen.training.loop import make_accelerator  # slow to import

    return make_accelerator()
