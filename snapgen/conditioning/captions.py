"""Text conditioning: captions encoded by several text encoders and merged into one context.

SnapGen (arXiv 2412.09619) uses three encoders; they are merged as in SD3. Encoders joined on channels form a group
(CLIP-L 768 + CLIP-G 1280 = 2048), each group is zero-padded on channels to the widest (Gemma2's 2304), and the groups
are concatenated along the tokens. Each encoder can be dropped independently, in training and inference: its embeddings
are then those of the null caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from snapgen.conditioning import embeddings, text_encoder
from snapgen.conditioning.coverage import coverage, note_coverage
from snapgen.config import Config
from snapgen.errors import InputError
from snapgen.findings import note
from snapgen.io.chunked import ChunkedTensor

ENCODING_FIELDS = {"tokens", "layer", "join", "padding", "null"}
"""Fields of a `TextEncoderConfig` on which a context depends, in addition to the encoder's weights."""


class TextEncoderConfig(Config):
    """Configuration of one text encoder in a list."""

    encoder: str = text_encoder.MINILM
    """minilm, a folder, or OWNER/NAME on the hub."""
    tokens: int = Field(16, gt=0, le=65536)
    """Captions are cut to this many tokens."""
    layer: text_encoder.Layer = "last"
    """Which hidden states to use; SnapGen takes CLIP's penultimate ones."""
    join: Literal["tokens", "channels"] = "tokens"
    """Axis along which its embeddings are joined to those of the encoder before it in the list: as further tokens or
    as further channels."""
    padding: text_encoder.ZerosOrEncoded = "zeros"
    """Embeddings after a caption's last token: zeros, or the encoded padding tokens, on which the nets and teachers of
    Stable Diffusion (SD-1.5, SDXL, SD3) were trained."""
    null: text_encoder.ZerosOrEncoded = "zeros"
    """Embeddings of the null caption of classifier-free guidance: zeros (SDXL), or the encoded empty string (SD-1.5,
    SD3)."""
    dropout: float = Field(0.1, ge=0, le=1)
    """Probability with which it is dropped in training, independently of the others. The default is our choice."""
    pooled: bool = False
    """Whether its pooled embedding is used as well, which SD3 teachers need."""

    @property
    def encoding(self) -> dict[str, Any]:
        """The settings on which the embeddings of a caption depend, besides the encoder."""
        return self.model_dump(include=ENCODING_FIELDS - {"join"})


class Conditioning(NamedTuple):
    """Text conditioning of a batch of images."""

    context: Tensor
    """Context (B, N, context_dim)."""
    pooled: Tensor | None
    """Pooled embeddings concatenated on channels (B, P), None if no encoder contributes one."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """The conditioning with a function applied to each of its tensors."""
        return Conditioning(function(self.context), None if self.pooled is None else function(self.pooled))

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Conditioning:
        """The conditioning on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


class ConditioningDims(NamedTuple):
    """Dimensions of a `Conditioning`."""

    context: int
    """Width of the context."""
    tokens: int
    """Number of tokens of the context."""
    pooled: int
    """Width of the pooled embedding, 0 if there is none."""


class EmbeddingSlice(NamedTuple):
    """Position of one encoder's embeddings within the context and the pooled embedding."""

    tokens: slice
    channels: slice
    pooled: slice


class EncodedCaptions:
    """Captions of a data set, encoded once by each of several encoders and merged batch by batch.

    Args:
        tables: embeddings of the distinct captions, for each encoder.
        rows: row of each caption in the tables, int64 (N,).
        slices: position of each encoder's embeddings.
        null_row: row of the null caption in the tables; None: it is zeros.

    Attributes:
        context_dim: width of the context.
        tokens: number of tokens of the context.
        pooled_width: width of the pooled embedding, 0 if there is none.
        num_encoders: number of encoders.
    """

    def __init__(
        self,
        tables: Sequence[embeddings.Embeddings],
        rows: Tensor,
        slices: Sequence[EmbeddingSlice],
        null_row: int | None = None,
    ) -> None:
        self._tables, self._rows, self._slices, self._null_row = tables, rows, slices, null_row
        self.context_dim, self.tokens, self.pooled_width = _dims(slices)
        self.num_encoders = len(slices)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def device(self) -> torch.device:
        """Device of the embeddings and of the conditioning made from them."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Size of all embeddings in bytes."""
        return sum(table.tokens.nbytes + table.pooled.nbytes for table in self._tables)

    def to(self, device: torch.device) -> EncodedCaptions:
        """The same captions with all embeddings moved to a device; for sets that fit there."""
        tables = [embeddings.Embeddings(table.tokens.to(device), table.pooled.to(device)) for table in self._tables]
        return EncodedCaptions(tables, self._rows.to(device), self._slices, self._null_row)

    def null(self) -> Conditioning:
        """Conditioning of the null caption, float32: (1, N, context_dim) and (1, P)."""
        if self._null_row is None:
            zeros = torch.zeros(1, self.tokens, self.context_dim, device=self.device)
            return Conditioning(zeros, zeros.new_zeros(1, self.pooled_width) if self.pooled_width else None)
        return self._merged(torch.tensor([self._null_row], device=self.device))

    def conditioning(self, indices: Tensor, keep_mask: Tensor | None = None) -> Conditioning:
        """Conditioning for a batch of captions, float32.

        Args:
            indices: indices of the captions, int64 (B,).
            keep_mask: bool (B, num_encoders); where False, the encoder is dropped: its tokens and its pooled embedding
                are those of the null caption. None keeps all.
        """
        merged = self._merged(self._rows[indices.to(self.device)])
        if keep_mask is not None:
            null = self.null()
            for slices, kept in zip(self._slices, keep_mask.to(self.device).T, strict=True):
                block = (slice(None), slices.tokens, slices.channels)
                merged.context[block] = torch.where(kept[:, None, None], merged.context[block], null.context[block])
                if merged.pooled is not None and null.pooled is not None:
                    pooled = merged.pooled[:, slices.pooled], null.pooled[:, slices.pooled]
                    merged.pooled[:, slices.pooled] = torch.where(kept[:, None], *pooled)
        return merged

    def _merged(self, rows: Tensor) -> Conditioning:
        """Conditioning of rows of the tables, float32."""
        context = torch.zeros(len(rows), self.tokens, self.context_dim, device=self.device)
        pooled = torch.zeros(len(rows), self.pooled_width, device=self.device)
        for table, slices in zip(self._tables, self._slices, strict=True):
            context[:, slices.tokens, slices.channels] = table.tokens[rows].float()  # (B, n, dim) into its block
            if slices.pooled.start < slices.pooled.stop:
                pooled[:, slices.pooled] = table.pooled[rows].float()
        return Conditioning(context, pooled if self.pooled_width else None)


def encode(
    captions: Sequence[str],
    encoders: Sequence[TextEncoderConfig],
    *,
    loaded: Sequence[tuple[Any, Any]] | None = None,
) -> EncodedCaptions:
    """Encode captions with each encoder of a list.

    Args:
        captions: the captions; an empty one is the null caption of classifier-free guidance.
        encoders: at least one.
        loaded: the models with their tokenizers, from `snapgen.conditioning.text_encoder.load_text_encoder`. They are
            used for a few prompts, whose embeddings are not cached. None: encoders are loaded as needed, and embeddings
            are cached on disk and memory-mapped.

    Raises:
        InputError: if an encoder cannot be loaded or does not take that many tokens, or as `conditioning_dims`.
    """
    null = any(encoder.null == "encoded" for encoder in encoders)
    distinct, rows = embeddings.deduplicate([*captions, ""] if null else captions)
    null_row, rows = (int(rows[-1]), rows[:-1]) if null else (None, rows)
    if loaded is None:
        conditioning_dims(encoders)
        tables = [embeddings.embed_captions(distinct, name=e.encoder, **e.encoding) for e in encoders]
        for encoder in encoders:
            note_coverage(encoder.encoder, distinct, encoder.tokens)
    else:
        tables = []
        for e, (model, tokenizer) in zip(encoders, loaded, strict=True):
            encoded = text_encoder.encode_batch(model, tokenizer, distinct, **e.encoding)
            found = coverage(distinct, tokenizer, e.tokens)
            if found.total:
                note(e.encoder, str(found))
            tables.append(embeddings.Embeddings(ChunkedTensor([encoded["tokens"]]), ChunkedTensor([encoded["pooled"]])))
    shapes = [(table.tokens.shape[2], table.pooled.shape[1]) for table in tables]
    return EncodedCaptions(tables, rows, layout(encoders, shapes), null_row)


def conditioning_dims(
    encoders: Sequence[TextEncoderConfig], shapes: Sequence[tuple[int, int]] | None = None
) -> ConditioningDims:
    """Dimensions of the conditioning that a list of encoders produces.

    Args:
        encoders: at least one.
        shapes: as for `layout`; None: read from the encoders' configurations.

    Raises:
        InputError: if an encoder does not exist, or encoders joined on channels differ in tokens.
    """
    if shapes is None:
        shapes = [(text_encoder.width(e.encoder), text_encoder.pooled_width(e.encoder)) for e in encoders]
    return _dims(layout(encoders, shapes))


def layout(encoders: Sequence[TextEncoderConfig], shapes: Sequence[tuple[int, int]]) -> list[EmbeddingSlice]:
    """Position of each encoder's embeddings within the context and the pooled embedding.

    Args:
        encoders: at least one.
        shapes: width of each encoder's token embeddings and of its pooled embedding.

    Raises:
        InputError: if encoders joined on channels differ in tokens.
    """
    if not encoders:
        raise InputError("encoders", "is empty", f"name at least one, e.g. {text_encoder.MINILM}")
    slices: list[EmbeddingSlice] = []
    for number, (encoder, (width, pooled_width)) in enumerate(zip(encoders, shapes, strict=True)):
        _, tokens, pooled = _dims(slices)
        token_slice, first_channel = slice(tokens, tokens + encoder.tokens), 0
        if encoder.join == "channels":
            _check_join(encoders, number)
            token_slice, first_channel = slices[-1].tokens, slices[-1].channels.stop
        channel_slice = slice(first_channel, first_channel + width)
        pooled_slice = slice(pooled, pooled + (pooled_width if encoder.pooled else 0))
        slices.append(EmbeddingSlice(token_slice, channel_slice, pooled_slice))
    return slices


def _check_join(encoders: Sequence[TextEncoderConfig], number: int) -> None:
    if number == 0:
        raise InputError("encoders", "joins the first encoder to one before it", "use join: tokens", place="[0].join")
    tokens, preceding = encoders[number].tokens, encoders[number - 1].tokens
    if tokens != preceding:
        problem = f"joins {tokens} tokens on channels with {preceding}"
        raise InputError("encoders", problem, "give both the same number of tokens", place=f"[{number}].tokens")


def _dims(slices: Sequence[EmbeddingSlice]) -> ConditioningDims:
    def end(name: Literal["tokens", "channels", "pooled"]) -> int:
        return max((getattr(encoder, name).stop for encoder in slices), default=0)

    return ConditioningDims(context=end("channels"), tokens=end("tokens"), pooled=end("pooled"))
