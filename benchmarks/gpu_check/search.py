"""Part 4: the search of the quick start on this device, and a comparison of its losses with those on the CPU."""

from __future__ import annotations

import contextlib
import logging
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from archsearch.quality.candidate_evaluator import CandidateEvaluator
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.record import Candidate
from benchmarks.gpu_check import reference
from benchmarks.gpu_check.section import Section, Table
from benchmarks.gpu_check.setup import Setup
from snapgen.errors import InputError

NAME = "gpu-check"
TRIALS, SMALL_TRIALS = 12, 1
WORKERS = 3
"""Number of processes that share the device: so small a network leaves it idle while kernels are launched."""
SEARCH_FRACTION = 0.8
"""Fraction of the remaining time that the search may use; the rest is for the comparison."""
POLL_SECONDS = 2.0


def run(section: Section, setup: Setup) -> None:
    """Run the search, show candidates as they are scored, and compare their losses with the reference."""
    protocol = reference.protocol_of(setup)
    expected = None if setup.small else reference.read(Path(setup.reference))
    settings = load_config(reference.STUDY).with_changes(
        {
            "name": NAME,
            "protocol": protocol.model_dump(mode="json"),
            "trials": SMALL_TRIALS if setup.small else TRIALS,
            "time_budget_minutes": max(1.0, SEARCH_FRACTION * setup.left()) / 60,
            "workers": 1 if setup.small else WORKERS,
        }
    )
    section.say(
        f"Study `{reference.STUDY}`: {settings.trials} candidates, seeds {', '.join(map(str, protocol.train_seeds))}, "
        f"{protocol.steps} steps of batch {protocol.batch_size} in {protocol.precision}, "
        f"workers: {settings.workers}. The text encoder is MiniLM with weights in half precision and a vocabulary "
        "reduced to the words of the captions. Latencies are those of this machine's CPU."
    )
    table = section.table(
        "Candidates", ["candidate", "architecture", "params, M", "latency, ms", "loss by seed", "Fréchet distance", "s"]
    )
    with _show_candidates(settings, table):
        search(settings, quiet=True)
    candidates = [c for c in load_candidates(load_study(settings)) if c.score.quality is not None]
    trained = sum(c.score.quality.training_seconds for c in candidates if c.score.quality)
    rate = 1e3 * trained / max(1, len(candidates) * len(protocol.train_seeds) * protocol.steps)
    section.say(f"{len(candidates)} candidates scored; {rate:.1f} ms per training step with all workers running.")
    if expected is None:
        expected = _train_on_cpu(candidates, settings, setup)
    _compare(section, candidates, expected, protocol.train_seeds)


@contextlib.contextmanager
def _show_candidates(settings: StudyConfig, table: Table) -> Iterator[None]:
    """Add candidates to a table as they are scored, so that the table is there if the search is cut off."""
    ended, shown = threading.Event(), set[int]()

    def update() -> None:
        with contextlib.suppress(InputError):  # the study does not exist yet
            for candidate in load_candidates(load_study(settings)):
                if candidate.state in ("scored", "failed") and candidate.number not in shown:
                    shown.add(candidate.number)
                    _row(table, candidate)

    def poll() -> None:
        while not ended.wait(POLL_SECONDS):
            with contextlib.suppress(Exception):  # retry if the database is busy
                update()

    logging.getLogger("optuna").setLevel(logging.ERROR)
    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        update()


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


def _train_on_cpu(candidates: Sequence[Candidate], settings: StudyConfig, setup: Setup) -> dict[str, Any]:
    """Losses of the same candidates on the CPU, in the format of the reference; for the small check."""
    evaluator = CandidateEvaluator(settings.protocol, torch.device("cpu"))
    cpu_losses = {
        c.architecture.id: {
            "name": c.name or str(c.number),
            "losses": reference.losses(c.architecture, evaluator, settings.seed),
        }
        for c in candidates
        if setup.left() > 0
    }
    machine = {"chip": "this machine", "torch": torch.__version__, "protocol_hash": evaluator.resolved.hash}
    return {**machine, "losses": cpu_losses}


def _compare(
    section: Section, candidates: Sequence[Candidate], expected: Mapping[str, Any], seeds: Sequence[int]
) -> None:
    """Compare the losses of the architectures that were trained both here and for the reference."""
    cpu_losses = {arch: entry["losses"] for arch, entry in expected["losses"].items()}
    spread, error = reference.tolerance(cpu_losses, len(seeds))
    section.say(
        f"The losses on the CPU ({expected['chip']}, torch {expected['torch']}, one thread) have the same protocol, "
        "initial weights and order of images. On CUDA the noise comes from another generator, Muon iterates in "
        f"bfloat16 and sums have another order, so a mean over seeds may differ by {reference.STANDARD_ERRORS} "
        f"standard errors of the spread between seeds ({spread:.4f}, pooled over the reference's architectures) plus "
        f"{reference.RELATIVE_TOLERANCE:.0%}."
    )
    table = section.table(
        "Losses on this device and on the CPU", ["candidate", "here", "CPU", "difference", "tolerance", ""]
    )
    agree = []
    for candidate in candidates:
        quality = candidate.score.quality
        if quality is None or candidate.architecture.id not in cpu_losses:
            continue
        if quality.protocol_hash != expected["protocol_hash"]:
            section.say(
                f"The reference has another protocol, {expected['protocol_hash']}, so no losses can be compared."
            )
            return
        here = statistics.fmean(quality.validation_loss.by_seed)
        on_cpu = statistics.fmean(cpu_losses[candidate.architecture.id][: len(seeds)])
        allowed = reference.STANDARD_ERRORS * error + reference.RELATIVE_TOLERANCE * on_cpu
        agree.append(abs(here - on_cpu) <= allowed)
        name = candidate.name or expected["losses"][candidate.architecture.id]["name"]
        verdict = "within" if agree[-1] else "BEYOND"
        table.add(name, f"{here:.4f}", f"{on_cpu:.4f}", f"{here - on_cpu:+.4f}", f"{allowed:.4f}", verdict)
        section.record(
            what="loss", architecture=candidate.architecture.id, name=name, here=here, cpu=on_cpu, allowed=allowed
        )
    if not agree:
        section.say("None of the reference's architectures was scored here, so no losses can be compared.")
    else:
        section.say(f"{sum(agree)} of {len(agree)} losses are within the tolerance.")
