"""The U-Net and its sub-networks."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.models.subnetworks import (
        blocks_disabled as blocks_disabled,
        edit_network as edit_network,
        from_supernet as from_supernet,
    )
    from snapgen.models.unet import UNet as UNet
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
