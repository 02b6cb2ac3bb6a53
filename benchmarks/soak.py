"""Search with many workers on PostgreSQL while everything that can fail does, and count what that cost.

    OMP_NUM_THREADS=1 python -m benchmarks.soak --minutes 10 --workers 16

Workers are killed and stopped, the server is restarted and crashed, and the disk of the artifacts is filled, at random
moments. Half of the workers believe that they are on other machines, so that their deaths show by their silence alone.
Scores are made up and take seconds; nothing is trained. At the end the study is completed, and every candidate must be
scored exactly once, and none charged with what was not its fault.

It needs PostgreSQL, and the right to mount a small disk (without it the disk is not filled).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage import database, leases
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.errors import InputError
from tests.archsearch.studies import quick
from tests.archsearch.studies.faults.disks import disk, fill
from tests.archsearch.studies.postgresql import Server, running

LARGER = {
    "levels[0].channels: [16, 24, 32, 48]": f"levels[0].channels: {[*range(16, 129, 8)]}",
    "levels[1].channels: [32, 48, 64]": f"levels[1].channels: {[*range(32, 257, 16)]}",
}
"""Changes of the tests' space that make it large enough for thousands of candidates."""

HEARTBEAT_SECONDS, GRACE_SECONDS = 2, 10
RESTART_SECONDS = 2
"""Time after which a worker that has ended is started again."""
STATES = {0: "ended by itself", 2: "one line", -signal.SIGKILL: "killed"}


@dataclass
class Tally:
    """What was done to the search."""

    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)


def settings(folder: Path, url: str, trials: int | None) -> StudyConfig:
    """The study; it is sampled at random, since the workers are what is tried."""
    made = quick.settings(folder, name="soak", storage=url, trials=trials or 10**6, sampler="random")
    space, text = folder / "space.yaml", quick.SPACE
    for small, large in LARGER.items():
        text = text.replace(small, large)
    space.write_text(text)
    return made


def work(folder: Path, made: StudyConfig, host: str, seconds: float) -> None:
    """A worker's process: it ends with status 0 or 2, as the command line does, and with 1 for any other error."""
    os.chdir(folder)
    os.environ.update(QUICK_SECONDS=str(seconds), QUICK_LOG=str(folder / "trained.log"))
    database.HEARTBEAT_SECONDS, database.GRACE_SECONDS = HEARTBEAT_SECONDS, GRACE_SECONDS
    boot = folder / f"boot-{host}"
    boot.write_text(host)
    leases.BOOT_ID = boot
    with (folder / "workers.log").open("a") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        search(made, quiet=True, scorer=quick.QuickScorer)
    except InputError as error:
        print(f"archsearch: {error}", file=sys.stderr)
        sys.exit(2)


class Workers:
    """Worker processes, each started again when it has ended."""

    def __init__(self, folder: Path, made: StudyConfig, count: int, seconds: float, tally: Tally) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.archsearch.studies.warm"])
        self._arguments = folder, made
        self._seconds, self._tally = seconds, tally
        self._hosts = ["here" if i % 2 else uuid.uuid4().hex for i in range(count)]
        self._stopped: dict[int, float] = {}
        self._ended: dict[int, float] = {}
        self.processes: list[BaseProcess] = [self._start(i) for i in range(count)]

    def _start(self, index: int) -> BaseProcess:
        process = self._context.Process(target=work, args=(*self._arguments, self._hosts[index], self._seconds))
        process.start()
        return process

    def revive(self) -> None:
        """Count those that have ended, start them again, and let those go on that were stopped for long enough."""
        for i, process in enumerate(self.processes):
            if process.exitcode is None:
                if self._stopped.get(i, float("inf")) <= time.monotonic():
                    self.signal(i, signal.SIGCONT)
                    del self._stopped[i]
            elif self._ended.setdefault(i, time.monotonic()) <= time.monotonic() - RESTART_SECONDS:
                del self._ended[i]
                self._tally.ends[STATES.get(process.exitcode, f"status {process.exitcode}")] += 1
                self._stopped.pop(i, None)
                self.processes[i] = self._start(i)

    def signal(self, index: int, number: signal.Signals) -> None:
        """Send a signal to one worker, if it lives."""
        process = self.processes[index]
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)

    def stop(self, index: int, seconds: float) -> None:
        """Stop a worker, and its clock, for some time."""
        self.signal(index, signal.SIGSTOP)
        self._stopped[index] = time.monotonic() + seconds

    def complete(self, made: StudyConfig) -> None:
        """Go on with the study in one process, undisturbed, until all that was begun has ended."""
        process = self._context.Process(target=work, args=(self._arguments[0], made, "here", 0.0))
        process.start()
        process.join()
        self._tally.ends[STATES.get(process.exitcode or 0, f"status {process.exitcode}")] += 1

    def end(self) -> None:
        """Ask all to end, and wait until they have."""
        for i in range(len(self.processes)):
            self.signal(i, signal.SIGCONT)
            self.signal(i, signal.SIGTERM)
        for process in self.processes:
            process.join(60)
            self._tally.ends["asked to end" if process.exitcode is not None else "does not end"] += 1
            process.kill()


class Faults:
    """Injects one fault at a time, at random."""

    def __init__(self, server: Server, artifacts: Path | None, workers: Workers, tally: Tally, seed: int) -> None:
        self._server, self._artifacts, self._workers, self._tally = server, artifacts, workers, tally
        self._random = random.Random(seed)

    def inject(self) -> None:
        """One fault."""
        kinds = {"kill": 10, "stop": 4, "restart": 1, "crash": 1, "full disk": 1 if self._artifacts else 0}
        kind = self._random.choices([*kinds], [*kinds.values()])[0]
        victim = self._random.randrange(len(self._workers.processes))
        self._tally.faults[kind] += 1
        if kind == "kill":
            self._workers.signal(victim, signal.SIGKILL)
        elif kind == "stop":
            self._workers.stop(victim, self._random.uniform(1, 3 * GRACE_SECONDS))
        elif kind == "full disk":
            assert self._artifacts is not None
            filler = fill(self._artifacts)
            self._pass(self._random.uniform(2, 8))
            filler.unlink()
        else:
            self._server.stop(signal.SIGINT if kind == "restart" else signal.SIGQUIT)
            self._pass(self._random.uniform(1, 15))
            self._server.start()

    def _pass(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._workers.revive()
            time.sleep(0.2)

    def between(self) -> None:
        """A pause between two faults."""
        self._pass(self._random.uniform(0.5, 5))


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A disk of 64 MB for the artifacts; None where none may be mounted."""
    with contextlib.ExitStack() as stack:
        mounted: Path | None = None
        with contextlib.suppress(BaseException):  # pytest's skip is no Exception
            mounted = stack.enter_context(disk(place, kilobytes=1 << 16))
        yield mounted


def report(folder: Path, made: StudyConfig, tally: Tally, minutes: float, workers: int) -> list[str]:
    """Lines on what happened; those that begin with WRONG are faults of archsearch."""
    study = load_study(made)
    trials, candidates = StudyTrials(study).read(), load_candidates(study)
    every = study.get_trials(deepcopy=False)
    scored = [c for c in candidates if c.state == "scored"]
    unique = Counter(c.id for c in scored if c.reused_from is None)
    trained = Counter((folder / "trained.log").read_text().split())
    again = sum(trained.values()) - len(trained)
    charged = [t for t in every if "error" in t.user_attrs]
    twice = [slot for slot, tries in trials.by_slot.items() if sum(t.state == "scored" for t in tries) > 1]
    artifacts = [c for c in scored if c.reused_from is None and len(c.artifacts) < 4]
    lines = [
        f"{workers} workers for {minutes:g} minutes: {len(every)} trials of {len(candidates)} candidates, "
        f"{len(unique)} architectures scored, {sum(t.state.name == 'FAIL' for t in every)} trials run again",
        "injected: " + ", ".join(f"{number} × {kind}" for kind, number in sorted(tally.faults.items())),
        "ends of worker processes: " + ", ".join(f"{number} × {end}" for end, number in sorted(tally.ends.items())),
        f"trainings: {sum(trained.values())}, of which {again} of an architecture that was trained before",
    ]
    wrong: dict[str, list[Any]] = {
        "candidates not scored": [c.number for c in candidates if c.state != "scored"],
        "slots scored twice": twice,
        "architectures scored twice": [i for i, count in unique.items() if count > 1],
        "candidates charged with an error": [t.number for t in charged],
        "candidates without their artifacts": [c.number for c in artifacts],
        "trials left running": [t.number for t in every if not t.state.is_finished()],
        "numbers with gaps": [i for i, t in enumerate(every) if t.number != i],
        "ends of processes with something else than a line": [
            end for end in tally.ends if end.startswith("status") or end == "does not end"
        ],
    }
    return lines + [
        f"{'WRONG: ' if found else ''}{name}: {len(found)} {found[:5] or ''}" for name, found in wrong.items()
    ]


def soak(folder: Path, *, minutes: float, workers: int, seconds: float, seed: int) -> list[str]:
    """Run it; returns the lines of the report."""
    tally = Tally()
    with running() as server, small_disk(folder / "runs" / "soak" / "artifacts") as mounted:
        made = settings(folder, server.url, None)
        os.chdir(folder)
        crew = Workers(folder, made, workers, seconds, tally)
        faults = Faults(server, mounted, crew, tally, seed)
        end = time.monotonic() + 60 * minutes
        try:
            while time.monotonic() < end:
                faults.inject()
                faults.between()
        finally:
            crew.end()
        count = len(StudyTrials(load_study(made)).read().by_slot)
        complete = settings(folder, server.url, count)
        crew.complete(complete)
        return report(folder, complete, tally, minutes, workers)


def main() -> None:
    """Run it once; exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6, help="duration of a training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="archsearch-soak-") as folder:
        lines = soak(Path(folder), **vars(given))
        print(*lines, sep="\n")
        told = Counter(
            line.partition("; ")[0][:100] for line in (Path(folder) / "workers.log").read_text().splitlines()
        )
        print(*(f"{count} × {line}" for line, count in told.most_common(20)), sep="\n", file=sys.stderr)
    sys.exit(any(line.startswith("WRONG") for line in lines))


if __name__ == "__main__":
    main()
