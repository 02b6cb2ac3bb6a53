from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from snapgen.architecture import presets
from snapgen.conditioning import captions as conditioning, embeddings, text_encoder
from snapgen.conditioning.captions import ConditioningDims, EncodedCaptions, TextEncoderConfig
from snapgen.errors import InputError
from snapgen.io import chunked
from tests.snapgen.encoders import bert, gemma2, projected_clip

CAPTIONS = ["a red fox", "moon", "", "the moon on a fox", "moon"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small stand-ins for the three encoders of arXiv 2412.09619, with the same order of widths: 8 + 12 < 28."""
    root = tmp_path_factory.mktemp("encoders")
    return {
        "clip_l": str(projected_clip(root / "l", hidden=8, projection=8)),
        "clip_g": str(projected_clip(root / "g", hidden=12, projection=14, seed=1)),
        "gemma": str(gemma2(root / "gemma", hidden=28)),
    }


@pytest.fixture
def encoders(folders: dict[str, str]) -> list[TextEncoderConfig]:
    clip: dict[str, Any] = {"tokens": 6, "layer": "penultimate", "pooled": True}
    return [
        TextEncoderConfig(encoder=folders["clip_l"], **clip),
        TextEncoderConfig(encoder=folders["clip_g"], join="channels", **clip),
        TextEncoderConfig(encoder=folders["gemma"], tokens=9),
    ]


def alone(setting: TextEncoderConfig) -> embeddings.Embeddings:
    distinct, rows = embeddings.deduplicate(CAPTIONS)
    embedded = embeddings.embed_captions(distinct, name=setting.encoder, tokens=setting.tokens, layer=setting.layer)
    return embeddings.Embeddings(embedded.tokens[rows].float(), embedded.pooled[rows].float())  # type: ignore[arg-type]


def everything(captions: EncodedCaptions) -> conditioning.Conditioning:
    return captions.conditioning(torch.arange(len(captions)))


def test_each_encoder_fills_its_slice(encoders: list[TextEncoderConfig]) -> None:
    captions = conditioning.encode(CAPTIONS, encoders)
    context, pooled = everything(captions)
    assert (len(captions), captions.num_encoders) == (5, 3)
    assert (captions.context_dim, captions.tokens, captions.pooled_width) == (28, 15, 22)
    assert context.shape == (5, 15, 28)
    assert context.dtype == torch.float32
    clip_l, clip_g, gemma = map(alone, encoders)
    assert torch.equal(context[:, :6, :8], clip_l.tokens)
    assert torch.equal(context[:, :6, 8:20], clip_g.tokens)
    assert not context[:, :6, 20:].any()
    assert torch.equal(context[:, 6:], gemma.tokens)
    assert pooled is not None
    assert torch.equal(pooled, torch.cat([clip_l.pooled, clip_g.pooled], 1))
    assert (context[[0, 1, 3, 4]] != 0).any(-1).sum(1).tolist() == [10, 6, 13, 6]  # 6 tokens of the longest in CLIP


def test_the_layers_are_those_asked_for(encoders: list[TextEncoderConfig]) -> None:
    model, tokenizer = text_encoder.load_text_encoder(encoders[0].encoder)
    ids = tokenizer(["a red fox"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own = model(input_ids=ids, output_hidden_states=True)
    context, pooled = everything(conditioning.encode(CAPTIONS, encoders))
    assert pooled is not None
    torch.testing.assert_close(context[0, :5, :8], own.hidden_states[-2][0], rtol=0, atol=2e-3)
    torch.testing.assert_close(pooled[0, :8], own.text_embeds[0], rtol=0, atol=2e-3)


def test_an_empty_caption_is_all_zeros(encoders: list[TextEncoderConfig]) -> None:
    context, pooled = everything(conditioning.encode(CAPTIONS, encoders))
    assert pooled is not None
    assert not context[2].any()
    assert not pooled[2].any()
    assert all(context[i].any() and pooled[i].any() for i in (0, 1, 3, 4))
    nothing, none = everything(conditioning.encode(["", " "], encoders))
    assert nothing.shape == (2, 15, 28)
    assert none is not None
    assert not nothing.any()


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_an_encoder_is_dropped_on_its_own(encoders: list[TextEncoderConfig], dropped: int) -> None:
    captions = conditioning.encode(CAPTIONS, encoders)
    context, pooled = everything(captions)
    slices = [(slice(0, 6), slice(0, 8)), (slice(0, 6), slice(8, 20)), (slice(6, 15), slice(0, 28))]
    keep_mask = torch.ones(5, 3, dtype=torch.bool)
    keep_mask[[0, 3], dropped] = False
    dropped_context, dropped_pooled = captions.conditioning(torch.arange(5), keep_mask)
    assert pooled is not None
    assert dropped_pooled is not None
    context[[0, 3], slices[dropped][0], slices[dropped][1]] = 0
    for row in (0, 3):
        pooled[row, [slice(0, 8), slice(8, 22), slice(0, 0)][dropped]] = 0
    assert torch.equal(dropped_context, context)
    assert torch.equal(dropped_pooled, pooled)


def test_dropping_every_encoder_gives_zeros(encoders: list[TextEncoderConfig]) -> None:
    context, pooled = conditioning.encode(CAPTIONS, encoders).conditioning(
        torch.arange(5), torch.zeros(5, 3, dtype=torch.bool)
    )
    assert pooled is not None
    assert not context.any()
    assert not pooled.any()


def test_a_batch_is_rows_of_all_captions(encoders: list[TextEncoderConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MAX_CHUNK_ROWS", 2)
    captions = conditioning.encode(CAPTIONS, encoders)
    indices = torch.tensor([4, 0, 0, 2, 3])
    keep_mask = torch.arange(15).view(5, 3) % 4 > 0
    for mask, batch_mask in ((None, None), (keep_mask, keep_mask[indices])):
        full, batch = captions.conditioning(torch.arange(5), mask), captions.conditioning(indices, batch_mask)
        assert torch.equal(batch.context, full.context[indices])
        assert full.pooled is not None
        assert batch.pooled is not None
        assert torch.equal(batch.pooled, full.pooled[indices])


def test_encoders_in_memory_give_what_those_in_folders_do(encoders: list[TextEncoderConfig], tmp_path: Path) -> None:
    loaded = [text_encoder.load_text_encoder(encoder.encoder) for encoder in encoders]
    encoded = conditioning.encode(CAPTIONS, [e.model_copy(update={"encoder": "gone"}) for e in encoders], loaded=loaded)
    assert not (tmp_path / "cache").exists()
    for a, b in zip(everything(encoded), everything(conditioning.encode(CAPTIONS, encoders)), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_one_encoder_as_ever(tmp_path: Path) -> None:
    name = str(bert(tmp_path / "bert"))
    captions = conditioning.encode(CAPTIONS, [TextEncoderConfig(encoder=name)])
    context, pooled = everything(captions)
    assert torch.equal(context, embeddings.encode(CAPTIONS, name=name).float())
    assert (pooled, captions.pooled_width) == (None, 0)
    moved = captions.to(torch.device("meta"))
    assert moved.conditioning(torch.arange(3)).context.shape == (3, 16, 16)
    assert captions.nbytes == 4 * (16 * 16 + 16) * 2


def test_widths_need_no_weights(encoders: list[TextEncoderConfig], tmp_path: Path) -> None:
    bare = []
    for number, encoder in enumerate(encoders):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_bytes((Path(encoder.encoder) / "config.json").read_bytes())
        bare.append(encoder.model_copy(update={"encoder": str(folder)}))
    assert conditioning.conditioning_dims(bare) == ConditioningDims(context=28, tokens=15, pooled=22)
    assert conditioning.conditioning_dims(bare[:2]) == ConditioningDims(context=20, tokens=6, pooled=22)
    assert conditioning.conditioning_dims(bare[2:]) == ConditioningDims(context=28, tokens=9, pooled=0)
    assert conditioning.conditioning_dims([TextEncoderConfig(pooled=True)]) == ConditioningDims(
        context=384, tokens=16, pooled=384
    )


def test_the_three_encoders_of_the_paper_make_its_context(tmp_path: Path) -> None:
    """2304 channels (arXiv 2412.09619: 379 M parameters), from the sizes in the encoders' configurations."""
    clip = {"model_type": "clip_text_model", "architectures": ["CLIPTextModelWithProjection"]}
    configs = [
        {**clip, "hidden_size": 768, "projection_dim": 768},
        {**clip, "hidden_size": 1280, "projection_dim": 1280},
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304},
    ]
    encoders = []
    for number, config in enumerate(configs):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(json.dumps(config))
        join = "channels" if number == 1 else "tokens"
        encoders.append(TextEncoderConfig(encoder=str(tmp_path / str(number)), tokens=77, join=join, pooled=number < 2))
    assert conditioning.conditioning_dims(encoders) == ConditioningDims(context=2304, tokens=154, pooled=2048)
    assert presets.preset("snapgen-t2i").context_dim == 2304


def test_lists_that_cannot_be_merged_are_refused_in_one_line(encoders: list[TextEncoderConfig]) -> None:
    clip_l, clip_g, gemma = encoders
    wrong = {
        r"\[1\]\.tokens: joins 5 tokens on channels with 6": [clip_l, clip_g.model_copy(update={"tokens": 5})],
        r"\[0\]\.join": [clip_g, gemma],
        "is empty": [],
        "takes 12 tokens, not 13": [clip_l.model_copy(update={"tokens": 13})],
        "name a text encoder's folder": [clip_l, TextEncoderConfig(encoder="no-such-folder")],
    }
    for message, settings in wrong.items():
        with pytest.raises(InputError, match=message):
            conditioning.encode(CAPTIONS, settings)
    for field, value in (("tokens", 0), ("dropout", 1.5), ("layer", "first"), ("join", "sum")):
        with pytest.raises(ValidationError, match=field):
            TextEncoderConfig.model_validate({field: value})
