"""Weights under the names of earlier versions: they are loaded, and initial weights are still drawn from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snapgen.models.names import EARLIER_NAMES, earlier_name
from snapgen.models.unet import UNet, load_unet
from snapgen.optim.ema import EMA
from snapgen.seeding import derive_seed
from tests.snapgen.nets import tiny

CHANGES = {"all.conv": "separable", "mid.conv": "standard", "qk_norm": True, "mid.transformer_depth": 2}
EARLIER = {
    "time_embedding.linear_1": "time.linear1",
    "time_embedding.linear_2": "time.linear2",
    "conv_norm_out": "norm_out",
    "down.0.downsample.depthwise": "down.0.downsample.0",
    "down.1.layers.0.residual.conv_shortcut": "down.1.layers.0.residual.shortcut",
    "down.1.layers.0.residual.conv1.depthwise": "down.1.layers.0.residual.conv1.0",
    "down.1.layers.0.residual.conv1.pointwise": "down.1.layers.0.residual.conv1.1",
    "down.1.layers.0.residual.time_emb_proj": "down.1.layers.0.residual.time",
    "up.1.upsample.conv.pointwise": "up.1.upsample.conv.1",
    "mid.layers.0.residual.conv1": "mid.layers.0.residual.conv1",
    "mid.layers.0.transformers.0.proj_in": "mid.layers.0.transformers.0.proj_in",
    **{
        f"mid.layers.0.transformers.0.transformer_blocks.1.{present}": f"mid.layers.0.transformers.0.blocks.1.{earlier}"
        for present, earlier in {
            "attn1.to_q": "attend_self.queries",
            "attn1.to_kv": "attend_self.keys_values",
            "attn1.norm_q": "attend_self.query_norm",
            "attn1.norm_k": "attend_self.key_norm",
            "attn2.to_out": "attend_context.out",
            "ff.proj_in": "feed_forward.expand",
            "ff.proj_out": "feed_forward.contract",
        }.items()
    },
}
"""Present and earlier names of modules, of every kind that was renamed."""
SAMPLING = {"down.0.downsample.depthwise": "down.0.sampler.0", "up.1.upsample.conv.pointwise": "up.1.sampler.conv.1"}
"""Names from which the resampling convolutions are seeded, which are older still."""


@pytest.fixture
def net() -> UNet:
    net = UNet(tiny(CHANGES), "v")
    net.init_weights(3)
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.add_(number)
    return net


def under_earlier_names(net: UNet) -> dict[str, Tensor]:
    state = {earlier_name(name): tensor.contiguous() for name, tensor in net.state_dict().items()}
    assert len(state) == len(net.state_dict())
    assert not state.keys() & {name for name in net.state_dict() if earlier_name(name) != name}
    return state


def assert_equal(found: UNet, expected: UNet) -> None:
    assert list(found.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_the_earlier_names(net: UNet) -> None:
    assert {name: earlier_name(name) for name in EARLIER} == EARLIER
    for name in EARLIER:
        net.get_submodule(name)
    used = {part for part in EARLIER_NAMES for name in EARLIER if f".{part}." in f".{name}."}
    assert used == set(EARLIER_NAMES)


def test_initial_weights_are_drawn_from_the_earlier_names() -> None:
    net, drawn = UNet(tiny(CHANGES)), 0
    for name, earlier in {**EARLIER, **SAMPLING}.items():
        module = net.get_submodule(name)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.any():
            generator = torch.Generator().manual_seed(derive_seed(0, earlier))
            expected = torch.empty(module.weight.shape)
            expected.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
            assert torch.equal(module.weight, expected), name
            drawn += 1
    assert drawn >= 12


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_of_an_earlier_version(net: UNet, tmp_path: Path, shard: str) -> None:
    net.save_pretrained(tmp_path, max_shard_size=shard)
    for file in tmp_path.glob("*.safetensors"):
        save_file({earlier_name(name): tensor for name, tensor in load_file(file).items()}, file)
    for index in tmp_path.glob("*.index.json"):
        values = json.loads(index.read_text())
        values["weight_map"] = {earlier_name(name): file for name, file in values["weight_map"].items()}
        index.write_text(json.dumps(values))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["prediction_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "prediction.json").write_text('{"prediction": "v"}\n')
    found = load_unet(tmp_path)
    assert found.prediction_type == "v"
    assert_equal(found, net)
    found.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors").keys() == net.state_dict().keys()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["prediction_type"] == "v"


def test_diffusers_own_loader(net: UNet, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path)
    save_file(under_earlier_names(net), tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert_equal(UNet.from_pretrained(tmp_path), net)


def test_a_state_dict_within_another_module(net: UNet) -> None:
    """An objective's, in a checkpoint of a training."""
    found = nn.ModuleDict({"student": UNet(tiny(CHANGES))})
    state = {f"student.{name}": tensor for name, tensor in under_earlier_names(net).items()}
    found.load_state_dict(state)
    assert_equal(found["student"], net)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="linear1"):
        found.load_state_dict({**state, "student.time.linear1.more": torch.ones(1)})


def test_an_average_in_a_checkpoint(net: UNet) -> None:
    average = EMA(UNet(tiny(CHANGES)), 0.1)
    average.load(under_earlier_names(net))
    expected = net.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in average.state().items())
