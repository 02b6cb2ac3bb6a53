"""Tests of rectified flow: timesteps, prediction types, validation losses and sampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import RectifiedFlow, VariancePreserving


def zero_net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    del t, context
    return torch.zeros_like(x)


def optimal(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    """E[v | x_t] for unit Gaussian data."""
    del context
    t = t.view(-1, 1, 1, 1)
    return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x


def test_interpolate_goes_from_data_to_noise() -> None:
    data, noise = torch.full((3, 2, 2, 2), 4.0), torch.full((3, 2, 2, 2), -4.0)
    path = rectified_flow.interpolate(data, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert path[:, 0, 0, 0].tolist() == [4.0, 2.0, -4.0]


def test_shift_is_sd3s() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert rectified_flow.shift_timesteps(t, 3).tolist() == pytest.approx([0, 0.5, 0.75, 1])
    assert torch.equal(rectified_flow.shift_timesteps(t, 1), t)


def test_timesteps_are_logit_normal_and_stratified() -> None:
    t = rectified_flow.logit_normal(rectified_flow.stratified(4096, torch.Generator().manual_seed(0)))
    logits = torch.logit(t).double()
    assert float(logits.mean()) == pytest.approx(0, abs=0.01)
    assert float(logits.std()) == pytest.approx(1, abs=0.01)
    u = rectified_flow.stratified(64, torch.Generator().manual_seed(1))
    assert sorted((u * 64).long().tolist()) == list(range(64))
    assert u.argsort().tolist() != list(range(64))


@pytest.mark.parametrize("prediction_type", rectified_flow.FLOW_PREDICTION_TYPES)
def test_a_perfect_net_has_the_same_loss_with_every_prediction_type(
    prediction_type: rectified_flow.FlowPredictionType,
) -> None:
    """The output that stands for the optimal velocity gives the optimal loss, whatever the prediction type."""

    def perfect_net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        t_map = t.view(-1, 1, 1, 1)
        if prediction_type == "velocity":
            return optimal(x, t, context)
        if prediction_type == "data":
            return x - optimal(x, t, context) * t_map
        return torch.zeros_like(x)  # optimal for unit Gaussian data

    generator = torch.Generator().manual_seed(2)
    data, noise = (torch.randn(2048, 1, 4, 4, generator=generator) for _ in range(2))
    t = torch.linspace(0.06, 0.99, 2048)
    losses = RectifiedFlow(prediction_type).losses(perfect_net, data, noise, t, None)
    expected = (1 / (t**2 + (1 - t) ** 2)).mean()
    assert float(losses.mean()) == pytest.approx(float(expected), rel=0.02)


def test_preconditioned_target_is_unit_and_uncorrelated_with_the_input() -> None:
    generator = torch.Generator().manual_seed(3)
    data, noise = (torch.randn(1, 1, 400, 400, generator=generator) for _ in range(2))
    for value in (0.02, 0.3, 0.5, 0.9):
        t = torch.tensor([value])
        x = rectified_flow.interpolate(data, noise, t)
        zero = rectified_flow.predict_velocity(zero_net, x, t, None, "preconditioned")
        one = rectified_flow.predict_velocity(lambda *x: zero_net(*x) + 1, x, t, None, "preconditioned")
        target = ((noise - data) - zero) / (one - zero)
        assert float(target.std()) == pytest.approx(1, abs=0.02)
        assert float((target * x).mean()) == pytest.approx(0, abs=0.02)


def test_noise_depends_on_the_image_only() -> None:
    together = rectified_flow.per_image_noise(range(8), (2, 4, 4), seed=5)
    separate = torch.cat([rectified_flow.per_image_noise([i], (2, 4, 4), seed=5) for i in (6, 1)])
    assert torch.equal(separate, together[[6, 1]])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, rectified_flow.per_image_noise(range(8), (2, 4, 4), seed=6))
    assert float(together.std()) == pytest.approx(1, abs=0.15)


def test_validation_losses_do_not_depend_on_the_batch() -> None:
    data = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    losses = RectifiedFlow().validation_losses(optimal, data, None, seed=0, batch=50)
    in_small_batches = RectifiedFlow().validation_losses(optimal, data, None, seed=0, batch=7)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, in_small_batches)
    assert not torch.allclose(losses, RectifiedFlow().validation_losses(optimal, data, None, seed=1))


def test_validation_times_cover_every_stratum_once() -> None:
    t = RectifiedFlow().validation_times(100, seed=0)
    quantiles = torch.special.ndtr(torch.logit(t))
    assert sorted((quantiles * 100).long().tolist()) == list(range(100))


def test_sampling_recovers_a_gaussian() -> None:
    """Integrating the exact velocity field of N(3, 0.5²) from noise gives samples of that distribution."""
    mean, std = 3.0, 0.5

    def field(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        del context
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean

    noise = torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    samples = RectifiedFlow().sample(field, noise, None, steps=200)
    assert float(samples.mean()) == pytest.approx(mean, abs=0.03)
    assert float(samples.std()) == pytest.approx(std, abs=0.03)
    shifted = RectifiedFlow(shift=3).sample(field, noise, None, steps=200)
    assert float(shifted.std()) == pytest.approx(std, abs=0.03)


def test_guidance_extrapolates_from_the_null_context() -> None:
    batch_sizes = []

    def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        del t
        assert context is not None
        batch_sizes.append(len(x))
        return torch.zeros_like(x) + context.sum((1, 2)).view(-1, 1, 1, 1)

    noise, context = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1)
    for guidance, expected in ((3, [-3, -6]), (1, [-1, -2])):
        samples = RectifiedFlow().sample(net, noise, context, steps=4, guidance=guidance)
        assert samples.flatten().tolist() == pytest.approx(expected)
    assert batch_sizes == [4] * 4 + [2] * 4


def test_guidance_extrapolates_from_the_null_captions_context_if_it_is_not_zeros() -> None:
    def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        del t
        assert context is not None
        return torch.zeros_like(x) + context.sum((1, 2)).view(-1, 1, 1, 1)

    noise, context = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1)
    null = torch.full((1, 1, 1), 0.5)
    for process in (RectifiedFlow(), VariancePreserving("v")):
        t = torch.ones(2)
        guided = process.predict_guided(net, noise, t, context, 3, null)
        assert guided.flatten().tolist() == pytest.approx([2, 5])  # 0.5 + 3 (c − 0.5)
    samples = RectifiedFlow().sample(net, noise, context, steps=4, guidance=3, null=null)
    assert samples.flatten().tolist() == pytest.approx([-2, -5])


def test_the_loss_of_a_zero_net_is_the_variance_of_its_target() -> None:
    data = torch.randn(512, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = RectifiedFlow().validation_losses(zero_net, data, None, seed=0)
    assert float(losses.mean()) == pytest.approx(1 + float(data.square().mean()), rel=0.01)  # E‖ε − x₀‖²
