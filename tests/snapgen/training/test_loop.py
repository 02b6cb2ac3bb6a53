from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from snapgen.errors import InputError
from snapgen.io import checkpoint
from snapgen.objectives.build import build_objectives
from snapgen.objectives.flow_matching import FlowMatchingObjective
from snapgen.training import loop
from snapgen.training.batches import Batch, few_step_timesteps
from snapgen.training.loop import StepStats, Trainer
from snapgen.training.settings import DistillationConfig
from snapgen.training.stages import AdversarialDistillationStage, FlowMatchingStage
from tests.snapgen import lessons
from tests.snapgen.lessons import NoReading

KINDS = ("flow_matching", "adversarial")
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def new(
    accelerator: Accelerator,
    kind: str = "flow_matching",
    *,
    steps: int = 4,
    bad_image: int | None = None,
    bad_caption: int | None = None,
    **settings: Any,
) -> Trainer:
    """flow: a student beside a teacher, features too; steps: a student and its critic in turn."""
    values = {
        "name": "some",
        "resolution": 8,
        "batch_size": 8,
        "num_images": 8 * steps,
        "learning_rate": 3e-3,
        **settings,
    }
    student, teacher, device = lessons.student(), lessons.frozen_teacher(), accelerator.device
    student, teacher = student.to(device), teacher.to(device)
    if kind == "flow_matching":
        stage: FlowMatchingStage | AdversarialDistillationStage = FlowMatchingStage(
            distillation=DistillationConfig(), **values
        )
        objective = FlowMatchingObjective(
            student, prediction="preconditioned", distillation=stage.distillation, teacher=teacher
        )
        objectives: dict[str, nn.Module] = {"student": objective}
        times, other = None, {}
    else:
        stage = AdversarialDistillationStage(**values)
        objectives, _ = build_objectives(stage, student, teacher, prediction="preconditioned", seed=0)
        times, other = few_step_timesteps(4, 1), {"critic": stage.model_copy(update={"optimizer": "adamw"})}
    for objective in objectives.values():
        objective.to(device)
    feed = lessons.feed(times=times, bad_image=bad_image, bad_caption=bad_caption, device=device)
    return Trainer(stage, student, objectives, feed, accelerator=accelerator, optimizer_configs=other)


def run(some: Trainer, *, pause: Callable[[], None] | None = None) -> list[StepStats]:
    """The reports of what is left to do; ``pause`` after every step."""
    reports: list[StepStats] = []
    some.run(report=reports.append, should_pause=lambda _: pause is not None, pause=pause or (lambda: None))
    return reports


def losses(some: Trainer) -> list[dict[str, float]]:
    return [report.losses for report in run(some)]


def close(found: list[dict[str, float]], wanted: list[dict[str, float]], rel: float) -> None:
    """But for the balance, a ratio of norms of a whole part."""
    for mine, its in zip(found, wanted, strict=True):
        assert mine.keys() == its.keys()
        for name in set(mine) - {"student balance"}:
            assert mine[name] == pytest.approx(its[name], rel=rel, abs=rel), name


def weights(some: Trainer) -> Weights:
    return {name: tensor.clone() for name, tensor in some.net.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- what a step is ---


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(accelerator: Accelerator, kind: str) -> None:
    some = new(accelerator, kind, steps=24)
    told = losses(some)
    first, last = (sum(row["student task"] for row in rows) for rows in (told[:6], told[-6:]))
    assert last < first
    assert all(math.isfinite(value) for row in told for value in row.values())


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("flow_matching", "muon"), ("flow_matching", "adamw"), ("adversarial", "adamw")]
)
def test_accumulated_parts_give_the_losses_of_the_whole(accelerator: Accelerator, kind: str, optimizer: str) -> None:
    whole, halves, quarters = (
        losses(new(accelerator, kind, gradient_accumulation_steps=parts, optimizer=optimizer)) for parts in (1, 2, 4)
    )
    close(halves, whole, 1e-3)
    close(quarters, whole, 1e-3)


def test_the_average_is_the_nets_alone(accelerator: Accelerator) -> None:
    some = new(accelerator, ema_sigma_rel=0.2)
    seen: list[Weights] = []
    run(some, pause=lambda: seen.append(weights(some)))
    average = some.ema.state()
    assert average.keys() == some.net.state_dict().keys()
    assert len(list(some.objectives["student"].parameters())) > len(list(some.net.parameters()))
    assert not equal(average, seen[-1])
    for name, tensor in average.items():
        low, high = (getattr(torch.stack([w[name] for w in seen]), of)(0).values for of in ("min", "max"))
        assert bool(((low - 1e-6 <= tensor) & (tensor <= high + 1e-6)).all()), name
    none = new(accelerator, ema_sigma_rel=0)
    run(none)
    assert equal(none.ema.state(), weights(none))


def test_bfloat16_is_the_passes_alone(accelerator: Accelerator) -> None:
    exact, some = new(accelerator), new(accelerator, precision="bfloat16")
    seen: set[torch.dtype] = set()
    for module in some.net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *args: seen.add(args[-1].dtype))
    close(losses(some), losses(exact), 0.1)
    assert torch.bfloat16 in seen
    kept = [tensor for part in some.state().values() for tensor in part.values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert not equal(weights(some), weights(exact))


def test_gradient_checkpointing_changes_nothing(accelerator: Accelerator) -> None:
    plain, some = new(accelerator), new(accelerator, gradient_checkpointing=True)
    some.net.enable_gradient_checkpointing()
    close(losses(some), losses(plain), 1e-4)


def test_kernels_lie_channels_last(accelerator: Accelerator) -> None:
    for objective in new(accelerator, "adversarial").objectives.values():
        kernels = [p for p in objective.parameters() if p.ndim == 4 and min(p.shape) > 1]
        assert kernels
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_nothing_is_compiled_on_a_cpu(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was compiled")

    monkeypatch.setattr(nn.Module, "compile", refuse)
    assert losses(new(accelerator, compile=True)) == losses(new(accelerator))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_is_read_between_reports(
    accelerator: Accelerator, kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU by what is read off a tensor; what is gathered for the device beforehand lies in memory anyway."""
    take = Trainer._step

    def watched(self: Trainer, step: int, batches: Iterator[Batch]) -> Tensor:
        given = iter([next(batches) for _ in range(self.stage.gradient_accumulation_steps)])
        with NoReading():
            return take(self, step, given)

    monkeypatch.setattr(Trainer, "_step", watched)
    assert len(run(new(accelerator, kind, gradient_accumulation_steps=2, precision=precision))) == 4


# --- what is told ---


def test_reports_add_up(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    each = run(new(accelerator, steps=7))
    assert [(r.step, r.steps, r.images, r.skipped) for r in each] == [(n, 7, 8 * n, []) for n in range(1, 8)]
    assert each[0].losses.keys() == {f"student {name}" for name in ("loss", "task", "output", "features", "gradient")}
    assert max(r.lr_scale for r in each) == 1
    assert all(r.images_per_second > 0 for r in each)
    monkeypatch.setattr(loop, "MIN_REPORTS", 2)
    some = new(accelerator, steps=7)
    assert some.report_every == 3
    threes = run(some)
    assert [r.step for r in threes] == [3, 6, 7]
    for report, rows in zip(threes, (each[:3], each[3:6], each[6:]), strict=True):
        wanted = {name: sum(r.losses[name] for r in rows) / len(rows) for name in report.losses}
        assert report.losses == pytest.approx(wanted, rel=1e-6)


def test_reports_of_a_long_stage_are_not_rare(accelerator: Accelerator) -> None:
    assert new(accelerator, steps=1_000_000).report_every == loop.MAX_REPORT_INTERVAL
    assert new(accelerator, steps=1000).report_every == 5


def test_a_pause_breaks_nothing(accelerator: Accelerator) -> None:
    """Net and turns are put to train again after what an evaluation did to them."""
    some = new(accelerator)
    modes: list[bool] = []
    some.net.mid.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    found = [report.losses for report in run(some, pause=lambda: some.net.eval() and None)]
    assert modes == [True] * 4
    assert found == losses(new(accelerator))


# --- going on ---


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_any_step_is_to_the_bit(accelerator: Accelerator, kind: str, tmp_path: Path) -> None:
    steps, whole = 5, new(accelerator, kind, steps=5, gradient_accumulation_steps=2)

    def save() -> None:
        checkpoint.save_checkpoint(tmp_path / str(whole.step), whole.state(), {})

    told = [report.losses for report in run(whole, pause=save)]
    wanted = whole.state()
    for step in range(1, steps):
        other = new(accelerator, kind, steps=5, gradient_accumulation_steps=2)
        other.load(checkpoint.load_checkpoint(tmp_path / str(step))[0], step)
        assert losses(other) == told[step:]
        found = other.state()
        assert found.keys() == wanted.keys()
        assert all(equal(found[part], wanted[part]) for part in wanted), step


# --- what is not finite ---

BAD = 5  # of the images; `bad_step` finds when it comes


def bad_step() -> int:
    """The step of the first epoch in which the image comes."""
    order = lessons.feed()._image_indices
    return next(step for step in (1, 2, 3) if BAD in order(step).tolist())


def test_a_stage_that_halts_says_where(accelerator: Accelerator) -> None:
    some, step = new(accelerator, bad_caption=BAD), bad_step()
    with pytest.raises(InputError) as told:
        run(some)
    line = str(told.value)
    assert line.startswith(f"stage some: step {step}, image {8 * step - 7}: a gradient is not finite; ")
    assert "; the first non-finite output comes from student.down.1." in line
    assert ".attn2.to_kv; set on_nonfinite_grad: skip" in line
    assert "\n" not in line


def test_latents_that_are_not_finite_are_told_apart(accelerator: Accelerator) -> None:
    with pytest.raises(InputError, match="its latents are not finite"):
        run(new(accelerator, bad_image=BAD))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_that_skips_goes_on_without_the_step(accelerator: Accelerator, kind: str) -> None:
    some, step = new(accelerator, kind, steps=3, bad_caption=BAD, on_nonfinite_grad="skip"), bad_step()
    states = [copy.deepcopy(some.state())]
    reports = run(some, pause=lambda: states.append(copy.deepcopy(some.state())))
    assert [report.skipped for report in reports] == [[step] if n == step else [] for n in (1, 2, 3)]
    for number, (before, after) in enumerate(itertools.pairwise(states), 1):
        for part in ("turn.student", "optimizer.student"):
            assert equal(before[part], after[part]) == (number == step), (number, part)
    assert all(tensor.isfinite().all() for part in states[-1].values() for tensor in part.values())
    assert all(math.isfinite(value) for report in reports if not report.skipped for value in report.losses.values())


def test_what_was_skipped_is_left_out_of_the_means(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MIN_REPORTS", 1)
    each, step = new(accelerator, steps=3, bad_caption=BAD, on_nonfinite_grad="skip"), bad_step()
    (report,) = run(each)
    assert report.skipped == [step]
    assert all(math.isfinite(value) for value in report.losses.values())


@pytest.mark.parametrize(("steps", "reports", "lost"), [(2, 200, 2), (5, 200, 3), (5, 1, 5)])
def test_a_stage_that_can_take_no_step_halts_even_so(
    accelerator: Accelerator, steps: int, reports: int, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED_STEPS", 3)
    monkeypatch.setattr(loop, "MIN_REPORTS", reports)
    some = new(accelerator, steps=steps, on_nonfinite_grad="skip")
    with torch.no_grad():
        some.net.conv_in.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=f"not finite for {lost} consecutive steps; .* student.conv_in") as told:
        run(some)
    assert "on_bad" not in str(told.value)
    assert some.step == lost


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    some, take = new(Accelerator(), kind, steps=6, precision="bfloat16"), Trainer._step

    def watched(self: Trainer, step: int, batches: Iterator[Batch]) -> Tensor:
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")  # kernels are chosen in the first steps
        try:
            return take(self, step, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", watched)
    assert all(math.isfinite(value) for report in run(some) for value in report.losses.values())
