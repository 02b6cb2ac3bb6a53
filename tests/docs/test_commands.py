"""Every ``archsearch`` command in the pages and in the YAML files' comments can be given: nothing is run.

The command, its options and their values must be what the command line takes, and names must be shipped ones. Words in
capitals (STUDY, OWNER/NAME) stand for something; a name with a suffix (my_study.yaml) is the reader's own.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from archsearch.cli import app
from archsearch.devices import BACKENDS
from archsearch.library import STUDIES, Kind, locate, shipped
from archsearch.predictor import profiles
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import BASE
from snapgen.architecture import presets
from snapgen.errors import InputError
from tests.docs.pages import PAGES, SETTINGS, blocks, name, prose

STARTS = r"(?:\w+=\S+ )*(?:archsearch|python3? -m archsearch|accelerate launch .*?-m archsearch) "
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*([:/][A-Za-z0-9_]+)*")
OWN = re.compile(r".*\.(yaml|json|jsonl)|(runs|path)/.*|.*-unet")


@dataclass(frozen=True)
class Given:
    """A command as a page gives it; ``whole`` where all that it needs must be there."""

    place: str
    text: str
    whole: bool


def in_page(page: Path) -> Iterator[Given]:
    """The commands of a page: whole ones in blocks, mentioned ones in text."""
    text = page.read_text()
    for block in blocks(text):
        if block.language not in ("", "sh", "bash", "console"):
            continue
        for number, line in enumerate(block.text.splitlines(), block.line):
            if re.match(STARTS, line.removeprefix("$ ")):
                yield Given(f"{name(page)}:{number}", line.removeprefix("$ "), whole=True)
    for span in re.findall(r"`(archsearch [a-z][^`]*)`", " ".join(prose(text).split())):
        yield Given(name(page), span, whole=False)


def in_settings(path: Path) -> Iterator[Given]:
    """The commands in a YAML file's comments: whole ones after a colon or alone, others as far as their options."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        comment = line.partition("#")[2]
        alone = re.fullmatch(rf"(?:.*: |\s*)({STARTS}[a-z].*)", comment)
        mentioned = re.search(r"archsearch ([a-z-]+)", comment)
        if alone:
            yield Given(f"{name(path)}:{number}", alone[1], whole=True)
        elif mentioned:
            yield Given(f"{name(path)}:{number}", mentioned[0], whole=False)


GIVEN = [
    *(given for page in PAGES if page.name != "CHANGELOG.md" for given in in_page(page)),
    *(given for path in SETTINGS for given in in_settings(path)),
]


@cache
def commands() -> dict[str, Any]:
    """Every command by its words, those of groups included."""

    def walk(command: Any, words: str) -> Iterator[tuple[str, Any]]:
        for word, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{words} {word}".strip())
        yield words, command

    return dict(walk(typer.main.get_command(app), ""))


def arguments(text: str) -> list[str]:
    """The words behind ``archsearch``, without a comment, a redirection or a pipe."""
    words = shlex.split(re.sub(rf"^{STARTS}", "", text), comments=True)
    end = next((i for i, word in enumerate(words) if word in (">", "|", "&&")), len(words))
    return words[:end]


def check(text: str, *, whole: bool) -> None:
    """Raises if the command line would refuse the command."""
    words = arguments(text)
    found = " ".join(words[:2]) if " ".join(words[:2]) in commands() else words[0]
    if found.startswith("-") or words[1:] == ["--help"]:
        return
    assert found in commands(), f"there is no command {found}"
    command = commands()[found]
    if hasattr(command, "commands"):
        assert not whole or "--help" in words, f"{found} is a group of commands"
        return
    context = command.context_class(command, info_name=found)
    values, rest, _ = command.make_parser(context).parse_args(words[len(found.split()) :])
    assert not rest, f"{found} takes no {rest[0]!r}"
    if values.get("help"):
        return
    for param in command.params:
        value = values.get(param.name)
        missing = value is None or value in ((), [])
        assert not (whole and param.required and missing), f"{found} needs {param.name}"
        if not missing:
            check_value(found, param, value, context)
    first = next((param for param in command.params if param.param_type_name == "argument"), None)
    if first is not None and isinstance(values.get(first.name), str):
        check_name(FIRST.get(found, anything), values[first.name], found)


def check_value(found: str, param: Any, value: Any, context: Any) -> None:
    """A value is of its type, and an option that names something names something shipped."""
    some = value if isinstance(value, list | tuple) else [value]
    if any(PLACEHOLDER.fullmatch(str(one)) for one in some):
        return
    param.process_value(context, value)
    for option in param.opts:
        if isinstance(value, str):
            check_name(OPTIONS.get(option, anything), value, f"{found} {option}")


def check_name(known: Callable[[str], bool], value: str, of: str) -> None:
    if not PLACEHOLDER.fullmatch(value) and not OWN.fullmatch(value):
        assert known(value), f"{of}: nothing is called {value}"


def anything(_: str) -> bool:
    return True


def one_of(*kinds: Kind) -> Callable[[str], bool]:
    def known(value: str) -> bool:
        try:
            return locate(value, kinds).exists()
        except InputError:
            return False

    return known


def a_study(first: Kind) -> Callable[[str], bool]:
    return one_of(first, *(kind for kind in STUDIES if kind != first))


def a_net(value: str) -> bool:
    """A preset, the tiny decoder, or a space's reference or base."""
    space, _, reference = value.partition("/")
    if value in (*presets.NAMES, presets.TINY_DECODER, "minilm"):
        return True
    return space in shipped("space") and reference in (BASE, *load_space(space).references)


def a_reference(value: str) -> bool:
    return a_net(value) or any(value in load_space(space).references for space in shipped("space"))


def a_run(value: str) -> bool:
    """The run of a shipped file: of a search its name, of any other KIND-NAME."""
    kind, _, own = value.partition("-")
    kinds: dict[str, Kind] = {"ablation": "ablation", "evolution": "evolution", "training": "training"}
    return own in shipped(kinds[kind]) if kind in kinds else value in shipped("search")


def an_architecture(value: str) -> bool:
    owner, colon, which = value.rpartition(":")
    if not colon:
        return a_net(value)
    return one_of("space")(owner) if which == BASE else a_study("search")(owner)


def a_device(value: str) -> bool:
    kind, _, profile = value.partition(":")
    return value in BACKENDS or (kind == "predicted" and (profile in profiles.NAMES or bool(OWN.fullmatch(profile))))


def a_candidate(value: str) -> bool:
    return ":" in value and an_architecture(value)


FIRST: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("search", "report", "best", "audit"), a_study("search")),
    "ablate": a_study("ablation"),
    "evolve": a_study("evolution"),
    "train": one_of("training"),
    "compare-recipes": one_of("comparison"),
    **dict.fromkeys(("space show", "latency sample"), one_of("space")),
    **dict.fromkeys(("cost", "latency measure", "latency blocks"), a_net),
    "score": lambda value: a_reference(value) or a_candidate(value),
    "prune-decoder": a_run,
    "generate": lambda value: a_run(value) or a_candidate(value),
    "export": lambda value: a_run(value) or a_net(value) or a_candidate(value),
}
OPTIONS: dict[str, Callable[[str], bool]] = {
    "--study": a_study("search"),
    "--compare-with": a_study("search"),
    "--architecture": an_architecture,
    "--profile": lambda value: value in profiles.NAMES,
    "--device": a_device,
}


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: f"{given.place}: {given.text[:60]}")
def test_it_can_be_given(given: Given) -> None:
    try:
        check(given.text, whole=given.whole)
    except typer.TyperException as error:
        pytest.fail(f"{given.place}: {given.text}\n{error.format_message()}")


def test_commands_are_found() -> None:
    """The search for commands itself works: all pages together name every command but those of nobody's page."""
    named = {" ".join(arguments(given.text)[:2]) for given in GIVEN}
    spoken = {command for command in commands() if any(f"{text} ".startswith(f"{command} ") for text in named)}
    assert len(GIVEN) > 100
    assert {"search", "ablate", "train", "latency fit", "space show"} <= spoken


@pytest.mark.parametrize(
    "text",
    [
        "archsearch serach emoji",
        "archsearch search emojis",
        "archsearch search emoji --trial 3",
        "archsearch search emoji --trials many",
        "archsearch search",
        "archsearch train emoji extra",
        "archsearch cost snapgen-t3i",
        "archsearch latency",
    ],
)
def test_what_cannot_be_given_is_caught(text: str) -> None:
    with pytest.raises((AssertionError, typer.TyperException)):
        check(text, whole=True)
