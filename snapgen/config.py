"""Base class of configurations: frozen pydantic models read from YAML or JSON files; unknown keys are errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from snapgen import files
from snapgen.errors import InputError, printable

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# Configuration files are far smaller; a larger file is data that was named by mistake.
MAX_FILE_BYTES = 1 << 20
NODE_SIZE = 16
"""Characters as which every value, list and mapping of a YAML file counts beside its own."""
MAX_DIGITS = 100
"""Longest whole number."""


class BrokenRules(ValueError):
    """The errors of all rules that a configuration breaks."""

    def __init__(self, errors: Sequence[ValueError]) -> None:
        super().__init__(str(errors[0]))
        self.errors = errors


def rule(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Mark a method of a `Config` that raises ValueError if fields do not fit each other.

    Other than pydantic's own validators, which end at the first error, all rules are checked.
    """
    check._is_rule = True  # type: ignore[attr-defined]
    return check


class Config(BaseModel):
    """Base class of every configuration that people write in a file: frozen, strict about keys, without NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    _rules: ClassVar[tuple[Callable[[Any], None], ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        super().__pydantic_init_subclass__(**settings)
        methods = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
        cls._rules = tuple(method for method in methods.values() if getattr(method, "_is_rule", False))

    @model_validator(mode="after")
    def _keeps_its_rules(self) -> Self:
        errors = []
        for check in self._rules:
            try:
                check(self)
            except ValueError as error:
                errors.append(error)
        if errors:
            raise BrokenRules(errors)
        return self

    def digest(self) -> str:
        """Hex digest (16 digits) of the canonical JSON of all fields; equal configurations have equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


S = TypeVar("S", bound=BaseModel)


def read_text(path: Path) -> str:
    """Read the text of a configuration file.

    Raises:
        InputError: if the file is missing, no regular file, too large, empty or not UTF-8.
    """
    text = files.read_text(path, "name the YAML file itself", MAX_FILE_BYTES)
    if not text.strip():
        raise InputError(path, "is empty", "start from a shipped file of the same kind")
    return text


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the mapping at the top level of a YAML (or JSON) file; duplicate keys are an error.

    Raises:
        InputError: as `read_text`, or if the file is not YAML or not a mapping.
    """
    value = parse_yaml(read_text(path), path)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(path, f"must be a mapping of names, not {type(value).__name__}", "write 'key: value' lines")
    return value


def parse_yaml(text: str, source: str | Path) -> object:
    """Read YAML of plain values: texts, numbers, true, false and null, in lists and mappings without duplicate keys.

    Raises:
        InputError: if it is not YAML, or too much: its aliases count as what they stand for.
    """
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is not YAML"
        remedy = "quote names with brackets inside { }" if "got '['" in problem else "correct the line"
        raise InputError(source, f"not valid YAML: {problem}", remedy, place=place) from None
    except (ValueError, ArithmeticError, LookupError, RecursionError):  # of values that do not fit their tags
        raise InputError(source, "not valid YAML", "correct the file") from None


def load_yaml(path: Path, model: type[S]) -> S:
    """Read a configuration file and validate it against a model.

    Raises:
        InputError: as `read_mapping`, or naming the first invalid field.
    """
    return parse_config(read_mapping(path), model, source=path)


def json_lines(
    text: str | bytes, source: str | Path, remedy: str = "remove or repair the line"
) -> Iterator[tuple[str, Any]]:
    """The values of JSON lines with their places, as ``line 3``; empty lines are left out.

    Args:
        text: the file's content.
        source: file that the lines come from, for error messages.
        remedy: what to do about a damaged line, for error messages.

    Raises:
        InputError: naming the first line that is not JSON.
    """
    data = text.encode() if isinstance(text, str) else text  # text has further separators, which strings may contain
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(source, "is not JSON", remedy, place=f"line {number}") from None


def parse_config(values: object, model: type[S], *, source: str | Path, place: str = "") -> S:
    """Validate ``values`` as a ``model``.

    Args:
        values: plain data, as read from YAML or JSON.
        model: the pydantic model to build.
        source: file that the values come from, for error messages.
        place: path of the values within the source, for error messages.

    Raises:
        InputError: naming the first invalid field, and in its ``others`` the further ones.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        mistakes: dict[str, tuple[str, str]] = {}
        for details in _own(error.errors(include_url=False)):
            path = place
            for step in _steps(values, details["loc"], missing=details["type"] == "missing"):
                path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
            for number, told in enumerate(_told(details, model)):
                # Of the members of a union, which all find something wrong, the first one is told.
                mistakes.setdefault(path if number == 0 else f"{path}\0{number}", told)
        found = [InputError(source, *told, place=path.partition("\0")[0]) for path, told in mistakes.items()]
        first = found[0]
        raise InputError(source, first.problem, first.remedy, place=first.place, others=found[1:]) from None


def _own(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The errors without those that follow from others: a list whose entries are invalid counts as too short, too."""
    within = {each["loc"][:length] for each in errors for length in range(len(each["loc"]))}
    return [each for each in errors if each["type"] != "too_short" or each["loc"] not in within]


def _told(details: ErrorDetails, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Problem and remedy of a pydantic error; of one that a `Config`'s rules raised, those of every broken rule."""
    if details["type"] == "extra_forbidden":
        names = sorted(model.model_fields) if len(details["loc"]) == 1 else []
        like = get_close_matches(str(details["loc"][-1]), names, 1, cutoff=0.75)
        remedy = f"write {like[0]}" if like else f"use one of: {', '.join(names)}" if names else "check its spelling"
        yield "unknown key", f"remove it or {remedy}"
    elif isinstance(cause := details.get("ctx", {}).get("error"), BrokenRules):
        yield from map(problem_and_remedy, cause.errors)
    else:
        yield _plainly(details)


def _steps(values: Any, location: Sequence[int | str], *, missing: bool) -> Iterator[int | str]:
    """The steps of an error's location that lead through the values; pydantic's also name members of unions."""
    for number, step in enumerate(location):
        keys = {str(key): key for key in values} if isinstance(values, dict) else {}
        if isinstance(step, int):
            values = values[step] if isinstance(values, list | tuple) and step < len(values) else None
        elif step in keys:
            values = values[keys[step]]
        elif not missing or number + 1 < len(location):
            continue
        yield step


def as_yaml(value: object, *, max_length: int | None = None) -> str:
    """Plain data as it stands in a YAML file, on one line of at most ``max_length`` characters.

    >>> as_yaml({"train_seeds": (0, 1), "init_from": None})
    '{train_seeds: [0, 1], init_from: null}'
    """
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf"))
    line = " ".join(text.removesuffix("\n...\n").split())
    return line if max_length is None or len(line) <= max_length else f"{line[: max_length - 1]}…"


def problem_and_remedy(error: ValueError, remedy: str = "correct it") -> tuple[str, str]:
    """Say in plain words what is wrong with a value, and what to write instead.

    Args:
        error: of pydantic, whose first error counts, or with a message "problem; remedy".
        remedy: for a message without one.
    """
    if isinstance(error, ValidationError):
        return _plainly(error.errors(include_url=False)[0], remedy)
    return _parted(str(error), remedy)


def _plainly(details: ErrorDetails, remedy: str = "correct it") -> tuple[str, str]:
    given, context = _shown(details["input"]), details.get("ctx", {})
    for kinds, problem, what_to_write in _PLAIN:
        if ("finite_number" if details["input"] != details["input"] else details["type"]) in kinds.split():  # NaN
            return problem.format(given=given, **context), what_to_write.format(**context)
    return _parted(details["msg"].removeprefix("Value error, "), remedy)


def _parted(message: str, remedy: str) -> tuple[str, str]:
    problem, _, own = message.partition("; ")
    return problem[:1].lower() + problem[1:], own or remedy


def _shown(value: object) -> str:
    """A value about as it stands in a file, at most 60 characters of it."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    return f"{value!r:.60}" if isinstance(value, str | int | float | list) else "a mapping"


_PLAIN = (
    ("missing", "is required, but missing", "add it"),
    ("int_type int_parsing int_from_float", "{given} is not a whole number", "write one, e.g. 8"),
    ("float_type float_parsing", "{given} is not a number", "write one, e.g. 0.5"),
    ("finite_number", "{given} is not a finite number", "write one that is, e.g. 0.5"),
    ("bool_type bool_parsing", "{given} is neither true nor false", "write true or false"),
    ("string_pattern_mismatch", "{given} cannot be a name here", "write a short one of letters, digits and hyphens"),
    ("string_type", "{given} is not a text", "write a text, in quotes if it looks like a number"),
    ("list_type tuple_type", "{given} is not a list", "write a list, e.g. [a, b]"),
    ("dict_type mapping_type model_type model_attributes_type", "{given} is not a mapping", "write 'key: value' lines"),
    ("literal_error enum", "{given} is not one of the choices", "use one of: {expected}"),
    ("greater_than", "{given} is too small", "write a number above {gt}"),
    ("greater_than_equal", "{given} is too small", "write {ge} or more"),
    ("less_than", "{given} is too large", "write a number below {lt}"),
    ("less_than_equal", "{given} is too large", "write {le} or less"),
    ("too_short", "has {actual_length} of at least {min_length} entries", "add some"),
    ("too_long", "has more than the {max_length} entries that it may have", "remove some"),
    ("union_tag_not_found", "its {discriminator} is missing", "add {discriminator}, which says what this is"),
    ("union_tag_invalid", "{tag!r} is not one of the kinds", "use one of: {expected_tags}"),
)
"""Types of pydantic's errors that people meet, what is wrong then, and what to write."""


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML loader of bounded size that raises on duplicate keys, of which plain YAML silently keeps the last.

    ``null`` as a key is a name, that of the setting for the null caption; plain YAML makes it None. A date is a text.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._size = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, and count it with all that is in it; an alias counts as what it stands for."""
        before, mark = self._size, self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None
        if is_alias and node not in self._sizes:
            raise yaml.constructor.ConstructorError(None, None, "an alias within what it stands for", mark)
        if isinstance(node, yaml.ScalarNode) and node.value != printable(node.value, newlines=True):
            raise yaml.constructor.ConstructorError(None, None, "a control character in a text", mark)
        if is_alias:
            self._size += self._sizes[node]
        else:
            self._size += NODE_SIZE + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._size > MAX_FILE_BYTES:
            raise yaml.constructor.ConstructorError(None, None, "too many values, or aliases that multiply", mark)
        self._sizes[node] = self._size - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value == "null":
                key_node.tag = "tag:yaml.org,2002:str"
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if isinstance(key, str) and key != printable(key):
                raise yaml.constructor.ConstructorError(None, None, "a key of several lines", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > MAX_DIGITS:
            problem = f"a number of {len(node.value):,} characters"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)

    def construct_text(self, node: yaml.ScalarNode) -> Any:
        return self.construct_scalar(node)

    def refuse(self, node: yaml.Node) -> Any:
        return self.construct_undefined(node)


_TAG = "tag:yaml.org,2002:"
_PlainLoader.add_constructor(f"{_TAG}int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor(f"{_TAG}timestamp", _PlainLoader.construct_text)
for _name in ("binary", "set", "omap", "pairs"):
    _PlainLoader.add_constructor(f"{_TAG}{_name}", _PlainLoader.refuse)
