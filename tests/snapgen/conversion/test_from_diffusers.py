"""Diffusers' nets as ours: equal outputs, or a field that says why not."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import DreamLiteUNetModel, UNet2DConditionModel
from torch import Tensor, nn

from snapgen.architecture import presets
from snapgen.architecture.schema import Architecture
from snapgen.conversion.config import FIXED_FIELDS, describe
from snapgen.conversion.from_diffusers import convert, from_diffusers
from snapgen.errors import InputError
from snapgen.io.pretrained import SavedNet, Weights, shapes_of
from snapgen.models.unet import UNet
from tests.snapgen.diffusers_nets import (
    ADDED,
    DREAMLITE,
    FULL,
    OWN_DREAMLITE,
    PLAIN,
    SD,
    SDXL,
    SMALL,
    THIN,
    TIMED_DREAMLITE,
    UNEVEN,
    assert_equal_outputs,
    check_equal,
    drawn,
    reference,
)
from tests.snapgen.nets import inputs


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (SD, UNet2DConditionModel),
        (THIN, UNet2DConditionModel),
        (UNEVEN, UNet2DConditionModel),
        (PLAIN, UNet2DConditionModel),
        (DREAMLITE, DreamLiteUNetModel),
    ],
    ids=["sd", "thin", "uneven", "no attention", "dreamlite"],
)
def test_a_converted_net_computes_what_diffusers_does(config: dict[str, Any], kind: type[nn.Module]) -> None:
    theirs = reference(config, kind)
    conversion = from_diffusers(theirs)
    assert (conversion.dropped, conversion.unexpected_keys, conversion.missing_keys) == ((), (), ())
    assert sum(p.numel() for p in conversion.net.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert_equal_outputs(theirs, conversion.net)


def test_dreamlites_shared_heads_and_norms_are_ours() -> None:
    net = from_diffusers(reference(DREAMLITE, DreamLiteUNetModel)).net
    assert (net.arch.qk_norm, net.arch.mid.num_kv_heads, net.arch.mid.ffn_ratio, net.arch.mid.num_transformers) == (
        True,
        1,
        3,
        2,
    )


def test_small_queries_and_keys_are_normalised_alike() -> None:
    """Where the norm's eps counts: theirs is ten times ours."""
    theirs = reference(DREAMLITE, DreamLiteUNetModel)
    for name, parameter in theirs.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter.data *= 1e-3
    assert_equal_outputs(theirs, from_diffusers(theirs).net)


@pytest.mark.parametrize(
    ("config", "kind", "pooled"),
    [(SDXL, UNet2DConditionModel, 1280), (TIMED_DREAMLITE, DreamLiteUNetModel, 0)],
    ids=["sdxl", "dreamlite"],
)
def test_added_conditions_are_folded_in(config: dict[str, Any], kind: type[nn.Module], pooled: int) -> None:
    """Equal with pooled text zero and a square image of the net's own size, or the sizes asked for."""
    theirs = reference(config, kind)
    own, other = from_diffusers(theirs), from_diffusers(theirs, time_ids=(32, 64, 1, 2, 64, 32))
    [left_out] = own.dropped
    assert left_out.startswith("addition_embed_type: folded in")
    for conversion, sizes in ((own, (64.0, 64, 0, 0, 64, 64)), (other, (32.0, 64, 1, 2, 64, 32))):
        added = {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.tensor([sizes] * 2)}
        assert_equal_outputs(theirs, conversion.net, **added)
    with pytest.raises(InputError, match=r"takes \d+ values, not 400 sizes"):
        from_diffusers(theirs, time_ids=(64.0,) * 400)


def test_conversion_shares_no_memory_and_leaves_the_source_alone() -> None:
    theirs = reference(THIN)
    before = {name: p.clone() for name, p in theirs.state_dict().items()}
    net = from_diffusers(theirs).net
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(torch.equal(p, before[name]) for name, p in theirs.state_dict().items())


def test_the_architectures_are_the_presets() -> None:
    sd = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    thin = {**FULL["snapgen-baseline"], "in_channels": 16, "out_channels": 16}
    for name, config in (("sd15", sd), ("sdxl", FULL["sdxl"]), ("snapgen-baseline", thin)):
        with torch.device("meta"):
            theirs = UNet2DConditionModel(**config)
        assert describe(theirs.config, name).architecture.id == presets.preset(name).id


# --- what our family cannot follow ---

FOLLOWED = {
    *("in_channels", "out_channels", "down_block_types", "mid_block_type", "up_block_types", "block_out_channels"),
    *("layers_per_block", "norm_num_groups", "cross_attention_dim", "transformer_layers_per_block"),
    *("reverse_transformer_layers_per_block", "attention_head_dim", "time_embedding_dim", "use_linear_projection"),
    *("addition_time_embed_dim", "projection_class_embeddings_input_dim", "sample_size"),
}
"""Fields that the architecture, the weights' shapes, or the folded conditions follow."""
WITHOUT_EFFECT = {"dropout", "upcast_attention"}
"""Fields without weights, whose values are told."""
CHECKED_BY_DIFFUSERS = {
    "num_attention_heads",  # refused if it is set
    "encoder_hid_dim",  # sets encoder_hid_dim_type
    "addition_embed_type_num_heads",  # of addition_embed_type "text", which is refused
}


def test_every_field_of_diffusers_unet_is_followed_or_refused() -> None:
    """A new version of diffusers with another field fails here."""
    fields = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    handled = [FOLLOWED, WITHOUT_EFFECT, CHECKED_BY_DIFFUSERS, set(FIXED_FIELDS)]
    assert fields <= set().union(*handled)
    for config in ({"num_attention_heads": 4}, {"encoder_hid_dim": 8}):
        with pytest.raises((InputError, ValueError)):
            from_diffusers(UNet2DConditionModel(**{**SMALL, **config}))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"freq_shift": 1}, "freq_shift"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"in_channels": 9}, "in_channels"),
        ({"only_cross_attention": (True, False, False)}, "only_cross_attention"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 4}, "encoder_hid_dim_type"),
        ({"down_block_types": ("AttnDownBlock2D", *SMALL["down_block_types"][1:])}, "down_block_types[0]"),
        ({"cross_attention_dim": (12, 12, 16)}, "cross_attention_dim"),
        ({"transformer_layers_per_block": [[1, 1], [2, 1], [1, 1]], "reverse_transformer_layers_per_block":
          [[1] * 3] * 3}, "transformer_layers_per_block[1]"),
        ({"attention_head_dim": (3, 2, 3)}, "attention_head_dim"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({**ADDED, "projection_class_embeddings_input_dim": 20 + 24}, "addition_embed_type"),
        ({**ADDED, "projection_class_embeddings_input_dim": 1280 + 24}, "addition_embed_type"),  # no sample_size
    ],
)  # fmt: skip
def test_a_field_that_our_family_does_not_have_is_named(changes: dict[str, Any], field: str) -> None:
    if "attention_head_dim" in changes:
        changes = {**changes, "down_block_types": ("CrossAttnDownBlock2D",) * 3}
    theirs = UNet2DConditionModel(**{**SMALL, **changes})
    with pytest.raises(InputError) as error:
        from_diffusers(theirs)
    assert error.value.place == field


@pytest.mark.parametrize(
    ("config", "field"),
    [(OWN_DREAMLITE, "use_sep_conv"), ({**OWN_DREAMLITE, "use_sep_conv": False}, "down_block_types[0]")],
)
def test_dreamlites_quirks_are_refused_by_name(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match="partial") as error:
        from_diffusers(DreamLiteUNetModel(**config))
    assert error.value.place == field


@torch.no_grad()
def test_of_dreamlites_own_design_the_part_that_is_the_same_converts() -> None:
    """Block by block: what passes theirs gives the same in ours, but for the blocks named in `conversion_config`."""
    theirs = reference(OWN_DREAMLITE, DreamLiteUNetModel)
    conversion = from_diffusers(theirs, partial=True)
    assert {phrase.partition(":")[0] for phrase in conversion.dropped} == {
        "use_sep_conv", "down_block_types[0]", "down_block_types[1]", "up_block_types[1]",
    }  # fmt: skip
    pairs = list(_same_blocks(theirs, conversion.net))
    assert len(pairs) == 6 + 2 + 2 + 1 + 3
    calls: dict[nn.Module, Tensor] = {}
    for their, _ in pairs:
        their.register_forward_hook(lambda module, args, out: calls.update({module: (args[0], out)}))
    sample, timestep, context = inputs(conversion.net.arch, size=8)
    theirs(sample, 1000 * timestep, context)
    time = theirs.time_embedding(theirs.time_proj(1000 * timestep))
    check_equal(conversion.net.time_embedding(timestep), nn.functional.silu(time))
    for their, our in pairs:
        given, expected = calls[their]
        if "Resnet" in type(their).__name__:
            check_equal(our(given, nn.functional.silu(time)), expected)
        else:
            check_equal(our(given, context, None), expected[0])


def _same_blocks(theirs: Any, ours: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Residual blocks but for the way up; transformers with self-attention."""
    for their, our in [*zip(theirs.down_blocks, ours.down, strict=True), (theirs.mid_block, ours.mid)]:
        yield from ((resnet, our.layers[i].residual) for i, resnet in enumerate(their.resnets))
    for their, our in (
        (theirs.down_blocks[2], ours.down[2]),
        (theirs.mid_block, ours.mid),
        (theirs.up_blocks[0], ours.up[2]),
    ):
        yield from ((attention, our.layers[i].transformers[0]) for i, attention in enumerate(their.attentions))


def test_a_partial_conversion_says_what_begins_anew() -> None:
    theirs = reference(OWN_DREAMLITE, DreamLiteUNetModel)
    conversion = from_diffusers(theirs, partial=True)
    assert "down.0.downsample.depthwise.weight" in conversion.missing_keys
    assert "up.0.layers.0.residual.conv1.pointwise.weight" in conversion.missing_keys
    assert not any(name.startswith("mid.") for name in conversion.missing_keys)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight" in conversion.unexpected_keys
    assert "down_blocks.0.downsamplers.0.conv.weight" in conversion.unexpected_keys
    fresh = UNet(conversion.net.arch).state_dict()
    assert all(torch.equal(conversion.net.state_dict()[name], fresh[name]) for name in conversion.missing_keys)
    assert conversion.net(*inputs(conversion.net.arch, size=8)).isfinite().all()


# --- full size ---


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_at_full_size(name: str) -> None:
    with torch.device("meta"):
        theirs: Any = UNet2DConditionModel(**FULL[name]).eval()
    params = sum(p.numel() for p in theirs.parameters())
    if psutil.virtual_memory().available < 5 * params:
        pytest.skip(f"needs {5 * params / 1e9:.0f} GB of free memory")
    shapes, config = shapes_of(theirs), {**theirs.config, "_class_name": "UNet2DConditionModel"}
    weights = Weights(name, shapes, lambda key: drawn(key, shapes[key]))  # so that one net at a time is in memory
    theirs.load_state_dict({key: weights.load(key) for key in shapes}, assign=True)
    arch = Architecture.model_validate({**presets.preset(name).model_dump(), "latent_channels": 4})
    sample, timestep, context = inputs(arch, size=16, batch=1, tokens=77)
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])}
    expected = theirs(sample, 1000 * timestep, context, added_cond_kwargs=added).sample
    del theirs
    gc.collect()
    net = convert(SavedNet(Path(name), config, weights)).net
    assert net.arch.id == arch.id
    check_equal(net(sample, timestep, context), expected)
