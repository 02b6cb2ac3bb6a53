from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from archsearch import cli
from archsearch.library import STUDIES, Kind, shipped
from archsearch.studies.config.study import StudyConfig, load_config
from snapgen.errors import InputError

GOOD = "space: emoji\ntrials: 3\n"


def read(tmp_path: Path, text: str | bytes) -> StudyConfig:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path)


def test_defaults(tmp_path: Path) -> None:
    settings = read(tmp_path, GOOD)
    assert settings.name == "mine"
    assert settings.objectives == ("validation_loss", "latency_ms")
    assert settings.sampler.name == "ehvi"
    for objectives in ("[latency_ms, params]", "[validation_loss]", "[validation_loss, kernel_distance]"):
        assert read(tmp_path, GOOD + f"objectives: {objectives}\n").sampler.name == "gp"
    assert settings.url == "sqlite:///runs/mine/study.db"
    assert settings.folder == Path("runs/mine")
    assert settings.artifact_folder == Path("runs/mine/artifacts")


@pytest.mark.parametrize("kind", STUDIES)
def test_shipped_studies_read(kind: Kind) -> None:
    for name in shipped(kind):
        assert (
            load_config(name, kind).name
            == load_config(f"{kind}/{name}").name
            == (name if kind == "search" else f"{kind}-{name}")
        )


def test_a_sampler_is_a_name_or_a_mapping(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD + "sampler: tpe\n").sampler.name == "tpe"
    nested = read(tmp_path, GOOD + "sampler: {name: nsga2, options: {population_size: 4}}\n")
    assert nested.sampler.options == {"population_size": 4}
    unnamed = read(tmp_path, GOOD + "sampler: {options: {features: false}}\n").sampler
    assert (unnamed.name, unnamed.options) == ("ehvi", {"features": False}), "the default of the objectives"


def test_a_space_beside_the_study_is_found(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("")
    assert read(tmp_path, "space: space.yaml\ntrials: 1\n").space == str(tmp_path / "space.yaml")
    settings = read(tmp_path, "space: space.yaml\nproxy: space.yaml\ntrials: 1\n")
    assert settings.proxy == str(tmp_path / "space.yaml")
    assert read(tmp_path, "space: emoji\nproxy: twin.yaml\ntrials: 1\n").proxy == "twin.yaml"


def test_overridden_keeps_the_source_and_checks(tmp_path: Path) -> None:
    settings = read(tmp_path, GOOD)
    changed = settings.with_overrides(trials=7, workers=None)
    assert (changed.trials, changed.workers, changed.source) == (7, 1, settings.source)
    with pytest.raises(InputError, match=r"mine\.yaml: workers"):
        settings.with_overrides(workers=0)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("trials: 3\n", "space", "required"),
        ("space: emoji\n", "", "no budget; give trials, time_budget_minutes or both"),
        (GOOD + "trails: 4\n", "trails", "unknown key"),
        (GOOD + "protocol: {stepz: 4}\n", "protocol.stepz", "unknown key"),
        (GOOD + "latency: {gpu: 1}\n", "latency.gpu", "unknown key"),
        (GOOD + "seed: -1\n", "seed", "-1 is too small; write 0 or more"),
        (GOOD + "workers: two\n", "workers", "'two' is not a whole number"),
        (GOOD + "workers: 0\n", "workers", "write 1 or more"),
        ("space: emoji\ntrials: 0\n", "trials", "write 1 or more"),
        ("space: emoji\ntrials: 3.5\n", "trials", "3.5 is not a whole number"),
        ("space: emoji\ntime_budget_minutes: .nan\n", "time_budget_minutes", "finite"),
        ("space: emoji\ntime_budget_minutes: -2\n", "time_budget_minutes", "write a number above 0"),
        ("space: [emoji]\ntrials: 3\n", "space", "['emoji'] is not a text"),
        (GOOD + "objectives: []\n", "objectives", "at least 1"),
        (GOOD + "objectives: [fid]\n", "objectives", "unknown objective 'fid'; use validation_loss"),
        (GOOD + "objectives: [params, params]\n", "objectives", "twice"),
        (GOOD + "objectives: params\n", "objectives", "'params' is not a list"),
        (GOOD + "constraints: {speed: 3}\n", "constraints", "unknown constraint 'speed'"),
        (GOOD + "constraints: {params: -3}\n", "constraints", "above 0"),
        (GOOD + "constraints: {params: many}\n", "constraints.params", "number"),
        (GOOD + "sampler: cmaes\n", "sampler", "'gp', 'tpe'"),
        (GOOD + "sampler: {name: gp, options: [1]}\n", "sampler.options", "[1] is not a mapping"),
        (GOOD + "seeds: {front: 200}\n", "seeds.front", "200 is too large; write 64 or less"),
        (GOOD + f"seeds: {{front: {10**15}}}\n", "seeds.front", "write 64 or less"),
        (GOOD + "proxy: 3\n", "proxy", "3"),
        (GOOD + "proxy: emoji\nobjectives: [params, macs]\n", "", "proxy is for a study that trains"),
        (GOOD + "proxy: emoji\nevolve: {target_ms: 3, round_steps: 2}\n", "", "proxy cannot be combined with evolve"),
        (GOOD + "name: ../up\n", "name", "folder"),
        (GOOD + "name: ''\n", "name", "folder"),
        ("space: emoji\ntrials: 3\ntrials: 4\n", "line 3", "twice"),
        ("space: emoji\n  trials: 3\n", "line 2", "not valid YAML"),
        ("- space\n", "", "must be a mapping"),
        ("", "", "is empty"),
        (b"\xff\xfe\x00", "", "not text"),
        ("a" * (1 << 21), "", "too large"),
    ],
)
def test_each_mistake_is_one_line_with_its_place(tmp_path: Path, text: str | bytes, place: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'mine.yaml'}: {place}")
    assert words in line
    assert "\n" not in line
    assert "; " in line


@pytest.mark.parametrize("name", ["no-such-study", "missing.yaml"])
def test_missing(name: str) -> None:
    with pytest.raises(InputError, match=r"neither a shipped study|does not exist"):
        load_config(name)


def test_a_folder_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="directory"):
        load_config(tmp_path)


def test_settings_are_read_without_what_builds_nets() -> None:
    heavy = "{'diffusers', 'transformers', 'snapgen.models.unet'}"
    code = f"import sys, archsearch.studies.config.study; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_three_mistakes_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of fields, and of fields that do not fit each other; a line each."""
    path = tmp_path / "mine.yaml"

    def told(text: str) -> list[str]:
        path.write_text(text)
        monkeypatch.setattr(sys, "argv", ["archsearch", "search", str(path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        return [line.removeprefix(f"archsearch: {path}: ") for line in capsys.readouterr().err.splitlines()]

    assert [
        line.partition(";")[0]
        for line in told(
            "space: emoji\ntrails: 5\nworkers: none\nprotocol: {steps: 0, batch_sise: 3}\nobjectives: [beauty]\n"
        )
    ] == [
        "objectives: unknown objective 'beauty'",
        "workers: 'none' is not a whole number",
        "protocol.steps: 0 is too small",
        "protocol.batch_sise: unknown key",
        "trails: unknown key",
    ]
    lines = told("space: emoji\nobjectives: [params]\nseeds: {first: 1}\nproxy: emoji\n")
    assert [line.partition(";")[0] for line in lines] == [
        "seeds is for studies that search by a quality number",
        "has no budget",
        "proxy is for a study that trains",
    ]
