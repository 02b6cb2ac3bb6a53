"""Tests that CUDA and the CPU agree; each also runs on the CPU alone, which verifies the test itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import make_process
from snapgen.objectives.flow_matching import FlowMatchingObjective
from snapgen.optim.muon import Muon, orthogonal
from snapgen.optim.optimizers import OptimizerGroup
from snapgen.training.loop import Trainer
from snapgen.training.stages import FlowMatchingStage
from tests.snapgen import lessons
from tests.snapgen.nets import inputs, stirred, tiny

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_both = pytest.mark.parametrize("device", DEVICES)
DESIGNS = {
    "plain": {},
    "rope and norms": {"rope": True, "qk_norm": True, "all.num_kv_heads": 1},
    "separable": {"all.conv": "separable", "all.expansion": 2},
}


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.backends.cudnn.allow_tf32 = False


@on_both
@pytest.mark.parametrize("design", DESIGNS)
def test_a_net_says_and_learns_the_same(design: str, device: str) -> None:
    net = stirred(tiny(DESIGNS[design]))
    other = copy.deepcopy(net).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sample, t, context = inputs(net.arch)
    wanted, found = net(sample, t, context), other(sample.to(device), t.to(device), context.to(device))
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)
    for output in (wanted, found):
        torch.autograd.backward(output.square().mean())
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        torch.testing.assert_close(two.grad.cpu(), one.grad, rtol=1e-2, atol=1e-3)


@on_both
def test_nothing_in_a_pass_is_copied_from_the_host(device: str) -> None:
    """A copy from the host's memory waits, and forbids CUDA graphs."""
    net = stirred(tiny(DESIGNS["rope and norms"])).to(device)
    given = [tensor.to(device) for tensor in inputs(net.arch)]
    net(*given)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        out = net(*given)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()


@on_both
def test_orthogonal_matrices_are_nearly_so(device: str) -> None:
    """Runs on CUDA in bfloat16."""
    matrices = torch.randn(3, 24, 96, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices.to(device)).float().cpu())
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


@on_both
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bad_gradient_changes_nothing(kind: str, device: str) -> None:
    net = stirred(tiny()).to(device)
    optimizers = OptimizerGroup(net, kind=kind, learning_rate=1e-2, beta2=0.99, weight_decay=0.01, clip=1)  # type: ignore[arg-type]
    before = copy.deepcopy(net.state_dict())
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizers.step(1.0, skip_nonfinite=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1.0, skip_nonfinite=True)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())


@on_both
def test_muons_state_comes_back(device: str) -> None:
    weight = torch.nn.Parameter(torch.randn(32, 48, device=device))
    optimizer = Muon([weight], lr=1e-2)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["momentum"].device == weight.device


@on_both
def test_a_loop_goes_on_from_its_checkpoint(device: str) -> None:
    def new() -> Trainer:
        accelerator = Accelerator(cpu=device == "cpu")
        stage = FlowMatchingStage(name="some", resolution=8, batch_size=8, num_images=32, learning_rate=3e-3)
        student = lessons.student().to(device)
        objectives = {"student": FlowMatchingObjective(student, prediction="preconditioned")}
        return Trainer(stage, student, objectives, lessons.feed(device=torch.device(device)), accelerator=accelerator)

    def run(loop: Trainer, parts: list[object] | None = None) -> dict[str, Tensor]:
        def pause() -> None:
            if parts is not None and loop.step == 2:
                parts.append(copy.deepcopy(loop.state()))

        loop.run(report=lambda _: None, should_pause=lambda step: step == 2, pause=pause)
        return loop.ema.state()

    parts: list[object] = []
    whole = run(new(), parts)
    again = new()
    again.load(parts[0], 2)  # type: ignore[arg-type]
    found = run(again)
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@on_both
@pytest.mark.parametrize("prediction", ["preconditioned", "v"])
def test_samples_are_the_same(prediction: str, device: str) -> None:
    net = stirred(tiny())
    other = copy.deepcopy(net).to(device)
    noise = rectified_flow.per_image_noise(range(2), (net.arch.latent_channels, 4, 4), seed=0)
    context = inputs(net.arch)[2]
    with torch.no_grad():
        wanted = make_process(prediction).sample(net, noise, context, steps=4, guidance=2)  # type: ignore[arg-type]
        found = make_process(prediction).sample(other, noise.to(device), context.to(device), steps=4, guidance=2)  # type: ignore[arg-type]
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-2, atol=1e-2)
