"""Text conditioning: captions under a list of encoders, merged into one context (arXiv 2412.09619; SD3's way).

Encoders joined on channels form a group (CLIP-L 768 + CLIP-G 1280 = 2048), each group is padded with zeros on channels
to the widest (Gemma2's 2304), and the groups stand one behind the other along the tokens. Each encoder can be left out
on its own, in training and in use: its part is zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from snapgen.conditioning import embeddings, text_encoder
from snapgen.config import Config
from snapgen.errors import InputError
from snapgen.io.chunked import ChunkedTensor


class TextEncoderConfig(Config):
    """One text encoder of a list."""

    encoder: str = text_encoder.MINILM
    """Name or folder, as `snapgen.conditioning.embeddings.encode` takes it."""
    tokens: int = Field(16, gt=0)
    """Captions are cut to so many."""
    layer: text_encoder.Layer = "last"
    """Which hidden states; SnapGen takes CLIP's penultimate."""
    join: Literal["tokens", "channels"] = "tokens"
    """How it is joined to the encoder before it in the list; the first has none before it."""
    dropout: float = Field(0.1, ge=0, le=1)
    """How often it is dropped in training, independently of the others. SnapGen's rate is not known; ours."""
    pooled: bool = False
    """Whether its pooled embedding is part of `Conditioning.pooled`."""


class Conditioning(NamedTuple):
    """What a net is told of its images."""

    context: Tensor
    """(B, N, W)."""
    pooled: Tensor | None
    """(B, P): the pooled embeddings joined on channels."""


class ConditioningDims(NamedTuple):
    """The shape of a condition."""

    context: int
    """Channels of the context."""
    tokens: int
    """Tokens of the context."""
    pooled: int
    """Channels of the pooled embedding, 0 if there is none."""


class EmbeddingSlice(NamedTuple):
    """Where one encoder's embeddings lie in the context and in the pooled embedding."""

    tokens: slice
    channels: slice
    pooled: slice


class EncodedCaptions:
    """The captions of a set under a list of encoders, encoded once, merged a batch at a time.

    Attributes:
        context_width, tokens: the context's channels and tokens.
        pooled_width: the pooled embedding's channels, 0 if there is none.
        encoders: how many encoders there are.
    """

    def __init__(self, tables: Sequence[embeddings.Embeddings], row: Tensor, places: Sequence[EmbeddingSlice]) -> None:
        self._tables, self._row, self._places = tables, row, places
        self.context_width, self.tokens, self.pooled_width = _extent(places)
        self.encoders = len(places)

    def __len__(self) -> int:
        return len(self._row)

    @property
    def device(self) -> torch.device:
        """Where the embeddings lie, and conditions are made."""
        return self._row.device

    @property
    def nbytes(self) -> int:
        """Bytes of all embeddings."""
        return sum(table.tokens.nbytes + table.pooled.nbytes for table in self._tables)

    def to(self, device: torch.device) -> EncodedCaptions:
        """The same, whole, on a device; for sets that fit."""
        tables = [embeddings.Embeddings(table.tokens.to(device), table.pooled.to(device)) for table in self._tables]
        return EncodedCaptions(tables, self._row.to(device), self._places)

    def condition(self, indices: Tensor, kept: Tensor | None = None) -> Conditioning:
        """The conditions of so many captions, float32.

        Args:
            indices: (B,) int64.
            kept: (B, encoders) bool; the tokens and the pooled embedding of a dropped encoder are zeros. None: all are
                kept.
        """
        rows = self._row[indices.to(self.device)]
        context = torch.zeros(len(rows), self.tokens, self.context_width, device=self.device)
        pooled = torch.zeros(len(rows), self.pooled_width, device=self.device)
        for number, (table, place) in enumerate(zip(self._tables, self._places, strict=True)):
            dropped = None if kept is None else ~kept[:, number].to(self.device)
            _put(table.tokens[rows], context[:, place.tokens, place.channels], dropped)
            if place.pooled.start < place.pooled.stop:
                _put(table.pooled[rows], pooled[:, place.pooled], dropped)
        return Conditioning(context, pooled if self.pooled_width else None)


def encode(
    captions: Sequence[str],
    encoders: Sequence[TextEncoderConfig],
    *,
    loaded: Sequence[tuple[Any, Any]] | None = None,
) -> EncodedCaptions:
    """Captions under each encoder of a list.

    Args:
        captions: an empty one is the null caption of classifier-free guidance: all zeros.
        encoders: at least one.
        loaded: the encoders themselves, each with its tokenizer, as
        `snapgen.conditioning.text_encoder.load_text_encoder` gives them: for a few prompts,
            nothing is kept. None: they are loaded if need be, and the embeddings kept on disk and read where they lie.

    Raises:
        InputError: if an encoder cannot be loaded or takes fewer tokens, or as `widths`.
    """
    different, row = embeddings.deduplicate(captions)
    if loaded is None:
        widths(encoders)
        tables = [
            embeddings.embed_captions(different, name=e.encoder, tokens=e.tokens, layer=e.layer) for e in encoders
        ]
    else:
        tables = []
        for e, (model, tokenizer) in zip(encoders, loaded, strict=True):
            found = text_encoder.encode_batch(model, tokenizer, different, tokens=e.tokens, layer=e.layer)
            tables.append(embeddings.Embeddings(ChunkedTensor([found["tokens"]]), ChunkedTensor([found["pooled"]])))
    shapes = [(table.tokens.shape[2], table.pooled.shape[1]) for table in tables]
    return EncodedCaptions(tables, row, layout(encoders, shapes))


def widths(encoders: Sequence[TextEncoderConfig], shapes: Sequence[tuple[int, int]] | None = None) -> ConditioningDims:
    """The shape of the conditions that a list of encoders gives.

    Args:
        encoders: at least one.
        shapes: as `layout` takes them; None: from the encoders' configurations.

    Raises:
        InputError: if there is no such encoder, or encoders joined on channels differ in tokens.
    """
    if shapes is None:
        shapes = [(text_encoder.width(e.encoder), text_encoder.pooled_width(e.encoder)) for e in encoders]
    return _extent(layout(encoders, shapes))


def layout(encoders: Sequence[TextEncoderConfig], shapes: Sequence[tuple[int, int]]) -> list[EmbeddingSlice]:
    """Where each encoder's embeddings go.

    Args:
        encoders: at least one.
        shapes: the channels of each one's tokens and of its pooled embedding.

    Raises:
        InputError: if encoders joined on channels differ in tokens.
    """
    if not encoders:
        raise InputError("encoders", "is empty", f"name at least one, e.g. {text_encoder.MINILM}")
    found: list[EmbeddingSlice] = []
    for number, (encoder, (width, pooled_width)) in enumerate(zip(encoders, shapes, strict=True)):
        _, tokens, pooled = _extent(found)
        span, first = slice(tokens, tokens + encoder.tokens), 0
        if encoder.join == "channels":
            _check_join(encoders, number)
            span, first = found[-1].tokens, found[-1].channels.stop
        own = pooled_width if encoder.pooled else 0
        found.append(EmbeddingSlice(span, slice(first, first + width), slice(pooled, pooled + own)))
    return found


def _check_join(encoders: Sequence[TextEncoderConfig], number: int) -> None:
    if number == 0:
        raise InputError("encoders", "has no encoder before it", "use join: tokens", place="[0].join")
    own, other = encoders[number].tokens, encoders[number - 1].tokens
    if own != other:
        problem = f"joins {own} tokens on channels with {other}"
        raise InputError("encoders", problem, "give both the same number of tokens", place=f"[{number}].tokens")


def _extent(places: Sequence[EmbeddingSlice]) -> ConditioningDims:
    def end(name: Literal["tokens", "channels", "pooled"]) -> int:
        return max((getattr(place, name).stop for place in places), default=0)

    return ConditioningDims(context=end("channels"), tokens=end("tokens"), pooled=end("pooled"))


def _put(found: Tensor, place: Tensor, dropped: Tensor | None) -> None:
    """Copies (B, …) into a view of its shape, but for the rows dropped."""
    place.copy_(found)
    if dropped is not None:
        place[dropped] = 0
