"""Every field of a foreign autoencoder's configuration is followed or refused, and its files are read in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.pruned_decoder import decode_image, prune_decoder
from snapgen.coreml.kl_decoder import KLDecoder
from snapgen.errors import InputError

MEAN, STD = [0.2, -1.0, 0.5, 3.0], [0.5, 2.0, 1.0, 0.1]


def vae(**fields: Any) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            **fields,
        ).eval()


def saved(folder: Path, **fields: Any) -> Path:
    vae(**fields).save_pretrained(folder)
    return folder


def images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def column(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def test_means_and_deviations_of_channels_are_followed(tmp_path: Path) -> None:
    """As StableDiffusionXLPipeline decodes: latents · std / scaling_factor + mean."""
    own = autoencoder.load_autoencoder(saved(tmp_path, latents_mean=MEAN, latents_std=STD, scaling_factor=0.5))
    theirs = vae()
    latents = own.encode(images())
    mode = theirs.encode(images()).latent_dist.mode()
    torch.testing.assert_close(latents, (mode - column(MEAN)) / column(STD) * 0.5)
    expected = theirs.decode(latents * column(STD) / 0.5 + column(MEAN)).sample
    torch.testing.assert_close(own.decode(latents), expected.clamp(-1, 1))


def test_exported_and_pruned_decoders_follow_them_too() -> None:
    net = vae(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = vae().decode(latents * column(STD) / 0.5 + column(MEAN)).sample
    torch.testing.assert_close(decode_image(net, latents), expected, rtol=1e-4, atol=1e-5)
    pruned = prune_decoder(net, 0.0)
    assert pruned.config.latents_mean == MEAN
    torch.testing.assert_close(KLDecoder(net)(latents), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"latents_mean": MEAN}, "latents_std: does not give a number for each of 4 channels"),
        ({"latents_std": STD}, "latents_mean: does not give a number"),
        ({"latents_mean": MEAN[:3], "latents_std": STD}, "latents_mean: does not give a number"),
        ({"latents_mean": MEAN, "latents_std": [0.5, 0.0, 1.0, 1.0]}, "latents_std: does not give"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, "shift_factor: contradicts latents_mean"),
        ({"scaling_factor": None}, "scaling_factor: is not a number other than 0"),
        ({"scaling_factor": 0}, "scaling_factor: is not a number other than 0"),
        ({"shift_factor": [0.1]}, "shift_factor: is not a number"),
        ({"latents_bias": 3}, "latents_bias: is 3, and AutoencoderKL has no such field here"),
    ],
)
def test_fields_that_cannot_be_followed_are_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    file = saved(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(InputError, match=words) as caught:
        autoencoder.load_autoencoder(tmp_path)
    assert "config.json" in str(caught.value)


def test_other_images_than_rgb_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in_channels: is 4, where images have 3 channels"):
        autoencoder.load_autoencoder(saved(tmp_path, in_channels=4))


@pytest.mark.parametrize(
    "options", [{"max_shard_size": "10KB"}, {"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "10KB"}]
)
@pytest.mark.parametrize("place", ["", "vae"])
def test_shards_and_variants_load(tmp_path: Path, options: dict[str, Any], place: str) -> None:
    net = vae()
    (net.half() if "variant" in options else net).save_pretrained(tmp_path / place, **options)
    files = list((tmp_path / place).glob("*.safetensors"))
    assert (len(files) > 1) == ("max_shard_size" in options)
    own = autoencoder.load_autoencoder(tmp_path)
    mode = net.float().encode(images()).latent_dist.mode()
    torch.testing.assert_close(own.encode(images()), mode * 0.18215)
    digest = autoencoder.digest(tmp_path)
    content = bytearray(files[-1].read_bytes())
    content[-1] ^= 1
    files[-1].write_bytes(content)
    assert autoencoder.digest(tmp_path) != digest


def test_a_half_precision_autoencoder_on_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae().half().save_pretrained(tmp_path / "hub" / "vae", variant="fp16")
    fetched = tmp_path / "fetched"
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "someone/half"
        asked.append(allow_patterns)
        for file in (tmp_path / "hub").rglob("*.*"):
            relative = file.relative_to(tmp_path / "hub")
            if any(relative.match(pattern) for pattern in allow_patterns):
                (fetched / relative).parent.mkdir(parents=True, exist_ok=True)
                (fetched / relative).write_bytes(file.read_bytes())
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert autoencoder.load_autoencoder("someone/half").latent_channels == 4
    assert len(asked) == 2
    assert "vae/diffusion_pytorch_model.fp16-*-of-*.safetensors" in asked[1]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_checkpoint_of_one_file_names_the_call_that_makes_a_folder_of_it(tmp_path: Path, suffix: str) -> None:
    from snapgen.conditioning import text_encoder
    from snapgen.conversion.from_diffusers import from_diffusers
    from snapgen.objectives.teacher import load_teacher

    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"")
    for read, reader in (
        (autoencoder.load_autoencoder, "AutoencoderKL"),
        (from_diffusers, "StableDiffusionPipeline"),
        (load_teacher, "SD3Transformer2DModel"),
        (text_encoder.width, "StableDiffusionPipeline"),
    ):
        with pytest.raises(InputError) as caught:
            read(str(file))  # type: ignore[operator]
        call = f"diffusers.{reader}.from_single_file('{file}').save_pretrained('FOLDER')"
        assert call in str(caught.value)
