"""The list of operations: complete, without free operations, each with its kind."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from archsearch.cost.counter import cost
from archsearch.cost.operations import Operation, module_operations, operations
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.errors import InputError
from tests.snapgen.nets import tiny

NETS = {
    "plain": tiny(),
    "snapgen": tiny(
        {"qk_norm": True, "rope": True, "all.conv": "separable", "all.expansion": 2, "all.num_kv_heads": 1}
    ),
    "no attention": tiny({"all.self_attention": False, "all.cross_attention": False}),
}


def operations_of(net: nn.Module, *shape: int) -> list[Operation]:
    with torch.device("meta"):
        return module_operations(net.to("meta").eval(), torch.empty(*shape))


@pytest.mark.parametrize("name", NETS)
def test_the_macs_are_the_costs_and_every_weight_is_read(name: str) -> None:
    steps = operations(NETS[name], 16, context_tokens=5)
    counted = cost(NETS[name], 16, context_tokens=5)
    assert sum(step.macs for step in steps) == counted.macs
    assert sum(step.weights for step in steps) == counted.params


def test_a_batch_does_everything_for_each_but_reads_the_weights_once() -> None:
    single, double = (operations(NETS["snapgen"], 8, context_tokens=5, batch=batch) for batch in (1, 2))
    assert [step.kind for step in single] == [step.kind for step in double]
    assert [2 * step.macs for step in single] == [step.macs for step in double]
    assert [step.weights for step in single] == [step.weights for step in double]


@pytest.mark.parametrize(
    ("module", "kind", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), "conv", 4 * 6 * 9 * 64),
        (nn.Conv2d(4, 6, 1), "pointwise", 4 * 6 * 64),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), "depthwise", 4 * 9 * 64),
        (nn.Linear(8, 5), "linear", 4 * 8 * 8 * 5),
        (nn.GroupNorm(2, 4), "norm", 0),
        (nn.SiLU(), "elementwise", 0),
        (nn.Upsample(scale_factor=2.0, mode="nearest"), "copy", 0),
    ],
)
def test_a_module_is_one_operation_of_its_kind(module: nn.Module, kind: str, macs: int) -> None:
    (step,) = operations_of(module, 1, 4, 8, 8)
    assert (step.kind, step.macs) == (kind, macs)
    assert step.moved == 4 * 64 + torch.Size(step.shape).numel()
    assert step.weights == sum(p.numel() for p in module.parameters())


def test_attention_is_one_operation_with_its_scores() -> None:
    class Attend(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3])

    (step,) = operations_of(Attend(), 1, 2, 7, 4)
    assert (step.kind, step.macs) == ("attention", 2 * 7 * 3 * (4 + 4))
    # The queries, the keys and the values; the output; the scores.
    assert step.moved == 2 * 4 * (7 + 3 + 3) + 2 * 4 * 7 + 2 * 7 * 3


def test_views_and_constants_are_excluded() -> None:
    class Tables(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = torch.arange(4, device=x.device).float().cos() * 2
            return (x.flatten(1).unflatten(1, (2, 4)).transpose(1, 2) * table[:, None])[:, :1]

    assert [step.kind for step in operations_of(Tables(), 1, 8)] == ["elementwise"]


def test_rope_adds_its_rotations_but_not_its_tables() -> None:
    plain, rotated = (Counter(step.kind for step in operations(tiny({"rope": rope}), 8)) for rope in (False, True))
    attentions = 4  # self-attentions: one transformer on the down path, one in the mid stage, two on the up path
    added = rotated - plain
    assert added == {"elementwise": 2 * 3 * attentions, "copy": 2 * attentions}


def test_a_decoder_is_listed_too() -> None:
    kinds = Counter(
        step.kind
        for step in operations_of(
            TinyDecoder(latent_channels=4, widths=(32, 32), blocks=(1, 1), mid_blocks=1), 1, 4, 8, 8
        )
    )
    assert kinds["depthwise"] == kinds["pointwise"] == 2 * 3 + 1
    assert kinds["conv"] == 2


def test_a_latent_that_does_not_halve_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match="use a multiple of 2"):
        operations(tiny(), 7)
