"""Tables as files: what is written is read again, and what is damaged is named in one line."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from archsearch.studies.config.study import load_config
from archsearch.studies.tabular.file import load_table, shipped_tables, write_table
from archsearch.studies.tabular.scorer import space_on
from archsearch.studies.tabular.table import BenchmarkTable
from snapgen.errors import InputError
from tests.archsearch import synthetic_table


@pytest.fixture(scope="module")
def table() -> BenchmarkTable:
    return synthetic_table.make()


@pytest.fixture(scope="module")
def text(table: BenchmarkTable, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("table") / "table.csv"
    write_table(table, path)
    return path.read_text()


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_a_table_survives_its_file(table: BenchmarkTable, tmp_path: Path, name: str) -> None:
    write_table(table, tmp_path / name)
    again = load_table(tmp_path / name)
    assert again.header == table.header
    assert again.space.digest == table.space.digest
    assert again.full_size is not None
    assert again.full_size.digest == table.header.full_size["digest"]  # type: ignore[index]
    assert list(again.entries) == list(table.entries)
    for ours, theirs in zip(again.runs, table.runs, strict=True):
        assert (ours.architecture_id, ours.protocol_hash, ours.seed) == (
            theirs.architecture_id,
            theirs.protocol_hash,
            theirs.seed,
        )
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-7)
        assert ours.curve.validation_loss == pytest.approx(theirs.curve.validation_loss, rel=1e-7)
    write_table(again, tmp_path / f"again-{name}")
    assert (tmp_path / f"again-{name}").read_bytes() == (tmp_path / name).read_bytes()


def test_pandas_reads_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(text)
    frame = pandas.read_csv(tmp_path / "table.csv", skiprows=1)
    assert len(frame[["architecture_id", "protocol_hash", "seed"]].drop_duplicates()) == len(frame)
    assert {"knob convs", "loss_1_of_8", "loss_8_of_8_t4", "predicted_iphone-15-pro_ms"} <= set(frame.columns)


def _line(text: str, number: int, change: Callable[[str], str]) -> str:
    lines = text.split("\n")
    lines[number - 1] = change(lines[number - 1])
    return "\n".join(lines)


def _header(text: str, change: Callable[[dict[str, object]], object]) -> str:
    def changed(line: str) -> str:
        values = json.loads(line.removeprefix("# "))
        change(values)
        return f"# {json.dumps(values)}"

    return _line(text, 1, changed)


def _cell(text: str, number: int, column: str, value: str) -> str:
    def changed(line: str) -> str:
        cells = line.split(",")
        cells[text.split("\n")[1].split(",").index(column)] = value
        return ",".join(cells)

    return _line(text, number, changed)


def _space(text: str, change: Callable[[Any], object]) -> str:
    """The table with another space, whose digest is right."""

    def changed(values: Any) -> None:
        change(values["space"])
        content = {key: value for key, value in values["space"].items() if key not in ("name", "digest")}
        written = json.dumps(content, sort_keys=True, separators=(",", ":"))
        values["space"]["digest"] = hashlib.sha256(written.encode()).hexdigest()[:16]

    return _header(text, changed)


def _shared(text: str) -> str:
    """The table with a further protocol that has the first one's seed."""
    more = synthetic_table.resolved(train_seeds=(0, 9))
    return _header(text, lambda v: v["protocols"].update({more.hash: more.model_dump(mode="json")}))  # type: ignore[attr-defined]


DAMAGES: dict[str, tuple[Callable[[str], str], str]] = {
    "no header": (lambda t: t.partition("\n")[2], "is not a table: its first line does not describe it"),
    "unknown key": (lambda t: _header(t, lambda v: v.update(colour="red")), "colour"),
    "other format": (lambda t: _header(t, lambda v: v.update(format=2)), "format"),
    "other space": (
        lambda t: _header(t, lambda v: v["space"].update(latent_size=16)),  # type: ignore[attr-defined]
        "its space is damaged: the digest differs",
    ),
    "limits that are none": (
        lambda t: _header(t, lambda v: v["space"].update(constraints="x")),  # type: ignore[attr-defined]
        "its space is damaged",
    ),
    "a name that is none": (
        lambda t: _header(t, lambda v: v["space"].update(name=[])),  # type: ignore[attr-defined]
        "its space is damaged",
    ),
    "endless curves": (
        lambda t: _header(t, lambda v: v.update(curve_points=10**18)),
        "curve_points: 1000000000000000000 is too large",
    ),
    "other revision": (
        lambda t: _header(t, lambda v: next(iter(v["protocols"].values())).update(revision=1)),  # type: ignore[attr-defined]
        "in this version of archsearch",
    ),
    "unknown column": (
        lambda t: _line(t, 2, lambda line: line.replace("seconds", "minutes")),
        "line 2: unknown column 'min",
    ),
    "missing column": (
        lambda t: "\n".join(line.partition(",")[2] if i else line for i, line in enumerate(t.split("\n"))),
        "line 2: missing column 'architecture_id'",
    ),
    "text for a number": (lambda t: _line(t, 5, lambda line: line.replace(",0,", ",zero,", 1)), "line 5, seed: 'zero'"),
    "not finite": (
        lambda t: _line(t, 4, lambda line: line.replace(line.split(",false,")[1].split(",")[0], "nan", 1)),
        "line 4, validation_loss: 'nan' is not a number",
    ),
    "a cell less": (lambda t: _line(t, 9, lambda line: line.rpartition(",")[0]), "line 9: has"),
    "a run twice": (lambda t: _line(t, 3, lambda line: f"{line}\n{line}"), "line 4: is the same run as an earlier row"),
    "a run less": (lambda t: _line(t, 3, lambda _: "").replace("\n\n", "\n"), "has 975 runs, but its first line says"),
    "the first protocol alone": (
        lambda t: "\n".join(t.split("\n")[: 2 + 768]) + "\n",
        "has 768 runs, but its first line says",
    ),
    "a run too few from the start": (
        lambda t: _header(_line(t, 3, lambda _: "").replace("\n\n", "\n"), lambda v: v.update(num_runs=975)),
        "lacks 1 of 768 runs",
    ),
    "a long first line": (lambda t: _header(t, lambda v: v.update(machine="x" * (1 << 20))), "has more than 1,048,576"),
    "a seed that was not": (lambda t: _cell(t, 3, "seed", "7"), "line 3: has seed 7, but its protocol has 0, 1"),
    "diverged with scores": (lambda t: _cell(t, 3, "diverged", "true"), "line 3: has scores, though it diverged"),
    "no loss": (lambda t: _cell(t, 3, "validation_loss", ""), "line 3: has no validation_loss, though it did not"),
    "no error": (lambda t: _cell(t, 3, "kernel_error", ""), "1 of 768 runs under "),
    "an error of nothing": (lambda t: _cell(t, 3, "kernel_distance", ""), "line 3: has kernel_error, but no kernel_d"),
    "a score less": (
        lambda t: _cell(_cell(t, 3, "kernel_error", ""), 3, "kernel_distance", ""),
        "1 of 768 runs under ",
    ),
    "a gap in a curve": (lambda t: _cell(t, 3, "loss_2_of_8", ""), "line 3: its curve has gaps"),
    "a negative error": (lambda t: _cell(t, 3, "frechet_error", "-1"), "line 3, frechet_error: '-1' is below 0"),
    "an underscore": (lambda t: _cell(t, 3, "validation_loss", "1_0"), "line 3, validation_loss: '1_0' is not a num"),
    "a huge loss": (lambda t: _cell(t, 3, "validation_loss", "1e308"), "line 3, validation_loss: '1e308' is larger"),
    "no params": (lambda t: _cell(t, 3, "params", "0"), "line 3, params: is 0"),
    "a number of thousands of digits": (
        lambda t: _cell(t, 3, "params", "9" * 5000),
        "is not a whole number of at most",
    ),
    "quartiles": (lambda t: _cell(t, 3, "latency_lower_ms", "1e6"), "line 3: the quartiles of its latency are not in"),
    "two protocols that share a seed": (_shared, " differ only in their seeds, but share 0"),
    "two knobs of a name": (
        lambda t: _space(t, lambda space: space["knobs"].append(space["knobs"][0])),
        "its space is damaged",
    ),
    "a choice without changes": (
        lambda t: _space(t, lambda space: space["knobs"][0]["choices"].append("none")),
        "its space is damaged",
    ),
    "another choice": (
        lambda t: t.replace(",plain,", ",separable,"),
        "does not have the choices that its row names",
    ),
    "an unknown choice": (
        lambda t: _line(t, 3, lambda line: line.replace(",plain,", ",wavy,")),
        "line 3, knob convs: 'wavy'",
    ),
    "an unknown protocol": (
        lambda t: _line(t, 3, lambda line: line.replace(line.split(",")[1], "0123456789abcdef")),
        "line 3: 0123456789abcdef is none of the table's protocols",
    ),
    "two latencies": (
        lambda t: _line(t, 4, lambda line: line.rpartition(",")[0] + ",99"),
        "line 4: architecture",
    ),
    "half a file": (lambda t: t[: len(t) // 2], "line "),
    "empty": (lambda _: "", "is not a table"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_one_line(text: str, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    path = tmp_path / "table.csv"
    path.write_text(change(text))
    with pytest.raises(InputError) as caught:
        load_table(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_gzip_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv.gz"
    for content in (gzip.compress(text.encode())[:-100], text.encode()):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is damaged or not a table"):
            load_table(path)
    with pytest.raises(InputError, match="does not exist"):
        load_table(tmp_path / "none.csv")


def test_true_values_are_means_over_the_seeds_that_all_architectures_have(table: BenchmarkTable) -> None:
    values = table.true_values("validation_loss")
    assert len(values) == 384
    for i, runs in table.short_runs.items():
        assert values[i] == pytest.approx((runs[0].scores["validation_loss"] + runs[1].scores["validation_loss"]) / 2)
    assert max(map(len, table.short_runs.values())) > 2


def test_the_shipped_table_is_whole_and_the_quick_starts() -> None:
    table = load_table("factorial")
    assert (len(table.entries), len(table.runs), table.seeds) == (384, 1128, (0, 1))
    assert table.header.run_seconds == "timed"
    assert not any(run.diverged for run in table.runs)
    for name in ("emoji", "factorial"):
        space_on(table, load_config(name))
    licence = next(iter(shipped_tables().values())).parent / "LICENSE-cc-by-4.0"
    assert table.header.license == "CC-BY-4.0"
    assert "Creative Commons" in licence.read_text()


def test_an_unknown_table_tells_the_shipped_ones() -> None:
    with pytest.raises(InputError, match=r"none\.csv: does not exist; .*, or a shipped one: factorial"):
        load_table("none.csv")
