"""Export to Core ML, and checks of what runs on the Neural Engine."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.coreml.compatibility import violations
    from snapgen.coreml.convert import convert_decoder, convert_text, convert_unet
    from snapgen.coreml.mil import read_program
    from snapgen.coreml.package import PackageOptions
    from snapgen.coreml.pipeline_export import export_pipeline
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "PackageOptions",
    "convert_decoder",
    "convert_text",
    "convert_unet",
    "export_pipeline",
    "read_program",
    "violations",
]
