from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from snapgen.conditioning import embeddings, text_encoder
from snapgen.coreml import compatibility, convert, mil as mil_
from snapgen.coreml.text_encoder import TextEncoder
from snapgen.errors import InputError
from tests.snapgen import mil
from tests.snapgen.conditioning.test_text_encoder import bert, clip
from tests.snapgen.coreml.test_convert import converted

CAPTION = "a red fox on the moon"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))


def feed(folder: Path, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor(text_encoder.load_text_encoder(str(folder))[1]([CAPTION])["input_ids"])
    count = ids.shape[1]
    return {
        "input_ids": F.pad(ids, (0, tokens - count)).int(),
        "mask": (torch.arange(tokens) < count).float()[None],
    }


@pytest.mark.parametrize("encoder", [bert, clip])
def test_a_padded_caption_is_encoded_as_without_padding(encoder: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = encoder(tmp_path / "encoder")
    given = feed(folder, 11)
    module = TextEncoder(str(folder), 11)
    expected = embeddings.encode([CAPTION], name=str(folder), tokens=11).float()
    with torch.no_grad():
        found = module(*given.values())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert not found[given["mask"] == 0].any()


@pytest.mark.parametrize("encoder", [bert, pytest.param(clip, marks=pytest.mark.slow)])
def test_a_text_encoder_converts(encoder: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = encoder(tmp_path / "encoder")
    given = feed(folder, 11)
    model = converted(TextEncoder(str(folder), 11).half(), given, "embeddings")
    (found,) = mil.run(model, given)
    expected = embeddings.encode([CAPTION], name=str(folder), tokens=11).float()
    assert (found - expected).abs().max() < 0.02 * expected.std()
    model.save(str(tmp_path / "text.mlpackage"))
    program = mil_.read_program(tmp_path / "text.mlpackage")
    counts = program.counts()
    assert counts["scaled_dot_product_attention"] == 1
    assert not {"softmax", "matmul", "cast", "select"} & counts.keys()
    # The lookup of tokens does not run on the Neural Engine; the fourth transposition is transformers' own.
    told = compatibility.violations(program)
    assert {line.split(":")[0] for line in told[:-1]} == {f"gather {_gather(program)}"}
    assert told[-1].startswith("4 transpositions")


def _gather(program: mil_.MILProgram) -> str:
    (name,) = (op.name for op in program.operations if op.kind == "gather")
    return name


def test_too_many_tokens_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes 1 to 12 tokens, not 13"):
        convert.convert_text(str(clip(tmp_path / "clip")), tokens=13)


def test_the_shipped_encoder_computes_the_same() -> None:
    module = TextEncoder(text_encoder.MINILM, 16)
    ids = torch.tensor(text_encoder.load_text_encoder()[1](["red heart"])["input_ids"])
    mask = (torch.arange(16) < ids.shape[1]).float()[None]
    with torch.no_grad():
        found = module(F.pad(ids, (0, 16 - ids.shape[1])).int(), mask)
    torch.testing.assert_close(found, embeddings.encode(["red heart"]).float(), rtol=0, atol=2e-3)
