"""Text encoders of transformers for Core ML: any that takes a mask of four axes, checked against its unmasked output.

The package takes ``input_ids`` (1, N), int32, and ``mask`` (1, N), 1 for tokens and 0 for padding after them. It
returns ``embeddings`` (1, N, width), with zeros for padding as in `snapgen.conditioning.embeddings.encode`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen.conditioning import text_encoder
from snapgen.coreml.layers import LayerNorm
from snapgen.errors import InputError

ATTENTION = "snapgen_coreml"
# Added to the scores of masked positions. Half precision ends at 65,504, and -inf yields NaN for a row in which all
# positions are masked (github.com/cactus-compute/cactus, pull request 734).
MASKED = -1e4
_CAPTION = "a red heart on a white background"
_TOLERANCE = 1e-3


class TextEncoder(nn.Module):
    """A text encoder for a fixed number of tokens, to which shorter captions are padded.

    Args:
        name: ``minilm``, or the folder of a Hugging Face text encoder.
        tokens: length of the input.
        layer: which hidden states to return (`snapgen.conditioning.embeddings.embed_captions`).

    Raises:
        InputError: if there is no such encoder, it takes fewer tokens, or its output with a mask differs from that
            without padding.
    """

    def __init__(self, name: str, tokens: int, layer: text_encoder.Layer = "last") -> None:
        import transformers

        super().__init__()
        self.layer = layer
        transformers.AttentionInterface.register(ATTENTION, _attention)
        self.model, tokenizer = text_encoder.load_text_encoder(name)
        longest = text_encoder.max_length(self.model, tokenizer)
        if not 1 <= tokens <= longest:
            raise InputError(
                name, f"takes 1 to {longest} tokens, not {tokens}", "use a number in that range", place="tokens"
            )
        self.model.eval().requires_grad_(False)
        ids = tokenizer([_CAPTION], truncation=True, max_length=tokens, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = self._hidden(ids, torch.ones_like(ids))
        see = torch.zeros(1, 1, tokens, tokens)
        self.register_buffer("see", see)
        self.see: Tensor
        self._prepare()
        for future in (0.0, MASKED):  # bidirectional, or causal attention
            self.see.copy_(torch.full_like(see, future).triu(1))
            if self._agrees(ids, expected, tokens):
                return
        raise InputError(name, "cannot be converted, it takes no mask of four axes", "name a BERT, CLIP or Gemma model")

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(1, N) and (1, N) → (1, N, width)."""
        # (1, 1, N, N) + (1, 1, 1, N): a bias for every query and key
        attention_bias = self.see + (1 - mask[:, None, None]) * MASKED
        return self._hidden(input_ids, attention_bias) * mask[..., None]

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        penultimate = self.layer == "penultimate"
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=penultimate)
        return cast(Tensor, output.hidden_states[-2] if penultimate else output.last_hidden_state)

    def _prepare(self) -> None:
        self.model.set_attn_implementation(ATTENTION)
        for parent in list(self.model.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.LayerNorm):
                    setattr(parent, name, LayerNorm(module, axis=-1))

    @torch.inference_mode()
    def _agrees(self, ids: Tensor, expected: Tensor, tokens: int) -> bool:
        count = ids.shape[1]
        padded = F.pad(ids, (0, tokens - count)).int()
        mask = (torch.arange(tokens) < count).float()[None]
        try:
            actual = self(padded, mask)[:, :count]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        return bool((actual - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _attention(
    module: nn.Module,  # noqa: ARG001 - transformers' signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention that stays one operation; coremltools decomposes one with a non-default scale.

    Query (B, heads, N, D), key and value (B, kv heads, M, D) → (B, N, heads, D).
    """
    default = query.shape[-1] ** -0.5
    if scaling is not None and abs(scaling / default - 1) > 1e-6:
        query = query * (scaling / default)
    queries_per_key = query.shape[1] // key.shape[1]
    if queries_per_key > 1:
        key, value = key.repeat_interleave(queries_per_key, 1), value.repeat_interleave(queries_per_key, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    return out.transpose(1, 2).contiguous(), None  # (B, heads, N, D) -> (B, N, heads, D)
