"""Contexts of published nets: those of diffusers' own pipelines, with small random encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from snapgen.conditioning import captions as conditioning, embeddings, text_encoder
from snapgen.conditioning.captions import EncodedCaptions, TextEncoderConfig
from snapgen.errors import InputError
from tests.snapgen.encoders import bert, clip, gemma2, llama, projected_clip, t5

CLIP_TOKENS, T5_TOKENS = 12, 16
PROMPTS = ["a red fox", "moon", "the moon on a fox on the moon on a fox on the moon on a fox", ""]
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-3}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))


def padded(folder: Path, pad: str, tokens: int = CLIP_TOKENS) -> Path:
    """The encoder with a padding token in its tokenizer, as the published ones have."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.model_max_length = pad, tokens
    tokenizer.save_pretrained(folder)
    return folder


def loaded(*folders: Path) -> list[Any]:
    return [part for folder in folders for part in text_encoder.load_text_encoder(str(folder))]


def encoded(encoders: list[TextEncoderConfig]) -> tuple[EncodedCaptions, Tensor, Tensor | None]:
    captions = conditioning.encode(PROMPTS, encoders)
    return captions, *captions.conditioning(torch.arange(len(PROMPTS)))


def config(folder: Path, **fields: Any) -> TextEncoderConfig:
    return TextEncoderConfig(encoder=str(folder), **{"tokens": CLIP_TOKENS, "padding": "encoded", **fields})


def test_sd15_sees_what_diffusers_gives_it(tmp_path: Path) -> None:
    folder = padded(clip(tmp_path / "clip"), "</s>")
    net, tokenizer = loaded(folder)
    pipeline = StableDiffusionPipeline(None, net, tokenizer, None, None, None, None, requires_safety_checker=False)
    expected, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    captions, context, pooled = encoded([config(folder, null="encoded")])
    torch.testing.assert_close(context, expected, **CLOSE)
    torch.testing.assert_close(captions.null().context, null[:1], **CLOSE)
    torch.testing.assert_close(context[3], null[0], **CLOSE)
    assert pooled is None


def test_sdxl_sees_what_diffusers_gives_it(tmp_path: Path) -> None:
    first = padded(clip(tmp_path / "l"), "</s>")
    second = padded(projected_clip(tmp_path / "g", hidden=12, projection=14, seed=1), "a")
    (net, tokenizer), (net_2, tokenizer_2) = loaded(first), loaded(second)
    pipeline = StableDiffusionXLPipeline(None, net, net_2, tokenizer, tokenizer_2, None, None, add_watermarker=False)
    expected, null, expected_pooled, null_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    captions, context, pooled = encoded(
        [config(first, layer="penultimate"), config(second, layer="penultimate", join="channels", pooled=True)]
    )
    assert pooled is not None
    torch.testing.assert_close(context[:3], expected[:3], **CLOSE)
    torch.testing.assert_close(pooled[:3], expected_pooled[:3], **CLOSE)
    assert torch.equal(captions.null().context, null[:1])  # zeros: an empty prompt is none for SDXL
    assert torch.equal(context[3:], null[3:])
    assert not null_pooled.any()


def test_sd3_sees_what_diffusers_gives_it(tmp_path: Path) -> None:
    first = padded(projected_clip(tmp_path / "l", hidden=8, projection=8), "</s>")
    second = padded(projected_clip(tmp_path / "g", hidden=10, projection=14, seed=1), "a")
    third = padded(t5(tmp_path / "t5"), "<unk>", T5_TOKENS)
    parts = [loaded(folder) for folder in (first, second, third)]
    pipeline = StableDiffusion3Pipeline(None, None, None, *parts[0], *parts[1], *parts[2])
    expected, null, expected_pooled, null_pooled = pipeline.encode_prompt(
        PROMPTS, None, None, device="cpu", max_sequence_length=T5_TOKENS
    )
    both: dict[str, Any] = {"layer": "penultimate", "null": "encoded", "pooled": True}
    captions, context, pooled = encoded(
        [
            config(first, **both),
            config(second, join="channels", **both),
            config(third, tokens=T5_TOKENS, null="encoded"),
        ]
    )
    assert pooled is not None
    torch.testing.assert_close(context, expected, **CLOSE)
    torch.testing.assert_close(pooled, expected_pooled, **CLOSE)
    null_context, null_of_pooled = captions.null()
    torch.testing.assert_close(null_context, null[:1], **CLOSE)
    torch.testing.assert_close(null_of_pooled, null_pooled[:1], **CLOSE)


def test_a_dropped_encoder_gives_its_null_caption(tmp_path: Path) -> None:
    first = padded(projected_clip(tmp_path / "l"), "</s>")
    second = padded(bert(tmp_path / "bert"), "<unk>")
    encoders = [config(first, null="encoded", pooled=True), config(second)]
    captions, full, full_pooled = encoded(encoders)
    keep_mask = torch.tensor([[False, True], [True, False], [False, False], [True, True]])
    context, pooled = captions.conditioning(torch.arange(4), keep_mask)
    null, null_pooled = captions.null()
    assert pooled is not None
    assert full_pooled is not None
    assert null_pooled is not None
    assert null[:, :CLIP_TOKENS].any()
    assert not null[:, CLIP_TOKENS:].any()
    kept = [keep_mask[:, i].nonzero().flatten() for i in (0, 1)]
    gone = [(~keep_mask[:, i]).nonzero().flatten() for i in (0, 1)]
    for i, tokens in ((0, slice(0, CLIP_TOKENS)), (1, slice(CLIP_TOKENS, None))):
        assert torch.equal(context[kept[i], tokens], full[kept[i], tokens])
        assert torch.equal(context[gone[i], tokens], null[:, tokens].expand(len(gone[i]), -1, -1))
    assert torch.equal(pooled[gone[0]], null_pooled.expand(2, -1))
    assert torch.equal(pooled[kept[0]], full_pooled[kept[0]])


@pytest.mark.parametrize("make", [bert, clip, gemma2, t5])
def test_padding_does_not_enter_the_mean(make: Any, tmp_path: Path) -> None:
    """T5 and BERT attend to the padding, but its embeddings are no part of the mean."""
    name = str(padded(make(tmp_path / "encoder"), "<unk>"))
    found = embeddings.embed_captions(["a red fox"], name=name, tokens=CLIP_TOKENS, padding="encoded")
    tokens, pooled = found.tokens.materialize().float(), found.pooled.materialize().float()
    assert (tokens != 0).any(-1).all()
    torch.testing.assert_close(pooled[0], tokens[0, :5].mean(0), **CLOSE)


def test_an_encoder_without_a_padding_token_is_refused(tmp_path: Path) -> None:
    name = str(llama(tmp_path / "llama"))
    with pytest.raises(InputError, match="has no padding token; use padding: zeros"):
        embeddings.embed_captions(["moon"], name=name, tokens=8, padding="encoded")
    assert embeddings.embed_captions([""], name=name, tokens=8, null="encoded").tokens.materialize()[0, :2].any()


def test_settings_of_the_encoding_have_their_own_cache(tmp_path: Path) -> None:
    name = str(padded(clip(tmp_path / "clip"), "</s>"))
    zeros, full = "zeros", "encoded"
    expected = {(zeros, zeros): [0, 3], (full, zeros): [0, 8], (zeros, full): [2, 3], (full, full): [8, 8]}
    for _ in range(2):
        for (padding, null), written in expected.items():
            options: dict[str, Any] = {"name": name, "tokens": 8, "padding": padding, "null": null}
            found = embeddings.embed_captions(["", "moon"], **options).tokens.materialize()
            assert (found != 0).any(-1).sum(1).tolist() == written
