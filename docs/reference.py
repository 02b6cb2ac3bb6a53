"""Write the tables of docs/reference/*.md from the settings' own types: every field with its values and description.

    python docs/reference.py            # writes the tables
    python docs/reference.py --check    # exit status 1 if a table is not what it would write

A table stands under a comment with its type, and with a base whose fields have a table of their own. All other text of
the pages is theirs. A field's description is the string literal under it; a field without one is an error.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import BaseMetadata, Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from archsearch.schemas import DERIVED_DEFAULTS, field_docstrings
from snapgen.config import Config, as_yaml

FOLDER = Path(__file__).parent / "reference"
COMMAND = "python docs/reference.py"
LARGE: dict[Any, str] = {1 << 32: "2^32", 1 << 63: "2^63"}
HEADER = "| setting | meaning | values | default |\n|---|---|---|---|\n"
TABLE = re.compile(r"(<!-- ([\w.]+:\w+)(?: without ([\w.]+:\w+))? -->\n\n)((?:\|.*\n)*)")
"""A comment with the name of a type and of a base to leave out, and the table under it."""
SECTION = re.compile(r"^## (.+)\n(?:(?!## ).*\n)*?" + TABLE.pattern, re.MULTILINE)
"""A section with a table."""

Model = type[Config]


def main() -> None:
    """Write the tables, or with --check compare them."""
    pages = {path: path.read_text() for path in sorted(FOLDER.glob("*.md"))}
    sections = {
        resolve_name(model): (path, title)
        for path, text in pages.items()
        for title, _, model, *_ in SECTION.findall(text)
    }
    stale = {}
    for path, text in pages.items():
        links = {model: link(title, "" if page == path else page.name) for model, (page, title) in sections.items()}
        new = render(text, links)
        if new != text:
            stale[path] = new
    if "--check" in sys.argv[1:]:
        if stale:
            sys.exit(f"docs/reference is stale ({', '.join(path.name for path in stale)}); run {COMMAND}")
        return
    for path, text in stale.items():
        path.write_text(text)


def render(page: str, links: Mapping[Model, str]) -> str:
    """A page with its tables written anew.

    Args:
        page: its Markdown.
        links: links to the sections of models.
    """

    def table(match: re.Match[str]) -> str:
        model, base = (resolve_name(name) if name else None for name in match.group(2, 3))
        rows = (row(links, model, name, field) for name, field in fields(model, base))
        return "".join([match[1], HEADER, *rows])

    return TABLE.sub(table, page)


def fields(model: Model, base: Model | None) -> Iterator[tuple[str, FieldInfo]]:
    """The fields of a table: name and kind, then own ones, then those of bases but the one that is left out."""
    left_out = base.model_fields if base else {}
    own = model.__annotations__
    listed = {n: f for n, f in model.model_fields.items() if n not in left_out or n in own}
    yield from sorted(listed.items(), key=lambda item: (item[0] != "name", item[0] != "kind", item[0] not in own))


def row(links: Mapping[Model, str], model: Model, name: str, field: FieldInfo) -> str:
    """A field's line of the table."""
    meaning = descriptions(model).get(name)
    if meaning is None:
        sys.exit(f"{model.__module__}.{model.__name__}.{name} has no description; write a string literal under it")
    value = DERIVED_DEFAULTS.get((model, name)) or default(field)
    return f"| `{name}` | {meaning} | {kind(field.annotation, links, field.metadata)} | {value} |\n"


@cache
def descriptions(model: Model) -> dict[str, str]:
    """The string literals under a model's fields, those of its bases included; for a reader of YAML."""
    return {name: for_tables(text) for name, text in field_docstrings(model).items()}


def for_tables(text: str) -> str:
    """A description with names of settings as code, YAML's words for Python's values, and no references to our code."""
    text = re.sub(r" \(`(?:snapgen|archsearch)\.[^`]*`\)", "", text)
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", f"`{yaml}`", text)
    name = r"[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)*_[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)*|\{seed\}"
    return re.sub(rf"`[^`]*`|σ_rel|({name})", lambda match: f"`{match[0]}`" if match[1] else match[0], text)


def kind(annotation: Any, links: Mapping[Model, str], metadata: Iterable[Any] = ()) -> str:
    """A type in words, with its bounds: what one may write in YAML."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(args[0], links, annotation.__metadata__)
    if origin in (Union, types.UnionType):
        some = [kind(arg, links) for arg in args if arg is not type(None)]
        null = ["`null`"] if type(None) in args else []
        return either([either(list(dict.fromkeys(some))) + bounds(metadata), *null])
    if origin is Literal:
        return either([f"`{value}`" for value in args])
    return plain(annotation, links) + bounds(metadata)


def plain(annotation: Any, links: Mapping[Model, str]) -> str:
    """A type that is neither a choice nor annotated."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        inner = [kind(arg, links) for arg in args if arg is not ...]
        return f"list of {inner[0]}" if args[-1] is ... else f"list of two: {', '.join(dict.fromkeys(inner))}"
    if origin in (dict, Mapping):
        return f"mapping of {kind(args[0], links)} to {kind(args[1], links)}"
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        if annotation not in links:
            sys.exit(f"{annotation.__name__} has no section in docs/reference; add one")
        return links[annotation]
    return {int: "integer", float: "number", str: "text", bool: "`true` or `false`", Any: "any value"}[annotation]


def either(choices: Sequence[str]) -> str:
    """Choices with commas and an or."""
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def link(title: str, file: str) -> str:
    """A link to the section of a title, on the same page or in another file."""
    anchor = re.sub(r"[^\w]+", "-", title.lower()).strip("-")
    return f"[{title[0].lower()}{title[1:]}]({file}#{anchor})"


def bounds(metadata: Iterable[Any]) -> str:
    """The bounds among a field's metadata, to stand behind its type."""
    some = list(limits(metadata))
    return f" {', '.join(some)}".replace("), (", ", ") if some else ""


def limits(metadata: Iterable[Any]) -> Iterator[str]:
    """The bounds, each in words."""
    for bound in metadata:
        match bound:
            case Ge(ge=value):
                yield f"≥ {value:,}"
            case Gt(gt=value):
                yield f"> {value:,}"
            case Le(le=value):
                yield f"≤ {value:,}"
            case Lt(lt=value):
                yield f"< {LARGE.get(value, value)}"
            case MultipleOf(multiple_of=value):
                yield f"that {value} divides"
            case MinLen(min_length=value):
                yield f"(at least {value})"
            case MaxLen(max_length=value):
                yield f"(at most {value})"
            case FieldInfo():
                yield from limits(bound.metadata)
            case BaseMetadata() if (pattern := getattr(bound, "pattern", None)) is not None:
                yield f"that matches `{pattern}`"


def default(field: FieldInfo) -> str:
    """A field's default, as YAML has it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, tuple) and value and all(isinstance(item, BaseModel) for item in value):
        return f"{len(value)} with its defaults"
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{as_yaml(changed)}`" if changed else "its defaults"
    return f"`{as_yaml(value)}`"


if __name__ == "__main__":
    main()
