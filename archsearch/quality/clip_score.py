"""CLIP score: cosine similarity of CLIP's embeddings of an image and its caption (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from snapgen.conditioning import text_encoder
from snapgen.errors import InputError, first_line
from snapgen.io import hub
from snapgen.io.pretrained import load_transformers_model

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Default mean and standard deviation of colors in [0, 1], from the code of arXiv 2103.00020."""

BATCH_SIZE = 32
"""Number of images and captions that are encoded at once."""

_FILES = ("*.json", "*.txt", "model*.safetensors")
_REMEDY = "name the folder of a Hugging Face CLIPModel, or OWNER/NAME on the hub"


@dataclass(frozen=True)
class ClipScore:
    """A CLIP model with its tokenizer and image normalization."""

    model: Any
    """transformers' CLIPModel."""
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine similarity of each image, (N, 3, H, W) uint8, and its caption: (N,) float64 on the CPU."""
        assert len(images) == len(captions), f"{len(images)} images, {len(captions)} captions"
        cosines = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            image_embeds, text_embeds = self.encode_images(images[batch]), self.encode_captions(captions[batch])
            cosines.append(functional.cosine_similarity(image_embeds.double(), text_embeds.double(), dim=1).cpu())
        return torch.cat(cosines)

    def encode_images(self, images: Tensor) -> Tensor:
        """Projected embeddings of images (N, 3, H, W) uint8: (N, D)."""
        output = self.model.vision_model(pixel_values=self.preprocess(images))
        embeddings: Tensor = self.model.visual_projection(output.pooler_output)
        return embeddings

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Projected embeddings of captions, truncated to the model's maximum length: (N, D)."""
        max_length = text_encoder.max_length(self.model.text_model, self.tokenizer)
        ids = self.tokenizer(list(captions), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        device = self.model.device
        inputs = {name: ids[name].to(device) for name in ("input_ids", "attention_mask")}
        embeddings: Tensor = self.model.text_projection(self.model.text_model(**inputs).pooler_output)
        return embeddings

    def preprocess(self, images: Tensor) -> Tensor:
        """Preprocess images like CLIP's processor: bicubic resize of the shorter side, center crop, normalization.

        (N, 3, H, W) uint8 -> (N, 3, side, side) float32.
        """
        side = int(self.model.config.vision_config.image_size)
        values = images.to(self.model.device).float()
        height, width = values.shape[-2:]
        shape = side * height // min(height, width), side * width // min(height, width)
        if shape != (height, width):
            values = functional.interpolate(values, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
        values = values[..., top : top + side, left : left + side] / 255
        mean, std = (values.new_tensor(colors)[:, None, None] for colors in (self.mean, self.std))
        return (values - mean) / std


def load_clip_score(name: str, device: torch.device | None = None) -> ClipScore:
    """Load a CLIP model from a folder or by its name on the hub.

    Raises:
        InputError: if it does not exist, is another kind of model, or lacks files.
    """
    import transformers

    from snapgen.progress import silence_libraries

    folder = hub.resolve_model_folder(name, _FILES, remedy=_REMEDY)
    config = text_encoder.read_config(folder / "config.json")
    if config is None:
        raise InputError(name, "is not a folder with a model's config.json", _REMEDY)
    if config.get("model_type") != "clip" or "CLIPModel" not in (config.get("architectures") or ()):
        kind = ", ".join(config.get("architectures") or ()) or config.get("model_type") or "an unnamed model"
        raise InputError(name, f"contains {kind}, not a CLIPModel", _REMEDY)
    if not text_encoder.has_vocabulary(folder):
        raise InputError(name, "contains no tokenizer", "add the tokenizer's files to the folder")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with silence_libraries():
            model_config = transformers.CLIPConfig.from_pretrained(folder, **local)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # damaged files raise anything, from KeyError to SafetensorError
        raise InputError(name, f"cannot be loaded as a CLIPModel ({first_line(error)})", _REMEDY) from None
    model = load_transformers_model(folder, transformers.CLIPModel, model_config)
    if tokenizer.pad_token is None:  # CLIP ignores everything after the first end token
        tokenizer.pad_token = tokenizer.eos_token
    preprocessor = text_encoder.read_config(folder / "preprocessor_config.json") or {}
    mean, std = tuple(preprocessor.get("image_mean") or MEAN), tuple(preprocessor.get("image_std") or STD)
    return ClipScore(model.to(device or torch.device("cpu")), tokenizer, mean, std)
