"""The CPU's losses that a search on CUDA is held to: ``python -m benchmarks.gpu_check.reference`` writes them.

    OMP_NUM_THREADS=1 python -m benchmarks.gpu_check.reference --seeds 0 1 2 3 --points base snapgen

trains the quick start's base and reference design (and any of the study's first, random points: ``--points base snapgen
2 4``) on one thread under the quick start's protocol, and adds them to ``reference.json``.
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
from archsearch.quality.evaluator import Evaluator
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.search.samplers import distributions, suggest
from benchmarks.gpu_check import captions, data
from benchmarks.gpu_check.setup import Setup
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write

STUDY = "emoji"
SHARE = 0.01
"""Of a loss, allowed for bfloat16 in Muon's iteration and for another order of sums: our choice."""
ERRORS = 3
"""Standard errors, allowed for the noise: CUDA's generator draws another than the CPU's of the same seed."""
SMALL = {"steps": 4, "batch": 8, "samples": 8, "validation_pairs": 16, "sampler_steps": 2}


def protocol_of(setup: Setup) -> EvaluationProtocol:
    """The quick start's, with the check's text encoder; of the small check a few steps on a few images."""
    given: dict[str, Any] = {"text": captions.encoder(setup)}
    if setup.small:
        given |= {**SMALL, "data": str(data.written(setup.shared / "data"))}
    return load_config(STUDY).protocol.model_copy(update=given)


def losses(arch: Architecture, evaluator: Evaluator, study_seed: int) -> list[float]:
    """An architecture's validation losses, one a seed of the evaluator's protocol."""
    return list(evaluator.score(arch, study_seed=study_seed).validation_loss.by_seed)


def tolerance(wanted: Mapping[str, Sequence[float]], seeds: int) -> tuple[float, float]:
    """The spread between seeds, pooled over the reference's architectures, and the standard error that follows from it
    for the difference of two means over so many seeds.
    """
    spreads = [statistics.variance(found) for found in wanted.values() if len(found) > 1]
    spread = math.sqrt(statistics.fmean(spreads)) if spreads else 0.0
    return spread, spread * math.sqrt(2 / seeds)


def read(path: Path) -> dict[str, Any]:
    """The reference as `main` wrote it.

    Raises:
        InputError: if it is missing or damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        assert found["losses"], "of no architecture"
    except (OSError, ValueError, KeyError, AssertionError):
        remedy = "write it: python -m benchmarks.gpu_check.reference"
        raise InputError(path, "is no reference of the search", remedy, place="--reference") from None
    return found


def points(settings: StudyConfig, space: Space, names: Sequence[str]) -> dict[str, Architecture]:
    """The architectures of the base, of references by their names, or of the study's first points by their slots."""
    known = space.points_of()
    found = {}
    for name in names:
        if name in known:
            found[name] = space.architecture(known[name])
            continue
        given = {"objectives": settings.objectives, "seed": settings.seed, "slot": int(name), "attempt": 0}
        point, _ = suggest(settings.sampler, [], distributions(space), fixed=None, source=settings.source, **given)  # type: ignore[arg-type]
        found[f"slot {name}"] = space.architecture(point)
    return found


def main() -> None:
    """Train, and write after every architecture."""
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
            evaluator = Evaluator(protocol.model_copy(update={"seeds": tuple(options.seeds)}), torch.device("cpu"))
            found = losses(arch, evaluator, settings.seed)
            print(name, arch.id, found, flush=True)
            of_study = evaluator.resolved.model_copy(update={"protocol": protocol})
            _add(options.out, arch.id, {"name": name, "seeds": options.seeds, "losses": found}, of_study.hash)


def _add(path: Path, arch: str, entry: dict[str, Any], protocol_hash: str) -> None:
    before = read(path)["losses"] if path.exists() else {}
    where = {"chip": chip(), "torch": installed("torch"), "device": "cpu", "threads": 1}
    content = {**where, "protocol_hash": protocol_hash, "losses": {**before, arch: entry}}
    with atomic_write(path) as file:
        file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.stderr.write(f"reference: {error}\n")
        sys.exit(2)
