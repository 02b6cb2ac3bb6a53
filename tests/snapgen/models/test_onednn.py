"""Linear layers through oneDNN: the same numbers, gradients and graphs as torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen.models import onednn
from snapgen.models.onednn import Linear, Pointwise, product

needs_onednn = pytest.mark.skipif(not onednn.PRESENT, reason="torch was built without MKL or oneDNN")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def through_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every product is worth while; the list grows with each that goes through oneDNN."""
    calls: list[int] = []
    original = onednn._through_onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(x.numel() * len(weight))
        return original(x, weight, bias)

    monkeypatch.setattr(onednn, "WORTHWHILE", 0)
    monkeypatch.setattr(onednn, "_through_onednn", counted)
    return calls


def _gradients(layer: nn.Module, x: Tensor, direction: Tensor | None) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = layer(leaf)
    (out.sum() if direction is None else (out * direction).sum()).backward()
    found = [out.detach(), leaf.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return found


@needs_onednn
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("outside", [6, 30])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_outputs_and_gradients_are_torchs(
    shape: tuple[int, ...], outside: int, bias: bool, summed: bool, through_onednn: list[int]
) -> None:
    ours = Linear(7, outside, bias=bias)
    theirs = nn.Linear(7, outside, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, direction = torch.randn(shape), None if summed else torch.randn(*shape[:-1], outside)
    for found, wanted in zip(_gradients(ours, x, direction), _gradients(theirs, x, direction), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert len(through_onednn) == 3


@needs_onednn
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_pointwise_convolution_is_torchs_and_stays_channels_last(
    layout: torch.memory_format, through_onednn: list[int]
) -> None:
    ours = Pointwise(8, 6).to(memory_format=layout)
    theirs = nn.Conv2d(8, 6, 1)
    theirs.load_state_dict(ours.state_dict())
    x, direction = torch.randn(2, 8, 3, 5).contiguous(memory_format=layout), torch.randn(2, 6, 3, 5)
    for found, wanted in zip(_gradients(ours, x, direction), _gradients(theirs, x, direction), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    with torch.inference_mode():
        assert ours(x).is_contiguous(memory_format=torch.channels_last)
    assert len(through_onednn) == 4


@needs_onednn
def test_a_gradient_has_a_gradient(through_onednn: list[int]) -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    found, wanted = [], []
    for of, into in ((product, found), (F.linear, wanted)):
        (first,) = torch.autograd.grad(of(x, weight, bias).square().sum(), x, create_graph=True)
        into += torch.autograd.grad(first.square().sum(), (x, weight, bias))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert len(through_onednn) > 3


@needs_onednn
def test_no_gradient_is_made_that_nobody_needs(through_onednn: list[int]) -> None:
    layer = Linear(4, 4).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert len(through_onednn) == 2
    assert layer.weight.grad is None


@needs_onednn
def test_only_what_gains_goes_through_onednn(through_onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(8, 8), torch.randn(2, 8)
    assert layer(x[0]).shape == (8,)
    with pytest.raises(RuntimeError, match="dtype"):
        layer.to(torch.bfloat16)(x)
    layer.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert Linear(8, 8).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        assert Linear(8, 8)(torch.empty(2, 8)).is_meta
    monkeypatch.setattr(onednn, "WORTHWHILE", 2 * 8 * 8 + 1)
    layer(x)
    assert not through_onednn
    monkeypatch.setattr(onednn, "WORTHWHILE", 2 * 8 * 8)
    layer(x)
    assert through_onednn


def test_an_exported_layer_is_torchs_own(through_onednn: list[int]) -> None:
    with torch.no_grad():
        program = torch.export.export(
            nn.Sequential(Pointwise(4, 3), nn.Flatten(2), Linear(6, 5)), (torch.ones(1, 4, 2, 3),)
        )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv2d.default", "aten.flatten.using_ints", "aten.linear.default"]
    torch.jit.trace(Linear(4, 3), (torch.ones(2, 4),), check_trace=False)
    assert not through_onednn
