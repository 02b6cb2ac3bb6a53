"""Data sets of captioned images: sources, decoding and loading."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.data.dataset import ImageDataset as ImageDataset, load_dataset as load_dataset
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
