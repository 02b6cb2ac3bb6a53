"""All ablation rows and both final designs train: small ones in fp32, bf16 and compiled, the finals at full size.

The compiled ones go through torch.compile's own tracing of the forward and the backward pass ("aot_eager"); that the
graphs become fast code is Inductor's work. Its C++ takes minutes a row, so two rows of the slow tests see to it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from snapgen.architecture import presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.models.unet import UNet
from tests.archsearch.cost.test_counter import ROWS
from tests.snapgen.nets import inputs, stirred

SMALL: dict[str, Any] = {  # few and narrow blocks of every kind in every level
    "latent_channels": 3,
    "context_dim": 12,
    "norm_groups": 4,
    "time.embed_dim": 8,
    "time.hidden_dim": 16,
    "all.head_dim": 8,
    "all.transformer_depth": 1,
    "levels[0].channels": 8,
    "levels[1].channels": 16,
    "levels[2].channels": 24,
    "levels[0:3].num_res_blocks": 1,
    "levels[1:3].num_transformers": 1,
    "mid.num_res_blocks": 1,
}
LATER: list[tuple[str, dict[str, Any]]] = [
    ("6", {"qk_norm": True, "rope": True}),
    ("snapgen-imagenet", {"time.projection": "output"}),
    ("snapgen-t2i", {"context_dim": 20}),
]


def _twins() -> dict[str, Architecture]:
    """Each row of the ablation on top of the one before, from a small baseline."""
    twins: dict[str, Architecture] = {}
    arch = apply_overrides(presets.preset("snapgen-baseline"), SMALL)
    for name, changes in [*((row[0], row[1]) for row in ROWS), *LATER]:
        arch = twins[name] = apply_overrides(arch, changes)
    return twins


TWINS = _twins()


@pytest.fixture(params=TWINS.values(), ids=TWINS)
def twin(request: pytest.FixtureRequest) -> UNet:
    return stirred(request.param)


def test_each_row_is_another_net() -> None:
    assert len({arch.id for arch in TWINS.values()}) == len(TWINS) == 10


def test_the_last_twins_are_the_final_designs_small() -> None:
    for name in ("snapgen-imagenet", "snapgen-t2i"):
        small = apply_overrides(presets.preset(name), {**SMALL, "context_dim": TWINS[name].context_dim})
        small = apply_overrides(small, {"down[0].num_res_blocks": 0, "down[0].num_transformers": 2})
        assert TWINS[name].id == small.id


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_runs_forward_and_backward(twin: UNet, dtype: torch.dtype) -> None:
    out = _trained(twin.to(dtype), twin)
    assert out.dtype == dtype
    _check_gradients(twin)


def test_bf16_autocast_trains_fp32_weights(twin: UNet) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = _trained(twin, twin)
    assert out.isfinite().all()
    _check_gradients(twin)


@pytest.mark.slow
def test_compiled_it_computes_the_same(twin: UNet) -> None:
    fewer = {"levels[2].num_transformers": 0}  # the middle has their kind; tracing takes a second a transformer
    if twin.arch.down[0].num_transformers:
        fewer["down[0].num_transformers"] = 1
    _check_compiled(stirred(apply_overrides(twin.arch, fewer)), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0", "snapgen-imagenet"])  # the plainest, and the one with every choice in it
def test_compiled_to_code_it_computes_the_same(name: str) -> None:
    _check_compiled(stirred(TWINS[name]), "inductor")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params"), [("snapgen-imagenet", 372e6), ("snapgen-t2i", 379e6)])
def test_the_final_designs_train_at_full_size(name: str, params: float) -> None:
    net = UNet(presets.preset(name))
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(params, rel=0.005)
    with torch.no_grad():  # a branch that ends in zeros hands no gradient on
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(parameter.numel()))
    out = _trained(net, net, size=32, tokens=77, batch=1)
    assert out.shape == (1, 16, 32, 32)
    assert out.isfinite().all()
    _check_gradients(net)


def _trained(call: Any, net: UNet, **shape: int) -> Tensor:
    """The output of a forward pass whose backward pass has been run."""
    sample, timestep, context = inputs(net.arch, **{"size": 8, **shape})
    dtype = net.conv_in.weight.dtype
    out: Tensor = call(sample.to(dtype), timestep, context.to(dtype))
    out.float().square().mean().backward()
    return out.detach()


def _check_gradients(net: UNet) -> None:
    """Every parameter has a finite gradient that is not zero throughout."""
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def _check_compiled(net: UNet, backend: str) -> None:
    torch._dynamo.reset()  # nothing left of the row before: a compiled net keeps its guards and its memory
    expected = _trained(net, net)
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    torch.testing.assert_close(_trained(torch.compile(net, backend=backend, fullgraph=True), net), expected)
    _check_gradients(net)
    for name, parameter in net.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * scale)
