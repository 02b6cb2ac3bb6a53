"""Input and output: atomic writes, the tensor cache, checkpoints, pretrained weights, the Hugging Face hub."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.io.atomic import atomic_folder, atomic_write
    from snapgen.io.cache import cached_tensors
    from snapgen.io.checkpoint import load_checkpoint, save_checkpoint
    from snapgen.io.hub import resolve_model_folder
    from snapgen.io.pretrained import load_net
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "atomic_folder",
    "atomic_write",
    "cached_tensors",
    "load_checkpoint",
    "load_net",
    "resolve_model_folder",
    "save_checkpoint",
]
