"""Text encoders of every kind, tiny and random, in folders as Hugging Face writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# The end token has the highest number, as CLIP's.
WORDS = ["<unk>", "<s>", "a", "red", "fox", "on", "the", "moon", "</s>"]
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def save(folder: Path, model: Any) -> Path:
    """A tiny encoder with a tokenizer of whole words between a start and an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", 8)]
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    model.save_pretrained(folder)
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokens.save_pretrained(folder)
    return folder


def bert(folder: Path, layers: int = 1) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 16, "num_hidden_layers": layers}
    return save(folder, BertModel(BertConfig(vocab_size=9, max_position_embeddings=32, **sizes)))


def clip_config(hidden: int = 24, projection: int = 8, layers: int = 2) -> Any:
    from transformers import CLIPTextConfig

    sizes = {**SIZES, "hidden_size": hidden, "projection_dim": projection, "num_hidden_layers": layers}
    return CLIPTextConfig(vocab_size=9, max_position_embeddings=12, bos_token_id=1, eos_token_id=8, **sizes)


def clip(folder: Path, layers: int = 1) -> Path:
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    return save(folder, CLIPTextModel(clip_config(layers=layers)))


def projected_clip(folder: Path, hidden: int = 24, projection: int = 8, seed: int = 0) -> Path:
    """CLIP text encoder with projection, in the form in which Stable Diffusion 3's encoders are published."""
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    return save(folder, CLIPTextModelWithProjection(clip_config(hidden, projection)))


def whole_clip(folder: Path) -> Path:
    """Text and image encoder in one checkpoint, as CLIP is published."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text_config = {**clip_config().to_dict(), "projection_dim": 512}  # which its own is not
    vision = {"image_size": 8, "patch_size": 4, "hidden_size": 24, **SIZES}
    return save(folder, CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=8)))


def t5(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 20, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return save(folder, T5ForConditionalGeneration(T5Config(vocab_size=9, decoder_start_token_id=0, **sizes)))


def llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    return save(folder, LlamaModel(LlamaConfig(vocab_size=9, max_position_embeddings=32, hidden_size=16, **SIZES)))


def gemma2(folder: Path, hidden: int = 28, layers: int = 2) -> Path:
    """Gemma2 in the form in which it is published, with its language-model head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": hidden, "num_hidden_layers": layers, "num_key_value_heads": 1, "head_dim": 8}
    numbers = {"bos_token_id": 1, "eos_token_id": 8, "pad_token_id": 0}
    return save(folder, Gemma2ForCausalLM(Gemma2Config(vocab_size=9, max_position_embeddings=32, **sizes, **numbers)))
