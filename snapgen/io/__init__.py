"""Input and output: atomic writes, the tensor cache, checkpoints, pretrained weights, the Hugging Face hub."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.io.atomic import atomic_folder as atomic_folder, atomic_write as atomic_write
    from snapgen.io.cache import cached_tensors as cached_tensors
    from snapgen.io.checkpoint import load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
    from snapgen.io.hub import resolve_model_folder as resolve_model_folder
    from snapgen.io.pretrained import load_net as load_net
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
