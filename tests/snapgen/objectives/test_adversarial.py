from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snapgen.diffusion import rectified_flow
from snapgen.errors import InputError
from snapgen.objectives import adversarial as adversary
from snapgen.objectives.adversarial import AdversarialObjective, DiscriminatorObjective, FeatureDiscriminator
from snapgen.objectives.build import build_objectives
from snapgen.objectives.teacher import Teacher
from snapgen.training.batches import Batch, StepRandom
from snapgen.training.settings import DistillationConfig
from snapgen.training.stages import AdversarialConfig, AdversarialDistillationStage
from tests.snapgen.lessons import NoReading, batch, frozen_teacher, student

STEPS = [1.0, 0.5]  # timesteps of two of a sampler's
OUTPUT = DistillationConfig(features=False)


def objectives(
    *,
    teacher: Teacher | None = None,
    stir: bool = True,
    distillation: DistillationConfig | None = OUTPUT,
    **settings: Any,
) -> tuple[AdversarialObjective, DiscriminatorObjective]:
    """Both turns, the heads' last layers no longer zero unless ``stir`` is off."""
    stage = AdversarialDistillationStage(
        name="steps",
        resolution=8,
        batch_size=8,
        num_images=8,
        adversarial=AdversarialConfig(**settings),
        distillation=distillation,
    )
    made, _ = build_objectives(stage, student(), teacher or frozen_teacher(), prediction="preconditioned", seed=0)
    assert list(made) == ["student", "critic"]
    first, second = made["student"], made["critic"]
    assert isinstance(first, AdversarialObjective)
    assert isinstance(second, DiscriminatorObjective)
    if stir:
        generator = torch.Generator().manual_seed(2)
        for head in second.critic.heads:
            nn.init.normal_(head[-1].weight, std=0.5, generator=generator)
    return first, second


def taken(*, t: list[float] = STEPS, **options: Any) -> Batch:
    return batch(t=t, **options)


def clean_by_hand(objective: AdversarialObjective, some: Batch) -> tuple[Tensor, Tensor]:
    """x̂₀ = x_t − t·v_θ and v_θ, with their graphs."""
    x = rectified_flow.interpolate(some.latents, some.noise, some.t)
    velocity = rectified_flow.predict_velocity(objective.student, x, some.t, some.context, "preconditioned")
    return x - some.t.view(-1, 1, 1, 1) * velocity, velocity


def answers(discriminator: FeatureDiscriminator, latents: Tensor, some: Batch, name: str) -> Tensor:
    assert some.teacher is not None
    found: Tensor = discriminator(discriminator.teacher_tokens(latents, some.teacher, some.random, name))
    return found


# --- the student's turn ---


def test_the_guess_is_a_step_to_the_data() -> None:
    first, _ = objectives()
    some = taken()
    first(some)
    wanted, _ = clean_by_hand(first, some)
    torch.testing.assert_close(first.last_x0(some), wanted.detach())
    assert not first.last_x0(some).requires_grad


def test_the_student_gets_the_gradient_of_the_whole_loss() -> None:
    """Taking the critic's part at x̂₀ first changes nothing: here it is one graph through teacher and heads."""
    first, second = objectives(weight=0.7)
    some = taken(t=[0.75, 0.5])
    found = first(some)
    clean, _ = clean_by_hand(first, some)
    adversarial = -answers(second.critic, clean, some, "student").mean()
    wanted = first.student_pass(some).loss.mean() + 0.7 * adversarial
    torch.testing.assert_close(found["loss"], wanted)
    torch.testing.assert_close(found["adversarial"], adversarial.detach())
    weights = list(first.student.parameters())
    pairs = zip(torch.autograd.grad(found["loss"], weights), torch.autograd.grad(wanted, weights), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_adversarial_part_alone_reaches_every_weight_of_the_student() -> None:
    first, _ = objectives(weight=1)
    some = taken()
    loss, rest = first(some)["loss"], first.student_pass(some).loss.mean()
    weights = list(first.student.parameters())
    both = [torch.autograd.grad(part, weights) for part in (loss, rest)]
    assert all((one - other).abs().max() > 1e-7 for one, other in zip(*both, strict=True))


def test_the_balance_is_that_of_the_gradients_at_the_guess() -> None:
    first, second = objectives(weight=0.3, distillation=None)
    some = taken(t=[0.75, 0.25])
    found = first(some)
    clean, velocity = clean_by_hand(first, some)
    (pull,) = torch.autograd.grad(answers(second.critic, clean, some, "student").mean(), clean)
    t = some.t.view(-1, 1, 1, 1)
    other = -2 * (velocity - (some.noise - some.latents)) / velocity.numel() / t  # of the task, through v = (x − x̂₀)/t
    torch.testing.assert_close(found["balance"], 0.3 * pull.norm() / other.norm())


def test_it_logs_what_it_is_made_of() -> None:
    first, _ = objectives()
    assert first(taken()).keys() == {"loss", "adversarial", "balance", "task", "output"}
    alone, _ = objectives(distillation=None)
    assert alone(taken()).keys() == {"loss", "adversarial", "balance", "task"}


def test_the_student_turn_trains_the_student_alone() -> None:
    own = frozen_teacher()
    first, second = objectives(teacher=own)
    assert {id(w) for w in first.parameters()} == {id(w) for w in first.student.parameters()}
    first(taken())["loss"].backward()
    assert all(weight.grad is not None for weight in first.parameters())
    assert all(weight.grad is None for weight in (*own.parameters(), *second.parameters()))


def test_heads_that_have_learnt_nothing_do_not_pull() -> None:
    first, second = objectives(stir=False)
    found = first(taken())
    assert found["adversarial"] == found["balance"] == 0
    second(taken())["loss"].backward()
    assert all(head[-1].weight.grad.abs().max() > 0 for head in second.critic.heads)


# --- the critic's turn ---


def test_the_critics_loss_is_the_hinge_and_the_penalty() -> None:
    first, second = objectives(r1=0.2)
    some = taken()
    first(some)
    found = second(some)
    real = answers(second.critic, some.latents, some, "critic")
    fake = answers(second.critic, first.last_x0(some), some, "critic")
    hinge = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    torch.testing.assert_close(found["loss"], hinge + 0.2 * found["r1"])
    torch.testing.assert_close(found["real"], real.mean().detach())
    torch.testing.assert_close(found["fake"], fake.mean().detach())
    assert real.shape == (2, 3 * 2 * 2)  # three blocks, each a grid of 2×2 tokens


def test_the_penalty_by_hand() -> None:
    """A head that is one product with w has the slope w at every token: R1 = ‖w‖², and its gradient is 2·w."""
    first, second = objectives(r1=1, blocks=(1,))
    head = nn.Conv2d(16, 1, 1)
    second.critic.heads = nn.ModuleList([head])
    some = taken()
    first(some)
    found = second(some)
    w = head.weight.detach()
    torch.testing.assert_close(found["r1"], w.square().sum())
    hinge = found["loss"] - found["r1"]
    assert hinge > 0
    (whole,) = torch.autograd.grad(found["loss"], head.weight, retain_graph=True)
    second._r1 = 0
    (plain,) = torch.autograd.grad(second(some)["loss"], head.weight)
    torch.testing.assert_close(whole - plain, 2 * w)


def test_the_penalty_is_above_zero_and_trains_the_heads() -> None:
    first, second = objectives(r1=1)
    _, free = objectives(r1=0)
    some = taken()
    first(some)
    free._student = (first,)
    found = second(some)
    assert found["r1"] > 0
    weights = list(second.critic.heads[0].parameters())[:1]
    with_r1 = torch.autograd.grad(found["loss"], weights)
    without = torch.autograd.grad(free(some)["loss"], list(free.critic.heads[0].parameters())[:1])
    assert not torch.allclose(with_r1[0], without[0])


def test_the_critics_turn_trains_the_heads_alone() -> None:
    own = frozen_teacher()
    first, second = objectives(teacher=own)
    some = taken()
    first(some)
    second(some)["loss"].backward()
    assert {id(w) for w in second.parameters()} == {id(w) for w in second.critic.heads.parameters()}
    assert all(weight.grad is not None for weight in second.parameters())
    assert all(weight.grad is None for weight in (*own.parameters(), *first.parameters()))
    places = {tensor.data_ptr() for tensor in own.state_dict().values()}
    assert not places & {
        tensor.data_ptr() for objective in (first, second) for tensor in objective.state_dict().values()
    }


def test_the_critics_turn_follows_on_the_students() -> None:
    first, second = objectives()
    first(taken(step=1))
    with pytest.raises(AssertionError, match="last trained on"):
        second(taken(step=2))


# --- how it looks ---


def test_latents_are_looked_at_noised_by_the_steps_own_draws() -> None:
    _, second = objectives(renoise_mean_std=(0.3, 2))
    some = taken()
    assert some.teacher is not None
    found = second.critic.teacher_tokens(some.latents, some.teacher, some.random, "critic")
    t = torch.sigmoid(0.3 + 2 * torch.special.ndtri(some.random.quantiles("critic t", torch.device("cpu"))))
    x = rectified_flow.interpolate(some.latents, some.random.noise("critic noise", some.latents), t)
    (teacher,) = second.critic._teacher
    _, tokens = teacher.forward_features(x, t, some.teacher, [0, 1, 2])
    for grid, raw in zip(found, tokens, strict=True):
        assert grid.shape == raw.shape
        torch.testing.assert_close(grid.mean(1), torch.zeros(2, 2, 2), atol=1e-5, rtol=0)
        torch.testing.assert_close(grid.var(1, correction=0), torch.ones(2, 2, 2), atol=1e-3, rtol=0)
        cosine = nn.functional.cosine_similarity(grid, raw - raw.mean(1, keepdim=True))
        torch.testing.assert_close(cosine, torch.ones(2, 2, 2))


def test_a_batch_in_parts_is_looked_at_as_one() -> None:
    _, second = objectives()
    whole = batch(count=4)
    found = answers(second.critic, whole.latents, whole, "critic")
    assert whole.teacher is not None
    for rows in (range(2), range(2, 4)):
        mine = slice(rows.start, rows.stop)
        part = dataclasses.replace(
            whole,
            teacher=whole.teacher._make(x if x is None else x[mine] for x in whole.teacher),
            random=StepRandom(whole.random.seed, whole.random.step, rows),
        )
        torch.testing.assert_close(answers(second.critic, whole.latents[mine], part, "critic"), found[mine])


def test_every_draw_follows_from_the_step() -> None:
    def losses(step: int) -> list[Tensor]:
        first, second = objectives()
        some = dataclasses.replace(taken(), random=StepRandom(7, step, range(2)))
        return [*first(some).values(), *second(some).values()]

    torch.manual_seed(0)
    once = losses(1)
    torch.manual_seed(1)
    assert all(torch.equal(one, other) for one, other in zip(once, losses(1), strict=True))
    assert not torch.equal(once[1], losses(2)[1])


def test_no_number_leaves_the_device() -> None:
    first, second = objectives()
    with NoReading():
        for objective in (first, second):
            objective(taken())["loss"].backward()


def test_a_bfloat16_teacher_under_autocast_judges_nearly_the_same() -> None:
    exact = [*(objective(taken()) for objective in objectives())]
    first, second = objectives(teacher=frozen_teacher().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = [first(taken()), second(taken())]
    for objective, losses, wanted in zip((first, second), found, exact, strict=True):
        losses["loss"].backward()
        assert all(value.dtype == torch.float32 and value.ndim == 0 for value in losses.values())
        assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in objective.parameters())
        torch.testing.assert_close(losses["loss"], wanted["loss"], rtol=0.1, atol=0)


@pytest.mark.parametrize(("depth", "blocks"), [(38, (8, 18, 27, 37)), (3, (0, 1, 2)), (4, (0, 1, 2, 3)), (1, (0,))])
def test_four_blocks_are_looked_at(depth: int, blocks: tuple[int, ...]) -> None:
    assert adversary.evenly_spaced(depth) == blocks


@pytest.mark.parametrize("block", [3, -1])
def test_blocks_that_the_teacher_has_not_are_told(block: int) -> None:
    with pytest.raises(InputError, match=f"has blocks 0 to 2, but adversarial.blocks names {block}"):
        FeatureDiscriminator(frozen_teacher(), AdversarialConfig(blocks=(0, block)))


@pytest.mark.slow
def test_compiled_turns_give_the_same() -> None:
    plain, compiled = objectives(), objectives()
    for one, other in zip(plain, compiled, strict=True):
        other.compile(backend="aot_eager")
        wanted, found = one(taken()), other(taken())
        wanted["loss"].backward()
        found["loss"].backward()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value)
        for mine, its in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(its.grad, mine.grad, rtol=1e-3, atol=1e-6)


# --- together ---


def test_the_critic_learns_and_the_student_follows_it() -> None:
    """The critic alone comes to tell them apart; then the student alone, by that loss, to be taken for real."""
    first, second = objectives(stir=False, distillation=None, weight=20, r1=0.01)
    some = taken(count=8, t=[1.0, 0.75, 0.5, 0.25] * 2)
    gap = []
    for objective, steps, rate in ((second, 40, 3e-3), (first, 40, 3e-3)):
        optimizer = torch.optim.AdamW(objective.parameters(), lr=rate, betas=(0.5, 0.99))
        for _ in range(steps):
            first.zero_grad()
            second.zero_grad()
            losses = {name: one(some) for name, one in (("student", first), ("critic", second))}
            losses["student" if objective is first else "critic"]["loss"].backward()
            optimizer.step()
        gap.append((losses["critic"]["real"] - losses["critic"]["fake"]).item())
    assert gap[0] > 0.5
    assert gap[1] < gap[0] / 2
