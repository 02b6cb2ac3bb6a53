"""Captions as people write them: a text or JSON file beside each image, and tables of file names and captions."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snapgen import files
from snapgen.config import json_lines
from snapgen.data.names import IMAGE_SUFFIXES
from snapgen.errors import InputError, os_errors

MAX_CAPTION_LENGTH = 2000
CAPTION_KEYS = ("caption", "text", "prompt", "description", "captions", "prompts", "texts")
"""Names of a caption in JSON and in tables, in the order in which they count."""
FILE_KEYS = ("file_name", "filename", "file", "image", "image_file", "image_path", "img", "path", "filepath", "name")
"""Names of an image's file in tables, likewise."""
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
_TABLE_NAMES = ("metadata", "captions", "meta_cap", "meta_lat")
_DELIMITERS = ",;\t|"
_BOMS = {  # the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SAVE = "save it as UTF-8"
Row = tuple[str, str, str]
"""Place within a table, file name, caption."""


def decode_text(content: bytes) -> str:
    """Decode a text by its byte order mark, else as UTF-8.

    Raises:
        ValueError: if it is neither; no other encoding can be told from its bytes.
    """
    encoding = next((encoding for bom, encoding in _BOMS.items() if content.startswith(bom)), "utf-8")
    text = content.decode(encoding)
    if "\0" in text:  # UTF-16 without a mark
        raise ValueError("the text has null characters")
    return text


def clean(text: str) -> str:
    """A caption on one line, of at most `MAX_CAPTION_LENGTH` characters."""
    return " ".join(text.split())[:MAX_CAPTION_LENGTH]


def caption_of(content: bytes, suffix: str) -> str:
    """The caption in a file beside an image; empty if there is none.

    Raises:
        ValueError: if it is not text.
    """
    return caption_in(decode_text(content), suffix)


def caption_in(text: str, suffix: str) -> str:
    """The caption in the text of a file beside an image; empty if there is none."""
    if suffix != ".json":
        return clean(text)
    try:
        return json_caption(json.loads(text))
    except (ValueError, RecursionError):
        return ""


def json_caption(value: object) -> str:
    """The caption in a JSON object: the first of `CAPTION_KEYS`, and of a list its first entry; empty without one."""
    for key in CAPTION_KEYS if isinstance(value, dict) else ():
        caption = value.get(key)  # type: ignore[attr-defined]
        caption = caption[0] if isinstance(caption, list) and caption else caption
        if isinstance(caption, str) and caption.strip():
            return clean(caption)
    return ""


def read_text(path: Path) -> str:
    """Read a text file as `decode_text` does.

    Raises:
        InputError: if it cannot be read, or is not text.
    """
    with os_errors(path, "make it readable", "cannot be read"):
        content = files.read_bytes(path)
    try:
        return decode_text(content)
    except ValueError:
        raise InputError(path, "is not UTF-8, and has no byte order mark", _SAVE) from None


def is_table(name: str) -> bool:
    """Whether a file may be a table of captions: any .jsonl, .csv and .tsv, and a .json or .txt of a usual name."""
    stem, _, suffix = name.lower().rpartition(".")
    return f".{suffix}" in TABLE_SUFFIXES or (suffix in ("json", "txt") and stem in _TABLE_NAMES)


def read_table(path: Path) -> list[Row]:
    """Read a table of file names and captions; empty for a table of other things, unless its name promises captions.

    Raises:
        InputError: if it is damaged, or named as a table of captions without being one; it names the place.
    """
    text, suffix = read_text(path), path.suffix.lower()
    rows = list(
        _separated(path, text) if suffix in (".csv", ".tsv", ".txt") else _objects(path, text, lines=suffix != ".json")
    )
    if not rows and text.strip() and suffix != ".txt" and path.stem.lower() in _TABLE_NAMES:
        problem = "has no columns of file names and captions"
        raise InputError(path, problem, f"name them {FILE_KEYS[0]} and {CAPTION_KEYS[1]}, or remove it")
    return rows


def _objects(path: Path, text: str, *, lines: bool) -> Iterator[Row]:
    """Rows of JSON objects: one a line, a list of them, or a mapping from file names to captions or objects."""
    for place, value in _json_values(path, text, lines=lines):
        if isinstance(value, dict):
            file = next((value[key] for key in FILE_KEYS if isinstance(value.get(key), str)), None)
            if file is not None:
                yield place, file, json_caption(value)


def _json_values(path: Path, text: str, *, lines: bool) -> Iterator[tuple[str, Any]]:
    if lines:
        yield from json_lines(text, path, "repair or remove it")
    if lines or not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(path, "is not JSON", "repair or remove it") from None
    if isinstance(value, list):
        yield from ((f"[{i}]", each) for i, each in enumerate(value))
    elif isinstance(value, dict):
        for name, each in value.items():
            own = each if isinstance(each, dict) else {CAPTION_KEYS[0]: each}
            yield name, {**own, FILE_KEYS[0]: name}


def _separated(path: Path, text: str) -> Iterator[Row]:
    """Rows of a table whose columns are separated by commas, semicolons, tabs or bars, with or without a header."""
    header = text.lstrip("\r\n").partition("\n")[0]
    for delimiter in _DELIMITERS:
        cells = next(csv.reader([header], delimiter=delimiter), [])
        columns = _columns([cell.strip().lower() for cell in cells])
        if columns is not None:
            break
    else:
        return
    file_column, caption_column, has_header = columns
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for number, row in enumerate(reader):
            if not row or (has_header and not number):
                continue
            place = f"line {reader.line_num}"
            if len(row) != len(cells):
                problem = f"has {len(row)} cells, where the first line has {len(cells)}"
                raise InputError(path, problem, f'put captions with "{delimiter}" in double quotes', place=place)
            yield place, row[file_column].strip(), clean(row[caption_column])
    except csv.Error as error:
        raise InputError(path, f"cannot be read ({error})", "repair it", place=f"line {reader.line_num}") from None


def _columns(cells: list[str]) -> tuple[int, int, bool] | None:
    """Columns of the file name and the caption, and whether the first line is a header; None if it is no such table."""
    file = next((cells.index(key) for key in FILE_KEYS if key in cells), None)
    caption = next((cells.index(key) for key in CAPTION_KEYS if key in cells), None)
    if file is not None and caption is not None:
        return file, caption, True
    return (0, 1, False) if len(cells) == 2 and cells[0].endswith(IMAGE_SUFFIXES) else None
