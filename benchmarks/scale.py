"""Benchmark of a study's size: what one more trial costs a worker, beside its scoring, after 100, 1,000 and 10,000.

The study is filled with synthetic trials: random architectures of the quick start's space, the numbers of a formula.
Then one worker scores a few more candidates by the same formula, which takes no time, and each step is timed: the first
read of a new process, the claim, all reads of the trials while the worker proposes, the sampler's ask, everything that
is written, and the display's tick. Last, some workers score candidates together, each a process of its own.

    OMP_NUM_THREADS=1 python -m benchmarks.scale
    OMP_NUM_THREADS=1 python -m benchmarks.scale --storage postgresql+psycopg://me@db/studies --workers 32

Without `--storage` it runs on a SQLite file and on a PostgreSQL server of its own. The results are in
reports/results/scale.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from archsearch.protocol import ResolvedProtocol
from archsearch.score import Cost, LatencyRecord, Quality, Score
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import Space
from archsearch.stats.estimate import Estimate
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.display import Display
from archsearch.studies.search.known_costs import KnownCosts
from archsearch.studies.search.pool import ignore_experimental_warnings
from archsearch.studies.search.proposer import Proposer
from archsearch.studies.search.samplers import distributions
from archsearch.studies.search.worker import Worker
from archsearch.studies.storage.database import create_or_resume, load_study, silence_optuna
from archsearch.studies.storage.leases import worker_identity
from archsearch.studies.storage.record import TrialRecord
from archsearch.studies.storage.trial_queue import DONE
from snapgen.architecture.schema import Architecture
from snapgen.progress import ProgressCallback
from snapgen.seeding import derive_seed

LIMIT = 60.0
"""Limit on milliseconds that a tenth of the random architectures break."""


class FormulaScorer:
    """Scores an architecture by a formula."""

    def __init__(self, settings: StudyConfig, space: Space) -> None:  # noqa: ARG002
        self._protocol, self._digests = settings.protocol, ("data", "autoencoder", "text_encoder", "feature_extractor")

    def describe(self) -> Mapping[str, Any]:
        """No data and no machine."""
        digests = {f"{name}_digest": "none" for name in self._digests}
        resolved = ResolvedProtocol(protocol=self._protocol, **digests)
        return {"protocol": resolved.model_dump(mode="json"), "protocol_hash": resolved.hash, "machine": {}}

    def check(self, arch: Architecture) -> None:
        """Every architecture can be scored."""

    def cost(self, arch: Architecture) -> Cost:
        """Something like the params of the net."""
        params = 0.0
        for _, b, channels in arch.named_levels():
            conv = 18.0 if b.conv == "standard" else 2 * b.expansion + 1.0
            attention = 4 * (b.self_attention + b.cross_attention) + 3 * b.ffn_ratio
            params += channels**2 * (b.num_res_blocks * conv + b.num_transformers * b.transformer_depth * attention)
        return Cost(params=int(params), macs=int(40 * params), activation_bytes=int(1000 + params / 10))

    def latency(self, arch: Architecture) -> LatencyRecord:
        """Milliseconds that rise with the MACs and with the number of blocks."""
        blocks = sum(b.num_res_blocks + 2 * b.num_transformers for _, b, _ in arch.named_levels())
        ms = self.cost(arch).macs / 4e6 + 0.5 * blocks
        named = {"source": "measured", "device": "host", "compute_units": "CPU", "chip": "", "os": "", "runtime": ""}
        quartiles = {"median_ms": ms, "lower_quartile_ms": 0.99 * ms, "upper_quartile_ms": 1.01 * ms}
        return LatencyRecord.model_validate(
            {**named, **quartiles, "runs": 100, "threads": 1, "load_ms": 1.0, "steady": True}
        )

    def final_latency(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:  # noqa: ARG002
        """The first."""
        return first

    def quality(
        self, arch: Architecture, *, seeds: Sequence[int], progress: ProgressCallback, artifacts: Path
    ) -> Quality:
        """A loss that falls with the params, and noise."""
        progress(0.5, "training seed 0")
        (artifacts / "curve.csv").write_text("step,loss\n1,0.5\n")
        noise = derive_seed(7, arch.id) / 2**63 - 0.5
        loss = 0.35 + 1.6 * self.cost(arch).params ** -0.15 * (1 + 0.01 * noise)
        by_seed = tuple(loss * (0.99 + 0.02 * derive_seed(seed, arch.id) / 2**63) for seed in seeds)
        value = Estimate(value=statistics.mean(by_seed), low=0.98 * loss, high=1.02 * loss, by_seed=by_seed)
        numbers = {"validation_loss": value, "frechet_distance": value, "kernel_distance": value}
        about = {"extractor": "none", "protocol_hash": self.describe()["protocol_hash"], "training_seconds": 1}
        return Quality.model_validate({**numbers, **about})


def formula_numbers(_: KnownCosts, arch: Architecture) -> dict[str, float]:
    """In place of the counts, which take 0.1 s an architecture whatever the study's size."""
    return {name: float(value) for name, value in FormulaScorer.cost(None, arch).model_dump().items()}  # type: ignore[arg-type]


def begin(url: str, sampler: str) -> tuple[StudyConfig, Space]:
    """Create the study."""
    values = {"name": f"scale-{sampler}", "space": "emoji", "trials": 1, "sampler": sampler, "storage": url}
    more = {"constraints": {"latency_ms": LIMIT}, "seeds": {"first": 1, "front": 2}}
    settings = StudyConfig.model_validate({**values, **more})
    space = load_space("emoji")
    create_or_resume(settings, {"space": space.to_dict(), **FormulaScorer(settings, space).describe()})
    return settings, space


def fill(settings: StudyConfig, space: Space, count: int) -> None:
    """Append trials up to a count in bulk, with the attributes and values that a worker writes."""
    import sqlalchemy
    from optuna.distributions import distribution_to_json
    from optuna.storages._rdb import models

    study = load_study(settings)
    scorer, choices = FormulaScorer(settings, space), distributions(space.knobs)
    stored = {name: distribution_to_json(d) for name, d in choices.items()}
    engine = study._storage._backend.engine  # type: ignore[attr-defined]
    past = study.get_trials(deepcopy=False)
    rng, seen = random.Random(len(past)), {t.user_attrs.get("architecture_id") for t in past}
    next_id = 1 + max((t._trial_id for t in past), default=0)
    tables: dict[Any, list[dict[str, Any]]] = {}

    def add(model: Any, **row: Any) -> None:
        tables.setdefault(model.__table__, []).append(row)

    began = datetime.datetime(2026, 1, 1)
    once: list[tuple[int, dict[str, int], Architecture]] = []
    for trial_id, number in enumerate(range(len(past), count), next_id):
        first = None
        if number % 6 == 5 and once:  # one candidate in five has a second seed
            first, point, arch = once.pop(rng.randrange(len(once)))
        else:
            while (arch := space.architecture(point := space.sample(rng))).id in seen:
                pass
            seen.add(arch.id)
        fields, state, values = _outcome(scorer, arch, first)
        if state == "COMPLETE" and first is None:
            once.append((number, point, arch))
        started = began + datetime.timedelta(minutes=number)
        times = {"datetime_start": started, "datetime_complete": started + datetime.timedelta(seconds=50)}
        add(models.TrialModel, trial_id=trial_id, number=number, study_id=study._study_id, state=state, **times)
        for name, choice in point.items():
            row = {"param_name": name, "param_value": choices[name].to_internal_repr(choice)}
            add(models.TrialParamModel, trial_id=trial_id, **row, distribution_json=stored[name])
        for key, value in TrialRecord._attributes({"slot": number, **fields}).items():
            add(models.TrialUserAttributeModel, trial_id=trial_id, key=key, value_json=json.dumps(value))
        excess = fields["score"].latency.median_ms / LIMIT - 1
        add(
            models.TrialSystemAttributeModel,
            trial_id=trial_id,
            key="constraints:latency_ms",
            value_json=json.dumps(excess),
        )
        for i, value in enumerate(values):
            add(models.TrialValueModel, trial_id=trial_id, objective=i, value=value, value_type="FINITE")
        add(models.TrialHeartbeatModel, trial_id=trial_id, heartbeat=started)
    with engine.begin() as connection:
        for table, rows in tables.items():
            connection.execute(sqlalchemy.insert(table), rows)
        if engine.name == "postgresql":
            sequence = "SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), (SELECT max(trial_id) FROM trials))"
            connection.execute(sqlalchemy.text(sequence))
    if engine.name == "postgresql":  # as the server does by itself, a minute later
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sqlalchemy.text("ANALYZE"))


def _outcome(
    scorer: FormulaScorer, arch: Architecture, first: int | None
) -> tuple[dict[str, Any], str, tuple[float, ...]]:
    """Fields, state and values of a trial that is new, or that continues the ``first`` with a second seed."""
    score = Score(cost=scorer.cost(arch), latency=scorer.latency(arch))
    assert score.latency is not None
    fields = {"architecture_id": arch.id, "architecture": arch, "worker": worker_identity(), "fraction": 1.0}
    if score.latency.median_ms > LIMIT:
        return {**fields, "phase": "latency", "score": score, "exceeded": "latency_ms"}, "PRUNED", ()
    with tempfile.TemporaryDirectory() as folder:
        seeds = (0,) if first is None else (0, 1)
        quality = scorer.quality(arch, seeds=seeds, progress=lambda *_: None, artifacts=Path(folder))
    score = score.model_copy(update={"quality": quality})
    values = (quality.validation_loss.value, score.latency.median_ms)
    continued = {} if first is None else {"continues": first}
    return {**fields, "phase": DONE, "score": score, **continued}, "COMPLETE", values


class Timer:
    """Milliseconds of named steps, without those of the steps within."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}
        self._within = [0.0]

    def __call__(self, name: str, function: Callable[..., Any], clock: Callable[[], float]) -> Callable[..., Any]:
        """The function, timed."""

        def call(*arguments: Any, **named: Any) -> Any:
            self._within.append(0.0)
            began = clock()
            try:
                return function(*arguments, **named)
            finally:
                took = 1000 * (clock() - began)
                self.steps.setdefault(name, []).append(took - self._within.pop())
                self._within[-1] += took

        return call


def one_more(settings: StudyConfig, space: Space, repeats: int) -> dict[str, float]:
    """Milliseconds of the steps of one more trial: medians over some trials, after a first one."""
    settings = settings.with_changes({"trials": 1_000_000})
    study, proposer, timer = load_study(settings), Proposer(settings, space), Timer()
    worker = Worker(study, settings, space, FormulaScorer(settings, space), proposer, log=lambda _: None)
    read = timer("first read", worker._queue.trials, time.perf_counter)
    claim = timer("claim", worker._queue.claim, time.perf_counter)
    process = timer("write", worker._process, time.perf_counter)
    worker._propose = timer("read", worker._propose, time.perf_counter)  # type: ignore[method-assign]
    proposer.propose = timer(  # type: ignore[method-assign]
        "ask", timer("ask, processor", proposer.propose, time.process_time), time.perf_counter
    )
    with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
        read()
        display = Display(study, settings, quiet=False)
        tick = timer("display", display.tick, time.perf_counter)
        for _ in range(repeats + 1):
            process(claim())
            tick(now=True)
    first = {name: values.pop(0) for name, values in timer.steps.items()}
    medians = {name: statistics.median(values) for name, values in timer.steps.items() if values}
    # The processor's clock is inside the wall's, whose step is what is left of it.
    return {"first read": first["first read"], "first ask": first["ask, processor"], **medians}


def work(settings: StudyConfig) -> None:
    """A worker's process."""
    os.chdir(settings.folder.parent.parent)
    with silence_optuna(), ignore_experimental_warnings():
        space = load_space("emoji")
        scorer, proposer = FormulaScorer(settings, space), Proposer(settings, space)
        Worker(load_study(settings), settings, space, scorer, proposer, log=print).run()


def throughput(settings: StudyConfig, workers: int, more: int) -> float:
    """Trials that some workers score a minute."""
    scored = sum(t.state.name == "COMPLETE" for t in load_study(settings).get_trials(deepcopy=False))
    settings = settings.with_changes({"trials": scored + more})
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(settings,)) for _ in range(workers)]
    began = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    after = sum(t.state.name == "COMPLETE" for t in load_study(settings).get_trials(deepcopy=False))
    assert after == scored + more, f"{after} of {scored + more} trials"
    return 60 * more / (time.perf_counter() - began)


@contextlib.contextmanager
def servers(url: str | None) -> Iterator[dict[str, str]]:
    """URLs of the storages by name."""
    if url is not None:
        yield {url.partition(":")[0].partition("+")[0]: url}
        return
    from tests.archsearch.studies.postgresql import running

    with running() as server:
        yield {"sqlite": f"sqlite:///{Path.cwd() / 'study.db'}", "postgresql": server.url}


STEPS = ("claim", "read", "ask, processor", "write", "display", "first read", "first ask")


def main() -> None:
    """Print a table a storage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default=None, help="URL; default: a SQLite file and a PostgreSQL server")
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 1_000, 10_000])
    parser.add_argument("--sampler", default="ehvi")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--more", type=int, default=0, help="trials that the workers score; 0: no workers")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="archsearch-scale-") as folder:
        os.chdir(folder)
        os.environ["ARCHSEARCH_CACHE"] = folder
        KnownCosts._count = formula_numbers  # type: ignore[method-assign]
        with servers(arguments.storage) as urls, silence_optuna(), ignore_experimental_warnings():
            for name, url in urls.items():
                settings, space = begin(url, arguments.sampler)
                print(f"| trials on {name} |", " | ".join(STEPS), "| trials a minute |")
                print("|---|" + "---|" * (len(STEPS) + 1), flush=True)
                for size in arguments.sizes:
                    fill(settings, space, size)
                    took = one_more(settings, space, arguments.repeats)
                    cells = [f"{took[step]:.1f}" for step in STEPS]
                    rate = throughput(settings, arguments.workers, arguments.more) if arguments.more else float("nan")
                    print(f"| {size:,} |", " | ".join(cells), f"| {rate:.0f} |", flush=True)


if __name__ == "__main__":
    main()
