"""Configuration errors name file, place and remedy; derived seeds depend on every name."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snapgen import config, seeding
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError


class Inner(config.Config):
    count: int


class Outer(config.Config):
    name: str
    rate: float = 1.0
    inner: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("name: a\nnmae: b", "nmae", "unknown key"),
        ("rate: 1", "name", "field required"),
        ("name: a\nrate: fast", "rate", "valid number"),
        ("name: a\nrate: .nan", "rate", "finite"),
        ("name: a\ninner: [{count: 1}, {count: x}]", "inner[1].count", "valid integer"),
        ("name: a\ninner: [{count: 1, more: 2}]", "inner[0].more", "unknown key"),
        ("name: a\nname: b", "line 2, column 1", "twice"),
        ("name: [a\n", "line 2", "not valid YAML"),
        ("? [a]\n: b", "line 1", "a key must be a name"),
        ("- name", "", "must be a mapping"),
        ("just words", "", "must be a mapping"),
        ("1: a", "", "must be a mapping"),
        ("  \n", "", "is empty"),
        ("!!python/object/apply:os.system [true]", "line 1", "not valid YAML"),
        ("name: &a [*a]", "name", "valid string"),
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


def test_an_input_error_can_be_pickled() -> None:
    error = InputError("a.yaml", "is odd", "mend it", place="line 3")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.yaml: line 3: is odd; mend it"
    assert (copy.source, copy.place, copy.problem, copy.remedy) == ("a.yaml", "line 3", "is odd", "mend it")


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
