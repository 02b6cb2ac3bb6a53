"""Text conditioning: text encoders, embeddings of captions, and the contexts merged from them."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.conditioning.captions import Conditioning, TextEncoderConfig
    from snapgen.conditioning.embeddings import embed_captions
    from snapgen.conditioning.text_encoder import load_text_encoder
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Conditioning", "TextEncoderConfig", "embed_captions", "load_text_encoder"]
