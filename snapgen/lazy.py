"""Lazy re-exports: a package offers names of its modules, and imports a module on first access to one of its names.

The mechanism is PEP 562. A package that uses it lists its names three times: as imports under ``TYPE_CHECKING``, for
type checkers and editors; for `lazy_exports`, with their modules; and in ``__all__``, for people and for ``import *``::

    if TYPE_CHECKING:
        from snapgen.models.unet import UNet
    else:
        __getattr__, __dir__ = lazy_exports(__name__, {"snapgen.models.unet": ["UNet"]})

    __all__ = ["UNet"]

``__getattr__`` is hidden from type checkers, which would otherwise accept any name. No exported name may equal the name
of a module of the package, since importing that module anywhere would replace it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Create the ``__getattr__`` and the ``__dir__`` of a package that imports its exports on first access.

    Args:
        package: the package's ``__name__``.
        exports: names that the package offers, by the full name of the module that defines them.
    """
    module_of = {name: module for module, names in exports.items() for name in names}

    def get_attribute(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(module_of[name]), name)

    def list_attributes() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return get_attribute, list_attributes
