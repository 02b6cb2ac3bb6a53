"""Tests of the variance-preserving process, and of the interface that it shares with rectified flow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from snapgen.diffusion import process, variance_preserving

NOW, NEXT, END = 0.001, 0.0, variance_preserving.DATA
"""Timesteps of `simple`: (α, σ) = (0.6, 0.8), (0.8, 0.6) and (1, 0)."""


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedule of two timesteps, simple enough for calculation by hand."""
    monkeypatch.setattr(variance_preserving, "_schedule", lambda _: torch.tensor([[1, 0.8, 0.6], [0, 0.6, 0.8]]))


def one(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), float(value))


def at(t: float) -> Tensor:
    return torch.tensor([t])


def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    mixed = torch.einsum("ij,bjhw->bihw", torch.tensor([[0.2, -0.3], [0.4, 0.1]]), x).tanh()
    offset = 0 if context is None else context.mean((1, 2)).view(-1, 1, 1, 1)
    return mixed * (1 + t.view(-1, 1, 1, 1)) + offset


def noise(count: int = 3) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))


# --- the formulas ---


def test_the_schedule_is_sd15s() -> None:
    """β grows evenly in its square root from 0.00085 to 0.012; ᾱ is the product of 1 − β."""
    second = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) / 999) ** 2
    alphas_cumprod = [1, 1 - 0.00085, (1 - 0.00085) * (1 - second)]
    alpha, sigma = variance_preserving.alpha_sigma(torch.tensor([variance_preserving.DATA, 0, 0.001]), noise())
    torch.testing.assert_close(alpha.flatten(), torch.tensor(alphas_cumprod).sqrt())
    torch.testing.assert_close(sigma.flatten(), (1 - torch.tensor(alphas_cumprod, dtype=torch.float64)).sqrt().float())
    alpha, sigma = variance_preserving.alpha_sigma(torch.tensor([0.5, 0.999]), noise())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2, 1, 1, 1))
    assert alpha.flatten()[1].square().item() == pytest.approx(0.00466, abs=1e-5)  # SD does not end in pure noise


@pytest.mark.usefixtures("simple")
def test_noise_and_predictions_by_hand() -> None:
    """x = 2, ε = 1: z = 0.8·2 + 0.6·1 = 2.2, v = 0.8·1 − 0.6·2 = −0.4."""
    z = variance_preserving.add_noise(one(2), one(1), at(NEXT))
    v = variance_preserving.target(one(2), one(1), at(NEXT), "v")
    torch.testing.assert_close((z, v), (one(2.2), one(-0.4)))
    torch.testing.assert_close(variance_preserving.target(one(2), one(1), at(NEXT), "noise"), one(1))
    torch.testing.assert_close(variance_preserving.predict_x0(v, z, at(NEXT), "v"), one(2))  # 0.8·2.2 + 0.6·0.4
    torch.testing.assert_close(
        variance_preserving.predict_x0(one(1), z, at(NEXT), "noise"), one(2)
    )  # (2.2 − 0.6) / 0.8


@pytest.mark.usefixtures("simple")
def test_a_ddim_step_by_hand() -> None:
    """z = 2 and x̂ = 1 at (0.6, 0.8): ε̂ = (2 − 0.6) / 0.8 = 1.75, z' = 0.8 + 0.6·1.75 = 1.85; at the data z' = x̂."""
    torch.testing.assert_close(variance_preserving.ddim_step(one(2), one(1), at(NOW), at(NEXT)), one(1.85))
    torch.testing.assert_close(variance_preserving.ddim_step(one(2), one(1), at(NOW), at(END)), one(1))


def test_the_loss_is_the_squared_error_of_v() -> None:
    """The loss of a net that outputs 0 is the mean of (α·ε − σ·x)²."""
    data, eps, t = noise(), noise().flip(0), torch.tensor([0.0, 0.3, 0.9])
    alpha, sigma = variance_preserving.alpha_sigma(t, data)
    losses = process.make_process("v").losses(lambda x, *_: torch.zeros_like(x), data, eps, t, None)
    torch.testing.assert_close(losses, (alpha * eps - sigma * data).square().mean((1, 2, 3)))


def test_guidance_is_the_papers() -> None:
    """ṽ = 3·v(z, c) − 2·v(z, ∅)."""
    z, t, context = noise(), torch.tensor([0.1, 0.5, 0.9]), torch.linspace(-1, 1, 24).view(3, 2, 4)
    expected = 3 * net(z, t, context) - 2 * net(z, t, torch.zeros_like(context))
    torch.testing.assert_close(process.make_process("v").predict_guided(net, z, t, context, 3), expected)
    assert torch.equal(process.make_process("v").predict_guided(net, z, t, context, 1), net(z, t, context))


# --- sampling ---


def test_the_timesteps_of_half_the_steps_are_among_them() -> None:
    assert (1000 * variance_preserving.ddim_timesteps(8)).round().tolist() == [
        999,
        874,
        749,
        624,
        499,
        374,
        249,
        124,
        -1,
    ]
    for steps in (2, 8, 16, 25, 500):
        assert torch.equal(
            variance_preserving.ddim_timesteps(2 * steps)[::2], variance_preserving.ddim_timesteps(steps)
        )


def by_diffusers(scheduler: object, steps: int, start: Tensor, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    z = start
    for t in scheduler.timesteps:  # type: ignore[attr-defined]
        z = scheduler.step(predict(z, (t / 1000).expand(len(z))), t, z, return_dict=False)[0]  # type: ignore[attr-defined]
    return z


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("prediction", "diffusers_name"), [("v", "v_prediction"), ("noise", "epsilon")])
def test_it_samples_as_diffusers_ddim(
    prediction: variance_preserving.DiffusionPredictionType, diffusers_name: str, guidance: float
) -> None:
    context = torch.linspace(-0.1, 0.1, 24).view(3, 2, 4)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        return process.make_process("v").predict_guided(net, z, t, context, guidance)

    ddim = DDIMScheduler(
        **variance_preserving.SCHEDULE, clip_sample=False, timestep_spacing="trailing", prediction_type=diffusers_name
    )
    for steps in (8, 20):  # divisors of 1000, as DDIMScheduler requires
        samples = process.make_process(prediction).sample(net, noise(), context, steps=steps, guidance=guidance)
        torch.testing.assert_close(
            samples, by_diffusers(ddim, steps, noise(), predict), rtol=1e-5, atol=1e-5 * samples.std()
        )
    for steps in (8, 16, 28, 32):
        samples = process.make_process(prediction).sample(net, noise(), context, steps=steps, guidance=guidance)
        expected = by_diffusers(variance_preserving.scheduler(prediction), steps, noise(), predict)
        torch.testing.assert_close(samples, expected, rtol=1e-5, atol=1e-5 * float(samples.std()))


def test_sampling_with_a_perfect_net_ends_in_the_data() -> None:
    data = noise().flip(0)

    def perfect_net(z: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        alpha, sigma = variance_preserving.alpha_sigma(t, z)
        return (alpha * z - data) / sigma

    torch.testing.assert_close(
        process.make_process("v").sample(perfect_net, noise(), None, steps=4), data, rtol=1e-4, atol=1e-4
    )


# --- the common interface ---


@pytest.mark.parametrize("prediction", process.PREDICTION_TYPES)
def test_validation_losses_do_not_depend_on_the_batch(prediction: process.PredictionType) -> None:
    data = noise(10)
    losses = [
        process.make_process(prediction).validation_losses(net, data, None, seed=3, batch=batch) for batch in (3, 10)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0].shape == (10,)


def test_training_draws_sds_integers_evenly() -> None:
    quantiles = (torch.arange(5000) + 0.5) / 5000
    indices = (1000 * process.make_process("v").timestep_quantiles(quantiles)).round().long()
    assert torch.equal(indices.bincount(), torch.full((1000,), 5))


@pytest.mark.parametrize("prediction", ["v", "noise"])
def test_sampling_by_the_exported_formulas_equals_sample(
    prediction: variance_preserving.DiffusionPredictionType,
) -> None:
    """Evaluate the formulas of an exported pipeline's JSON."""
    diffusion = process.make_process(prediction)
    spec, x = diffusion.export_spec(diffusion.scheduler(), 16), noise()
    x0_formula = spec["each step"].split("; ")[1].removeprefix("d = ")
    for i, t in enumerate(spec["times"]):
        names = {"x": x, "v": net(x, torch.full((len(x),), t), None), "i": i, **spec}
        d = eval(" ".join(x0_formula.replace("] ", "] * ").split()), names)
        e = (x - spec["alphas"][i] * d) / spec["sigmas"][i]
        x = spec["alphas"][i + 1] * d + spec["sigmas"][i + 1] * e
    expected = diffusion.sample(net, noise(), None, steps=16)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
