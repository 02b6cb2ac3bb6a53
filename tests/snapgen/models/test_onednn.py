"""Layers that use oneDNN give the outputs, gradients and graphs of torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen.models import onednn
from snapgen.models.onednn import Depthwise, Linear, Pointwise, linear

needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="torch was built without MKL or oneDNN")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def through_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let every product use oneDNN; the list grows with each one that does."""
    calls: list[int] = []
    original = onednn._onednn_linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(x.numel() * len(weight))
        return original(x, weight, bias)

    monkeypatch.setattr(onednn, "MIN_MACS", 0)
    monkeypatch.setattr(onednn, "_onednn_linear", counted)
    return calls


def _gradients(layer: nn.Module, x: Tensor, direction: Tensor | None) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = layer(leaf)
    (out.sum() if direction is None else (out * direction).sum()).backward()
    results = [out.detach(), leaf.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return results


@needs_onednn
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("out_features", [6, 30])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_outputs_and_gradients_are_torchs(
    shape: tuple[int, ...], out_features: int, bias: bool, summed: bool, through_onednn: list[int]
) -> None:
    layer = Linear(7, out_features, bias=bias)
    reference = nn.Linear(7, out_features, bias=bias)
    reference.load_state_dict(layer.state_dict())
    x, direction = torch.randn(shape), None if summed else torch.randn(*shape[:-1], out_features)
    pairs = zip(_gradients(layer, x, direction), _gradients(reference, x, direction), strict=True)
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, **CLOSE)
    assert len(through_onednn) == 3


@needs_onednn
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_pointwise_convolution_is_torchs_and_stays_channels_last(
    layout: torch.memory_format, through_onednn: list[int]
) -> None:
    layer = Pointwise(8, 6).to(memory_format=layout)
    reference = nn.Conv2d(8, 6, 1)
    reference.load_state_dict(layer.state_dict())
    x, direction = torch.randn(2, 8, 3, 5).contiguous(memory_format=layout), torch.randn(2, 6, 3, 5)
    pairs = zip(_gradients(layer, x, direction), _gradients(reference, x, direction), strict=True)
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, **CLOSE)
    with torch.inference_mode():
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert len(through_onednn) == 4


@needs_onednn
def test_a_gradient_has_a_gradient(through_onednn: list[int]) -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    results, expected = [], []
    for function, gradients in ((linear, results), (F.linear, expected)):
        (first,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        gradients += torch.autograd.grad(first.square().sum(), (x, weight, bias))
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert len(through_onednn) > 3


@needs_onednn
def test_gradients_that_are_not_needed_are_not_computed(through_onednn: list[int]) -> None:
    layer = Linear(4, 4).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert len(through_onednn) == 2
    assert layer.weight.grad is None


@needs_onednn
def test_small_products_and_other_dtypes_use_torch(through_onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(onednn, "MIN_MACS", 2 * 8 * 8 + 1)
    layer(x)
    assert not through_onednn
    monkeypatch.setattr(onednn, "MIN_MACS", 2 * 8 * 8)
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


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (2, 5), (3, 3), (4, 4)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_of_a_small_map_is_torchs(size: tuple[int, int], stride: int) -> None:
    layer = Depthwise(16, stride)
    reference = nn.Conv2d(16, 16, 3, stride, 1, groups=16, bias=False)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(3, 16, *size).to(memory_format=torch.channels_last)
    pairs = zip(_gradients(layer, x, None), _gradients(reference, x, None), strict=True)
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, **CLOSE)


def test_small_maps_have_their_own_gradients_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    original = onednn.conv2d_weight

    def noted(x: Tensor, size: torch.Size, gradient: Tensor, **settings: int) -> Tensor:
        calls.append(tuple(gradient.shape))
        return original(x, size, gradient, **settings)

    monkeypatch.setattr(onednn, "conv2d_weight", noted)
    layer = Depthwise(4)
    for size in (2, 3):
        layer(torch.randn(1, 4, size, size)).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 4, 2, 2)).sum().backward()
    assert calls == [(1, 4, 3, 3)]
    assert torch.export.export(layer, (torch.randn(1, 4, 2, 2),)).module()(torch.ones(1, 4, 2, 2)).shape == (1, 4, 2, 2)
