from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from snapgen.objectives.knowledge_distillation import FeatureProjector, data_weight, timestep_aware_loss

PEAK = 1.5957691216  # of the logit-normal(0, 1)'s density, 4 / √(2π)


def density(t: float) -> float:
    """Of the logit-normal(0, 1), as it stands in the books."""
    logit = math.log(t / (1 - t))
    return math.exp(-(logit**2) / 2) / (math.sqrt(2 * math.pi) * t * (1 - t))


@pytest.mark.parametrize("t", [0.02, 0.1, 0.25, 0.5, 0.7, 0.99])
def test_the_data_leads_as_the_timesteps_density_says(t: float) -> None:
    assert data_weight(torch.tensor([t])).item() == pytest.approx(density(t) / PEAK, rel=1e-4)


def test_the_teacher_leads_alone_at_both_ends_and_the_data_in_the_middle() -> None:
    assert torch.equal(data_weight(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.0, 1.0, 0.0]))
    assert data_weight(torch.linspace(0, 1, 999)).max() == data_weight(torch.tensor([0.5]))


def test_a_case_by_hand() -> None:
    """At t = 1/4 α = exp(−ln²3 / 2) · 4/3; the teacher's part 3 counts as the task's 2, its gradient as 2/3 of it."""
    alpha = math.exp(-(math.log(3) ** 2) / 2) * 4 / 3
    task = torch.tensor([2.0], requires_grad=True)
    kd = torch.tensor([3.0], requires_grad=True)
    total = timestep_aware_loss(task, kd, torch.tensor([0.25]))
    assert total.item() == pytest.approx(2)
    total.sum().backward()
    assert task.grad is not None
    assert kd.grad is not None
    assert task.grad.item() == pytest.approx(alpha)
    assert kd.grad.item() == pytest.approx((1 - alpha) * 2 / 3)


def test_no_gradient_flows_through_the_ratio() -> None:
    """∇S = α·∇task + (1 − α)·ratio·∇kd in a weight that both depend on, an image by itself."""
    t = torch.tensor([0.1, 0.5, 0.9])
    weight = torch.tensor([1.5, -0.5, 2.0], requires_grad=True)

    def losses() -> tuple[Tensor, Tensor]:
        return (weight - 1).square() + 0.1, (2 * weight + 1).square()

    task, kd = losses()
    (of_task,) = torch.autograd.grad(task.sum(), weight)
    (of_kd,) = torch.autograd.grad(losses()[1].sum(), weight)
    (found,) = torch.autograd.grad(timestep_aware_loss(*losses(), t).sum(), weight)
    alpha, ratio = data_weight(t), (task / kd.clamp(min=1e-12)).detach()
    torch.testing.assert_close(found, alpha * of_task + (1 - alpha) * ratio * of_kd)


def test_a_student_that_equals_its_teacher_is_safe() -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    timestep_aware_loss(weight.square(), (weight - 1).square(), torch.tensor([0.2])).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(2 * data_weight(torch.tensor([0.2])).item())


def test_the_projector_bridges_the_papers_grids_and_widths() -> None:
    with torch.device("meta"):
        tokens = FeatureProjector(256, 2432, 2)(torch.empty(1, 256, 128, 128))
    assert tokens.shape == (1, 2432, 64, 64)
    assert [layer.stride for layer in FeatureProjector(4, 6, 2) if isinstance(layer, torch.nn.Conv2d)] == [
        (2, 2),
        (1, 1),
    ]


def test_a_projector_begins_from_its_seed_alone() -> None:
    torch.manual_seed(1)
    one, other = FeatureProjector(4, 6, 2, seed=3), FeatureProjector(4, 6, 2, seed=3)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one[0].weight, FeatureProjector(4, 6, 2, seed=4)[0].weight)
    assert torch.equal(torch.get_rng_state(), state)
