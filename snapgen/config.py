"""Base class of configurations: frozen pydantic models read from YAML or JSON files; unknown keys are errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from snapgen.errors import InputError

# Configuration files are far smaller; a larger file is data that was named by mistake.
MAX_FILE_BYTES = 1 << 20


class Config(BaseModel):
    """Base class of every configuration that people write in a file: frozen, strict about keys, without NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """Hex digest (16 digits) of the canonical JSON of all fields; equal configurations have equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


S = TypeVar("S", bound=BaseModel)


def read_text(path: Path) -> str:
    """Read the text of a configuration file.

    Raises:
        InputError: if the file is missing, a folder, too large, empty or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(path, f"is {size:,} bytes, too large for a configuration", "name the YAML file itself")
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            path, "is not text (not UTF-8)", "name the YAML file itself", place=f"byte {error.start}"
        ) from None
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the path") from None
    except OSError as error:
        raise InputError(path, (error.strerror or "cannot be read").lower(), "name a readable file") from None
    if not text.strip():
        raise InputError(path, "is empty", "start from a shipped file of the same kind")
    return text


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the mapping at the top level of a YAML (or JSON) file; duplicate keys are an error.

    Raises:
        InputError: as `read_text`, or if the file is not YAML or not a mapping.
    """
    text = read_text(path)
    try:
        value = yaml.load(text, _UniqueKeys)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is not YAML"
        remedy = "quote names with brackets inside { }" if "got '['" in problem else "correct the line"
        raise InputError(path, f"not valid YAML: {problem}", remedy, place=place) from None
    except (ValueError, RecursionError):
        raise InputError(path, "not valid YAML", "correct the file") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(path, f"must be a mapping of names, not {type(value).__name__}", "write 'key: value' lines")
    return value


def load_yaml(path: Path, model: type[S]) -> S:
    """Read a configuration file and validate it against a model.

    Raises:
        InputError: as `read_mapping`, or naming the first invalid field.
    """
    return parse_config(read_mapping(path), model, source=path)


def parse_config(values: object, model: type[S], *, source: str | Path, place: str = "") -> S:
    """Validate ``values`` as a ``model``.

    Args:
        values: plain data, as read from YAML or JSON.
        model: the pydantic model to build.
        source: file that the values come from, for error messages.
        place: path of the values within the source, for error messages.

    Raises:
        InputError: naming the first invalid field.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = place
        for step in first["loc"]:
            path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
        if first["type"] == "extra_forbidden":
            names = ", ".join(sorted(model.model_fields)) if len(first["loc"]) == 1 else ""
            remedy = f"remove it or use one of: {names}" if names else "remove it or check its spelling"
            raise InputError(source, "unknown key", remedy, place=path) from None
        problem, _, remedy = first["msg"].removeprefix("Value error, ").partition("; ")
        raise InputError(source, problem[0].lower() + problem[1:], remedy or "correct it", place=path) from None


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML loader that raises on duplicate keys, of which plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
