"""The U-Net and its sub-networks."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.models.subnetworks import blocks_disabled, edit_network, from_supernet
    from snapgen.models.unet import UNet
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["UNet", "blocks_disabled", "edit_network", "from_supernet"]
