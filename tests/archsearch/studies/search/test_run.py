from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from archsearch.latency.base import DeviceLostError
from archsearch.reports.study.data import load_study_data
from archsearch.score import LatencyRecord
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search import proposer as proposal
from archsearch.studies.search.candidates import best, load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.search.samplers import distributions
from archsearch.studies.storage import trial_queue
from archsearch.studies.storage.artifacts import artifact_store
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.record import Candidate, TrialRecord
from archsearch.studies.storage.trial_queue import TrialQueue
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.archsearch.studies.quick import SPACE, QuickScorer

Make = Callable[..., StudyConfig]
Start = Callable[..., BaseProcess]


def run(settings: StudyConfig) -> list[Candidate]:
    return load_candidates(search(settings, quiet=True, scorer=QuickScorer))


def run_in(folder: Path, settings: StudyConfig, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring it
    search(settings, quiet=True, scorer=QuickScorer)


def scored(candidates: list[Candidate]) -> list[Candidate]:
    return [c for c in candidates if c.state == "scored" and c.reused_from is None]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the id of every architecture that was trained."""
    path = tmp_path / "trained.log"
    path.touch()
    monkeypatch.setenv("QUICK_LOG", str(path))
    return path


def test_a_study_is_told_whole(settings: Make, log: Path) -> None:
    study = search(settings(trials=6), quiet=True, scorer=QuickScorer)
    candidates = load_candidates(study)
    assert [c.slot for c in candidates] == list(range(len(candidates)))
    assert [c.name for c in candidates[:2]] == ["base", "thin"]
    assert len(scored(candidates)) == 6
    assert log.read_text().split() == [c.architecture.id for c in scored(candidates)]
    trial = study.get_trials()[3]
    assert trial.values == [candidates[3].value("validation_loss"), candidates[3].value("latency_ms")]
    assert {
        "slot",
        "architecture",
        "architecture_id",
        "name",
        "score",
        "stage",
        "fraction",
        "worker",
    } <= trial.user_attrs.keys()
    assert {"settings", "space", "protocol", "protocol_hash", "machine", "artifacts"} <= study.user_attrs.keys()
    assert candidates[3].artifacts.keys() == {"architecture.json", "curve.csv", "samples.png", "unet.safetensors"}
    with artifact_store(study).open_reader(candidates[3].artifacts["unet.safetensors"]) as file:
        assert file.read() == b"weights"
    assert not list((settings().folder / "working").iterdir())


def test_ordered_knobs_are_integers_and_others_categories_to_samplers(settings: Make) -> None:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    choices = distributions(settings().load_space().knobs)
    assert choices["levels[0].channels"] == IntDistribution(0, 3)
    assert choices["all.num_kv_heads"] == IntDistribution(0, 2)
    assert isinstance(choices["convs"], CategoricalDistribution)


def test_a_study_whose_parameters_are_indices_goes_on(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As studies of before stored them; others store the names of the choices."""
    indices = distributions(settings().load_space().knobs)
    named = search(settings(trials=4), quiet=True, scorer=QuickScorer)
    with monkeypatch.context() as before:
        before.setattr(TrialQueue, "_named_choices", indices)
        search(settings(name="old", trials=2), quiet=True, scorer=QuickScorer)
    old = search(settings(name="old", trials=4), quiet=True, scorer=QuickScorer)
    assert [c.point for c in load_candidates(old)] == [c.point for c in load_candidates(named)]
    assert old.get_trials()[3].params == load_candidates(old)[3].point
    assert named.get_trials()[0].params["levels[0].channels"] == "16"
    assert old.get_trials()[3].distributions == indices


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "nsga3", "random", "qmc"])
def test_infeasible_candidates_are_told_by_how_much_and_never_trained(settings: Make, log: Path, sampler: str) -> None:
    limits = {"latency_ms": 9.0, "params": 2e5}
    study = search(settings(trials=5, sampler=sampler, constraints=limits), quiet=True, scorer=QuickScorer)
    candidates = load_candidates(study)
    trained = log.read_text().split()
    outside = [c for c in candidates if c.state == "infeasible"]
    assert outside
    assert len(scored(candidates)) == 5
    assert all(c.score.quality is None and c.architecture.id not in trained for c in outside)
    assert all(c.value("params") <= 2e5 and c.value("latency_ms") <= 9 for c in scored(candidates))
    for c in outside:
        trial = study.get_trials()[c.number]
        assert trial.state.name == "PRUNED"
        over = c.value("params") / 2e5 - 1
        assert trial.constraints["params"] == pytest.approx(over)
        # Over the limit on cost: not even timed.
        assert (c.score.latency is None) == (over > 0)
    assert {t.number for t in study.best_trials} <= {c.number for c in scored(candidates)}


def test_a_limit_that_nothing_keeps_ends_the_study(settings: Make, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_queue, "MAX_INFEASIBLE_IN_A_ROW", 7)
    with pytest.raises(
        InputError, match=r"the last 7 candidates were all outside .*: 7 of 7 exceed the limit 1000"
    ) as end:
        run(settings(constraints={"params": 1000}, sampler="random"))
    assert log.read_text() == ""
    assert (end.value.source, end.value.place) == ("study", "constraints.params")
    lowest = min(c.value("params") for c in load_candidates(load_study(settings())))
    assert end.value.remedy == f"raise it; the lowest params was {lowest:.4g}"


@pytest.mark.parametrize(("own", "place"), [({}, "space.yaml"), ({"params": 500}, "study")])
def test_a_limit_that_nothing_keeps_is_named_where_it_is_written(
    own: dict[str, float], place: str, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_queue, "MAX_INFEASIBLE_IN_A_ROW", 3)
    made = settings(constraints=own, sampler="random")
    space = Path(made.space)
    space.write_text(space.read_text() + "constraints: {params: 1000}\n")
    with pytest.raises(InputError, match="exceed the limit") as end:
        run(made)
    assert Path(end.value.source).name == place
    assert end.value.place == "constraints.params"


@pytest.mark.parametrize(
    ("constraints", "limits", "place"),
    [
        ({"params": 900}, "", "constraints.params"),
        ({}, "constraints: {params: 900}\n", "space.constraints.params"),
        ({"validation_loss": 0.01}, "", "constraints.validation_loss"),
    ],
)
def test_the_best_of_infeasible_candidates_is_one_line_with_the_limit(
    settings: Make, monkeypatch: pytest.MonkeyPatch, constraints: dict[str, float], limits: str, place: str
) -> None:
    monkeypatch.setattr(trial_queue, "MAX_INFEASIBLE_IN_A_ROW", 3)
    made = settings(constraints=constraints, sampler="random", trials=3)
    space = Path(made.space)
    space.write_text(space.read_text() + limits)
    with pytest.raises(InputError):
        run(made)
    study, name = load_study(made), place.rpartition(".")[2]
    lowest = min(c.value(name) for c in load_candidates(study))
    for look in (best, load_study_data):
        with pytest.raises(InputError) as end:
            look(study)
        line = str(end.value)
        assert line.startswith(f"study quick: {place}: no candidate is feasible: 3 of 3 exceed the limit ")
        assert line.endswith(f"; raise it; the lowest {name} was {lowest:.4g}")
        assert "\n" not in line


def test_a_limit_on_quality_is_a_constraint_of_trained_candidates(settings: Make) -> None:
    study = search(
        settings(trials=6, constraints={"validation_loss": 0.3}, sampler="random"), quiet=True, scorer=QuickScorer
    )
    over = [c for c in load_candidates(study) if c.infeasible]
    assert over
    assert all(c.state == "scored" for c in over)
    assert best(study).candidate.value("validation_loss") <= 0.3


def test_studies_of_cost_alone_train_nothing(settings: Make, log: Path) -> None:
    candidates = run(settings(objectives=("params", "latency_ms"), trials=5))
    assert all(c.score.quality is None for c in candidates)
    assert log.read_text() == ""


DOUBLES = SPACE.replace("convs:", "time.projection: [expanded, output]\n  convs:", 1)  # one net where convs are plain


def test_an_architecture_is_scored_once(settings: Make, tmp_path: Path, log: Path) -> None:
    changed = settings(trials=12, sampler="random")
    (tmp_path / "space.yaml").write_text(DOUBLES.replace("thin: {", "thin: {time.projection: expanded, "))
    candidates = run(changed)
    trained = log.read_text().split()
    assert len(trained) == len(set(trained)) == 12
    for c in candidates:
        if c.reused_from is not None:
            first = next(o for o in candidates if o.number == c.reused_from)
            assert (first.score, first.architecture.id) == (c.score, c.architecture.id)
            assert first.point != c.point


SMALL = SPACE[: SPACE.index("  convs:")] + "  rope: [false, true]\n"


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_an_exhausted_space_ends_the_study(settings: Make, tmp_path: Path, log: Path, sampler: str) -> None:
    changed = settings(trials=9, sampler=sampler)
    (tmp_path / "space.yaml").write_text(SMALL)
    assert len(scored(run(changed))) == 4
    assert len(scored(run(changed))) == 4
    assert len(log.read_text().split()) == 4


def test_the_budget_may_be_raised(settings: Make) -> None:
    assert len(scored(run(settings(trials=3)))) == 3
    assert len(scored(run(settings(trials=5)))) == 5
    assert len(scored(run(settings(trials=4)))) == 5


def test_minutes(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_SECONDS", "0.05")
    timed = settings(trials=None, time_budget_minutes=0.04, sampler="random")
    began = time.monotonic()
    candidates = run(timed)
    assert time.monotonic() - began < 30
    assert len(candidates) >= 2
    again = run(timed)
    assert len(again) - len(candidates) <= 1
    assert len(run(timed.with_overrides(time_budget_minutes=0.1))) > len(again)


def test_a_candidate_that_fails_is_tried_again_then_given_up(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usual = run(settings(name="usual", trials=5, sampler="random"))
    monkeypatch.setenv("QUICK_FAULT", f"{usual[2].architecture.id}:raise")
    candidates = run(settings(trials=5, sampler="random"))
    assert [c.state for c in candidates].count("failed") == 1
    assert (candidates[2].error, candidates[2].attempts) == ("RuntimeError: out of memory", 2)
    assert len(scored(candidates)) == 5
    lines = capfd.readouterr().err.splitlines()
    ends = "tried again", "abandoned", "was given up: RuntimeError: out of memory", "tries what was given up again"
    assert [line.endswith(end) for line, end in zip(lines, ends, strict=True)] == [True] * 4


def test_too_many_failures_stop_the_study(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_FAULT", ":raise")
    with pytest.raises(InputError, match="3 candidates in a row failed, the last with RuntimeError: out of memory"):
        run(settings())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_mistake_met_on_the_way_ends_the_study(
    settings: Make, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("QUICK_FAULT", ":input")
    with pytest.raises(InputError, match="data: is gone; bring it back"):
        run(settings(workers=workers))
    monkeypatch.delenv("QUICK_FAULT")
    assert len(scored(run(settings(trials=3)))) == 3


class Unplugged(QuickScorer):
    """Its device went away."""

    def latency(self, arch: Architecture) -> LatencyRecord:  # noqa: ARG002
        raise DeviceLostError("Desk phone was disconnected", "connect it")


def test_a_lost_device_ends_the_search_and_blames_no_candidate(settings: Make) -> None:
    with pytest.raises(InputError, match="Desk phone was disconnected; trial 0 will be run again; connect it"):
        search(settings(trials=2), quiet=True, scorer=Unplugged)
    candidates = run(settings(trials=2))
    assert len(scored(candidates)) == 2
    assert not [c for c in candidates if c.state != "scored"]


def test_an_unknown_option_of_a_sampler(settings: Make) -> None:
    with pytest.raises(InputError, match=r"sampler\.options: sampler gp does not accept its options: .*n_starts"):
        run(settings(sampler={"name": "gp", "options": {"n_starts": 3}}))


def test_two_workers(settings: Make, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_SECONDS", "0.05")
    candidates = run(settings(trials=9, workers=2))
    assert len(scored(candidates)) == 9
    assert [c.slot for c in candidates] == list(range(len(candidates)))
    assert max(Counter(log.read_text().split()).values()) == 1
    pids = {t.user_attrs["worker"]["pid"] for t in load_study(settings()).get_trials()}
    assert len(pids) == 2


def test_two_processes_on_one_file(settings: Make, start: Start, tmp_path: Path) -> None:
    log = tmp_path / "trained.log"
    arguments = (tmp_path, settings(trials=12), {"QUICK_SECONDS": "0.15", "QUICK_LOG": str(log)})
    both = [start(run_in, *arguments) for _ in range(2)]
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0]
    study = load_study(settings())
    assert [t.number for t in study.get_trials()] == list(range(len(study.get_trials())))
    candidates = load_candidates(study)
    assert [c.slot for c in candidates] == list(range(len(candidates)))
    assert len(scored(candidates)) == 12
    trained = log.read_text().split()
    assert len(trained) == len(set(trained)) == 12
    assert len({t.user_attrs["worker"]["pid"] for t in study.get_trials()}) == 2


def test_one_process_goes_on_where_the_other_was_killed(settings: Make, start: Start, tmp_path: Path) -> None:
    arguments = (tmp_path, settings(trials=10), {"QUICK_SECONDS": "0.1"})
    victim, survivor = (start(run_in, *arguments) for _ in range(2))
    until(lambda: len(numbers(settings(), "COMPLETE")) >= 3)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    survivor.join()
    assert survivor.exitcode == 0
    candidates = load_candidates(load_study(settings()))
    assert len(scored(candidates)) == 10
    assert all(c.state == "scored" for c in candidates)


def test_a_worker_that_dies_is_replaced_and_its_candidate_given_up(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usual = run(settings(name="usual", trials=1))
    monkeypatch.setenv("QUICK_FAULT", f"{usual[0].architecture.id}:die")
    monkeypatch.setattr("archsearch.studies.search.pool.MAX_DEAD_WORKERS", 50)
    candidates = run(settings(trials=4, workers=2, sampler="random"))
    assert len(scored(candidates)) == 4
    assert (candidates[0].state, candidates[0].error) == ("failed", "its worker died (status 9)")
    # Two deaths that the search saw; more where the other worker, idle here, saw one first and took the slot.
    assert capfd.readouterr().err.count("another takes over") >= 2


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_an_interrupted_study_puts_its_trials_back(
    settings: Make, start: Start, tmp_path: Path, workers: int, number: signal.Signals
) -> None:
    changed = settings(trials=60, workers=workers, sampler="random")  # so many that it can not be over before we look
    process = start(run_in, tmp_path, changed, {"QUICK_SECONDS": "1"})
    until(lambda: numbers(changed, "COMPLETE") and len(numbers(changed, "RUNNING")) == workers)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode != 0
    assert numbers(changed, "RUNNING") == []
    withdrawn = [t for t in load_study(changed).get_trials() if t.user_attrs.get("withdrawn")]
    assert 1 <= len(withdrawn) <= workers
    done = len(numbers(changed, "COMPLETE")) + 3
    candidates = run(settings(trials=done, workers=1, sampler="random"))
    assert len(scored(candidates)) == done
    assert [c.slot for c in candidates] == list(range(done))


def test_a_trial_is_put_back_if_the_interrupt_falls_into_its_claim(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trial_queue, "send_heartbeat", interrupt)  # right after the creation of the trial
        with pytest.raises(KeyboardInterrupt):
            run(settings(trials=3))
    assert [t.state.name for t in load_study(settings()).get_trials()] == ["FAIL"]
    assert [(c.slot, c.state) for c in run(settings(trials=3))] == [(slot, "scored") for slot in range(3)]


def test_workers_do_not_outlive_a_killed_search(settings: Make, start: Start, tmp_path: Path) -> None:
    changed = settings(trials=30, workers=2, sampler="random")
    process = start(run_in, tmp_path, changed, {"QUICK_SECONDS": "0.2"})
    until(lambda: len(numbers(changed, "RUNNING")) == 2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    pids = {t.user_attrs["worker"]["pid"] for t in load_study(changed).get_trials()}
    until(
        lambda: not any(Path(f"/proc/{pid}/environ").exists() and os.access(f"/proc/{pid}/fd", os.R_OK) for pid in pids)
    )
    assert len(scored(run(settings(trials=5, sampler="random")))) >= 5


def test_a_silent_worker_of_another_machine_is_replaced(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna.trial import TrialState

    import archsearch.studies.storage.database
    import archsearch.studies.storage.trial_queue

    monkeypatch.setattr(archsearch.studies.storage.database, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(archsearch.studies.storage.database, "GRACE_SECONDS", 2)
    whole = run(settings(name="whole", trials=4, sampler="random"))
    run(settings(trials=2, sampler="random"))
    elsewhere = {"host": "elsewhere", "pid": 1, "started": 0.0}
    monkeypatch.setattr(archsearch.studies.storage.trial_queue, "worker_identity", lambda: elsewhere)
    claim = archsearch.studies.storage.trial_queue.TrialQueue(load_study(settings()), settings(trials=4)).claim()
    monkeypatch.undo()
    monkeypatch.chdir(settings().space.removesuffix("/space.yaml"))
    assert isinstance(claim, TrialRecord)
    monkeypatch.setattr(archsearch.studies.storage.database, "GRACE_SECONDS", 2)
    began = time.monotonic()
    candidates = run(settings(trials=4, sampler="random"))
    assert time.monotonic() - began > 1
    assert load_study(settings()).get_trials()[claim.number].state == TrialState.FAIL
    assert sorted(c.architecture.id for c in candidates) == sorted(c.architecture.id for c in whole)


def test_a_proposal_that_another_worker_has_is_not_taken(settings: Make) -> None:
    from archsearch.spaces.loading import load_space

    study = search(settings(trials=3), quiet=True, scorer=QuickScorer)
    book = trial_queue.TrialQueue(study, settings(trials=9))
    proposer = proposal.Proposer(settings(), load_space(settings().space))
    first, second = book.claim(), book.claim()
    assert isinstance(first, TrialRecord)
    assert isinstance(second, TrialRecord)
    ours = proposer.propose(first, book.trials())
    book.write(second.trial_id, architecture_id=ours.architecture.id)
    other = proposer.propose(first, book.trials())
    assert other.architecture.id != ours.architecture.id


def numbers(settings: StudyConfig, state: str) -> list[int]:
    try:
        return [t.number for t in load_study(settings).get_trials() if t.state.name == state]
    except InputError:  # not begun yet
        return []


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
