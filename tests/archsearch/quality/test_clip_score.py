"""The CLIP score against a CLIP of random weights, run by hand; the preparation against PIL."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from archsearch.quality import clip_score
from snapgen.errors import InputError
from tests.snapgen import encoders

CAPTIONS = ["a red fox", "the moon", "a fox on the moon"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.whole_clip(tmp_path_factory.mktemp("clip"))


def pictures(count: int = 3, height: int = 20, width: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def by_hand(folder: Path, images: torch.Tensor, captions: list[str]) -> list[float]:
    """One image of the model's size and one caption at a time: numpy, and transformers' own forward pass."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for image, caption in zip(images, captions, strict=True):
        values = (image.permute(1, 2, 0).numpy() / 255 - np.array(clip_score.MEAN)) / np.array(clip_score.STD)
        pixels = torch.tensor(values.transpose(2, 0, 1), dtype=torch.float32)[None]
        with torch.no_grad():
            both = model(input_ids=tokenizer(caption, return_tensors="pt")["input_ids"], pixel_values=pixels)
        a, b = both.image_embeds[0].double().numpy(), both.text_embeds[0].double().numpy()
        found.append(float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)))
    return found


def test_it_is_the_cosine_of_both_embeddings(folder: Path) -> None:
    images = pictures(height=8, width=8)
    found = clip_score.load_clip_score(str(folder))(images, CAPTIONS)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(by_hand(folder, images, CAPTIONS), abs=1e-6)
    assert len(set(found.tolist())) == 3


def test_images_are_shrunk_as_pil_does(folder: Path) -> None:
    [image] = pictures(1)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BICUBIC)
    values = (np.asarray(picture) / 255 - np.array(clip_score.MEAN)) / np.array(clip_score.STD)
    [found] = clip_score.load_clip_score(str(folder)).preprocess(image[None])
    assert np.allclose(found.permute(1, 2, 0), values, atol=2 / 255 / min(clip_score.STD))  # PIL rounds in between


def test_images_are_cut_to_a_square_about_their_centre(folder: Path) -> None:
    clip = clip_score.load_clip_score(str(folder))
    wide = pictures(1, height=8, width=14)
    assert torch.equal(clip.preprocess(wide), clip.preprocess(wide[..., 3:11]))


def test_the_folder_says_how_colours_are_centred(tmp_path: Path) -> None:
    home = encoders.whole_clip(tmp_path / "clip")
    (home / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    images = pictures(1, height=8, width=8)
    assert torch.allclose(clip_score.load_clip_score(str(home)).preprocess(images), images / 255)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda home: (home / "config.json").unlink(), "config.json"),
        (lambda home: (home / "config.json").write_text("{"), "config.json"),
        (lambda home: (home / "tokenizer.json").unlink(), "tokenizer"),
        (lambda home: (home / "model.safetensors").write_bytes(b"nothing"), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_said_so(tmp_path: Path, harm: object, message: str) -> None:
    home = encoders.whole_clip(tmp_path / "clip")
    harm(home)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        clip_score.load_clip_score(str(home))


def test_a_text_encoder_alone_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contains CLIPTextModel, not a CLIPModel"):
        clip_score.load_clip_score(str(encoders.clip(tmp_path / "text")))


def test_a_name_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        clip_score.load_clip_score(str(tmp_path / "none"))
