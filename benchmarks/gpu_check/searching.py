"""Part 4: the quick start's search on this device, and whether its losses are the CPU's."""

from __future__ import annotations

import contextlib
import logging
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from archsearch.quality.evaluator import Evaluator
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.search.candidates import Candidate, load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from benchmarks.gpu_check import reference
from benchmarks.gpu_check.section import Section, Table
from benchmarks.gpu_check.setup import Setup
from snapgen.errors import InputError

NAME = "gpu-check"
TRIALS, SMALL_TRIALS = 12, 1
WORKERS = 3
"""Processes that share the device: a net so small leaves it idle while its kernels are being started."""
SHARE_OF_TIME = 0.8
"""Of what is left of the part when the search begins; the rest is for comparing."""
LOOK_SECONDS = 2.0


def run(section: Section, setup: Setup) -> None:
    """Search, showing candidates as they are scored, then compare."""
    protocol = reference.protocol_of(setup)
    wanted = None if setup.small else reference.read(Path(setup.reference))
    settings = load_config(reference.STUDY).with_changes(
        {
            "name": NAME,
            "protocol": protocol.model_dump(mode="json"),
            "trials": SMALL_TRIALS if setup.small else TRIALS,
            "minutes": max(1.0, SHARE_OF_TIME * setup.left()) / 60,
            "workers": 1 if setup.small else WORKERS,
        }
    )
    section.say(
        f"Study `{reference.STUDY}`: {settings.trials} candidates, seeds {', '.join(map(str, protocol.seeds))}, "
        f"{protocol.steps} steps of batch {protocol.batch} in {protocol.precision}, workers: {settings.workers}. The "
        "text encoder is MiniLM, its weights rounded to half precision and with the captions' words alone. Latencies "
        "are of this machine's CPU."
    )
    table = section.table(
        "Candidates", ["candidate", "architecture", "params, M", "latency, ms", "loss by seed", "Fréchet distance", "s"]
    )
    with _shown(settings, table):
        search(settings, quiet=True)
    candidates = [c for c in load_candidates(load_study(settings)) if c.score.quality is not None]
    trained = sum(c.score.quality.training_seconds for c in candidates if c.score.quality)
    rate = 1e3 * trained / max(1, len(candidates) * len(protocol.seeds) * protocol.steps)
    section.say(f"{len(candidates)} scored; {rate:.1f} ms a training step, the workers beside each other.")
    if wanted is None:
        wanted = _in_place(candidates, settings, setup)
    _compare(section, candidates, wanted, protocol.seeds)


@contextlib.contextmanager
def _shown(settings: StudyConfig, table: Table) -> Iterator[None]:
    """Adds candidates to a table as they are scored, so that a search that is cut off leaves them."""
    ended, shown = threading.Event(), set[int]()

    def look() -> None:
        with contextlib.suppress(InputError):  # the study is not there yet
            for candidate in load_candidates(load_study(settings), artifacts=False):
                if candidate.state in ("scored", "failed") and candidate.number not in shown:
                    shown.add(candidate.number)
                    _row(table, candidate)

    def keep_looking() -> None:
        while not ended.wait(LOOK_SECONDS):
            with contextlib.suppress(Exception):  # a database that is busy is asked again
                look()

    logging.getLogger("optuna").setLevel(logging.ERROR)
    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


def _row(table: Table, candidate: Candidate) -> None:
    quality, latency = candidate.score.quality, candidate.score.latency
    if quality is None:
        table.add(
            candidate.name or candidate.number, candidate.architecture.id, None, None, candidate.error, None, None
        )
        return
    distance = quality.frechet_distance
    table.add(
        candidate.name or candidate.number,
        candidate.architecture.id,
        f"{candidate.score.cost.params / 1e6:.2f}",
        None if latency is None else f"{latency.median_ms:.2f}",
        ", ".join(f"{loss:.4f}" for loss in quality.validation_loss.by_seed),
        None if distance is None else f"{distance.value:.0f}",
        f"{candidate.seconds:.0f}",
    )


def _in_place(candidates: Sequence[Candidate], settings: StudyConfig, setup: Setup) -> dict[str, Any]:
    """The losses of the same candidates on the CPU, for the small check."""
    evaluator = Evaluator(settings.protocol, torch.device("cpu"))
    found = {
        c.architecture.id: {
            "name": c.name or str(c.number),
            "losses": reference.losses(c.architecture, evaluator, settings.seed),
        }
        for c in candidates
        if setup.left() > 0
    }
    where = {"chip": "this machine", "torch": torch.__version__, "protocol_hash": evaluator.resolved.hash}
    return {**where, "losses": found}


def _compare(
    section: Section, candidates: Sequence[Candidate], wanted: Mapping[str, Any], seeds: Sequence[int]
) -> None:
    """The losses of the architectures that both trained, side by side."""
    of_cpu = {arch: entry["losses"] for arch, entry in wanted["losses"].items()}
    spread, error = reference.tolerance(of_cpu, len(seeds))
    section.say(
        f"The CPU's losses ({wanted['chip']}, torch {wanted['torch']}, one thread) are of the same protocol, first "
        "weights and order of images. Another generator draws the noise on CUDA, Muon iterates in bfloat16 there, and "
        f"sums have another order; so a mean over seeds may differ by {reference.ERRORS} standard errors of the spread "
        f"between seeds ({spread:.4f}, pooled over the reference's architectures) and {reference.SHARE:.0%} besides."
    )
    table = section.table("Losses on this device and on the CPU", ["candidate", "here", "CPU", "apart", "allowed", ""])
    agree = []
    for candidate in candidates:
        quality = candidate.score.quality
        if quality is None or candidate.architecture.id not in of_cpu:
            continue
        if quality.protocol_hash != wanted["protocol_hash"]:
            section.say(f"The reference is of another protocol, {wanted['protocol_hash']}: nothing can be compared.")
            return
        here = statistics.fmean(quality.validation_loss.by_seed)
        there = statistics.fmean(of_cpu[candidate.architecture.id][: len(seeds)])
        allowed = reference.ERRORS * error + reference.SHARE * there
        agree.append(abs(here - there) <= allowed)
        name = candidate.name or wanted["losses"][candidate.architecture.id]["name"]
        said = "within" if agree[-1] else "BEYOND"
        table.add(name, f"{here:.4f}", f"{there:.4f}", f"{here - there:+.4f}", f"{allowed:.4f}", said)
        section.record(
            what="loss", architecture=candidate.architecture.id, name=name, here=here, cpu=there, allowed=allowed
        )
    if not agree:
        section.say("None of the reference's architectures was scored here: nothing can be compared.")
    else:
        section.say(f"{sum(agree)} of {len(agree)} are within what is allowed.")
