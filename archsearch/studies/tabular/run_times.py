"""Seconds of a training run, measured alike for all architectures of a table.

The durations that a study has are those of its machines, busy or not; a simulated clock wants those of one machine.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from pydantic import Field

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol
from archsearch.quality.candidate_evaluator import CandidateEvaluator
from archsearch.quality.metrics import MIN_SAMPLES
from snapgen import files
from snapgen.architecture.schema import Architecture
from snapgen.config import Config, json_lines, parse_config
from snapgen.devices import torch_threads
from snapgen.io.atomic import atomic_write_text

PARTS = (8, 32)
"""A run is timed by these parts of its steps, samples and validation pairs; their difference leaves out what each run
takes once."""


class RunTime(Config):
    """A line of the file in which measured times are kept."""

    architecture_id: str
    seconds: float = Field(gt=0)


class RunTimes:
    """Measures how long a run of an architecture takes, on one thread.

    An eighth of the run and a 32nd are timed, evaluations included, and extended to the whole. The clock is that of the
    thread's processor time, which other processes lengthen little; on CUDA it is the wall's.

    Args:
        folder: folder with the file of what was measured before, to which every measurement is added.
        protocol: protocol of the runs.

    Raises:
        InputError: if the file is damaged.
    """

    def __init__(self, folder: Path, protocol: ResolvedProtocol) -> None:
        path = folder / f"run_times-{protocol.hash}.jsonl"
        self._path, self._protocol = path, protocol.protocol
        self._evaluators: list[CandidateEvaluator] = []
        text = files.read_text(path) if path.exists() else ""
        lines = json_lines(text, path, "delete the file; its times are then measured again")
        read = [parse_config(values, RunTime, source=path, place=place) for place, values in lines]
        self._known = {each.architecture_id: each.seconds for each in read}

    def seconds(self, arch: Architecture) -> float:
        """Seconds of a whole run; measured if they are not known."""
        if arch.id not in self._known:
            if not self._evaluators:
                self._evaluators = [CandidateEvaluator(part_of(self._protocol, part)) for part in PARTS]
                _timed(self._evaluators[0], arch)  # loads what every run needs
            longer, shorter = (_timed(evaluator, arch) for evaluator in self._evaluators)
            steps, fewer = (evaluator.protocol.steps for evaluator in self._evaluators)
            a_step = max(longer - shorter, 0.0) / max(1, steps - fewer)
            self._known[arch.id] = longer + a_step * (self._protocol.steps - steps)
            lines = (json.dumps({"architecture_id": i, "seconds": round(s, 3)}) for i, s in self._known.items())
            atomic_write_text(self._path, "".join(f"{line}\n" for line in lines))
        return self._known[arch.id]


def _timed(evaluator: CandidateEvaluator, arch: Architecture) -> float:
    on_cuda = evaluator.device.type == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time
    with torch_threads(1):
        began = clock()
        evaluator.score(arch, study_seed=0)
        if on_cuda:
            torch.cuda.synchronize()
        return clock() - began


def part_of(protocol: EvaluationProtocol, part: int) -> EvaluationProtocol:
    """The protocol of one run's ``part``-th part, e.g. of an eighth."""
    return protocol.model_copy(
        update={
            "steps": max(1, protocol.steps // part),
            "num_samples": max(MIN_SAMPLES, protocol.num_samples // part) if protocol.num_samples else 0,
            "validation_pairs": max(8, protocol.validation_pairs // part),
            "train_seeds": protocol.train_seeds[:1],
        }
    )
