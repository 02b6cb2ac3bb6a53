"""A study starts from another one or from a table of scores, and from nothing else later."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from archsearch import cli
from archsearch.reports.study_report import write_report
from archsearch.score import ProtocolMismatch
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.search.candidates import eligible, load_candidates
from archsearch.studies.search.known_scores import load_scores
from archsearch.studies.search.run import search
from archsearch.studies.storage.record import Candidate
from snapgen.errors import InputError
from tests.archsearch import tiny_studies
from tests.archsearch.studies.quick import SPACE, QuickScorer

Make = Callable[..., StudyConfig]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Number of architectures that have been trained so far."""
    path = tmp_path / "trained.log"
    path.touch()
    monkeypatch.setenv("QUICK_LOG", str(path))
    return lambda: len(path.read_text().split())


def run(settings: StudyConfig) -> list[Candidate]:
    return load_candidates(search(settings, quiet=True, scorer=QuickScorer))


@pytest.fixture
def table(settings: Make, tmp_path: Path) -> Path:
    """The scores of a study of which nothing else is left."""
    study = search(settings(name="first", trials=6), quiet=True, scorer=QuickScorer)
    path = write_report(study, tmp_path / "first.jsonl")
    (tmp_path / "runs" / "first").rename(tmp_path / "moved")
    return path


def refused(settings: StudyConfig) -> InputError:
    with pytest.raises(InputError) as caught:
        run(settings)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_study_cannot_start_from_itself(settings: Make, tmp_path: Path) -> None:
    words = "study: start_from: quick.yaml is this study, which cannot start from itself; name another one"
    (tmp_path / "quick.yaml").write_text("space: space.yaml\ntrials: 3\n")
    assert str(refused(settings(start_from="quick.yaml"))) == words
    run(settings(trials=3))
    assert str(refused(settings(start_from="quick.yaml"))) == words, "when it has begun, too"
    assert "quick is this study" in str(refused(settings(start_from="quick")))


def test_what_a_study_starts_from_may_be_spelled_otherwise(settings: Make, tmp_path: Path) -> None:
    run(settings(name="first", trials=3))
    (tmp_path / "first.yaml").write_text("space: space.yaml\ntrials: 3\n")
    run(settings(name="second", trials=1, start_from="first"))
    (tmp_path / "same.yaml").write_text(
        f"name: first\nspace: e\ntrials: 1\nstorage: sqlite:///{tmp_path}/runs/first/study.db"
    )
    for spelling in ("first.yaml", str(tmp_path / "first.yaml"), "same.yaml"):
        assert len(run(settings(name="second", trials=1, start_from=spelling))) == 4


@pytest.mark.parametrize("begun", ["first", None])
def test_a_study_goes_on_from_what_it_began_with(settings: Make, tmp_path: Path, begun: str | None) -> None:
    run(settings(name="first", trials=3))
    run(settings(name="other", trials=3))
    run(settings(name="second", trials=1, start_from=begun))
    for now in {"first", "other", "gone", None} - {begun}:
        error = refused(settings(name="second", trials=2, start_from=now))
        assert (error.place, error.problem) == ("start_from", f"was {begun or 'null'} when second began")
    (tmp_path / "first.yaml").write_text("name: other\nspace: space.yaml\ntrials: 3\n")
    if begun:
        (tmp_path / "runs" / "first").rename(tmp_path / "moved")
        assert refused(settings(name="second", trials=2, start_from="first.yaml")).place == "start_from"
        run(settings(name="second", trials=2, start_from="first"))


def test_a_table_has_all_that_a_study_can_start_from(
    settings: Make, table: Path, trained: Callable[[], int], tmp_path: Path
) -> None:
    (tmp_path / "moved").rename(tmp_path / "runs" / "first")
    by_study = run(settings(name="by_study", trials=3, start_from="first"))
    (tmp_path / "runs" / "first").rename(tmp_path / "moved")
    before = trained()
    by_table = run(settings(name="by_table", trials=3, start_from=str(table)))
    assert trained() == before + 3
    assert [c.score for c in by_table] == [c.score for c in by_study]
    assert by_table[1].reused_study == f"trial 1 of first (line 2 of {table})"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert all(row["protocol_hash"] == row["quality"]["protocol_hash"] for row in rows)
    assert all(row["protocol"]["protocol"]["steps"] == 240 for row in rows)
    assert all(len(row["quality"]["validation_loss"]["by_seed"]) == 2 for row in rows)


def test_a_table_may_be_moved_and_may_go_but_not_change(
    settings: Make, table: Path, tmp_path: Path, trained: Callable[[], int]
) -> None:
    run(settings(name="second", trials=1, start_from=str(table)))
    moved = table.rename(tmp_path / "elsewhere.jsonl")
    run(settings(name="second", trials=2, start_from=str(moved)))
    moved.write_bytes(moved.read_bytes() + moved.read_bytes())
    assert refused(settings(name="second", trials=3, start_from=str(moved))).place == "start_from"
    moved.unlink()
    count = trained()
    assert len(eligible(run(settings(name="second", trials=3, start_from=str(moved))))) == 9
    assert trained() == count + 1


def test_tables_may_be_put_together(settings: Make, table: Path) -> None:
    study = search(settings(name="third", trials=5, sampler="random"), quiet=True, scorer=QuickScorer)
    rows = table.read_bytes()
    table.write_bytes(rows + write_report(study, table.with_name("third.jsonl")).read_bytes() + rows)
    ids = {score.architecture.id for score in load_scores(str(table))}
    assert {c.architecture.id for c in run(settings(name="second", trials=1, start_from=str(table)))} > ids


def test_a_twins_score_is_that_of_its_own_space(settings: Make, tmp_path: Path) -> None:
    (tmp_path / "twin.yaml").write_text(SPACE.replace("norm_groups: 8", "norm_groups: 4"))
    (tmp_path / "other.yaml").write_text(SPACE.replace("norm_groups: 8", "norm_groups: 2"))
    proxy = str(tmp_path / "twin.yaml")
    study = search(settings(name="first", trials=4, proxy=proxy), quiet=True, scorer=QuickScorer)
    table = str(write_report(study, tmp_path / "first.jsonl"))
    assert sum(c.given for c in run(settings(name="second", trials=1, start_from=table, proxy=proxy))) == 4
    for changes in ({}, {"proxy": str(tmp_path / "other.yaml")}):
        error = refused(settings(name="third", start_from=table, **changes))
        assert "trial 0 of first (line 1 of " in error.problem
        assert "another twin was trained in its place" in error.problem


def test_a_foreign_protocol_is_refused_by_its_first_difference(settings: Make, table: Path) -> None:
    error = refused(settings(name="second", start_from=str(table), protocol={"steps": 7}))
    assert isinstance(error, ProtocolMismatch)
    assert str(error).startswith(f"study: protocol.steps: differs from line 1 of {table}, 7 against 240; ")
    error = refused(settings(name="second", start_from=str(table), seed=9))
    assert str(error).startswith(f"study: seed: differs from line 1 of {table}, 9 against 3; ")


def test_candidates_of_another_space_are_refused_or_named(
    settings: Make, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knobs = SPACE.partition("references:")[0]
    other = knobs.replace("channels: 16,", "channels: 40,").replace("[16, 24, 32, 48]", "[40, 56]")
    (tmp_path / "none.yaml").write_text(other)
    error = refused(settings(name="second", space=str(tmp_path / "none.yaml"), start_from=str(table)))
    assert (error.source, error.place) == ("study", "start_from")
    assert error.problem.startswith(
        f"{table}: has no candidate that is a point of none, e.g. trial 0 of first (line 1 of "
    )
    (tmp_path / "fewer.yaml").write_text(SPACE.replace("[16, 24, 32, 48]", "[16, 24]"))
    search(
        settings(name="third", trials=1, space=str(tmp_path / "fewer.yaml"), start_from=str(table)), scorer=QuickScorer
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not points" in line]
    assert "candidates are not points of fewer, e.g. trial " in line
    assert line.endswith(f"of {table}): levels[0].channels has none of the choices in fewer")


def damage(line: int, change: Callable[[dict[str, Any]], None]) -> Callable[[list[str]], list[str]]:
    def changed(lines: list[str]) -> list[str]:
        row = json.loads(lines[line - 1])
        change(row)
        return [*lines[: line - 1], json.dumps(row), *lines[line:]]

    return changed


@pytest.mark.parametrize(
    ("damaged", "place", "words"),
    [
        (lambda lines: lines[:4], "line 4", "the table ends with 4 of the 6 scores of study first"),
        (lambda lines: [*lines[:2], lines[2][:300]], "line 3", "is not JSON"),
        (lambda lines: [*lines[:5], "[1]"], "line 6", "is not a mapping"),
        (lambda lines: [*lines[:5], "\udcff"], "line 6", "not JSON"),
        (lambda _: [], "", "has no scores"),
        (
            damage(2, lambda row: row["quality"]["validation_loss"].pop("low")),
            "line 2: quality.validation_loss.low",
            "missing",
        ),
        (
            damage(3, lambda row: row["quality"]["validation_loss"].update(value=float("nan"))),
            "line 3: quality",
            "finite",
        ),
        (damage(1, lambda row: row.update(stars=5)), "line 1: stars", "unknown key"),
        (damage(4, lambda row: row["architecture"].update(down=[])), "line 4: architecture", ""),
        (damage(5, lambda row: row["protocol"]["protocol"].update(steps=7)), "line 5", "is not that of the protocol"),
        (
            damage(6, lambda row: row["quality"]["validation_loss"].update(by_seed=[1, 1, 1])),
            "line 6",
            "3 values by seed",
        ),
    ],
)
def test_a_damaged_table_is_refused_by_its_line(
    settings: Make, table: Path, damaged: Callable[[list[str]], list[str]], place: str, words: str
) -> None:
    lines = damaged(table.read_text().splitlines())
    table.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        load_scores(str(table))
    assert caught.value.source == str(table)
    assert caught.value.place.startswith(place)
    assert words in caught.value.problem
    error = refused(settings(name="second", start_from=str(table)))
    assert str(error).startswith(f"study: start_from: {table}: {place}")


def test_the_command_writes_a_table_and_takes_it(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[str, str, object]:
        monkeypatch.setattr(sys, "argv", ["archsearch", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return *capsys.readouterr(), ended.value.code

    monkeypatch.setitem(search.__kwdefaults__, "scorer", QuickScorer)
    run(settings(name="first", trials=4))
    out, _, status = command("report", "first", "--out", "first.jsonl")
    assert (out.startswith("Scores: "), status) == (True, 0)
    assert not Path("first.csv").exists()
    (tmp_path / "second.yaml").write_text(
        "space: space.yaml\ntrials: 1\nseed: 3\nsampler: random\nstart_from: first.jsonl\n"
    )
    assert load_config(tmp_path / "second.yaml").start_from == str(tmp_path / "first.jsonl")
    assert command("search", "second.yaml", "--quiet")[2] == 0
    Path("first.jsonl").write_text("{}\n")
    (tmp_path / "third.yaml").write_text((tmp_path / "second.yaml").read_text())
    _, error, status = command("search", "third.yaml", "--quiet")
    assert status == 2
    assert error.startswith("archsearch: third.yaml: start_from: first.jsonl: line 1: study: is required")


def test_what_has_no_scores_is_not_exported(settings: Make, tmp_path: Path) -> None:
    sizes = search(settings(name="sizes", objectives=["params", "macs"], trials=2), quiet=True, scorer=QuickScorer)
    sizes.set_user_attr("protocol_hash", None)
    with pytest.raises(InputError, match="study sizes: trains nothing"):
        write_report(sizes, tmp_path / "sizes.jsonl")
    with pytest.raises(InputError, match="--compare-with: is for a report"):
        write_report(sizes, tmp_path / "sizes.jsonl", compare_with=sizes)
    assert not (tmp_path / "sizes.jsonl").exists()


def test_objectives_and_limits_change_without_training_again(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "trained.log"
    monkeypatch.setenv("QUICK_LOG", str(log))
    old = load_candidates(search(settings(trials=6), quiet=True, scorer=QuickScorer))
    trained = log.read_text().split()
    capsys.readouterr()
    ms = sorted(c.value("latency_ms") for c in old)
    changed = {"objectives": ["frechet_distance", "params", "latency_ms"], "constraints": {"latency_ms": ms[3]}}
    again = settings(trials=6, **changed)
    new = search(again, quiet=True, scorer=QuickScorer)
    told = capsys.readouterr().err
    assert "quick: objectives and constraints changed; its 6 scored candidates are kept as study quick-1" in told
    scored = [c for c in load_candidates(new) if c.state == "scored"]
    reused = [c for c in scored if c.reused_study]
    qualities = {c.architecture.id: c.score.quality for c in old}
    assert len(reused) == 4, "those that keep the new limit"
    assert all(c.score.quality == qualities[c.architecture.id] for c in reused)
    assert len(log.read_text().split()) == len(trained) + 2, "6 candidates, of which 4 were scored before"
    assert len(new.directions) == 3
    search(settings(trials=7, **changed), quiet=True, scorer=QuickScorer)  # goes on as any study
    assert sorted(optuna.get_all_study_names(new._storage)) == ["quick", "quick-1"]
    search(settings(trials=7, **{**changed, "sampler": "random", "constraints": {}}), quiet=True, scorer=QuickScorer)
    assert sorted(optuna.get_all_study_names(new._storage)) == ["quick", "quick-1", "quick-2"]


def test_best_and_report_say_where_the_file_differs_from_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_studies.ship(tmp_path, monkeypatch)
    search(load_config("emoji"), quiet=True)

    def told(*command: str) -> str:
        monkeypatch.setattr(sys, "argv", ["archsearch", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return capsys.readouterr().err

    assert told("best", "emoji") == told("report", "emoji") == ""
    path = tmp_path / "shipped" / "studies" / "search" / "emoji.yaml"
    values = yaml.safe_load(path.read_text()) | {"constraints": {"latency_ms": 2}, "trials": 99}
    values["protocol"]["steps"] = 4
    path.write_text(yaml.safe_dump(values))
    for command in ("best", "report"):
        lines = told(command, "emoji").splitlines()
        assert [line.partition("; ")[0].removeprefix(f"{path}: ") for line in lines] == [
            "constraints is {latency_ms: 2.0}, but {} in the study",
            "protocol.steps is 4, but 3 in the study",
        ]
