from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from snapgen.optim import muon
from snapgen.optim.config import OptimizerConfig, build_optimizers
from snapgen.optim.ema import EMA, ema_gamma
from snapgen.optim.optimizers import OptimizerGroup
from snapgen.optim.schedule import lr_scale


class Net(nn.Module):
    """Small and convolutional, with every kind of weight; scales with the caption."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.enter = nn.Conv2d(2, 32, 3, padding=1)
            self.middle = nn.Conv2d(32, 32, 3, padding=1)
            self.context = nn.Linear(4, 32)
            self.leave = nn.Conv2d(32, 2, 1)
            nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        h = self.enter(x) + self.context(context.mean(1))[:, :, None, None] + t.view(-1, 1, 1, 1)
        return self.leave(torch.relu(self.middle(torch.relu(h))))


CONFIG = OptimizerConfig(learning_rate=3e-3)


def test_rate_rises_and_falls_to_zero() -> None:
    settings = OptimizerConfig(warmup_fraction=0.1, lr_schedule="linear")
    rates = [lr_scale(step, settings, 100) for step in range(1, 101)]
    assert max(rates) == rates[10] == 1
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert lr_scale(100, settings.model_copy(update={"lr_schedule": "constant"}), 100) == 1
    assert 0 < lr_scale(100, settings.model_copy(update={"lr_schedule": "cosine"}), 100) < 0.01
    assert lr_scale(1, settings.model_copy(update={"warmup_fraction": 0.0}), 100) == 1


def test_average_has_the_width_it_promises() -> None:
    """Averaging the step number itself shows the weights' spread: σ_rel of the run."""
    width, steps = 0.1, 4000
    module = nn.Linear(1, 1, bias=False)
    first, second = EMA(module, width), nn.Linear(1, 1, bias=False)
    squares = EMA(second, width)
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.weight.fill_(step / steps)
            second.weight.fill_((step / steps) ** 2)
        first.update(step)
        squares.update(step)
    mean, square = float(first.state()["weight"]), float(squares.state()["weight"])
    assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=0.02)
    assert ema_gamma(0.1) == pytest.approx(6.94, abs=0.01)  # EDM2, section 3.1


def moved_by_muon(weights: torch.memory_format, gradient: torch.memory_format) -> tuple[Tensor, Tensor]:
    """How far one step moves the kernel inside, and the gradient it moved along; both as matrices."""
    net = Net().to(memory_format=weights)  # type: ignore[call-overload]
    before = net.middle.weight.detach().clone()
    optimizers = OptimizerGroup(net, kind="muon", learning_rate=0.01, beta2=0.99, weight_decay=0.0, clip=1e9)
    generator = torch.Generator().manual_seed(0)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
        if param.ndim == 4:
            param.grad = param.grad.to(memory_format=gradient)
    along = net.middle.weight.grad
    assert along is not None
    optimizers.step(1.0)
    assert all(param.grad is None for param in net.parameters())
    return (net.middle.weight.detach() - before).flatten(1), along.flatten(1)


def test_muon_steps_are_orthogonal_and_of_adamws_size() -> None:
    moved, along = moved_by_muon(torch.contiguous_format, torch.contiguous_format)
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=0.2)
    singular = torch.linalg.svdvals(moved)
    assert float(singular.max() / singular.min()) < 3
    assert float((moved * along).sum()) < 0


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradient", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_either_layout(weights: torch.memory_format, gradient: torch.memory_format) -> None:
    expected, _ = moved_by_muon(torch.contiguous_format, torch.contiguous_format)
    torch.testing.assert_close(moved_by_muon(weights, gradient)[0], expected, rtol=1e-3, atol=1e-6)


def test_weight_decay_spares_vectors() -> None:
    net = Net()
    before = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    optimizers = OptimizerGroup(net, kind="adamw", learning_rate=0.1, beta2=0.99, weight_decay=0.5, clip=1)
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizers.step(1.0)
    assert torch.equal(net.enter.bias, before["enter.bias"])
    torch.testing.assert_close(net.enter.weight.detach(), before["enter.weight"] * 0.95)


def test_wide_matrices_are_made_orthogonal_in_their_gram_matrix_alike() -> None:
    wide = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0)) / 40
    torch.testing.assert_close(muon._iterate_gram(wide @ wide.mT) @ wide, muon._iterate(wide), rtol=1e-4, atol=1e-5)
    singular = torch.linalg.svdvals(muon.orthogonal(wide))
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3


@pytest.mark.parametrize("shape", [(5, 96, 96), (7, 24, 64)])
def test_matrices_iterated_in_parts_are_those_iterated_together(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    """To the last bit: how many matrices share a batch is a matter of speed."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    together = muon.orthogonal(matrices)
    monkeypatch.setattr(muon, "GRAM_CHUNK_SIZE", 2 * shape[1] ** 2)
    assert torch.equal(muon.orthogonal(matrices), together)


def backward(net: Net, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x, t = torch.randn(8, 2, 4, 4, generator=generator), torch.rand(8, generator=generator)
    net(x, t, torch.randn(8, 3, 4, generator=generator)).square().mean().backward()


def stirred_net() -> Net:
    net = Net().to(memory_format=torch.channels_last)
    torch.nn.init.normal_(net.leave.weight, generator=torch.Generator().manual_seed(1))
    return net


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers_go_on_from_their_state_to_the_bit(optimizer: str) -> None:
    settings = CONFIG.model_copy(update={"optimizer": optimizer})
    whole, first, second = stirred_net(), stirred_net(), stirred_net()
    unbroken, before = build_optimizers(whole, settings), build_optimizers(first, settings)
    for step in range(6):
        for net, optimizers in [(whole, unbroken)] + ([(first, before)] if step < 3 else []):
            backward(net, step)
            optimizers.step(1)
    second.load_state_dict({name: tensor.contiguous().clone() for name, tensor in first.state_dict().items()})
    after = build_optimizers(second, settings)
    after.load({name: tensor.contiguous().clone() for name, tensor in before.state().items()})
    for step in range(3, 6):
        backward(second, step)
        after.step(1)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_gradient_changes_nothing(optimizer: str) -> None:
    net = stirred_net()
    optimizers = build_optimizers(net, CONFIG.model_copy(update={"optimizer": optimizer}))
    backward(net, 0)
    assert optimizers.step(1, skip_nonfinite=True).isfinite()
    weights, state = ([t.clone() for t in ts] for ts in (net.parameters(), optimizers.state().values()))
    backward(net, 1)
    assert net.middle.weight.grad is not None
    net.middle.weight.grad[0, 0, 0, 0] = float("nan")
    assert not optimizers.step(1, skip_nonfinite=True).isfinite()
    assert all(map(torch.equal, weights, net.parameters()))
    assert all(map(torch.equal, state, optimizers.state().values()))
    backward(net, 1)
    optimizers.step(1, skip_nonfinite=True)
    assert not torch.equal(weights[0], net.enter.weight)
