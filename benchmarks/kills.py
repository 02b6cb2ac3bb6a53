"""Kill commands with SIGKILL at random moments, start them again, and compare with runs that were left alone.

    OMP_NUM_THREADS=1 python -m benchmarks.kills --kills 200

The kills are shared out over a search, an evolution, a training, a device and a report, of the tests' small studies,
and over commands that write one folder: convert, export and prune-decoder. Each is killed and started again until it
ends; then it begins anew in another folder, until it has had its kills. What it ends with must be what a run has that
was left alone: the same trials and scores, the same weights to the bit, every measurement once, the same file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from archsearch.cli.convert import convert
from archsearch.reports.study_report import write_report
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.evolution.run import evolve
from archsearch.studies.remote import server
from archsearch.studies.remote.queue import MeasurementQueue, MeasurementSpec
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study, open_storage
from snapgen.architecture import presets
from snapgen.coreml.convert import COREML
from snapgen.coreml.net_export import export_net
from snapgen.pipeline.decoder_distillation import DecoderDistillationConfig, distill
from tests.archsearch.studies import quick, tiny_recipe
from tests.archsearch.studies.evolution import test_run as evolution
from tests.archsearch.studies.remote.test_client import Quick
from tests.archsearch.studies.search.test_restart import RUNGS, of
from tests.snapgen.pipeline import test_decoder_distillation as pruning

MEASUREMENTS = 12
LONGEST_SECONDS = 8
"""Time after which a command is killed at the latest."""
ORDER = MeasurementSpec("quick", 8, 77, {})


@dataclass(frozen=True)
class Kind:
    """One kind of command: what it needs, does and leaves in a folder, and what must hold there at any moment."""

    run: Callable[[Path], Any]
    outcome: Callable[[Path], Any]
    check: Callable[[Path], None] = lambda _: None
    prepare: Callable[[Path], Any] = lambda _: None


def _study(folder: Path) -> StudyConfig:
    return quick.settings(folder, **{**RUNGS, "trials": 8, "sampler": "tpe", "constraints": {"latency_ms": 20.0}})


def _search(folder: Path) -> None:
    os.environ["QUICK_SECONDS"] = "0.1"
    search(_study(folder), quiet=True, scorer=quick.QuickScorer)


def _evolve(folder: Path) -> None:
    evolve(load_config(evolution.study(folder, checkpoint_minutes=0, evolve__rounds=3)), quiet=True)


def _device(folder: Path) -> None:
    os.environ.update(QUICK_SECONDS="0.1", MEASURED_LOG=str(folder / "measured.log"))
    storage = open_storage(f"sqlite:///{folder / 'queue.db'}")
    queue, space = MeasurementQueue(storage, ORDER), _study(folder).load_space()
    for point in [space.base_point, *space.neighbors(space.base_point)][:MEASUREMENTS]:
        queue.request(space.architecture(point))
    server.POLL_SECONDS = 0.02
    server.serve(storage.url, "quick", {}, log=lambda _: None, idle_seconds=0.1, make=lambda *_: Quick())


def _measured(folder: Path) -> Any:
    trials = MeasurementQueue(open_storage(f"sqlite:///{folder / 'queue.db'}"), ORDER).trials()
    scored = Counter(t.architecture_id for t in trials if t.state == "scored")
    return scored, {t.state for t in trials} <= {"scored", "failed"}


def _report(folder: Path) -> None:
    search(quick.settings(folder, trials=6), quiet=True, scorer=quick.QuickScorer)
    for _ in range(10):
        write_report(load_study(quick.settings(folder)), folder / "report.html")


def _files(folder: Path) -> Any:
    rows = (folder / "report.csv").read_text().splitlines()
    return len(rows), rows[0], (folder / "report.html").exists()


def _whole(folder: Path) -> None:
    page, table = folder / "report.html", folder / "report.csv"
    assert not page.exists() or page.read_text().rstrip().endswith("</html>")
    assert not table.exists() or table.read_text().endswith("\n")


def _convert(folder: Path) -> None:
    if not (out := folder / "out").exists():
        convert(str(folder / "sd" / "unet"), out, quiet=True)


def _export(folder: Path) -> None:
    os.environ["ARCHSEARCH_CACHE"] = str(folder / "cache")
    if not (out := folder / "out.mlpackage").exists():
        export_net(presets.preset("snapgen-emoji"), out, latent_size=4)


def _prune(folder: Path) -> None:
    os.environ["ARCHSEARCH_CACHE"] = str(folder / "cache")
    (folder / "prompts.txt").write_text("a red fox\na moon\n")
    if not (out := folder / "out").exists():
        training = DecoderDistillationConfig(steps=40, batch_size=3, warmup_steps=1)
        distill(str(folder / "sd"), folder / "prompts.txt", out, sampling=pruning.FEW, training=training)


def _nets(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted((folder / "out").rglob("*.safetensors"))}


def _whole_nets(folder: Path) -> None:
    for file in (folder / "out").rglob("*.safetensors"):
        safetensors.torch.load_file(file)


KINDS = {
    "search": Kind(_search, lambda folder: of(_study(folder))),
    "evolve": Kind(_evolve, lambda folder: evolution.rounds(load_config(folder / "study.yaml"))),
    "train": Kind(tiny_recipe.train, lambda folder: tiny_recipe.weights(folder / "runs" / "tiny")),
    "device": Kind(_device, _measured),
    "report": Kind(_report, _files, _whole),
    "convert": Kind(_convert, _nets, _whole_nets, pruning.theirs),
    "export": Kind(_export, lambda folder: COREML.summarize(folder / "out.mlpackage")),
    "prune-decoder": Kind(_prune, _nets, _whole_nets, pruning.theirs),
}


def _in(folder: Path, kind: str) -> None:
    os.chdir(folder)
    with (folder / "output.log").open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    KINDS[kind].run(folder)


class Killer:
    """Runs one kind of command again and again."""

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self._kind, self._folder = kind, folder
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.archsearch.studies.warm", "tests.archsearch.studies.tiny_recipe"])

    def _run(self, folder: Path, seconds: float | None) -> bool:
        """Whether a run ended by itself, rather than was killed after some seconds."""
        process = self._context.Process(target=_in, args=(folder, self._kind))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise AssertionError(f"{folder}: status {process.exitcode}: {(folder / 'output.log').read_text()[-2000:]}")
        return process.exitcode == 0

    def _outcome(self, folder: Path) -> Any:
        os.chdir(folder)
        return KINDS[self._kind].outcome(folder)

    def kill(self, kills: int) -> str:
        """Kill so many times; a line on what came of it.

        Raises:
            AssertionError: if a killed run ends with anything else than one that was left alone.
        """
        whole, began = self._new("whole"), time.monotonic()
        self._run(whole, None)
        longest = min(time.monotonic() - began, LONGEST_SECONDS)
        expected, died, runs = self._outcome(whole), 0, 0
        while died < kills:
            folder, runs = self._new(f"killed-{runs}"), runs + 1
            while not self._run(folder, self._random.uniform(0, longest) if died < kills else None):
                died += 1
                KINDS[self._kind].check(folder)
            if self._outcome(folder) != expected:
                raise AssertionError(f"{folder}: ends with something else than a run that was left alone")
        return f"{self._kind}: {died} kills in {runs} runs, each of which ended as one that was left alone"

    def _new(self, name: str) -> Path:
        folder = self._folder / self._kind / name
        folder.mkdir(parents=True)
        KINDS[self._kind].prepare(folder)
        return folder


def main() -> None:
    """Print a line for each kind, and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    given = parser.parse_args()
    each = -(-given.kills // len(given.only))
    with tempfile.TemporaryDirectory(prefix="archsearch-kills-") as folder:
        for number, kind in enumerate(given.only):
            print(Killer(kind, Path(folder), given.seed + number).kill(each), flush=True)
    print(f"{each * len(given.only)} kills: nothing lost, nothing twice, training bit-exact")


if __name__ == "__main__":
    main()
