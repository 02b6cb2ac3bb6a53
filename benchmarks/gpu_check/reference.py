"""Reference losses on the CPU for the search on CUDA: ``python -m benchmarks.gpu_check.reference`` writes them.

    OMP_NUM_THREADS=1 python -m benchmarks.gpu_check.reference --seeds 0 1 2 3 --points base snapgen

trains the base and the reference design of the quick start on one thread with the quick start's protocol, and adds the
losses to ``reference.json``. Random points of the study are named by their slot: ``--points base snapgen 2 4``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from archsearch.machine import chip, installed
from archsearch.protocol import EvaluationProtocol
from archsearch.quality.candidate_evaluator import CandidateEvaluator
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.search.samplers import distributions, suggest
from benchmarks.gpu_check import captions, data
from benchmarks.gpu_check.setup import Setup
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write

STUDY = "emoji"
RELATIVE_TOLERANCE = 0.01
"""Relative difference of a loss allowed for bfloat16 in Muon's iteration and another summation order; our choice."""
STANDARD_ERRORS = 3
"""Number of standard errors allowed for the noise, which differs between the CUDA and the CPU generator."""
SMALL = {"steps": 4, "batch_size": 8, "num_samples": 8, "validation_pairs": 16, "num_inference_steps": 2}


def protocol_of(setup: Setup) -> EvaluationProtocol:
    """Protocol of the quick start with the check's text encoder; for the small check, few steps on few images."""
    changes: dict[str, Any] = {"text_encoder": captions.encoder(setup)}
    if setup.small:
        changes |= {**SMALL, "data": str(data.write_images(setup.shared / "data"))}
    return load_config(STUDY).protocol.model_copy(update=changes)


def losses(arch: Architecture, evaluator: CandidateEvaluator, study_seed: int) -> list[float]:
    """Validation losses of an architecture, one per training seed of the evaluator's protocol."""
    return list(evaluator.score(arch, study_seed=study_seed).validation_loss.by_seed)


def tolerance(reference_losses: Mapping[str, Sequence[float]], seeds: int) -> tuple[float, float]:
    """Spread between seeds, and the standard error of the difference of two means over ``seeds`` seeds.

    The spread is a standard deviation, with variances pooled over the architectures of the reference.
    """
    variances = [statistics.variance(values) for values in reference_losses.values() if len(values) > 1]
    spread = math.sqrt(statistics.fmean(variances)) if variances else 0.0
    return spread, spread * math.sqrt(2 / seeds)


def read(path: Path) -> dict[str, Any]:
    """Read the reference that `main` wrote.

    Raises:
        InputError: if it is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        assert content["losses"], "no architecture"
    except (OSError, ValueError, KeyError, AssertionError):
        remedy = "write it: python -m benchmarks.gpu_check.reference"
        raise InputError(path, "is not a reference of the search", remedy, place="--reference") from None
    return content


def points(settings: StudyConfig, space: Space, names: Sequence[str]) -> dict[str, Architecture]:
    """Architectures of the base and reference designs by name, and of the study's first points by slot."""
    reference_points = space.reference_points()
    archs = {}
    for name in names:
        if name in reference_points:
            archs[name] = space.architecture(reference_points[name])
            continue
        choices = distributions(space.knobs)
        arguments = {"objectives": settings.objectives, "seed": settings.seed, "slot": int(name), "attempt": 0}
        point, _ = suggest(settings.sampler, [], choices, fixed=None, source=settings.source, **arguments)  # type: ignore[arg-type]
        archs[f"slot {name}"] = space.architecture(point)
    return archs


def main() -> None:
    """Train the architectures; write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", default=["base", "snapgen"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("reference.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = load_config(STUDY)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup("cpu", False, folder, f"{folder}/work", "", math.inf)
        protocol = protocol_of(setup)
        for name, arch in points(settings, settings.load_space(), options.points).items():
            evaluator = CandidateEvaluator(
                protocol.model_copy(update={"train_seeds": tuple(options.seeds)}), torch.device("cpu")
            )
            arch_losses = losses(arch, evaluator, settings.seed)
            print(name, arch.id, arch_losses, flush=True)
            resolved = evaluator.resolved.model_copy(update={"protocol": protocol})
            _add(options.out, arch.id, {"name": name, "seeds": options.seeds, "losses": arch_losses}, resolved.hash)


def _add(path: Path, arch: str, entry: dict[str, Any], protocol_hash: str) -> None:
    previous = read(path)["losses"] if path.exists() else {}
    machine = {"chip": chip(), "torch": installed("torch"), "device": "cpu", "threads": 1}
    content = {**machine, "protocol_hash": protocol_hash, "losses": {**previous, arch: entry}}
    with atomic_write(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.stderr.write(f"reference: {error}\n")
        sys.exit(2)
