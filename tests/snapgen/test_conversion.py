"""Diffusers' nets as ours: equal outputs, or a field that says why not."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import AutoencoderKL, DreamLiteUNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from archsearch.cli import app
from snapgen import conversion_files, presets
from snapgen.arch import Architecture
from snapgen.conversion import convert, from_diffusers
from snapgen.errors import InputError
from snapgen.seeds import derive
from snapgen.unet import UNet
from tests.snapgen.nets import inputs

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 3),  # diffusers means heads
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
SD: dict[str, Any] = {
    **SMALL,
    "block_out_channels": (8, 16, 24, 24),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 2,
}
THIN: dict[str, Any] = {
    **SMALL,
    "transformer_layers_per_block": (1, 2, 4),
    "use_linear_projection": True,
    "time_embedding_dim": 28,
}
ADDED: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
SDXL: dict[str, Any] = {
    **THIN,
    **ADDED,
    "sample_size": 8,
    "time_embedding_dim": None,
    "projection_class_embeddings_input_dim": 1280 + 6 * 4,
}
DREAMLITE: dict[str, Any] = {
    **SMALL,
    "use_sep_conv": False,
    "ff_mult": 3,
    "num_mid_layers": 2,
    "transformer_layers_per_block": (1, 2, 1),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "DreamLiteCrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}
OWN_DREAMLITE: dict[str, Any] = {  # as the class has it by default, small
    **{key: value for key, value in SMALL.items() if not key.endswith("_types")},
    "ff_mult": 6,
}
UNEVEN: dict[str, Any] = {
    **SMALL,
    "layers_per_block": (1, 3, 2),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": [[1], [2, 2, 2], [1, 1]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [3, 3, 3, 3], [1, 1]],
}
PLAIN: dict[str, Any] = {
    **SMALL,
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 3,
}


@torch.no_grad()
def reference(config: dict[str, Any], kind: type[nn.Module] = UNet2DConditionModel) -> Any:
    """Diffusers' net with every parameter random and none silent."""
    net = kind(**config)
    for name, parameter in net.named_parameters():
        parameter.copy_(drawn(name, parameter.shape))
    return net.eval()


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Weights from their name: those of norms about 1, matrices of the variance that keeps what passes through."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(derive(0, name)))
    if len(shape) > 1:
        return noise * (shape.numel() / shape[0]) ** -0.5
    return (1 if "norm" in name and name.endswith("weight") else 0) + 0.2 * noise


@torch.no_grad()
def assert_equal_outputs(theirs: Any, ours: UNet, *, size: int = 8, **added: Any) -> None:
    sample, timestep, context = inputs(ours.arch, size=size)
    expected = theirs(sample, 1000 * timestep, context, added_cond_kwargs=added or None).sample
    check_equal(ours(sample, timestep, context), expected)


def check_equal(actual: Tensor, expected: Tensor) -> None:
    """Fp32, 1e-4 relative, and not about nothing."""
    scale = expected.std().item()
    assert scale > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)


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
    assert (conversion.left_out, conversion.unused, conversion.new) == ((), (), ())
    assert sum(p.numel() for p in conversion.net.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert_equal_outputs(theirs, conversion.net)


def test_dreamlites_shared_heads_and_norms_are_ours() -> None:
    net = from_diffusers(reference(DREAMLITE, DreamLiteUNetModel)).net
    assert (net.arch.qk_norm, net.arch.mid.kv_heads, net.arch.mid.ffn_ratio, net.arch.mid.transformers) == (
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


@pytest.mark.parametrize("kind", ["text_time", "time"])
def test_added_conditions_are_folded_in(kind: str) -> None:
    """SDXL's: equal to it with pooled text zero and a square image of its own size, or the sizes asked for."""
    width = {"text_time": 1280, "time": 0}[kind]
    config = {**SDXL, "addition_embed_type": kind, "projection_class_embeddings_input_dim": width + 24}
    theirs = reference(config, UNet2DConditionModel if width else DreamLiteUNetModel) if width else None
    if theirs is None:
        theirs = reference({**DREAMLITE, **ADDED, **config, "use_sep_conv": False}, DreamLiteUNetModel)
    own = from_diffusers(theirs)
    assert len(own.left_out) == 1
    assert own.left_out[0].startswith("addition_embed_type: folded in")
    pooled = {"text_embeds": torch.zeros(2, 1280)} if width else {}
    assert_equal_outputs(theirs, own.net, **pooled, time_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2))
    other = from_diffusers(theirs, time_ids=(32, 64, 1, 2, 64, 32))
    assert_equal_outputs(theirs, other.net, **pooled, time_ids=torch.tensor([[32.0, 64, 1, 2, 64, 32]] * 2))


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
        from snapgen.conversion_config import describe

        assert describe(theirs.config, name).architecture.id == presets.preset(name).id


# --- what our family cannot follow ---


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
    assert {phrase.partition(":")[0] for phrase in conversion.left_out} == {
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
    check_equal(conversion.net.time(timestep), nn.functional.silu(time))
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
    assert "down.0.sampler.0.weight" in conversion.new
    assert "up.0.layers.0.residual.conv1.1.weight" in conversion.new
    assert not any(name.startswith("mid.") for name in conversion.new)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight" in conversion.unused
    assert "down_blocks.0.downsamplers.0.conv.weight" in conversion.unused
    fresh = UNet(conversion.net.arch).state_dict()
    assert all(torch.equal(conversion.net.state_dict()[name], fresh[name]) for name in conversion.new)
    assert conversion.net(*inputs(conversion.net.arch, size=8)).isfinite().all()


# --- checkpoints ---


def test_folders_whole_sharded_half_and_of_pipelines(tmp_path: Path) -> None:
    theirs = reference(THIN)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    theirs.save_pretrained(tmp_path / "pipeline" / "unet")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards", "pipeline"):
        assert_equal_outputs(theirs, from_diffusers(tmp_path / folder).net)
    theirs.half().save_pretrained(tmp_path / "half", variant="fp16")
    net = from_diffusers(str(tmp_path / "half")).net
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert_equal_outputs(theirs.float(), net)


def test_a_hub_name_is_fetched_the_unet_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs = reference(SD)
    theirs.save_pretrained(tmp_path / "unet")
    asked: list[Any] = []

    def fetched(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert_equal_outputs(theirs, from_diffusers("someone/a-pipeline").net)
    [(name, patterns)] = asked
    assert name == "someone/a-pipeline"
    assert not [pattern for pattern in patterns if not pattern.endswith((".json", ".safetensors"))]

    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"could not be fetched from the hub \(no network\);"):
        from_diffusers("someone/a-pipeline")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    reference(SMALL).save_pretrained(folder / "one")
    reference(SMALL).save_pretrained(folder / "shards", max_shard_size="100KB")
    return folder


def _copied(saved: Path, kind: str, to: Path) -> Path:
    to.mkdir()
    for file in (saved / kind).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def _truncate(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _change_weights(folder: Path, name: str, value: Tensor | None) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = {**load_file(file), name: value}
    save_file({key: tensor for key, tensor in weights.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("kind", "harm", "words"),
    [
        ("one", _truncate, "cannot be read"),
        ("one", lambda f: (f / "config.json").unlink(), "config.json: does not exist"),
        ("one", lambda f: (f / "config.json").write_text("{"), "is no JSON"),
        ("one", lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "holds no diffusion_pytorch_model"),
        ("one", lambda f: _change_config(f, _class_name="AutoencoderKL"), "describes AutoencoderKL"),
        ("one", lambda f: _change_config(f, block_out_channels=[8, 16]), "is no configuration of a UNet2D"),
        ("one", lambda f: _change_config(f, block_out_channels="wide"), "is no configuration of a UNet2D"),
        ("one", lambda f: _change_config(f, block_out_channels=[8, 16, 48]), "conv1.weight: is torch.float32 of shape"),
        ("one", lambda f: _change_config(f, norm_num_groups=3), "is no configuration of a UNet2D"),
        ("one", lambda f: _change_weights(f, "conv_in.bias", None), "conv_in.bias: weights do not fit.*1 missing, 0"),
        ("one", lambda f: _change_weights(f, "lora", torch.ones(1)), "lora: weights do not fit.*0 missing, 1"),
        ("one", lambda f: _change_weights(f, "conv_in.bias", torch.full((8,), torch.nan)), "not finite"),
        ("one", lambda f: _change_weights(f, "conv_in.bias", torch.ones(8, dtype=torch.int8)), "not floats"),
        ("shards", lambda f: next(f.glob("*-00002-of-*")).unlink(), "00002-of.*does not exist"),
        ("shards", lambda f: next(f.glob("*.index.json")).write_text('{"a": 1}'), "weight_map: maps no weights"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_line_and_nothing_written(
    saved: Path, tmp_path: Path, kind: str, harm: Any, words: str
) -> None:
    folder = _copied(saved, kind, tmp_path / "in")
    harm(folder)
    with pytest.raises(InputError, match=words) as error:
        from_diffusers(folder)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
    outcome = CliRunner().invoke(app, ["convert", str(folder), "--out", str(tmp_path / "out")])
    assert isinstance(outcome.exception, InputError)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"x")
    for source, words in (
        (tmp_path / "nowhere", "does not exist"),
        ("nowhere", "does not exist"),
        (tmp_path / "file.safetensors", "is a file"),
        (nn.Linear(1, 1), "describes Linear"),
        (AutoencoderKL(block_out_channels=(32,)), "describes AutoencoderKL"),
    ):
        with pytest.raises(InputError, match=words):
            from_diffusers(source)


# --- the command ---


def test_the_command_writes_a_net_of_ours(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "net"
    outcome = CliRunner().invoke(app, ["convert", str(saved / "shards"), "--out", str(out), "--json"])
    assert outcome.exit_code == 0, outcome.output
    net = UNet.from_pretrained(out)
    answer = json.loads(outcome.stdout)
    assert answer["architecture_id"] == net.arch.id
    assert answer["params"] == sum(p.numel() for p in net.parameters())
    assert_equal_outputs(reference(SMALL), net)
    assert [path.name for path in out.parent.iterdir()] == ["net"]


def test_the_command_prints_what_was_left_out(tmp_path: Path) -> None:
    reference(OWN_DREAMLITE, DreamLiteUNetModel).save_pretrained(tmp_path / "in")
    args = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert isinstance(CliRunner().invoke(app, args).exception, InputError)
    assert not (tmp_path / "out").exists()
    outcome = CliRunner().invoke(app, [*args, "--partial"], env={"COLUMNS": "200"})
    for words in ("use_sep_conv: widens to twice", "begins anew", "no place for", "params"):
        assert words in outcome.stdout


def test_the_command_overwrites_nothing(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    args = ["convert", str(saved / "one"), "--out"]
    for out in (tmp_path, tmp_path / "mine"):
        outcome = CliRunner().invoke(app, [*args, str(out)])
        assert isinstance(outcome.exception, InputError)
        assert "is there already" in str(outcome.exception)
    assert (tmp_path / "mine").read_text() == "x"
    outcome = CliRunner().invoke(app, [*args, str(tmp_path / "out"), "--time-ids", "1,x"])
    assert "is no list of numbers" in str(outcome.exception)


# --- full size ---

FULL: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        **{key: SMALL[key] for key in ("down_block_types", "up_block_types")},
        **{"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048},
        **{"transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "sample_size": 128},
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
        "projection_class_embeddings_input_dim": 2816,
    },
    "snapgen-baseline": {
        **{key: SMALL[key] for key in ("down_block_types", "up_block_types")},
        **{"block_out_channels": (256, 512, 896), "attention_head_dim": (4, 8, 14), "cross_attention_dim": 768},
        **{"transformer_layers_per_block": (1, 2, 4), "use_linear_projection": True, "time_embedding_dim": 896},
    },
}


class Drawn(Mapping[str, Tensor]):
    """Weights that come into being when asked for, so that one net at a time is in memory."""

    def __init__(self, net: nn.Module) -> None:
        self.shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}

    def __getitem__(self, name: str) -> Tensor:
        return drawn(name, self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("sd15", 16), ("snapgen-baseline", 16), ("sdxl", 16)])
@torch.no_grad()
def test_at_full_size(name: str, size: int) -> None:
    with torch.device("meta"):
        theirs: Any = UNet2DConditionModel(**FULL[name]).eval()
    params = sum(p.numel() for p in theirs.parameters())
    if psutil.virtual_memory().available < 5 * params:
        pytest.skip(f"needs {5 * params / 1e9:.0f} GB of free memory")
    weights, config = Drawn(theirs), {**theirs.config, "_class_name": "UNet2DConditionModel"}
    theirs.load_state_dict(dict(weights), assign=True)
    arch = Architecture.model_validate({**presets.preset(name).model_dump(), "latent_channels": 4})
    sample, timestep, context = inputs(arch, size=size, batch=1, tokens=77)
    pixels = 1024.0
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]])}
    expected = theirs(sample, 1000 * timestep, context, added_cond_kwargs=added if name == "sdxl" else None).sample
    del theirs
    gc.collect()
    net = convert(config, weights, name).net
    assert net.arch.id == arch.id
    check_equal(net(sample, timestep, context), expected)


def test_only_wanted_files_are_read() -> None:
    assert conversion_files.HUB_NAME.fullmatch("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert not conversion_files.HUB_NAME.fullmatch("a/b/c")
