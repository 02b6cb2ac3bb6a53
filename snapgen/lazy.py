"""Lazy re-exports: a package offers names of its modules, and imports a module on first access to one of its names.

The mechanism is PEP 562. A package imports its names, each as itself, where only type checkers and editors look;
`lazy_exports` reads them from the package's source::

    if TYPE_CHECKING:
        from snapgen.models.unet import UNet as UNet
    else:
        __all__, __getattr__, __dir__ = lazy_exports(__name__)

``__getattr__`` is hidden from type checkers, which would otherwise accept any name. No exported name may equal the name
of a module of the package, since importing that module anywhere would replace it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import InspectLoader
from typing import Any


def lazy_exports(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Create the ``__all__``, ``__getattr__`` and ``__dir__`` of a package that imports its exports on first access.

    Args:
        package: the package's ``__name__``; its exports are the imports in its only ``if`` statement.
    """
    spec = sys.modules[package].__spec__
    assert spec is not None
    assert isinstance(spec.loader, InspectLoader)
    (block,) = (node for node in ast.parse(spec.loader.get_source(package) or "").body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    module_of = {alias.name: node.module for node in imports for alias in node.names if node.module}

    def get_attribute(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(module_of[name]), name)

    def list_attributes() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return sorted(module_of), get_attribute, list_attributes
