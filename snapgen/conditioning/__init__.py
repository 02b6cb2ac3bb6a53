"""Text conditioning: text encoders, embeddings of captions, and the contexts merged from them."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.conditioning.captions import Conditioning as Conditioning, TextEncoderConfig as TextEncoderConfig
    from snapgen.conditioning.embeddings import embed_captions as embed_captions
    from snapgen.conditioning.text_encoder import load_text_encoder as load_text_encoder
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
