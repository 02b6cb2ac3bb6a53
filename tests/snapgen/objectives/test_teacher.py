from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

from snapgen.conditioning.captions import Conditioning, TextEncoderConfig
from snapgen.diffusion import rectified_flow
from snapgen.errors import InputError
from snapgen.objectives import teacher
from snapgen.objectives.teacher import Teacher
from tests.snapgen.lessons import SHAPE, batch, frozen_teacher, new_teacher

SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "sample_size": 128,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def given() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    some = batch(size=8)
    assert some.teacher is not None
    return some.latents, some.t, some.teacher


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    frozen_teacher(prediction="preconditioned").save_pretrained(folder)
    return folder


# --- what it says ---


def test_it_is_diffusers_net_with_time_from_0_to_1000() -> None:
    own = frozen_teacher()
    x, t, (context, pooled) = given()
    theirs = own.net(
        hidden_states=x, encoder_hidden_states=context, pooled_projections=pooled, timestep=1000 * t
    ).sample
    assert theirs.abs().mean() > 0.1
    assert torch.equal(own(x, t, context, pooled), theirs)
    assert torch.equal(own.velocity(x, t, Conditioning(context, pooled)), theirs)


def test_without_a_pooled_embedding_it_is_zero() -> None:
    own = frozen_teacher()
    x, t, (context, pooled) = given()
    assert pooled is not None
    assert torch.equal(own(x, t, context), own(x, t, context, torch.zeros_like(pooled)))


def test_its_velocity_follows_from_what_it_predicts() -> None:
    x, t, condition = given()
    own = frozen_teacher(prediction="data")
    wanted = (x - own(x, t, *condition)) / t.view(-1, 1, 1, 1)
    torch.testing.assert_close(own.velocity(x, t, condition), wanted)


def test_tokens_are_the_blocks_images_on_their_grid() -> None:
    """The last block's, normed and projected as in diffusers, are the output; and rows are rows."""
    own = frozen_teacher()
    x, t, condition = given()
    x = x[:, :, :6]  # 3 rows of 4 tokens
    velocity, tokens = own.forward_features(x, t, condition, [2, 0])
    assert [grid.shape for grid in tokens] == [(2, 16, 3, 4)] * 2
    time = own.net.time_text_embed(1000 * t, condition.pooled)
    patches = own.net.proj_out(own.net.norm_out(tokens[0].flatten(2).transpose(1, 2), time))  # (B, N, p·p·C)
    image = patches.view(2, 3, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
    torch.testing.assert_close(image, velocity)
    assert not own.net.transformer_blocks[0]._forward_hooks


def test_observing_passes_gradients_to_the_sample_and_none_to_the_weights() -> None:
    own = frozen_teacher()
    x, t, condition = given()
    x.requires_grad_()
    own.forward_features(x, t, condition, [1])[1][0].square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    assert all(weight.grad is None for weight in own.parameters())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    own = frozen_teacher()
    x, t, condition = given()
    x.requires_grad_()
    found = []
    for switch in (own.disable_gradient_checkpointing, own.enable_gradient_checkpointing):
        switch()
        assert own.net.is_gradient_checkpointing == bool(found)
        found.append(torch.autograd.grad(own.forward_features(x, t, condition, [0, 1])[1][1].square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1])


def test_guidance_leads_away_from_zeros() -> None:
    own = frozen_teacher()
    x, t, condition = given()
    none = Conditioning(*(None if part is None else torch.zeros_like(part) for part in condition))
    velocity, tokens = own.forward_features(x, t, condition, [2], guidance=3.5)
    bare = own.velocity(x, t, none)
    torch.testing.assert_close(velocity, bare + 3.5 * (own.velocity(x, t, condition) - bare))
    torch.testing.assert_close(tokens[0], own.forward_features(x, t, condition, [2])[1][0])


def test_guidance_leads_away_from_the_null_caption() -> None:
    own = frozen_teacher()
    x, t, condition = given()
    null = Conditioning(*(None if part is None else torch.ones_like(part[:1]) for part in condition))
    velocity, _ = own.forward_features(x, t, condition, [2], guidance=3.5, null=null)
    bare = own.velocity(x, t, null.map(lambda part: part.repeat(len(x), *[1] * (part.ndim - 1))))
    torch.testing.assert_close(velocity, bare + 3.5 * (own.velocity(x, t, condition) - bare))


def test_a_published_teacher_is_warned_of_zeros_as_padding(caplog: pytest.LogCaptureFixture) -> None:
    own = frozen_teacher()
    own.check_padding([TextEncoderConfig()])
    assert not caplog.records
    own.trained_here = False
    own.check_padding([TextEncoderConfig(padding="encoded", null="encoded")])
    assert not caplog.records
    own.check_padding([TextEncoderConfig(padding="encoded", null="encoded"), TextEncoderConfig(padding="encoded")])
    assert 'set padding: encoded and "null": encoded' in caplog.text


def test_bfloat16_teaches_float32() -> None:
    own = frozen_teacher()
    x, t, condition = given()
    wanted, kept = own.forward_features(x, t, condition, [2])
    velocity, tokens = own.bfloat16().forward_features(x, t, condition, [2])
    assert velocity.dtype == tokens[0].dtype == torch.float32
    for one, other in ((velocity, wanted), (tokens[0], kept[0])):
        assert (one - other).norm() < 0.05 * other.norm()
        assert not torch.equal(one, other)


# --- where it comes from ---


def test_a_new_one_says_nothing_yet_and_comes_from_its_seed_alone() -> None:
    torch.manual_seed(5)
    own = new_teacher()
    state = torch.get_rng_state()
    x, t, condition = given()
    assert own(x, t, *condition).abs().max() == 0
    torch.manual_seed(6)
    again = new_teacher()
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), again.parameters(), strict=True))
    assert own.net.pos_embed.pos_embed.shape == (1, 16, 16)
    assert all(weight.requires_grad for weight in own.parameters())
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_new_one_learns() -> None:
    own = new_teacher(prediction="preconditioned")
    x, t, condition = given()
    optimizer = torch.optim.AdamW(own.parameters(), lr=3e-3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(40):
        velocity = own.velocity(rectified_flow.interpolate(x, noise, t), t, condition)
        loss = rectified_flow.mse_per_image(velocity, noise - x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_saved_and_loaded_it_is_frozen_and_says_the_same(saved: Path) -> None:
    wanted, found = frozen_teacher(prediction="preconditioned"), teacher.load_teacher(saved)
    x, t, condition = given()
    assert found.prediction == "preconditioned"
    assert not found.training
    assert not any(weight.requires_grad for weight in found.parameters())
    assert torch.equal(found.velocity(x, t, condition), wanted.velocity(x, t, condition))
    half = teacher.load_teacher(saved, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}


def test_its_shape_needs_no_memory(saved: Path) -> None:
    with torch.device("meta"):
        new = new_teacher()
    for own in (teacher.load_on_meta(saved), new):
        own.check(**FITS)
        assert all(weight.is_meta for weight in own.parameters())


def test_diffusers_own_folder_in_shards_in_a_pipeline_teaches_velocities(tmp_path: Path) -> None:
    net = frozen_teacher().net
    net.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list(tmp_path.glob("transformer/*-of-*.safetensors"))) > 1
    found = teacher.load_teacher(tmp_path)
    assert found.prediction == "velocity"
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in found.net.state_dict().items())


def test_sd35_large_builds_without_memory() -> None:
    with torch.device("meta"):
        own = Teacher(SD3Transformer2DModel(**SD35_LARGE))
    assert (own.hidden_dim, own.num_layers, own.patch_size, own.latent_channels) == (2432, 38, 2, 16)
    assert (own.context_dim, own.pooled_width) == (4096, 2048)
    own.check(latent_channels=16, latent_size=128, context_dim=4096, pooled_width=2048)
    x, t = torch.empty(1, 16, 128, 128, device="meta"), torch.empty(1, device="meta")
    condition = Conditioning(torch.empty(1, 333, 4096, device="meta"), torch.empty(1, 2048, device="meta"))
    velocity, (tokens,) = own.forward_features(x, t, condition, [37])
    assert (velocity.shape, tokens.shape) == (x.shape, (1, 2432, 64, 64))


# --- what does not fit ---


FITS = {"latent_channels": 3, "latent_size": 8, "context_dim": 10, "pooled_width": 5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_channels": 16}, "takes latents of 3 channels, but the stage's have 16; name a teacher for the same"),
        ({"latent_size": 7}, "takes latents with sides divisible by 2, but the stage's have 7"),
        ({"latent_size": 10}, "has positions for latents up to 8×8, but the stage's have 10"),
        ({"context_dim": 384}, "takes a context of width 10, but its text encoders give 384"),
        ({"pooled_width": 0}, "takes a pooled embedding of width 5, but its text encoders give none"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(change: dict[str, int], words: str, saved: Path) -> None:
    own = teacher.load_teacher(saved)
    own.check(**FITS)
    with pytest.raises(InputError) as refused:
        own.check(**FITS | change)
    assert words in str(refused.value)
    assert str(refused.value).startswith(str(saved))


def _changed(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (lambda f: os.truncate(f / WEIGHTS, 20_000), f"{WEIGHTS}: cannot be read"),
    "empty weights": (lambda f: os.truncate(f / WEIGHTS, 0), f"{WEIGHTS}: cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: does not exist"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not valid JSON"),
    "another net": (lambda f: _changed(f, _class_name="UNet2DModel"), "describes UNet2DModel"),
    "wrong kind": (lambda f: _changed(f, num_layers="many"), "is not a valid configuration"),
    "of another depth": (lambda f: _changed(f, num_layers=4), "weights that do not fit config.json"),
    "of another width": (lambda f: _changed(f, joint_attention_dim=11), "context_embedder.weight: is of shape"),
    "other output": (lambda f: _changed(f, out_channels=4), "out_channels: cannot be 4"),
    "no positions": (lambda f: _changed(f, pos_embed_max_size=None), "pos_embed_max_size: cannot be None"),
    "bad meaning": (
        lambda f: _changed(f, prediction_type="noise"),
        "config.json: prediction_type: cannot be 'noise'",
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_told_in_one_line(
    damage: Callable[[Path], object], words: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(InputError) as refused:
        teacher.load_teacher(folder)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_truncated_weights_are_found_before_they_are_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    os.truncate(tmp_path / "copy" / WEIGHTS, 20_000)
    with pytest.raises(InputError, match="cannot be read"):
        teacher.load_on_meta(tmp_path / "copy")


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    own = frozen_teacher()
    own.net.proj_out.weight[0, 0] = torch.nan
    own.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"proj_out\.weight: holds values that are not finite"):
        teacher.load_teacher(tmp_path)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_no_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="name the folder"):
        teacher.load_teacher(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "pooled", "words"),
    [
        ({"num_layers": 0}, 5, "recipe.yaml: num_layers: "),
        ({"heads": 3}, 5, "recipe.yaml: heads: unknown key"),
        ({"num_attention_heads": 1, "attention_head_dim": 5}, 5, "not a multiple of 4"),
        ({}, 0, "set pooled: true"),
    ],
)
def test_a_shape_that_builds_no_net_is_refused(change: dict[str, int], pooled: int, words: str) -> None:
    sizes = {"latent_channels": 3, "context_dim": 10, "pooled_width": pooled, "sample_size": 8, "seed": 0}
    with pytest.raises(InputError) as refused:
        teacher.new_teacher(SHAPE | change, **sizes, source="recipe.yaml")
    assert words in str(refused.value)
