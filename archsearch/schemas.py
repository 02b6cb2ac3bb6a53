"""JSON schemas of the files that people write, made of the pydantic types that read them; for editors.

The schemas that are shipped (`archsearch.library.schema_path`) are written anew by::

    python -m archsearch.schemas
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from archsearch.library import SchemaKind, schema_path
from archsearch.spaces.loading import SpaceConfig
from archsearch.studies.config.study import SamplerConfig, StudyConfig
from archsearch.training.comparison import ComparisonConfig
from archsearch.training.recipe import Recipe
from snapgen.architecture.schema import Architecture
from snapgen.config import Config
from snapgen.io.atomic import atomic_write_text

TYPES: Mapping[SchemaKind, type[Config]] = {
    "study": StudyConfig,
    "space": SpaceConfig,
    "recipe": Recipe,
    "comparison": ComparisonConfig,
    "architecture": Architecture,
}
"""Type that reads each kind of file."""

DERIVED_DEFAULTS: Mapping[tuple[type[Config], str], str] = {
    **{(named_by_file, "name"): "the file's name" for named_by_file in (StudyConfig, Recipe, ComparisonConfig)},
    **dict.fromkeys([(StudyConfig, "sampler"), (SamplerConfig, "name")], "ehvi or gp, by the objectives"),
}
"""Settings that a file may leave out and whose value follows from something else: what it is then."""


def schema(kind: SchemaKind) -> dict[str, Any]:
    """The JSON schema of a kind of file."""
    found = TYPES[kind].model_json_schema(schema_generator=_Generator)
    return {"$schema": _Generator.schema_dialect, **found, "title": f"archsearch {kind}"}


def schema_text(kind: SchemaKind) -> str:
    """The schema as it is shipped."""
    return json.dumps(schema(kind), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


class _Generator(GenerateJsonSchema):
    """Pydantic's own, with the docstrings of fields as their descriptions."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        found, cls = super().model_schema(schema), schema["cls"]
        described = field_docstrings(cls)
        for name, field in found.get("properties", {}).items():
            field.pop("title", None)
            if name in described:
                field["description"] = described[name]
            if (cls, name) in DERIVED_DEFAULTS:
                field.pop("default", None)
        if "required" in found:
            found["required"] = [name for name in found["required"] if (cls, name) not in DERIVED_DEFAULTS]
        return found


def field_docstrings(cls: type[Config]) -> dict[str, str]:
    """The strings that stand under a type's fields, its bases' included, each in one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Config) or base is Config:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[field.target.id] = " ".join(str(after.value.value).split())
    return found


if __name__ == "__main__":
    for kind in TYPES:
        atomic_write_text(schema_path(kind), schema_text(kind))
