"""The user is told which captions and prompts an encoder cuts, does not know, or cannot tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from snapgen.conditioning import captions as conditioning, text_encoder
from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.conditioning.coverage import coverage
from snapgen.data.dataset import load_dataset
from snapgen.findings import note
from tests.snapgen.encoders import bert

LONG = "the red fox on the red moon on the red fox"
CAPTIONS = ["", "a red fox", LONG, f"{LONG} on a moon", "a blue fox", "a green fox", "moon"]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    note.cache_clear()


def counted(captions: list[str], tokenizer: Any, tokens: int) -> dict[str, tuple[int, str]]:
    return {problem: found for problem, *found in coverage(captions, tokenizer, tokens).listed()}  # type: ignore[misc]


def test_what_is_cut_unknown_or_the_same_is_counted(tmp_path: Path) -> None:
    tokenizer = text_encoder.load_tokenizer(str(bert(tmp_path / "bert")))
    assert counted(CAPTIONS, tokenizer, 8) == {
        "captions are longer than 8 tokens and are cut": [2, f"'{LONG}'"],
        "captions give the same tokens as another": [2, f"'{LONG} on a moon' and '{LONG}'"],
        "captions have words or signs that it does not know": [2, "'a blue fox'"],
    }
    assert counted(["a red fox", "moon"], tokenizer, 5) == {}
    assert counted(["a red fox"], tokenizer, 4) == {"captions are longer than 4 tokens and are cut": [1, "'a red fox'"]}


def test_emoji_and_case_in_minilm() -> None:
    found = counted(["A Fox", "a fox", "🦊", "🦉", "fox 🦊"], text_encoder.load_tokenizer(), 16)
    assert found == {
        "captions have words or signs that it does not know": [3, "'🦊'"],
        "captions give the same tokens as another": [1, "'🦉' and '🦊'"],
    }


def test_a_data_sets_captions_are_told_once_and_from_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(bert(tmp_path / "bert"))
    encoders = [TextEncoderConfig(encoder=name, tokens=8)]
    for _ in range(2):
        conditioning.encode(CAPTIONS, encoders)
    assert len(caplog.records) == 1
    assert f"{name}: 2 captions have words" in caplog.text
    assert f"2 captions are longer than 8 tokens and are cut, e.g. '{LONG}'" in caplog.text
    note.cache_clear()
    caplog.clear()
    monkeypatch.setattr("snapgen.conditioning.coverage.load_tokenizer", lambda _: pytest.fail("tokenized again"))
    conditioning.encode(CAPTIONS, encoders)
    assert "2 captions are longer than 8 tokens" in caplog.text


def test_prompts_are_told_of_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = str(bert(tmp_path / "bert"))
    encoders = [TextEncoderConfig(encoder=name, tokens=8)]
    conditioning.encode(["a red fox", LONG], encoders, loaded=[text_encoder.load_text_encoder(name)])
    assert f"1 captions are longer than 8 tokens and are cut, e.g. '{LONG}'" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_embedded_captions_are_all_known(split: Any) -> None:
    captions = load_dataset("emoji", split=split, resolution=32).captions
    assert not coverage(sorted(set(captions)), text_encoder.load_tokenizer(), 16).total
