"""Every shipped space: random architectures build, run, keep shapes, survive saving, and have the right ids.

The nets are shrunken: widths are divided, while levels, blocks, heads, groups of channels and ratios stay.
"""

from __future__ import annotations

import tempfile
import zlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings, strategies as st
from torch import Tensor

from archsearch.library import shipped
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import Space
from snapgen.architecture import block_index, presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.models.unet import UNet

SPACES = {name: load_space(name) for name in shipped("space")}
HEAD_DIM = 4
"""The smallest head width that RoPE supports."""

MUTATIONS: tuple[dict[str, Any], ...] = (
    {"all.expansion": 1},
    {"all.expansion": 2},
    {"down[0].expansion": 2},
    {"down[-1].conv": "separable"},
    {"up[0].conv": "separable"},
    {"mid.conv": "standard"},
    {"all.num_kv_heads": 1},
    {"down[0].num_kv_heads": 1},
    {"levels[1].num_kv_heads": None},
    {"levels[0].head_dim": 8},
    {"mid.head_dim": 8},
    {"up[0].ffn_ratio": 2},
    {"levels[0].self_attention": True},
    {"levels[0].cross_attention": False},
    {"all.self_attention": False},
    {"all.cross_attention": False},
    {"all.num_transformers": 0},
    {"levels[0].transformer_depth": 2},
    {"all.transformer_depth": 0},
    {"mid.num_res_blocks": 0},
    {"mid.num_transformers": 0},
    {"down[0].num_res_blocks": 0, "down[0].num_transformers": 1},
    {"qk_norm": True},
    {"qk_norm": False},
    {"rope": True},
    {"rope": False},
    {"time.projection": "output"},
    {"time.projection": "expanded"},
    {"context_dim": 12},
)
"""Changes that affect some nets and not others."""

Fingerprint = tuple[tuple[tuple[str, torch.Size], ...], tuple[float, ...]]
"""Names and shapes of a net's weights, and its output with weights that depend only on their names."""

EXAMPLES = settings(
    deadline=None, derandomize=True, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck)
)


def shrunken(arch: Architecture) -> Architecture:
    """The same structure with heads of `HEAD_DIM`, all other widths scaled alike, and transformers of depth 1."""
    by = arch.mid.head_dim // HEAD_DIM
    ways = {"down": arch.down, "up": arch.up}
    sizes = {f"{way}[{i}].channels": s.channels // by for way, stages in ways.items() for i, s in enumerate(stages)}
    small = {"norm_groups": max(1, arch.norm_groups // by), "context_dim": 8, "time.embed_dim": 8, "time.hidden_dim": 8}
    shallow = {"all.transformer_depth": 1, "all.head_dim": HEAD_DIM, "latent_channels": 2}
    return apply_overrides(arch, {**sizes, **small, **shallow})


def filled(arch: Architecture) -> UNet:
    """Its net, with non-zero weights that depend only on their names."""
    net = UNet(arch).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            steps = torch.arange(weight.numel()) * 0.7 + zlib.crc32(name.encode()) % 997
            weight.copy_((steps.sin() / max(1, weight[0].numel()) ** 0.5 + (weight.ndim == 1)).view_as(weight))
    return net


def velocity(net: UNet) -> Tensor:
    """The net's output for fixed inputs on a grid with at least 2×2 positions at the lowest resolution."""
    size = 2 * net.arch.stride
    sample = (torch.arange(2 * 2 * size * size) * 1.3).sin().view(2, 2, size, size)
    context = (torch.arange(2 * 3 * net.arch.context_dim) * 0.9).sin().view(2, 3, -1)
    output: Tensor = net(sample, torch.tensor([0.2, 0.7]), context)
    assert output.shape == sample.shape
    return output


def shapes(net: UNet) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in net.state_dict().items()}


def same_net(net: UNet, output: Tensor, other: UNet) -> bool:
    """Whether both have the same weights at the same modules and the same output.

    Outputs of nets with different context widths are not compared: without weights for a context, they ignore it.
    """
    if shapes(net) != shapes(other):
        return False
    with torch.no_grad():
        return net.arch.context_dim != other.arch.context_dim or torch.equal(output, velocity(other))


def runs_forward_and_backward(net: UNet) -> Tensor:
    output = velocity(net)
    assert output.isfinite().all()
    output.square().mean().backward()
    unused = [name for name, weight in net.named_parameters() if weight.grad is None]
    if not any(block.kind == "residual" for block in block_index.blocks(net.arch)):
        unused = [name for name in unused if not name.startswith("time_embedding.")]  # only residual blocks use it
    assert not unused, f"nothing depends on {unused}"
    return output.detach()


def survives_saving(net: UNet, output: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        net.save_pretrained(folder)
        again = UNet.from_pretrained(folder)
        assert again.arch == net.arch
        assert torch.equal(velocity(again), output)


@st.composite
def candidates(draw: st.DrawFn, space: Space) -> Architecture:
    """A random architecture of a space."""
    point = {knob.name: draw(st.integers(0, len(knob.choices) - 1)) for knob in space.knobs}
    assume(space.valid(point))
    return space.architecture(point)


def mutated(arch: Architecture, changes: dict[str, Any]) -> Architecture:
    """The changed architecture, or the unchanged one if the change is invalid."""
    try:
        return apply_overrides(arch, changes)
    except ValueError:
        return arch


@pytest.mark.parametrize("examples", [8, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", shipped("space"))
def test_random_architectures_run_save_and_have_ids_of_their_own(name: str, examples: int) -> None:
    nets: dict[str, Fingerprint] = {}
    ids: dict[Fingerprint, str] = {}

    @settings(EXAMPLES, max_examples=examples)
    @given(candidates(SPACES[name]), st.none() | st.sampled_from(MUTATIONS))
    def check(arch: Architecture, mutation: dict[str, Any] | None) -> None:
        net = filled(shrunken(arch))
        output = runs_forward_and_backward(net)
        survives_saving(net, output)
        seen = [(net, output)]
        if mutation:
            twin = filled(mutated(net.arch, mutation))
            with torch.no_grad():
                seen.append((twin, velocity(twin)))
        for seen_net, seen_output in seen:
            fingerprint = (tuple(shapes(seen_net).items()), tuple(seen_output.flatten().tolist()))
            assert nets.setdefault(seen_net.arch.id, fingerprint) == fingerprint, f"{mutation}: one id, two nets"
            assert ids.setdefault(fingerprint, seen_net.arch.id) == seen_net.arch.id, f"{mutation}: one net, two ids"

    check()


@settings(EXAMPLES, max_examples=60)
@given(candidates(SPACES["emoji"]), st.lists(st.sampled_from(MUTATIONS), max_size=3), st.sampled_from(MUTATIONS))
def test_ids_are_equal_exactly_when_the_same_net_is_built(
    arch: Architecture, before: list[dict[str, Any]], mutation: dict[str, Any]
) -> None:
    a = shrunken(arch)
    for changes in before:
        a = mutated(a, changes)
    b = mutated(a, mutation)
    assume(a != b)
    net = filled(a)
    with torch.no_grad():
        alike = same_net(net, velocity(net), filled(b))
    assert (a.id == b.id) == alike, f"{a.to_json()} and {b.to_json()}"


@pytest.mark.parametrize("name", shipped("space"))
def test_the_base_and_every_reference_are_points(name: str) -> None:
    space = SPACES[name]
    points = space.reference_points()
    assert space.architecture(points["base"]).id == space.base.id
    assert ("snapfusion" if "blocks" in name else "snapgen") in points
    assert len({space.architecture(point).id for point in points.values()}) == len(points)


def test_the_full_size_space_holds_the_published_designs() -> None:
    space = SPACES["snapgen"]
    assert space.base.id == presets.preset("snapgen-baseline").id
    final = space.architecture(space.references["snapgen"])
    assert final.id == presets.preset("snapgen-imagenet").id
    with torch.device("meta"):
        sizes = {
            name: sum(weight.numel() for weight in UNet(space.architecture(point)).parameters())
            for name, point in space.reference_points().items()
        }
    published = {"base": 632.6, "row 1": 622.1, "row 2a": 473.4, "row 2b": 528.4, "row 3": 462.7, "row 4": 389.3}
    published |= {"row 5": 389.8, "row 6": 389.8, "snapgen": 372.2}
    assert {name: round(size / 1e6, 1) for name, size in sizes.items()} == published
