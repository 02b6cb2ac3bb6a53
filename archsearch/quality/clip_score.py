"""The CLIP score: the cosine of CLIP's embeddings of an image and of its caption (arXiv 2104.08718)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from snapgen.conditioning import text_encoder
from snapgen.errors import InputError, first_line
from snapgen.io import hub

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the colours that CLIP was trained on, in [0, 1], where its folder does not say (arXiv 2103.00020's code)."""
BATCH = 32
_FILES = ("*.json", "*.txt", "model*.safetensors")
_REMEDY = "name the folder of a Hugging Face CLIPModel, or OWNER/NAME on the hub"


@dataclass(frozen=True)
class ClipScore:
    """A CLIP with its tokenizer, and how images are brought to it."""

    model: Any
    """transformers' CLIPModel."""
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """The cosine of each image (N, 3, H, W) uint8 and its caption: (N,) float64 on the CPU."""
        assert len(images) == len(captions), f"{len(images)} images, {len(captions)} captions"
        found = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            seen, said = self.of_images(images[part]), self.of_captions(captions[part])
            found.append(functional.cosine_similarity(seen.double(), said.double(), dim=1).cpu())
        return torch.cat(found)

    def of_images(self, images: Tensor) -> Tensor:
        """Projected embeddings of images (N, 3, H, W) uint8: (N, D)."""
        output = self.model.vision_model(pixel_values=self.prepared(images))
        embeddings: Tensor = self.model.visual_projection(output.pooler_output)
        return embeddings

    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """Projected embeddings of captions, cut to what the model takes: (N, D)."""
        most = text_encoder.max_length(self.model.text_model, self.tokenizer)
        ids = self.tokenizer(list(captions), padding=True, truncation=True, max_length=most, return_tensors="pt")
        device = self.model.device
        given = {name: ids[name].to(device) for name in ("input_ids", "attention_mask")}
        embeddings: Tensor = self.model.text_projection(self.model.text_model(**given).pooler_output)
        return embeddings

    def prepared(self, images: Tensor) -> Tensor:
        """As CLIP's own processor: shorter side by bicubic, centre cut out, colours centred and scaled."""
        side = int(self.model.config.vision_config.image_size)
        values = images.to(self.model.device).float()
        height, width = values.shape[-2:]
        shape = side * height // min(height, width), side * width // min(height, width)
        if shape != (height, width):
            values = functional.interpolate(values, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
        values = values[..., top : top + side, left : left + side] / 255
        mean, std = (values.new_tensor(one)[:, None, None] for one in (self.mean, self.std))
        return (values - mean) / std


def load_clip_score(name: str, device: torch.device | None = None) -> ClipScore:
    """A CLIP by its folder, or by its name on the hub.

    Raises:
        InputError: if there is none, or it is another model, or lacks files.
    """
    import transformers

    from snapgen.progress import silence_libraries

    folder = hub.resolve_model_folder(name, _FILES, remedy=_REMEDY)
    config = _read(folder / "config.json")
    if config is None:
        raise InputError(name, "is no folder with a model's config.json", _REMEDY)
    if config.get("model_type") != "clip" or "CLIPModel" not in (config.get("architectures") or ()):
        kind = ", ".join(config.get("architectures") or ()) or config.get("model_type") or "an unnamed model"
        raise InputError(name, f"holds {kind}, not a CLIPModel", _REMEDY)
    if not text_encoder.has_vocabulary(folder):
        raise InputError(name, "holds no tokenizer", "put the tokenizer's files beside the model's config.json")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with silence_libraries():
            model, info = transformers.CLIPModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # damaged files raise anything, from KeyError to SafetensorError
        raise InputError(name, f"cannot be loaded as a CLIPModel ({first_line(error)})", _REMEDY) from None
    if info["missing_keys"]:
        raise InputError(name, f"its weights lack {sorted(info['missing_keys'])[0]}", _REMEDY)
    if tokenizer.pad_token is None:  # CLIP reads up to the first end token: what stands behind it is never seen
        tokenizer.pad_token = tokenizer.eos_token
    colours = _read(folder / "preprocessor_config.json") or {}
    mean, std = tuple(colours.get("image_mean") or MEAN), tuple(colours.get("image_std") or STD)
    return ClipScore(model.eval().to(device or torch.device("cpu")), tokenizer, mean, std)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
