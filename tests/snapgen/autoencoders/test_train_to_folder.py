"""A training leaves a folder that loads, resumes where it was killed, or says what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snapgen.autoencoders import autoencoder, stepwise
from snapgen.autoencoders.autoencoder import AutoencoderWithDecoder, ConvAutoencoder, read_decoder
from snapgen.autoencoders.perceptual import PerceptualLoss
from snapgen.autoencoders.psnr import psnr
from snapgen.autoencoders.train_to_folder import CHECKPOINT, train_to_folder
from snapgen.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Discs on white, a class a folder, already split."""
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    rows, columns = np.mgrid[:16, :16]
    for split, count in (("train", 6), ("val", 3)):
        home = tmp_path / "discs" / split / "disc"
        home.mkdir(parents=True)
        for index in range(count):
            pixels = np.full((16, 16, 3), 255, np.uint8)
            pixels[(rows - 8) ** 2 + (columns - 8) ** 2 < 20 + 5 * index] = (40 * index, 90, 200)
            Image.fromarray(pixels).save(home / f"{index}.png")
    return tmp_path / "discs"


def test_it_writes_what_load_reads(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines: list[str] = []
    reports: list[tuple[float, str]] = []
    quality = train_to_folder(
        out,
        steps=2,
        data=str(folder),
        resolutions=(16,),
        progress=lambda *report: reports.append(report),
        log=lines.append,
    )
    assert quality.keys() == {16}
    assert "on 6 images of" in lines[0]
    assert [fraction for fraction, _ in reports] == [0.5, 1]
    assert reports[-1][1].startswith("step 2 of 2, ")
    assert isinstance(autoencoder.load_autoencoder(out), ConvAutoencoder)
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    card = (out / "README.md").read_text()
    assert "`archsearch train-autoencoder --out FOLDER --steps 2" in card
    assert "3 images" in card
    assert not list(tmp_path.glob(".out*")), "nothing is left beside it"


def test_it_trains_a_decoder_for_an_encoder(folder: Path, tmp_path: Path) -> None:
    train_to_folder(tmp_path / "out", steps=2, data=str(folder), resolutions=(16,), encoder="emoji")
    pair = AutoencoderWithDecoder(autoencoder.load_autoencoder("emoji"), read_decoder(tmp_path / "out"))
    images = torch.zeros(1, 3, 16, 16)
    assert pair.decode(pair.encode(images)).shape == images.shape
    with pytest.raises(InputError, match="describes TinyDecoder"):
        autoencoder.load_autoencoder(tmp_path / "out")


@pytest.fixture
def interrupted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of a training of four steps, stopped after the third with a checkpoint of the second."""
    told: list[int] = []

    def stop(fraction: float, message: str = "") -> None:  # noqa: ARG001 - a progress callback
        step = round(4 * fraction)
        told.append(step)
        if step == 2:  # the checkpoint was written before
            monkeypatch.setattr(stepwise, "CHECKPOINT_INTERVAL_SECONDS", 1e9)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stepwise, "CHECKPOINT_INTERVAL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train_to_folder(tmp_path / "out", steps=4, data=str(folder), resolutions=(16,), progress=stop)
    assert told == [1, 2, 3]
    return tmp_path / "out"


def test_the_same_call_resumes_to_the_same_weights(folder: Path, interrupted: Path, tmp_path: Path) -> None:
    train_to_folder(tmp_path / "unbroken", steps=4, data=str(folder), resolutions=(16,))
    assert [file.name for file in interrupted.iterdir()] == [CHECKPOINT]
    lines: list[str] = []
    train_to_folder(interrupted, steps=4, data=str(folder), resolutions=(16,), log=lines.append)
    assert "from step 2 on" in lines[0]
    name = "diffusion_pytorch_model.safetensors"
    assert (interrupted / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert not (interrupted / CHECKPOINT).exists()


def test_other_arguments_leave_a_checkpoint_alone(folder: Path, interrupted: Path) -> None:
    before = (interrupted / CHECKPOINT).read_bytes()
    with pytest.raises(InputError, match="belongs to a training run with a different --seed"):
        train_to_folder(interrupted, steps=4, data=str(folder), resolutions=(16,), seed=1)
    with pytest.raises(InputError, match="a different --steps"):
        train_to_folder(interrupted, steps=5, data=str(folder), resolutions=(16,))
    assert (interrupted / CHECKPOINT).read_bytes() == before
    (interrupted / CHECKPOINT).write_bytes(before[: len(before) // 2])
    with pytest.raises(InputError, match="is damaged"):
        train_to_folder(interrupted, steps=4, data=str(folder), resolutions=(16,))


def test_file_for_a_folder_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="out: is a file; name a folder"):
        train_to_folder(tmp_path / "out", steps=1)


def test_perceptual_loss_orders_by_likeness() -> None:
    random = torch.Generator().manual_seed(0)
    loss, state = PerceptualLoss(), torch.get_rng_state()
    images = torch.rand(4, 3, 32, 32, generator=random) * 2 - 1
    noise = torch.randn(images.shape, generator=random)
    near, far = (float(loss((images + size * noise).clamp(-1, 1), images)) for size in (0.05, 0.5))
    assert float(loss(images, images)) == 0
    assert 0 < near < far / 2
    assert not any(parameter.requires_grad for parameter in loss.train().parameters())
    assert not any(module.training for module in loss.modules())
    PerceptualLoss()
    assert torch.equal(state, torch.get_rng_state())


def test_psnr_is_the_textbooks() -> None:
    images = torch.full((5, 3, 8, 8), 100, dtype=torch.uint8)

    class Brighter(autoencoder.IdentityAutoencoder):
        def _decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents + 10 / 127.5

    quality = psnr(Brighter(), images)
    assert quality.value == pytest.approx(20 * np.log10(255 / 10), abs=0.01)
    assert quality.low == pytest.approx(quality.high)
    assert str(quality).endswith("5 images")
