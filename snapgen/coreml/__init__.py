"""Export to Core ML, and checks of what runs on the Neural Engine."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.coreml.compatibility import violations as violations
    from snapgen.coreml.convert import (
        convert_decoder as convert_decoder,
        convert_text as convert_text,
        convert_unet as convert_unet,
    )
    from snapgen.coreml.mil import read_program as read_program
    from snapgen.coreml.package import PackageOptions as PackageOptions
    from snapgen.coreml.pipeline_export import export_pipeline as export_pipeline
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
