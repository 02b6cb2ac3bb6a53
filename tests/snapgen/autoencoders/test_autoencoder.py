"""Autoencoders: what ships reconstructs, what is trained repeats, what is damaged is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import (
    SHIPPED,
    Autoencoder,
    AutoencoderWithDecoder,
    ConvAutoencoder,
    IdentityAutoencoder,
    KLAutoencoder,
)
from snapgen.autoencoders.psnr import psnr
from snapgen.autoencoders.training import DecoderTrainer, DecoderTrainingConfig, build_tiny_decoder, new_autoencoder
from snapgen.data.dataset import load_dataset
from snapgen.data.pixels import to_float
from snapgen.errors import InputError

SMALL: dict[str, Any] = {
    "latent_channels": 4,
    "encoder_widths": (8, 8, 16),
    "encoder_blocks": (0, 1, 1),
    "decoder_widths": (8, 8, 16),
    "decoder_blocks": (0, 1, 1),
    "mid_blocks": 0,
    "norm_groups": 4,
}
QUICK = DecoderTrainingConfig(steps=3, batch_size=8, warmup_steps=1, adversarial_share=0.4, latent_noise=0.1)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=[32, 64])
def validation(request: pytest.FixtureRequest) -> Tensor:
    """Images of concepts that training never saw: uint8 (N, 3, side, side)."""
    return next(iter(load_dataset("emoji", split="val", resolution=request.param).batches(96 * 32 // request.param)))


@pytest.fixture(scope="module")
def few() -> dict[int, Tensor]:
    """A handful of training images by resolution."""
    return {side: next(iter(load_dataset("emoji", split="train", resolution=side).batches(12))) for side in (32, 64)}


@pytest.fixture
def kl_folder(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=6,
            norm_num_groups=4,
            scaling_factor=1.5,
            shift_factor=0.06,
        )
    vae.save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


# What ships


def test_shipped_reconstructs_unseen_images(validation: Tensor) -> None:
    quality = psnr(autoencoder.load_autoencoder("emoji"), validation)
    assert quality.low > {32: 23.5, 64: 28.5}[validation.shape[-1]]


def test_shipped_latents_are_standard(validation: Tensor) -> None:
    ae = autoencoder.load_autoencoder("emoji")
    latents = ae.encode(to_float(validation))
    side = validation.shape[-1] // 4
    assert latents.shape == (len(validation), 4, side, side)
    assert (ae.factor, ae.latent_channels) == (4, 4)
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert ((latents.std((0, 2, 3)) - 1).abs() < 0.3).all()
    assert torch.equal(latents, ae.encode(to_float(validation))), "encoding draws nothing by chance"


def test_shipped_decoder_bears_inexact_latents(validation: Tensor) -> None:
    ae = autoencoder.load_autoencoder("emoji")
    images = to_float(validation)
    latents = ae.encode(images)
    noise = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    error = (ae.decode(latents + noise) - images).square().mean()
    assert 10 * torch.log10(4 / error) > 20


def test_shipped_is_small_and_frozen() -> None:
    assert sum(file.stat().st_size for file in SHIPPED["emoji"].iterdir()) < 1_000_000
    ae = autoencoder.load_autoencoder("emoji")
    assert not ae.training
    assert not any(parameter.requires_grad for parameter in ae.parameters())
    assert {parameter.dtype for parameter in ae.parameters()} == {torch.float32}


def test_decoded_images_are_in_range() -> None:
    image = autoencoder.load_autoencoder("emoji").decode(torch.full((1, 4, 2, 3), 9.0))
    assert image.shape == (1, 3, 8, 12)
    assert image.abs().max() <= 1


# Training


def test_training_lowers_the_loss(few: dict[int, Tensor]) -> None:
    quick = QUICK.model_copy(update={"steps": 30, "adversarial_share": 0.1, "resolutions": (32,)})
    trainer = DecoderTrainer(new_autoencoder(0, **SMALL), few, quick)
    steps = [trainer.step() for _ in range(30)]
    losses = [float(step["l1"] + step["mse"] + step["perceptual"]) for step in steps]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def test_progress_rises_to_the_end_and_names_the_step(few: dict[int, Tensor]) -> None:
    reports: list[tuple[float, str]] = []
    quick = QUICK.model_copy(update={"steps": 4})
    DecoderTrainer(new_autoencoder(0, **SMALL), few, quick).complete(lambda *report: reports.append(report))
    assert [fraction for fraction, _ in reports] == [0.25, 0.5, 0.75, 1]
    assert reports[-1][1].startswith("step 4 of 4, l1 0.")


def test_training_repeats_from_its_seed(few: dict[int, Tensor]) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        state = torch.get_rng_state()
        model = new_autoencoder(seed, **SMALL)
        DecoderTrainer(model, few, QUICK.model_copy(update={"seed": seed})).complete()
        assert torch.equal(state, torch.get_rng_state()), "the global random state is left alone"
        return dict(model.state_dict())

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_statistics_are_those_of_the_encoder(few: dict[int, Tensor], share: float) -> None:
    model = new_autoencoder(0, **SMALL)
    DecoderTrainer(model, few, QUICK.model_copy(update={"adversarial_share": share})).complete()
    with torch.no_grad():
        latents = torch.cat([model.encode(to_float(few[side])).transpose(0, 1).flatten(1) for side in (32, 64)], 1)
    assert torch.allclose(latents.mean(1), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std(1, correction=0), torch.ones(4), atol=1e-3)


def test_decoder_stage_leaves_the_encoder(few: dict[int, Tensor]) -> None:
    model = new_autoencoder(0, **SMALL)
    encoder, decoder = ({k: v.clone() for k, v in part.state_dict().items()} for part in (model.encoder, model.decoder))
    DecoderTrainer(model, few, QUICK.model_copy(update={"adversarial_share": 1.0})).complete()
    assert all(torch.equal(encoder[name], weight) for name, weight in model.encoder.state_dict().items())
    assert not all(torch.equal(decoder[name], weight) for name, weight in model.decoder.state_dict().items())


def test_tiny_decoder_learns_another_encoders_latents(few: dict[int, Tensor], kl_folder: Path) -> None:
    given = autoencoder.load_autoencoder(kl_folder)
    before = {name: weight.clone() for name, weight in given.state_dict().items()}
    decoder = build_tiny_decoder(given, seed=0)
    count = sum(parameter.numel() for parameter in decoder.parameters())
    assert abs(count / 1.38e6 - 1) < 0.02
    DecoderTrainer(decoder, few, QUICK.model_copy(update={"batch_size": 2}), given).complete()
    assert all(torch.equal(before[name], weight) for name, weight in given.state_dict().items())
    pair = AutoencoderWithDecoder(given, decoder)
    assert pair.decode(pair.encode(to_float(few[32][:1]))).shape == (1, 3, 32, 32)


# Files


def test_saved_and_loaded_is_identical(tmp_path: Path, few: dict[int, Tensor]) -> None:
    model = new_autoencoder(0, **SMALL)
    model.measure_latents(iter([to_float(few[32])]))
    model.save_pretrained(tmp_path)
    again = autoencoder.load_autoencoder(tmp_path)
    images = to_float(few[64])
    assert torch.equal(again.encode(images), model.encode(images))
    assert torch.equal(again.decode(again.encode(images)), model.decode(model.encode(images)))


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    new_autoencoder(0, **SMALL).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert autoencoder.digest(tmp_path / "a") == autoencoder.digest(str(tmp_path / "b"))
    weights = load_file(tmp_path / "b" / WEIGHTS)
    weights["mean"] += 1
    save_file(weights, tmp_path / "b" / WEIGHTS)
    digests = [autoencoder.digest(name) for name in (tmp_path / "a", tmp_path / "b", "emoji", "none")]
    assert len(set(digests)) == 4
    assert all(len(digest) == 16 for digest in digests)


def test_kl_autoencoder_by_path(kl_folder: Path) -> None:
    ae = autoencoder.load_autoencoder(kl_folder)
    assert isinstance(ae, KLAutoencoder)
    assert (ae.factor, ae.latent_channels) == (8, 6)
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = ae.encode(images)
    assert latents.shape == (2, 6, 4, 6)
    vae = AutoencoderKL.from_pretrained(kl_folder)
    mode = vae.encode(images).latent_dist.mode()
    assert torch.allclose(latents, (mode - 0.06) * 1.5, atol=1e-5)
    assert torch.allclose(ae.decode(latents), vae.decode(mode).sample.clamp(-1, 1), atol=1e-5)


def test_pipeline_folder_gives_its_vae(kl_folder: Path, tmp_path: Path) -> None:
    shutil.move(kl_folder, tmp_path / "pipeline" / "vae")
    assert isinstance(autoencoder.load_autoencoder(tmp_path / "pipeline"), KLAutoencoder)


def test_pixels_pass_through() -> None:
    ae = autoencoder.load_autoencoder("none")
    assert isinstance(ae, IdentityAutoencoder)
    images = torch.rand(1, 3, 5, 7) * 2 - 1
    assert torch.equal(ae.decode(ae.encode(images)), images)


def test_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        autoencoder.load_autoencoder("emoji").encode(torch.zeros(1, 3, 32, 30))


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def rewritten(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return rewrite


def reconfigured(**values: Any) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return rewrite


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "cannot be read"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "cannot be read"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\0" * 4096), "cannot be read"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no diffusion_pytorch_model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: does not exist"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: is not a JSON object"),
        (reconfigured(_class_name="UNet2DModel"), "_class_name: describes UNet2DModel"),
        (reconfigured(latent_channels=5), WEIGHTS),
        (reconfigured(norm_groups=3), "multiples of 3"),
        (
            rewritten(lambda weights: weights.pop("std")),
            "std: is missing (weights that do not fit config.json: 1)",
        ),
        (rewritten(lambda weights: weights["mean"].fill_(torch.nan)), "mean: holds values that are not finite"),
    ],
)
def test_damaged_folder_is_named(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    folder = tmp_path / "ae"
    new_autoencoder(0, **SMALL).save_pretrained(folder)
    damage(folder)
    with pytest.raises(InputError) as caught:
        autoencoder.load_autoencoder(folder)
    message = str(caught.value)
    assert words in message
    assert str(folder) in message
    assert "\n" not in message


@pytest.mark.parametrize("use", [autoencoder.load_autoencoder, autoencoder.digest])
def test_what_is_not_there_is_named(use: Callable[[Path | str], object], tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="does not exist; name an autoencoder's folder, OWNER/NAME on the hub, or one of: emoji, none"
    ):
        use("emojis")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file, not a folder"):
        use(tmp_path / "file")


def test_every_kind_is_an_autoencoder(kl_folder: Path) -> None:
    assert all(isinstance(autoencoder.load_autoencoder(name), Autoencoder) for name in ("emoji", "none", kl_folder))
    assert isinstance(autoencoder.load_autoencoder("emoji"), ConvAutoencoder)
