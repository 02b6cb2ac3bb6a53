"""Counts of captions that a text encoder cuts, does not know, or cannot tell apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from snapgen.conditioning.text_encoder import digest, load_tokenizer
from snapgen.findings import Findings, note
from snapgen.io.cache import JSON, cached_tensors

_BATCH_SIZE = 4096
_EXAMPLE_LENGTH = 60


def coverage(captions: Sequence[str], tokenizer: Any, tokens: int) -> Findings:
    """Count distinct captions that are cut, hold unknown words, or give the same tokens as another.

    Captions that differ in case alone are not counted: many encoders ignore it.

    Args:
        captions: the captions; empty ones are left out.
        tokenizer: the encoder's tokenizer.
        tokens: number of tokens to which captions are cut.
    """
    findings, first = Findings(), dict[bytes, str]()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = None if tokenizer.unk_token_id in special else tokenizer.unk_token_id
    for caption, ids, is_cut in _tokenized([caption for caption in captions if caption], tokenizer, tokens):
        if is_cut:
            findings.add(f"captions are longer than {tokens} tokens and are cut", _shown(caption))
        if unknown is not None and unknown in ids:
            findings.add("captions have words or signs that it does not know", _shown(caption))
        other = first.setdefault(hashlib.sha256(json.dumps(ids).encode()).digest(), caption)
        if other.casefold() != caption.casefold():
            findings.add("captions give the same tokens as another", f"{_shown(caption)} and {_shown(other)}")
    return findings


def note_coverage(name: str, captions: Sequence[str], tokens: int) -> None:
    """Tell the user the `coverage` of a data set's captions by the encoder of a name; the counts are cached.

    Raises:
        InputError: if there is no such encoder, or its tokenizer is damaged.
    """
    text = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    key: dict[str, JSON] = {"encoder": digest(name), "tokens": tokens, "captions": text, "version": 1}

    def compute() -> dict[str, torch.Tensor]:
        found = json.dumps(coverage(captions, load_tokenizer(name), tokens).listed()).encode()
        return {"findings": torch.frombuffer(bytearray(found), dtype=torch.uint8)}

    findings = Findings(json.loads(cached_tensors("coverage", key, compute)["findings"].numpy().tobytes()))
    if findings.total:
        note(name, str(findings))


def _tokenized(captions: Sequence[str], tokenizer: Any, tokens: int) -> Iterator[tuple[str, list[int], bool]]:
    """Each caption with its token ids, cut to ``tokens``, and whether any were cut off."""
    for start in range(0, len(captions), _BATCH_SIZE):
        batch = captions[start : start + _BATCH_SIZE]
        all_ids = tokenizer(batch, truncation=True, max_length=tokens)["input_ids"]
        for caption, ids in zip(batch, all_ids, strict=True):
            is_full = len(ids) == tokens
            yield caption, ids, is_full and len(tokenizer(caption, verbose=False)["input_ids"]) > tokens


def _shown(caption: str) -> str:
    cut = caption if len(caption) <= _EXAMPLE_LENGTH else f"{caption[: _EXAMPLE_LENGTH - 1]}…"
    return f"'{cut}'"
