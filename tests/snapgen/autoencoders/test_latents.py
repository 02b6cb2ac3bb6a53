from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snapgen import progress
from snapgen.autoencoders import autoencoder, latents
from snapgen.autoencoders.latents import encode_dataset
from snapgen.data import dataset
from snapgen.data.dataset import ImageDataset, load_dataset
from snapgen.data.decoding import decode
from snapgen.errors import InputError
from snapgen.io import chunked
from tests.snapgen.data.test_dataset import picture, samples, shard

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of eight images, none held in memory."""
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latents, "ENCODE_BATCH_SIZE", 4)
    monkeypatch.setattr(chunked, "MAX_CHUNK_ROWS", 9)
    monkeypatch.setattr(dataset, "MAX_IN_MEMORY_BYTES", 1000)


def in_folder(root: Path) -> ImageDataset:
    (root / "train").mkdir(parents=True)
    (root / "val").mkdir()
    for i in range(30):
        (root / "train" / f"{i}.jpg").write_bytes(picture(i, "JPEG"))
    (root / "train" / "11.jpg").write_bytes(b"damaged")
    (root / "train" / "12.jpg").write_bytes(picture(12, "JPEG")[:60])
    return load_dataset(str(root), split="train", resolution=8)


def in_shards(root: Path) -> ImageDataset:
    (root / "train").mkdir(parents=True)
    (root / "val").mkdir()
    files = samples(20)
    files["00011.jpg"] = b"damaged"
    files["00012.jpg"] = files["00012.jpg"][:60]
    shard(root / "train" / "a.tar", files)
    shard(root / "train" / "b.tar", samples(10, 20))
    return load_dataset(str(root), split="train", resolution=8)


def number(caption: str) -> int:
    return int(caption.removeprefix("picture "))


@pytest.mark.parametrize("make", [in_folder, in_shards])
def test_damaged_images_leave_no_gap_between_latents_and_captions(make: Any, tmp_path: Path) -> None:
    images = make(tmp_path / "set")
    assert (len(images), images.skipped, images._in_memory) == (28, 2, None)
    coder = autoencoder.load_autoencoder("emoji")
    found = encode_dataset(images, coder, digest="d", device=CPU)
    assert found.shape == (28, coder.latent_channels, 8 // coder.factor, 8 // coder.factor)
    assert found.dtype == torch.float16
    assert {number(caption) for caption in images.captions} == {*range(30)} - {11, 12}
    for row, caption in enumerate(images.captions):
        pixels = decode(picture(number(caption), "JPEG"), 8)
        assert pixels is not None
        expected = coder.encode(pixels[None] / 127.5 - 1)[0].half()
        torch.testing.assert_close(found[torch.tensor([row])][0], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("make", [in_folder, in_shards])
def test_an_interrupted_pass_goes_on_where_it_was(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, coder = make(tmp_path / "set"), autoencoder.load_autoencoder("none")
    seen: list[Tensor] = []

    def until(last: int) -> None:
        def encode(batch: Tensor) -> Tensor:
            if len(seen) == last:
                raise KeyboardInterrupt
            seen.append(batch)
            return batch

        monkeypatch.setattr(coder, "encode", encode)
        seen.clear()

    until(3)
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(images, coder, digest="d", device=CPU)
    until(100)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO):
        found = encode_dataset(images, coder, digest="d", device=CPU)
    assert [len(batch) for batch in seen] == [4, 4, 4, 4, 4]  # the first eight are there
    assert "encoded 12 of 28 images" in caplog.text
    assert "encoded 28 of 28 images, 0 s left" in caplog.text
    assert torch.equal(found.materialize(), (images.pixels / 127.5 - 1).half())
    until(0)
    assert torch.equal(encode_dataset(images, coder, digest="d", device=CPU).materialize(), found.materialize())
    [lost, *_] = sorted((tmp_path / "cache" / "latents").iterdir(), key=lambda path: path.stat().st_mtime_ns)[1:]
    lost.unlink()
    until(100)
    assert torch.equal(encode_dataset(images, coder, digest="d", device=CPU).materialize(), found.materialize())
    assert [len(batch) for batch in seen] == [4, 4]


def test_another_set_autoencoder_or_resolution_is_computed_anew(tmp_path: Path) -> None:
    images, coder = in_folder(tmp_path / "set"), autoencoder.load_autoencoder("none")
    larger = load_dataset(str(tmp_path / "set"), split="train", resolution=10)
    kept = tmp_path / "cache" / "latents"
    for count, (given, digest) in enumerate([(images, "d"), (images, "e"), (larger, "d"), (images, "d")], start=1):
        encode_dataset(given, coder, digest=digest, device=CPU)
        assert len(list(kept.iterdir())) == 4 * min(count, 3)


def test_an_image_that_changed_since_is_no_silent_gap(tmp_path: Path) -> None:
    images = in_folder(tmp_path / "set")
    (tmp_path / "set" / "train" / f"{images.captions[20]}.jpg").write_bytes(b"gone bad")
    with pytest.raises(InputError, match="changed while"):
        encode_dataset(images, autoencoder.load_autoencoder("none"), digest="d", device=CPU)


def test_a_resolution_that_does_not_fit_is_named(tmp_path: Path) -> None:
    in_folder(tmp_path / "set")
    images = load_dataset(str(tmp_path / "set"), split="train", resolution=9)
    with pytest.raises(InputError, match=r"resolution: images of 9×9 do not fit"):
        encode_dataset(images, autoencoder.load_autoencoder("emoji"), digest="d", device=CPU)
