"""Configuration errors name file, place and remedy; derived seeds depend on every name."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, strategies as st
from pydantic import Field

from snapgen import config, seeding
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.findings import Findings


class Inner(config.Config):
    count: int


class Outer(config.Config):
    name: str
    rate: float = 1.0
    inner: tuple[Inner, ...] = ()


class Sized(config.Config):
    kind: Literal["sized"]
    count: int = Field(default=1, ge=1, lt=10)
    share: float = Field(default=0.5, gt=0, le=1)
    names: tuple[str, ...] = Field(default=("a",), min_length=1, max_length=2)
    on: bool = False
    inner: Inner | None = None


class Named(config.Config):
    kind: Literal["named"]


class Holder(config.Config):
    part: Sized | Named = Field(discriminator="kind")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"count": "three"}, "part.count: 'three' is not a whole number; write one, e.g. 8"),
        ({"count": 1.5}, "part.count: 1.5 is not a whole number; write one, e.g. 8"),
        ({"count": None}, "part.count: nothing is not a whole number; write one, e.g. 8"),
        ({"count": 0}, "part.count: 0 is too small; write 1 or more"),
        ({"count": 10}, "part.count: 10 is too large; write a number below 10"),
        ({"share": 0}, "part.share: 0 is too small; write a number above 0.0"),
        ({"share": 1.5}, "part.share: 1.5 is too large; write 1.0 or less"),
        ({"share": [1]}, "part.share: [1] is not a number; write one, e.g. 0.5"),
        ({"share": float("nan")}, "part.share: nan is not a finite number; write one that is, e.g. 0.5"),
        ({"names": []}, "part.names: has 0 of at least 1 entries; add some"),
        ({"names": ["a", "b", "c"]}, "part.names: has more than the 2 entries that it may have; remove some"),
        ({"names": "a"}, "part.names: 'a' is not a list; write a list, e.g. [a, b]"),
        ({"names": [1]}, "part.names[0]: 1 is not a text; write a text, in quotes if it looks like a number"),
        ({"on": "maybe"}, "part.on: 'maybe' is neither true nor false; write true or false"),
        ({"inner": 3}, "part.inner: 3 is not a mapping; write 'key: value' lines"),
        ({"kind": "other"}, "part: 'other' is not one of the kinds; use one of: 'sized', 'named'"),
        ({"kind": None}, "part: its 'kind' is missing; add 'kind', which says what this is"),
    ],
)
def test_mistakes_are_told_in_plain_words(values: dict[str, object], line: str) -> None:
    part = {key: value for key, value in {"kind": "sized", **values}.items() if key != "kind" or value is not None}
    with pytest.raises(InputError) as caught:
        config.parse_config({"part": part}, Holder, source="a.yaml")
    assert str(caught.value) == f"a.yaml: {line}"


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("name: a\nnmae: b", "nmae", "unknown key"),
        ("rate: 1", "name", "is required, but missing; add it"),
        ("name: a\nrate: fast", "rate", "'fast' is not a number"),
        ("name: a\nrate: .nan", "rate", "finite"),
        ("name: a\ninner: [{count: 1}, {count: x}]", "inner[1].count", "'x' is not a whole number"),
        ("name: a\ninner: [{count: 1, more: 2}]", "inner[0].more", "unknown key"),
        ("name: a\nname: b", "line 2, column 1", "twice"),
        ("name: [a\n", "line 2", "not valid YAML"),
        ("? [a]\n: b", "line 1", "a key must be a name"),
        ("- name", "", "must be a mapping"),
        ("just words", "", "must be a mapping"),
        ("1: a", "", "must be a mapping"),
        ("  \n", "", "is empty"),
        ("!!python/object/apply:os.system [true]", "line 1", "not valid YAML"),
        ("name: &a [*a]", "line 1", "an alias within what it stands for"),
        ("name: 2020-01-01\ninner: [{count: 2020-01-01}]", "inner[0].count", "'2020-01-01' is not a whole number"),
        ('name: "\\e[2Jcleared"', "line 1", "a control character"),
        ('name: "right \\u202e left"', "line 1", "a control character"),
        ('"name\\n": a', "line 1", "a key of several lines"),
        ("rate: !!set {a}", "line 1", "could not determine a constructor"),
        ("rate: !!int ''", "", "not valid YAML"),
        (f"name: a\nrate: {'9' * 101}", "line 2", "a number of 101 characters"),
        (f"name: a\nrate: 1{':1' * 5000}", "line 2", "a number of 10,001 characters"),
        (f"name: a\nrate: 1{':1' * 5000}.5", "", "not valid YAML"),
        ("[" * 5000, "", "not valid YAML"),
    ],
)
def test_mistakes_are_placed(tmp_path: Path, text: str, place: str, problem: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        config.load_yaml(path, Outer)
    line = str(caught.value)
    assert line.startswith(f"{path}: {place}")
    assert problem.lower() in line.lower()
    assert "\n" not in line
    assert "; " in line, "a remedy follows the problem"


def test_files_that_are_not_configurations(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge").write_bytes(b"a" * (config.MAX_FILE_BYTES + 1))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, problem in [("binary", "byte 0"), ("huge", "too large"), ("none", "does not exist"), ("loop", "level")]:
        with pytest.raises(InputError, match=problem):
            config.load_yaml(tmp_path / name, Outer)
    with pytest.raises(InputError, match="directory"):
        config.load_yaml(tmp_path, Outer)


@pytest.mark.parametrize("name", ["pipe", "zeros", "link", "socket"])
def test_only_regular_files_are_read(tmp_path: Path, name: str) -> None:
    """A pipe without a writer would be waited for, and zeros never end."""
    path = tmp_path / name
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        if name == "pipe":
            os.mkfifo(path)
        elif name == "socket":
            server.bind(str(path))
        else:
            path.symlink_to("/dev/zero" if name == "zeros" else tmp_path / "pipe")
            os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputError, match=r"is not a regular file|no such device"):
            config.load_yaml(path, Outer)


def multiplied(levels: int) -> str:
    """YAML of under a kilobyte whose last value stands for ten to the power of ``levels`` ones."""
    lists = (f"&l{i} [{', '.join([f'*l{i - 1}' if i else '1'] * 10)}]" for i in range(levels))
    return "\n".join(f"- {each}" for each in lists)


@pytest.mark.parametrize("text", [multiplied(9), "- 1\n" * 100_000])
def test_aliases_do_not_multiply_what_is_read(text: str) -> None:
    begun = time.process_time()
    with pytest.raises(InputError, match="not valid YAML"):
        config.parse_yaml(text, "a.yaml")
    assert time.process_time() - begun < 5


def test_few_aliases_stand_for_what_they_name() -> None:
    assert config.parse_yaml("a: &a [1, 2]\nb: *a\nc: {d: *a}", "a.yaml") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": [1, 2]},
    }


def test_an_input_error_can_be_pickled() -> None:
    error = InputError("a.yaml", "is odd", "mend it", place="line 3")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.yaml: line 3: is odd; mend it"
    assert (copy.source, copy.place, copy.problem, copy.remedy) == ("a.yaml", "line 3", "is odd", "mend it")


def test_a_line_of_an_error_controls_no_terminal() -> None:
    line = str(InputError("\x1b[2Ja.yaml", "is\x07 \x9b31m odd\u202e", "mend\nit", place="\x00"))
    assert line == "�[2Ja.yaml: �: is� �31m odd�; mend it"
    findings = Findings()
    findings.add("have no caption", "a\x1b]0;title\x07.png")
    assert str(findings) == "1 have no caption, e.g. a�]0;title�.png"


def test_digest_depends_on_values_alone() -> None:
    assert Outer(name="a").digest() == Outer(rate=1, name="a").digest() != Outer(name="b").digest()


def test_architecture_file_round_trip(tmp_path: Path) -> None:
    arch = Architecture.model_validate(
        {"norm_groups": 8, "down": [{"channels": 16}], "up": [{"channels": 16, "num_res_blocks": 3}]}
    )
    (tmp_path / "arch.json").write_text(arch.to_json())
    assert Architecture.load(tmp_path / "arch.json") == arch


names = st.lists(st.integers(0, 99) | st.sampled_from(["train", "noise", "sampler"]), max_size=4)


@given(st.integers(0, 5), names, st.integers(0, 5), names)
def test_seeds_differ_when_anything_differs(
    seed: int, name: list[int | str], other_seed: int, other_name: list[int | str]
) -> None:
    same = (seed, [*map(str, name)]) == (other_seed, [*map(str, other_name)])
    assert (seeding.derive_seed(seed, *name) == seeding.derive_seed(other_seed, *other_name)) == same
    assert 0 <= seeding.derive_seed(seed, *name) < 2**63


def test_seeds_never_change() -> None:
    """Changing the derivation would silently change the results of every published study."""
    assert seeding.derive_seed(0, "train", 3) == 9010243902811717215


def test_null_is_a_name_as_a_key_and_nothing_as_a_value(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("null: encoded\ninner: [{null: zeros, b: null}]\n'null ': ~\n")
    read = config.read_mapping(tmp_path / "a.yaml")
    assert read == {"null": "encoded", "inner": [{"null": "zeros", "b": None}], "null ": None}
    (tmp_path / "b.yaml").write_text('null: a\n"null": b\n')
    with pytest.raises(InputError, match="twice"):
        config.read_mapping(tmp_path / "b.yaml")


def test_json_lines_tell_the_line_that_is_damaged() -> None:
    text = '{"a": 1}\n\n"\u2028 is no end of a line"\n{"a"\n'
    lines = config.json_lines(text, "data.jsonl")
    assert [next(lines), next(lines)] == [("line 1", {"a": 1}), ("line 3", "\u2028 is no end of a line")]
    with pytest.raises(InputError, match=r"data\.jsonl: line 4: is not JSON; remove or repair the line"):
        next(lines)
    assert next(config.json_lines(text.encode(), "data.jsonl")) == ("line 1", {"a": 1})
    assert [*config.json_lines("1\r\n2\r3", "data.jsonl")] == [("line 1", 1), ("line 2", 2), ("line 3", 3)]
