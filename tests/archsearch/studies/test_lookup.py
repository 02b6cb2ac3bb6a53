"""One function finds what an architecture's name stands for, and a study is found by its run, too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from archsearch import cli, measure_latency
from archsearch.spaces.loading import load_space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.lookup import Conditions, find_architecture, find_conditions, find_config
from archsearch.studies.search.candidates import best, load_candidates
from archsearch.studies.search.run import search
from snapgen.architecture.presets import preset
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer

Make = Callable[..., StudyConfig]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["archsearch", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    return out


def test_every_kind_of_name(tmp_path: Path) -> None:
    emoji, path = load_space("emoji"), tmp_path / "net.json"
    path.write_text(emoji.base.to_json())
    assert find_architecture("snapgen-emoji") == preset("snapgen-emoji")
    assert (
        find_architecture(str(path)) == find_architecture("emoji:base") == find_architecture("emoji/base") == emoji.base
    )
    with pytest.raises(InputError, match=r"nosuch: is neither .*STUDY:best, STUDY:TRIAL, mine"):
        find_architecture("nosuch", other_names=("mine",))


def test_a_studys_candidates_are_named_wherever_an_architecture_is(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = search(settings(trials=4), quiet=True, scorer=QuickScorer)
    chosen, last = best(study).candidate, load_candidates(study)[-1]
    assert find_architecture("quick:best").id == chosen.architecture.id
    assert find_architecture(f"quick:{last.number}").id == last.architecture.id
    with pytest.raises(InputError, match=r"quick: has no candidate 99; use best, a trial's number \(0, 1, 2"):
        find_architecture("quick:99")
    sizes = ["--latent-size", "8", "--context-tokens", "16", "--json"]
    counted = json.loads(run(["cost", "quick:best", *sizes], monkeypatch, capsys))
    assert counted["architecture_id"] == chosen.architecture.id
    predicted = ["--device", "predicted:iphone-16-pro-max"]
    timed = json.loads(run(["latency", "measure", f"quick:{last.number}", *predicted, *sizes], monkeypatch, capsys))
    path = Path("net.json")
    path.write_text(last.architecture.to_json())
    assert timed == json.loads(run(["latency", "measure", str(path), *predicted, *sizes], monkeypatch, capsys))


def test_a_studys_candidate_is_measured_as_the_study_did(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = settings(trials=3, latency={"device": "predicted:iphone-15-pro"})
    space = load_space(made.space)
    search(made, quiet=True, scorer=QuickScorer)
    own = json.loads(run(["latency", "measure", "quick:best", "--json"], monkeypatch, capsys))
    assert (own["latent_size"], own["context_tokens"], own["device"]) == (8, space.context_tokens, "iphone-15-pro")
    other = ["--device", "predicted:iphone-16-pro-max", "--latent-size", "16", "--json"]
    changed = json.loads(run(["latency", "measure", "quick:best", *other], monkeypatch, capsys))
    assert (changed["latent_size"], changed["device"]) == (16, "iphone-16-pro-max")
    assert json.loads(run(["cost", "quick:best", "--json"], monkeypatch, capsys))["latent"] == 8
    assert measure_latency("quick:best").median_ms == own["median_ms"]


def test_a_devices_settings_stay_with_the_device(settings: Make) -> None:
    search(settings(trials=2, latency={"threads": 2, "options": {"timeout": 9}}), quiet=True, scorer=QuickScorer)
    own = find_conditions("quick:best")
    assert own.options == {"threads": 2, "timeout": 9}
    assert own.with_overrides(device="host", latent_size=4).options == own.options
    assert own.with_overrides(device="predicted:iphone-15-pro").options == {}
    assert find_conditions("emoji:base") == find_conditions("snapgen-t2i") == Conditions()


def test_a_run_names_its_study(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = settings(trials=3)
    chosen = best(search(made, quiet=True, scorer=QuickScorer)).candidate
    assert find_config("quick").model_dump() == made.model_dump()
    assert f"Trial {chosen.number}, architecture {chosen.architecture.id}" in run(
        ["best", "quick"], monkeypatch, capsys
    )
    assert "runs/quick/report.html" in run(["report", "quick"], monkeypatch, capsys).replace("\n", "")
    with pytest.raises(InputError, match="quickly: is neither a shipped study nor a file"):
        find_config("quickly")
