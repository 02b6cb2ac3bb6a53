"""Networks that evolve: a real study, small, on a predicted device, whose every number repeats."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from optuna import Study

from archsearch.spaces.loading import load_space
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.evolution import block_table, run
from archsearch.studies.search.candidates import best, load_candidates
from archsearch.studies.search.weights import load_unet
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.rounds import EvolutionRound
from snapgen.architecture import block_index
from snapgen.errors import InputError
from snapgen.models import subnetworks
from snapgen.models.unet import UNet
from snapgen.training.loop import Trainer
from tests.archsearch import tiny_studies
from tests.archsearch.launching import launched
from tests.records import latency_record

DEVICE = "predicted:iphone-16-pro-max"
SPACE = {**tiny_studies.SPACE, "blocks": {"extra_copies": 1}}


def study(folder: Path, **changes: Any) -> Path:
    """A study's file: a target that about two thirds of the blocks' latency meets."""
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    values = {
        "name": "small",
        "space": "space.yaml",
        "objectives": ["validation_loss", "latency_ms"],
        "latency": {"device": DEVICE},
        "protocol": {"steps": 12, "batch_size": 8, "train_seeds": [0], "num_samples": 0, "validation_pairs": 24},
        "evolve": {
            "target_ms": 0.8,
            "round_steps": 3,
            "final_steps": 4,
            "max_edits_per_round": 2,
            "tolerance": 0.2,
            "rounds": 8,
        },
    }
    for path, value in changes.items():
        *way, last = path.split("__")
        home: Any = values
        for step in way:
            home = home[step]
        home[last] = value
    (folder / "study.yaml").write_text(yaml.safe_dump(values))
    return folder / "study.yaml"


def rounds(settings: StudyConfig) -> list[EvolutionRound]:
    found = [c for c in load_study(settings).get_trials(deepcopy=False) if "evolution" in c.user_attrs]
    return [EvolutionRound.model_validate(t.user_attrs["evolution"]) for t in found if t.state.name == "COMPLETE"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyConfig, Path]:
    folder = tmp_path_factory.mktemp("evolve")
    here = Path.cwd()
    os.chdir(folder)
    try:
        settings = load_config(study(folder))
        run.evolve(settings, quiet=True)
    finally:
        os.chdir(here)
    return settings, folder


def test_it_ends_at_the_target(done: tuple[StudyConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, folder = done
    monkeypatch.chdir(folder)
    found = rounds(settings)
    assert [r.number for r in found] == list(range(len(found)))
    assert [r.phase for r in found] == ["robust", *["evolve"] * (len(found) - 2), "final"]
    choice = best(load_study(settings))
    how = settings.evolve
    assert how is not None
    assert how.min_ms <= choice.candidate.value("latency_ms") <= how.max_ms
    assert choice.reason == "the network of the final round of the evolution"
    assert found[-1].training_macs > found[0].training_macs > 0
    assert found[-2].next.startswith("train round")


def test_every_round_values_its_blocks(done: tuple[StudyConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, folder = done
    monkeypatch.chdir(folder)
    candidates = {c.slot: c for c in load_candidates(load_study(settings))}
    for one in rounds(settings)[:-1]:
        arch = candidates[one.number].architecture
        assert [worth.block for worth in one.worths] == [block.name for block in block_index.removable(arch)]
        assert all(worth.ms > 0 and worth.loss.low <= worth.loss.value <= worth.loss.high for worth in one.worths)
        assert one.quality.value == pytest.approx(candidates[one.number].value("validation_loss"))
        assert one.predicted_ms == pytest.approx(candidates[one.number].value("latency_ms"), rel=0.2)


def weights(study: Study, number: int) -> UNet:
    """The trained network of a round."""
    return load_unet(study, next(c for c in load_candidates(study) if c.slot == number))


def test_weights_are_carried_over_every_action(done: tuple[StudyConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, folder = done
    monkeypatch.chdir(folder)
    kept = load_study(settings)
    for one in rounds(settings)[1:]:
        assert one.parent is not None
        parent, child = weights(kept, one.parent), weights(kept, one.number)
        begun = subnetworks.edit_network(parent, one.removed, one.copied)
        assert begun.arch.id == child.arch.id
        moved = torch.cat([(a - b).flatten() for a, b in zip(begun.parameters(), child.parameters(), strict=True)])
        fresh = UNet(child.arch)
        apart = torch.cat([(a - b).flatten() for a, b in zip(fresh.parameters(), child.parameters(), strict=True)])
        assert 0 < moved.norm() < apart.norm()


def test_the_same_again_does_nothing(done: tuple[StudyConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, folder = done
    monkeypatch.chdir(folder)
    before = rounds(settings)
    run.evolve(settings, quiet=True)
    assert rounds(settings) == before


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_interrupted_it_takes_the_same_rounds(
    done: tuple[StudyConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    settings, folder = done
    monkeypatch.chdir(tmp_path)
    own = load_config(study(tmp_path))
    calls, real = 0, run.EvolutionScorer._record_round

    def breaks(self: run.EvolutionScorer, *arguments: Any) -> EvolutionRound:
        nonlocal calls
        calls += 1
        if calls in range(2, 2 + 2 * times, 2):  # after its training, before it is kept
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(run.EvolutionScorer, "_record_round", breaks)
    for _ in range(times):
        with pytest.raises(KeyboardInterrupt):
            run.evolve(own, quiet=True)
    run.evolve(own, quiet=True)
    found = rounds(own)
    monkeypatch.chdir(folder)
    assert found == rounds(settings)


def test_interrupted_within_a_round_it_goes_on_within_it(
    done: tuple[StudyConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = done
    monkeypatch.chdir(folder)
    whole = rounds(settings)
    monkeypatch.chdir(tmp_path)
    own = load_config(study(tmp_path, checkpoint_minutes=0))
    steps: list[int] = []
    step = Trainer._step

    def interrupted(self: Trainer, number: int, batches: Any) -> Any:
        if len(steps) in (8, 14):  # in the first round's twelve steps, and in the second's three
            steps.append(0)
            raise KeyboardInterrupt
        steps.append(number)
        return step(self, number, batches)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.evolve(own, quiet=True)
    run.evolve(own, quiet=True)
    assert rounds(own) == whole
    assert len(steps) - 2 == sum(one.steps for one in whole), "no step was taken twice"
    assert steps[:16] == [*range(1, 9), 0, *range(9, 13), 1, 0, 2]
    assert not list(Path("runs/small").glob("working/*"))


@pytest.mark.slow
def test_killed_in_any_phase_it_takes_the_same_rounds(
    done: tuple[StudyConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = done
    command = [sys.executable, "-m", "archsearch", "evolve", "study.yaml", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(run.__file__).parents[3])}
    whole = tmp_path / "whole"
    whole.mkdir()
    study(whole)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=whole, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    study(tmp_path)
    kills = 0
    for share in itertools.count(0.4, 0.1):  # of the processor's time: on a busy machine the clock says little
        process = psutil.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and sum(process.cpu_times()[:2]) < share * took:
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills > 1
    monkeypatch.chdir(tmp_path)
    found = rounds(load_config(tmp_path / "study.yaml"))
    monkeypatch.chdir(folder)
    assert found == rounds(settings)


def test_a_target_may_be_a_share_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_config(
        study(tmp_path, evolve={"target_ratio": 0.9, "round_steps": 2, "tolerance": 0.2, "rounds": 1})
    )
    for _ in range(2):  # the second time by the study's own table
        kept = run.evolve(settings, quiet=True)
        table = block_table.stored_block_table(settings)
        assert table is not None
        assert kept.user_attrs["settings"]["evolve"]["target_ms"] == pytest.approx(0.9 * table.whole_ms)


def test_it_begins_with_given_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = UNet(load_space(study(tmp_path).with_name("space.yaml")).base)
    given.init_weights(7)
    given.save_pretrained("given")
    settings = load_config(study(tmp_path, protocol__init_from="given", evolve__final_steps=0, evolve__rounds=1))
    run.evolve(settings, quiet=True)
    first = rounds(settings)[0]
    assert (first.steps, first.training_macs) == (0, 0)
    kept = weights(load_study(settings), 0)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), given.parameters(), strict=True))


WRONG = {
    "a target below every network": (
        {"evolve__target_ms": 0.001},
        "not met by any network of the space",
        "evolve.target_ms",
    ),
    "a target above every network": (
        {"evolve__target_ms": 900.0},
        "not met by any network of the space",
        "evolve.target_ms",
    ),
    "a space without knobs for blocks": ({"space": "emoji"}, "no knob for any block", "space"),
    "two seeds": ({"protocol__train_seeds": [0, 1]}, "evolves from a single training run", "protocol.train_seeds"),
    "two workers": ({"workers": 2}, "needs the one before", "workers"),
    "weights that are not there": ({"protocol__init_from": "nowhere"}, "nowhere", ""),
    "no such metric": ({"evolve__metric": "beauty"}, "is not a metric", "evolve.metric"),
    "no CLIP": ({"evolve__metric": "clip_score:nowhere", "evolve__num_samples": 8}, "nowhere", "evolve.metric"),
    "no quality": ({"objectives": ["params"]}, "no objective is a quality number", "objectives"),
    "two targets": ({"evolve__target_ratio": 0.5}, "either target_ms or target_ratio", "evolve"),
    "a probability of one": ({"evolve__block_dropout": 1.0}, "write a number below 1", "evolve.block_dropout"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_told_before_anything_is_trained(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, says, place = WRONG[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("archsearch.quality.short_run.ShortRun.train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InputError) as caught:
        run.evolve(load_config(study(tmp_path, **changes)), quiet=True)
    assert says in str(caught.value)
    assert caught.value.place.startswith(place)
    assert "\n" not in str(caught.value)


def test_weights_that_are_gone_are_named(done: tuple[StudyConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, folder = done
    monkeypatch.chdir(folder)
    kept = load_study(settings)
    candidate = next(c for c in load_candidates(kept) if c.slot == 0)
    path = Path(kept.user_attrs["artifacts"]) / candidate.artifacts["unet.safetensors"]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    try:
        with pytest.raises(InputError, match=r"trial 0 .* weights cannot be read"):
            weights(kept, 0)
    finally:
        path.write_bytes(whole)


def test_a_plain_study_does_not_evolve_and_an_evolving_one_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from archsearch.studies.search.run import search

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="has no settings for evolution"):
        run.evolve(load_config("emoji"))
    with pytest.raises(InputError, match="run archsearch evolve"):
        search(load_config(study(tmp_path)))


def test_the_shipped_study_is_whole() -> None:
    settings = load_config("evolution/emoji")
    assert settings.evolve is not None
    assert settings.load_space().name == "emoji-blocks"


def test_a_rounds_latency_is_the_lowest_that_was_reached_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_config(study(tmp_path))
    times, real = [2.0, 1.0, 3.0, 1.01, 5.0, 5.0], run.EvolutionScorer.latency

    class Noisy:
        def measure(self, *_: Any) -> Any:
            return latency_record(times.pop(0))

    def noisy(self: run.EvolutionScorer, arch: Any) -> Any:
        self._backend = Noisy()
        return real(self, arch)

    monkeypatch.setattr(run.EvolutionScorer, "latency", noisy)
    run.evolve(settings.with_overrides(trials=1), quiet=True)
    assert load_candidates(load_study(settings))[0].value("latency_ms") == 1.0
    assert times == [5.0, 5.0]
    space = settings.load_space()
    again = run.EvolutionScorer(settings.with_overrides(trials=1), space)
    times[:] = [1.02, 7.0]
    assert again.latency(space.base).median_ms == 1.0, "what the first round measured counts"
    assert times == [7.0]


def test_the_table_of_blocks_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from archsearch.devices import backend

    monkeypatch.chdir(tmp_path)
    settings = load_config(study(tmp_path))
    space, whole, measured = settings.load_space(), backend(DEVICE), list[str]()

    class Breaks:
        def measure(self, arch: Any, *sizes: int) -> Any:
            measured.append(arch.id)
            if len(measured) == 10:
                raise KeyboardInterrupt
            return whole.measure(arch, *sizes)

    with pytest.raises(KeyboardInterrupt):
        block_table.load_or_fit_block_table(settings, space, Breaks())
    kept = json.loads((settings.folder / block_table.MEASUREMENTS_FILE).read_text())["records"]
    assert sum(map(len, kept.values())) == 9
    table = block_table.load_or_fit_block_table(settings, space, Breaks())
    assert (
        sum(map(len, json.loads((settings.folder / block_table.MEASUREMENTS_FILE).read_text())["records"].values()))
        == len(measured) - 1
    )
    assert table == block_table.load_or_fit_block_table(settings, space, Breaks()), (
        "what is measured is not measured again"
    )


@pytest.mark.slow
def test_two_processes_evolve_as_one(done: tuple[StudyConfig, Path], tmp_path: Path) -> None:
    """On the CPU they are launched as on GPUs. Sums in another order round differently."""
    settings, folder = done
    study(tmp_path)
    process = launched("evolve", "study.yaml", processes=2, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Report: ") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        one = rounds(settings)
        patch.chdir(tmp_path)
        two = rounds(load_config("study.yaml"))
    assert [(r.phase, r.removed, r.copied) for r in two] == [(r.phase, r.removed, r.copied) for r in one]
    for first, second in zip(one, two, strict=True):
        assert second.quality.value == pytest.approx(first.quality.value, rel=2e-3)


@pytest.mark.slow
def test_what_several_processes_cannot_share_is_told(tmp_path: Path) -> None:
    study(tmp_path, protocol__batch_size=7)
    process = launched("evolve", "study.yaml", processes=2, cwd=tmp_path)
    assert process.returncode != 0
    assert "protocol.batch_size: is 7, which 2 processes cannot divide" in process.stderr
