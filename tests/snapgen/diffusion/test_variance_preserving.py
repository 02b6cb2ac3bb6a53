from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from snapgen.diffusion import process, rectified_flow, variance_preserving

NOW, NEXT, END = 0.001, 0.0, variance_preserving.DATA
"""Timesteps of `simple`: (α, σ) = (0.6, 0.8), (0.8, 0.6) and (1, 0)."""


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of two timesteps whose numbers can be reckoned by hand."""
    monkeypatch.setattr(variance_preserving, "_schedule", lambda _: torch.tensor([[1, 0.8, 0.6], [0, 0.6, 0.8]]))


def one(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), float(value))


def at(t: float) -> Tensor:
    return torch.tensor([t])


def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    mixed = torch.einsum("ij,bjhw->bihw", torch.tensor([[0.2, -0.3], [0.4, 0.1]]), x).tanh()
    told = 0 if context is None else context.mean((1, 2)).view(-1, 1, 1, 1)
    return mixed * (1 + t.view(-1, 1, 1, 1)) + told


def noise(count: int = 3) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))


# --- the formulas ---


def test_the_schedule_is_sd15s() -> None:
    """β grows evenly in its square root from 0.00085 to 0.012; ᾱ is the product of 1 − β."""
    second = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) / 999) ** 2
    kept = [1, 1 - 0.00085, (1 - 0.00085) * (1 - second)]
    alpha, sigma = variance_preserving.alpha_sigma(torch.tensor([variance_preserving.DATA, 0, 0.001]), noise())
    torch.testing.assert_close(alpha.flatten(), torch.tensor(kept).sqrt())
    torch.testing.assert_close(sigma.flatten(), (1 - torch.tensor(kept, dtype=torch.float64)).sqrt().float())
    alpha, sigma = variance_preserving.alpha_sigma(torch.tensor([0.5, 0.999]), noise())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2, 1, 1, 1))
    assert alpha.flatten()[1].square().item() == pytest.approx(0.00466, abs=1e-5)  # SD's is not noise alone


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
    """A net that says 0 at α, σ gets the mean of (α·ε − σ·x)²."""
    data, some, t = noise(), noise().flip(0), torch.tensor([0.0, 0.3, 0.9])
    alpha, sigma = variance_preserving.alpha_sigma(t, data)
    found = process.make_process("v").losses(lambda x, *_: torch.zeros_like(x), data, some, t, None)
    torch.testing.assert_close(found, (alpha * some - sigma * data).square().mean((1, 2, 3)))


def test_guidance_is_the_papers() -> None:
    """ṽ = 3·v(z, c) − 2·v(z, ∅)."""
    z, t, context = noise(), torch.tensor([0.1, 0.5, 0.9]), torch.linspace(-1, 1, 24).view(3, 2, 4)
    wanted = 3 * net(z, t, context) - 2 * net(z, t, torch.zeros_like(context))
    torch.testing.assert_close(variance_preserving.apply_cfg(net, z, t, context, 3), wanted)
    assert torch.equal(variance_preserving.apply_cfg(net, z, t, context, 1), net(z, t, context))


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


def by_diffusers(scheduler: object, steps: int, start: Tensor, said: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    z = start
    for t in scheduler.timesteps:  # type: ignore[attr-defined]
        z = scheduler.step(said(z, (t / 1000).expand(len(z))), t, z, return_dict=False)[0]  # type: ignore[attr-defined]
    return z


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("prediction", "theirs"), [("v", "v_prediction"), ("noise", "epsilon")])
def test_it_samples_as_diffusers_ddim(
    prediction: variance_preserving.DiffusionPredictionType, theirs: str, guidance: float
) -> None:
    context = torch.linspace(-0.1, 0.1, 24).view(3, 2, 4)

    def said(z: Tensor, t: Tensor) -> Tensor:
        return variance_preserving.apply_cfg(net, z, t, context, guidance)

    ddim = DDIMScheduler(
        **variance_preserving.SCHEDULE, clip_sample=False, timestep_spacing="trailing", prediction_type=theirs
    )
    for steps in (8, 20):  # which divide 1000, as theirs needs
        ours = variance_preserving.sample(net, noise(), context, steps=steps, guidance=guidance, prediction=prediction)
        torch.testing.assert_close(ours, by_diffusers(ddim, steps, noise(), said), rtol=1e-5, atol=1e-5 * ours.std())
    for steps in (8, 16, 28, 32):
        ours = variance_preserving.sample(net, noise(), context, steps=steps, guidance=guidance, prediction=prediction)
        theirs_too = by_diffusers(variance_preserving.scheduler(prediction), steps, noise(), said)
        torch.testing.assert_close(ours, theirs_too, rtol=1e-5, atol=1e-5 * float(ours.std()))


def test_a_net_that_knows_the_data_ends_there() -> None:
    data = noise().flip(0)

    def knows(z: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        alpha, sigma = variance_preserving.alpha_sigma(t, z)
        return (alpha * z - data) / sigma

    torch.testing.assert_close(variance_preserving.sample(knows, noise(), None, steps=4), data, rtol=1e-4, atol=1e-4)


# --- behind the processes' one face ---


@pytest.mark.parametrize("prediction", process.PREDICTION_TYPES)
def test_validation_losses_do_not_depend_on_the_batch(prediction: process.PredictionType) -> None:
    data = noise(10)
    found = [
        process.make_process(prediction).validation_losses(net, data, None, seed=3, batch=batch) for batch in (3, 10)
    ]
    torch.testing.assert_close(found[0], found[1])
    assert found[0].shape == (10,)


@pytest.mark.parametrize("prediction", rectified_flow.FLOW_PREDICTION_TYPES)
def test_rectified_flow_is_what_it_was(prediction: rectified_flow.FlowPredictionType) -> None:
    data, context = noise(6), torch.linspace(-0.1, 0.1, 48).view(6, 2, 4)
    found = process.make_process(prediction, shift=3)
    options = {"prediction": prediction, "shift": 3}
    assert torch.equal(
        found.validation_losses(net, data, context, seed=1),
        rectified_flow.validation_losses(net, data, context, seed=1, **options),
    )
    assert torch.equal(
        found.sample(net, data, context, steps=3, guidance=2),
        rectified_flow.sample(net, data, context, steps=3, guidance=2, **options),
    )


def test_training_draws_sds_integers_evenly() -> None:
    quantiles = (torch.arange(5000) + 0.5) / 5000
    found = (1000 * process.make_process("v").times(quantiles)).round().long()
    assert torch.equal(found.bincount(), torch.full((1000,), 5))


@pytest.mark.parametrize("prediction", ["v", "noise"])
def test_the_formulas_for_other_readers_sample_as_we_do(
    prediction: variance_preserving.DiffusionPredictionType,
) -> None:
    """What an exported pipeline's JSON says, followed word for word."""
    found = process.make_process(prediction)
    told, x = found.described(found.scheduler(), 16), noise()
    clean = told["each step"].split("; ")[1].removeprefix("d = ")
    for i, t in enumerate(told["times"]):
        names = {"x": x, "v": net(x, torch.full((len(x),), t), None), "i": i, **told}
        d = eval(" ".join(clean.replace("] ", "] * ").split()), names)
        e = (x - told["alphas"][i] * d) / told["sigmas"][i]
        x = told["alphas"][i + 1] * d + told["sigmas"][i + 1] * e
    expected = variance_preserving.sample(net, noise(), None, steps=16, prediction=prediction)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
