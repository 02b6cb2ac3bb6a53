from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import RectifiedFlow
from snapgen.objectives.flow_matching import FlowMatchingObjective
from snapgen.objectives.knowledge_distillation import data_weight
from snapgen.objectives.teacher import Teacher
from snapgen.training.batches import Batch
from snapgen.training.settings import DistillationConfig
from tests.snapgen.lessons import NoReading, batch, frozen_teacher, new_teacher, student

BOTH = DistillationConfig()


def taught(distillation: DistillationConfig = BOTH, **options: object) -> FlowMatchingObjective:
    own = frozen_teacher()
    return FlowMatchingObjective(
        student(), prediction="preconditioned", distillation=distillation, teacher=own, **options
    )


def gradients(loss: Tensor, objective: FlowMatchingObjective) -> list[Tensor]:
    weights = list(objective.student.parameters())
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


# --- the data alone ---


@pytest.mark.parametrize("prediction", rectified_flow.FLOW_PREDICTION_TYPES)
def test_without_a_teacher_it_is_flow_matching(prediction: rectified_flow.FlowPredictionType) -> None:
    objective, some = FlowMatchingObjective(student(), prediction=prediction), batch()
    found = objective(some)
    wanted = RectifiedFlow(prediction).losses(objective.student, some.latents, some.noise, some.t, some.context)
    assert torch.equal(found["loss"], wanted.mean())
    assert found.keys() == {"loss", "task"}
    assert torch.equal(found["task"], found["loss"])


def test_a_teacher_is_trained_the_same_way() -> None:
    """On its own captions, which the feed gives as it gives a student's."""
    own, some = new_teacher(prediction="preconditioned"), batch(size=8)
    assert some.teacher is not None
    some = dataclasses.replace(some, context=some.teacher.context, pooled=some.teacher.pooled, teacher=None)
    objective = FlowMatchingObjective(own, prediction=own.prediction)
    assert len(list(objective.parameters())) == len(list(own.parameters()))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(some)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    given = some.pooled
    assert given is not None
    assert not torch.equal(objective(some)["loss"], objective(dataclasses.replace(some, pooled=0 * given))["loss"])


# --- a teacher ---


def parts_by_hand(objective: FlowMatchingObjective, some: Batch, teacher: Teacher) -> dict[str, Tensor]:
    """(B,) each, from the formulas: ‖v_θ − (ε − x₀)‖², ‖v_T − v_θ‖², ‖f_T − φ(f_θ)‖², means over elements."""
    assert objective.projector is not None
    assert some.teacher is not None
    t = some.t.view(-1, 1, 1, 1)
    x = (1 - t) * some.latents + t * some.noise
    scale = (t**2 + (1 - t) ** 2).rsqrt()
    features = objective.student.forward_features(x * scale, some.t, some.context)
    velocity = (2 * t - 1) * scale**2 * x + scale * objective.student.head(features)
    wanted, (tokens,) = teacher.forward_features(x, some.t, some.teacher, [2])
    pairs = {
        "task": (velocity, some.noise - some.latents),
        "output": (velocity, wanted),
        "features": (objective.projector(features), tokens),
    }
    return {name: (one - other).square().mean((1, 2, 3)) for name, (one, other) in pairs.items()}


def test_the_losses_are_the_papers() -> None:
    own, some = frozen_teacher(), batch()
    objective = FlowMatchingObjective(student(), prediction="preconditioned", distillation=BOTH, teacher=own)
    found, wanted = objective(some), parts_by_hand(objective, some, own)
    assert found.keys() == {"loss", *wanted}
    for name, part in wanted.items():
        torch.testing.assert_close(found[name], part.mean())
    torch.testing.assert_close(found["loss"], 2 * wanted["task"].mean())  # S has the task's value, and there are two


def test_the_gradient_is_the_mixture_of_the_parts() -> None:
    """S(task, output) + S(task, features): 2·α·∇task + (1 − α)·Σ ratio·∇kd, image by image, in every weight."""
    own, some = frozen_teacher(), batch(t=[0.1, 0.6])
    objective = FlowMatchingObjective(student(), prediction="preconditioned", distillation=BOTH, teacher=own)
    parts = parts_by_hand(objective, some, own)
    mixed = torch.zeros(())
    for image, alpha in enumerate(data_weight(some.t).tolist()):
        ratios = {name: (parts["task"][image] / parts[name][image]).item() for name in ("output", "features")}
        mixed = mixed + alpha * 2 * parts["task"][image] / 2
        mixed = mixed + sum((1 - alpha) * ratio * parts[name][image] / 2 for name, ratio in ratios.items())
    for found, wanted in zip(gradients(objective(some)["loss"], objective), gradients(mixed, objective), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_without_scaling_the_losses_are_weighted_and_added() -> None:
    plain = DistillationConfig(scaling="fixed", output_weight=0.5, feature_weight=0.25)
    found = taught(plain)(batch())
    torch.testing.assert_close(found["loss"], found["task"] + 0.5 * found["output"] + 0.25 * found["features"])


@pytest.mark.parametrize("scaling", ["timestep_aware", "fixed"])
@pytest.mark.parametrize(("output", "features"), [(True, False), (False, True)])
def test_each_level_can_be_left_out(output: bool, features: bool, scaling: str) -> None:
    objective = taught(DistillationConfig(output=output, features=features, scaling=scaling))
    found = objective(batch())
    assert found.keys() == {"loss", "task", "output" if output else "features"}
    assert (objective.projector is not None) == features
    found["loss"].backward()
    assert all(weight.grad is not None for weight in objective.parameters())


def test_guidance_changes_what_the_teacher_says() -> None:
    assert not torch.equal(taught()(batch())["output"], taught(DistillationConfig(guidance_scale=4))(batch())["output"])


# --- who trains ---


def test_the_teacher_is_neither_trained_nor_copied_nor_kept_in_a_graph() -> None:
    own = frozen_teacher()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    places = {tensor.data_ptr() for tensor in own.state_dict().values()}
    objective = FlowMatchingObjective(student(), prediction="velocity", distillation=BOTH, teacher=own)
    trained = {id(weight) for weight in objective.parameters()}
    assert trained == {id(w) for net in (objective.student, objective.projector) for w in net.parameters()}
    seen: list[bool] = []
    own.net.register_forward_hook(lambda *args: seen.append(args[-1][0].requires_grad))
    objective(batch())["loss"].backward()
    assert seen == [False]
    assert all(weight.grad is None for weight in own.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert {tensor.data_ptr() for tensor in own.state_dict().values()} == places
    assert not places & {tensor.data_ptr() for tensor in objective.state_dict().values()}
    assert all(weight.grad is not None for weight in objective.parameters())


def test_a_teacher_that_could_learn_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        FlowMatchingObjective(student(), prediction="velocity", distillation=BOTH, teacher=new_teacher())


def test_a_bfloat16_teacher_teaches_nearly_the_same() -> None:
    own = frozen_teacher()
    exact = FlowMatchingObjective(student(), prediction="velocity", distillation=BOTH, teacher=own)(batch())
    objective = FlowMatchingObjective(student(), prediction="velocity", distillation=BOTH, teacher=own.bfloat16())
    found = objective(batch())
    found["loss"].backward()
    assert all(value.dtype == torch.float32 for value in found.values())
    torch.testing.assert_close(found["output"], exact["output"], rtol=0.05, atol=0)
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in objective.parameters())


def test_under_autocast_losses_stay_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = taught()(batch())
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in found.values())
    torch.testing.assert_close(found["loss"], taught()(batch())["loss"], rtol=0.05, atol=0)


def test_gradient_checkpointing_changes_nothing() -> None:
    objective = taught()
    plain = gradients(objective(batch())["loss"], objective)
    objective.student.enable_gradient_checkpointing()
    for one, other in zip(plain, gradients(objective(batch())["loss"], objective), strict=True):
        torch.testing.assert_close(one, other)


def test_a_turn_of_one_seed_gives_the_same_again() -> None:
    one, other = (taught(seed=3)(batch()) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(taught(seed=4)(batch())["features"], one["features"])


def test_no_number_leaves_the_device() -> None:
    with NoReading():
        taught()(batch())["loss"].backward()
        with pytest.raises(AssertionError, match="a number was read"):
            torch.ones(()).item()


@pytest.mark.slow
def test_a_compiled_turn_gives_the_same() -> None:
    """Step after step: the hooks that observe the teacher are another set every time."""
    plain, compiled = taught(), taught()
    compiled.compile(backend="aot_eager")
    for step in (1, 2):
        wanted, found = plain(batch(step=step)), compiled(batch(step=step))
        wanted["loss"].backward()
        found["loss"].backward()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value)
    for mine, its in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(its.grad, mine.grad, rtol=1e-3, atol=1e-5)
