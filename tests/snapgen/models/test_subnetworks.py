"""Tests of sub-networks: names of blocks, outputs, and inherited weights."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from snapgen.architecture import block_index, presets
from snapgen.architecture.schema import Architecture
from snapgen.models import subnetworks
from snapgen.models.unet import UNet
from tests.snapgen.nets import inputs, stirred, tiny

NETS = {
    "plain": tiny(),
    "transformers alone on the way down": tiny({"down.num_res_blocks": 0, "down.num_transformers": 2}),
    "separable": tiny({"all.conv": "separable", "all.expansion": 2}),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> UNet:
    return stirred(NETS[request.param]).eval()


@torch.no_grad()
def output(unet: UNet) -> Tensor:
    out: Tensor = unet(*inputs(unet.arch))
    return out


def names(arch: Architecture) -> list[str]:
    return [block.name for block in block_index.blocks(arch)]


def test_blocks_are_modules_of_the_net_in_the_order_of_the_pass(net: UNet) -> None:
    seen: list[str] = []
    for block in block_index.blocks(net.arch):
        module = net.get_submodule(block.name)
        assert type(module).__name__ == {"residual": "ResidualBlock", "transformer": "SpatialTransformer"}[block.kind]
        module.register_forward_hook(lambda *_, name=block.name: seen.append(name))
    output(net)
    assert seen == names(net.arch)
    kinds = [type(module).__name__ for module in net.modules()]
    assert len(seen) == kinds.count("ResidualBlock") + kinds.count("SpatialTransformer")


def test_sd15_has_the_papers_blocks() -> None:
    """arXiv 2306.00980, table 1: 22 ResNets and 16 cross-attention blocks."""
    kinds = [block.kind for block in block_index.blocks(presets.resolve("sd15"))]
    assert (kinds.count("residual"), kinds.count("transformer")) == (22, 16)


def test_written_out_it_is_the_same_net() -> None:
    for arch in NETS.values():
        written = block_index.with_explicit_layers(arch)
        assert written.id == arch.id
        assert all(blocks.layers is not None for _, blocks, _ in written.named_levels())
        assert block_index.blocks(written) == block_index.blocks(arch)
        assert Architecture.model_validate_json(written.to_json()) == written


@pytest.mark.parametrize("seed", range(6))
def test_a_net_without_blocks_is_the_same_masked_or_built(net: UNet, seed: int) -> None:
    rng = random.Random(seed)
    removed = set(rng.sample(names(net.arch), rng.randint(1, len(names(net.arch)))))
    with subnetworks.blocks_disabled(net, removed):
        masked = output(net)
    built = subnetworks.edit_network(net, removed).eval()
    assert torch.allclose(output(built), masked, atol=1e-6)
    assert not torch.allclose(output(net), masked, atol=1e-4)
    assert len(names(built.arch)) == len(names(net.arch)) - len(removed)
    assert sum(p.numel() for p in built.parameters()) < sum(p.numel() for p in net.parameters())


def test_removing_blocks_one_by_one_equals_removing_them_at_once(net: UNet) -> None:
    edited = net
    for block in reversed(block_index.blocks(net.arch)):  # later ones first, so that names stay
        edited = subnetworks.edit_network(edited, {block.name})
    at_once = subnetworks.edit_network(net, names(net.arch))
    assert edited.arch == at_once.arch
    assert block_index.blocks(edited.arch) == ()
    assert torch.allclose(output(edited.eval()), output(at_once.eval()))


def test_a_copy_begins_as_the_identity_with_the_weights(net: UNet) -> None:
    for block in block_index.blocks(net.arch):
        copied = subnetworks.edit_network(net, copied={block.name}).eval()
        assert torch.allclose(output(copied), output(net), atol=1e-6), block
        twin = next(
            b
            for b in block_index.blocks(copied.arch)
            if b.block_site == block.block_site and b.index == block.index + 1
        )
        with subnetworks.blocks_disabled(copied, {twin.name}):
            assert torch.allclose(output(copied), output(net), atol=1e-6)
        copy_weights = copied.get_submodule(twin.name).state_dict()
        block_weights = net.get_submodule(block.name).state_dict()
        fitting = [key for key in copy_weights if copy_weights[key].shape == block_weights[key].shape]
        same = [key for key in fitting if torch.equal(copy_weights[key], block_weights[key])]
        if len(fitting) == len(copy_weights):  # all but the last layer, and the time projection if added there
            assert len(copy_weights) - len(same) in (2, 4), block


def test_a_copy_learns() -> None:
    net = stirred(NETS["plain"])
    block = block_index.blocks(net.arch)[1]
    copied = subnetworks.edit_network(net, copied={block.name}).requires_grad_(True)
    copied(*inputs(copied.arch)).square().mean().backward()
    twin = next(b for b in block_index.blocks(copied.arch) if b.block_site == block.block_site and b.index == 1)
    grads = [p.grad for p in copied.get_submodule(twin.name).parameters() if p.grad is not None]
    assert any(bool(grad.abs().sum() > 0) for grad in grads)


def test_removing_the_copy_gives_the_net_back() -> None:
    net = stirred(NETS["plain"]).eval()
    for block in block_index.blocks(net.arch):
        copied = subnetworks.edit_network(net, copied={block.name})
        twin = next(b for b in block_index.blocks(copied.arch) if b.block_site == block.block_site and b.index == 1)
        back = subnetworks.edit_network(copied, {twin.name}).eval()
        assert back.arch.id == net.arch.id
        assert torch.allclose(output(back), output(net))


def test_the_first_of_two_residual_blocks_stays() -> None:
    net = UNet(NETS["plain"])
    first = next(block for block in block_index.blocks(net.arch) if block.kind == "residual")
    copied = subnetworks.edit_network(net, copied={first.name})
    assert first.name not in [block.name for block in block_index.removable(copied.arch)]
    with pytest.raises(ValueError, match="cannot replace the block before it"):
        subnetworks.edit_network(copied, {first.name})


def test_a_supernets_weights_are_inherited(net: UNet) -> None:
    removed = set(names(net.arch)[::2])
    expected = subnetworks.edit_network(net, removed).eval()
    inherited = subnetworks.from_supernet(net, expected.arch).eval()
    assert torch.equal(output(inherited), output(expected))
    twice = block_index.edit_blocks(net.arch, copied=names(net.arch)[:3])
    assert torch.allclose(output(subnetworks.from_supernet(net, twice).eval()), output(net), atol=1e-6)


def test_blocks_without_trained_weights_are_refused() -> None:
    net = UNet(NETS["plain"])
    first = names(net.arch)[0]
    smaller = subnetworks.edit_network(net, {first})
    with pytest.raises(ValueError, match="no weights"):
        subnetworks.from_supernet(smaller, net.arch)
    with pytest.raises(ValueError, match="not a block of the net"):
        block_index.edit_blocks(net.arch, {"down.0.layers.7.residual"})
    other = tiny({"time.hidden_dim": 32})
    with pytest.raises(ValueError, match="does not fit the trained net"):
        subnetworks.from_supernet(net, other)


def test_block_dropout_is_uniform_and_reproducible() -> None:
    net = UNet(NETS["plain"])
    draws = [subnetworks.sample_block_dropout(net, 0.2, seed=3, step=step) for step in range(500)]
    assert draws == [subnetworks.sample_block_dropout(net, 0.2, seed=3, step=step) for step in range(500)]
    count = len(names(net.arch))
    assert 0.18 < sum(map(len, draws)) / 500 / count < 0.22
    pairs = [sum({a, b} <= drawn for drawn in draws) / 500 for a, b in itertools.combinations(names(net.arch), 2)]
    assert max(pairs) < 0.1  # 0.04 expected: each by itself
    assert subnetworks.sample_block_dropout(net, 0, seed=0, step=1) == frozenset()


def test_block_dropout_applies_in_training_mode_only() -> None:
    net = stirred(NETS["plain"])
    full = output(net)
    skipped = subnetworks.sample_block_dropout(net, 0.5, seed=0, step=1)
    assert 0 < len(skipped) < len(names(net.arch))
    assert torch.equal(output(net.eval()), full)
    with subnetworks.blocks_disabled(net, skipped):
        masked = output(net)
    assert torch.equal(output(net.train()), masked)
    subnetworks.sample_block_dropout(net, 0, seed=0, step=2)
    assert torch.equal(output(net), full)


def test_skipped_blocks_get_no_gradient_with_and_without_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        net = stirred(NETS["plain"]).train().requires_grad_(True)
        if checkpointing:
            net.enable_gradient_checkpointing()
        skipped = subnetworks.sample_block_dropout(net, 0.5, seed=1, step=1)
        net(*inputs(net.arch)).square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
        for block in block_index.blocks(net.arch):
            own = dict(net.get_submodule(block.name).named_parameters())
            inner = [p.grad for name, p in own.items() if not name.startswith("conv_shortcut")]
            assert all(grad is None for grad in inner) if block.name in skipped else any(g is not None for g in inner)
    for name, grad in gradients[0].items():
        other = gradients[1][name]
        assert (grad is None and other is None) or torch.equal(grad, other), name
