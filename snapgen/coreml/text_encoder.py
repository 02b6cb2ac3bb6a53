"""Text encoders of transformers for Core ML: any that takes a mask of four axes, held against itself before it goes.

The package takes ``input_ids`` (1, N), int32, and ``mask`` (1, N), 1 for a token and 0 behind the last, and gives
``embeddings`` (1, N, width) with zeros behind the last token, as `snapgen.conditioning.embeddings.encode` does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen.conditioning import text_encoder
from snapgen.coreml import custom_ops
from snapgen.errors import InputError

ATTENTION = "snapgen_coreml"
# Added to the scores of what must not be seen. Half precision ends at 65,504, and -inf makes NaN of a row that sees
# nothing (github.com/cactus-compute/cactus, pull request 734).
HIDDEN = -1e4
_CAPTION = "a red heart on a white background"
_TOLERANCE = 1e-3


class TextEncoder(nn.Module):
    """A text encoder for captions of a fixed number of tokens, shorter ones padded.

    Args:
        name: as `snapgen.conditioning.embeddings.encode` takes it.
        tokens: length of its input.
        layer: which hidden states it gives, as `snapgen.conditioning.embeddings.embed_captions` takes it.

    Raises:
        InputError: if there is no such encoder, it takes fewer tokens, or it gives something else with a mask than
            without padding.
    """

    def __init__(self, name: str, tokens: int, layer: text_encoder.Layer = "last") -> None:
        super().__init__()
        self.layer = layer
        _register()
        self.model, tokenizer = text_encoder.load_text_encoder(name)
        longest = text_encoder.max_length(self.model, tokenizer)
        if not 1 <= tokens <= longest:
            raise InputError(name, f"takes 1 to {longest} tokens, not {tokens}", "choose so many", place="tokens")
        self.model.eval().requires_grad_(False)
        ids = tokenizer([_CAPTION], truncation=True, max_length=tokens, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = self._hidden(ids, torch.ones_like(ids))
        see = torch.zeros(1, 1, tokens, tokens)
        self.register_buffer("see", see)
        self.see: Tensor
        self._prepare()
        for future in (0.0, HIDDEN):  # an encoder, or a decoder that sees no token after its own
            self.see.copy_(torch.full_like(see, future).triu(1))
            if self._agrees(ids, expected, tokens):
                return
        raise InputError(name, "cannot be converted: it takes no mask of four axes", "name a BERT, CLIP or Gemma")

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(1, N) and (1, N) → (1, N, width)."""
        seen = self.see + (1 - mask[:, None, None]) * HIDDEN
        return self._hidden(input_ids, seen) * mask[..., None]

    def _hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        before = self.layer == "penultimate"
        found = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=before)
        return cast(Tensor, found.hidden_states[-2] if before else found.last_hidden_state)

    def _prepare(self) -> None:
        self.model.set_attn_implementation(ATTENTION)
        for parent in list(self.model.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.LayerNorm):
                    setattr(parent, name, FinalNorm(module))

    @torch.inference_mode()
    def _agrees(self, ids: Tensor, expected: Tensor, tokens: int) -> bool:
        count = ids.shape[1]
        padded = F.pad(ids, (0, tokens - count)).int()
        mask = (torch.arange(tokens) < count).float()[None]
        try:
            found = self(padded, mask)[:, :count]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


class FinalNorm(nn.Module):
    """A layer norm over the last axis, as an operator of ours: coremltools takes no float16 one with an affine."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        bias = self.norm.bias if self.norm.bias is not None else torch.zeros_like(self.norm.weight)
        return cast(Tensor, custom_ops.layer_norm(x, -1, self.norm.weight, bias, self.norm.eps))


def _attention(
    module: nn.Module,  # noqa: ARG001 - transformers' signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention that stays one operation: coremltools takes one with a scale of its own apart."""
    default = query.shape[-1] ** -0.5
    if scaling is not None and abs(scaling / default - 1) > 1e-6:
        query = query * (scaling / default)
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _register() -> None:
    import transformers

    transformers.AttentionInterface.register(ATTENTION, _attention)
