"""The text encoder of the check: MiniLM, made small enough to be carried to a machine without a network.

Its weights are rounded to half precision, and of its vocabulary only the words of the captions are kept: a quarter of
its package's size. Both the search and the training take it, here and on the CPU that the reference is of, so that
their numbers have one protocol. The same package gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from archsearch.training.recipe import load_recipe
from benchmarks.gpu_check.setup import Setup
from snapgen.conditioning import text_encoder
from snapgen.data.dataset import EMOJI_RESOLUTIONS, open_images
from snapgen.io.atomic import atomic_folder

RECIPE = "emoji"
_WORDS = "embeddings.word_embeddings.weight"


def encoder(setup: Setup) -> str:
    """The folder of the encoder: the one that was carried along, or one that is made from MiniLM's package.

    Raises:
        InputError: if there is neither.
    """
    folder = setup.shared / "captions"
    return str(folder if folder.is_dir() else made(folder))


def made(folder: Path) -> Path:
    """Make the encoder in a new folder.

    Raises:
        InputError: if MiniLM's package is not installed.
    """
    source = text_encoder._folder(text_encoder.MINILM)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    kept = sorted(_used(written()) | {token["id"] for token in tokenizer["added_tokens"]})
    new = {number: place for place, number in enumerate(kept)}
    config = json.loads((source / "config.json").read_text())
    with atomic_folder(folder) as part:
        _put(part / "config.json", {**config, "vocab_size": len(kept), "pad_token_id": new[config["pad_token_id"]]})
        words = tokenizer["model"]["vocab"].items()
        tokenizer["model"]["vocab"] = {word: new[number] for word, number in words if number in new}
        _put(part / "tokenizer.json", _renumbered(tokenizer, new))
        _put(part / "tokenizer_config.json", json.loads((source / "tokenizer_config.json").read_text()))
        weights = load_file(source / "model.safetensors")
        weights[_WORDS] = weights[_WORDS][kept]
        small = {name: t.half().contiguous() if t.is_floating_point() else t for name, t in weights.items()}
        save_file(small, part / "model.safetensors", {"format": "pt"})
    return folder


def written() -> list[str]:
    """Every caption that the check encodes."""
    splits = [open_images("emoji", split=s, resolution=min(EMOJI_RESOLUTIONS)).captions for s in ("train", "val")]
    return sorted(
        {caption.strip() for captions in splits for caption in captions} | {*load_recipe(RECIPE).evaluation.prompts}
    )


def _used(captions: Iterable[str]) -> set[int]:
    """The numbers of the words that the captions are made of."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        text_encoder._folder(text_encoder.MINILM), local_files_only=True
    )
    return {number for numbers in tokenizer(list(captions))["input_ids"] for number in numbers}


def _renumbered(tokenizer: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    """A tokenizer's settings with the numbers of its special tokens changed, and without padding."""
    for token in tokenizer["added_tokens"]:
        token["id"] = new[token["id"]]
    for token in tokenizer["post_processor"]["special_tokens"].values():
        token["ids"] = [new[number] for number in token["ids"]]
    return {**tokenizer, "padding": None, "truncation": None}


def _put(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, sort_keys=False))


def apart(folder: Path) -> float:
    """How far the encoder's embeddings are from MiniLM's own at most, over the standard deviation of those."""
    captions = written()
    names = (text_encoder.MINILM, str(folder))
    own, small = (
        text_encoder.encode_batch(*text_encoder.load_text_encoder(name), captions, tokens=16)["tokens"].float()
        for name in names
    )
    return float((own - small).abs().max() / own[own != 0].std())
