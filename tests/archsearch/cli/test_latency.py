"""The latency commands: what they print, what they write, and what they make of mistakes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archsearch import cli, devices
from archsearch.latency import repeats
from archsearch.predictor.model import LatencyModel
from archsearch.spaces.loading import load_space
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.archsearch import apple_standin
from tests.archsearch.latency.test_records import Clock
from tests.archsearch.studies.quick import SPACE
from tests.archsearch.summing import Fake, biased, crowded
from tests.records import latency_record
from tests.snapgen.nets import tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Any:
    """The command's output; the exit status must be the wanted one."""

    def run(*arguments: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["archsearch", "latency", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == status, err
        return str(err if status else out)

    return run


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.json"
    path.write_text(tiny().to_json())
    return path


PHONE = ("--device", "predicted:iphone-15-pro", "--latent-size", 16)


def test_a_prediction_shows_as_one_with_its_interval_its_shares_and_the_residuals(run: Any, net: Path) -> None:
    shown = run("measure", net, *PHONE)
    assert "90 % interval" in shown
    assert "predicted, iphone-15-pro, A17 Pro, Neural Engine" in shown
    assert "an estimate, not a measurement" in shown
    for name in ("attention", "weights", "row 2a over row 1", "SDXL base, 768 px, guided", "check", "borrowed"):
        assert name in shown


def test_the_json_is_the_record_with_more_beside_it(run: Any, net: Path) -> None:
    found = json.loads(run("measure", net, *PHONE, "--json"))
    assert found["source"] == "predicted"
    assert sum(found["share_ms"].values()) == pytest.approx(found["median_ms"])
    low, high = found["interval_ms"]
    assert low < found["median_ms"] < high
    assert len(found["published"]) == 10


def test_what_was_measured_is_said_with_its_size(run: Any) -> None:
    assert "One pass of the U-Net at batch size 1, latent size 128, context tokens 77\n" in run(
        "measure", "emoji/base", *PHONE[:2]
    )
    sizes = ("--latent-size", 8, "--context-tokens", 16)
    assert "One pass of the U-Net at batch size 1, latent size 8, context tokens 16\n" in run(
        "measure", "emoji:base", *PHONE, *sizes
    )
    found = json.loads(run("measure", "emoji/base", *PHONE, *sizes, "--json"))
    assert (found["latent_size"], found["context_tokens"]) == (8, 16)
    assert "One pass of tiny-decoder at batch size 1, latent size 16\n" in run("measure", "tiny-decoder", *PHONE)


def test_the_tiny_decoder_is_predicted_and_not_measured(run: Any) -> None:
    found = json.loads(run("measure", "tiny-decoder", *PHONE, "--json"))
    assert found["share_ms"]["depthwise"] > 0
    assert "predict it" in run("measure", "tiny-decoder", "--device", "host", status=2)


def test_the_host_measures(run: Any, net: Path) -> None:
    shown = run("measure", net, "--latent-size", 4, "--context-tokens", 3)
    assert "measured, host" in shown
    assert "quartiles" in shown
    assert "loaded in" in shown


def test_core_ml_shows_where_operations_are_and_what_they_may_take(
    run: Any, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apple_standin.no_conversion(monkeypatch, tmp_path)
    apple_standin.on_a_mac(monkeypatch)
    on_a_mac = ("measure", net, "--device", "coreml", "--latent-size", 4)
    shown = run(*on_a_mac)
    assert "measured, coreml" in shown
    assert "On the Neural Engine: 90% of the estimated time, 67% of the operations" in shown
    assert "The costliest of 3 operations (Core ML's estimate, not a measurement)" in shown
    operations = json.loads(run(*on_a_mac, "--json"))["operations"]
    assert operations[2] == {
        "name": "c",
        "operator": "ios18.gather",
        "unit": "CPU",
        "estimated_ms": pytest.approx(2),
    }


def test_what_can_not_be_timed_and_a_lost_device_are_one_line(
    run: Any, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apple_standin.no_conversion(monkeypatch, tmp_path)
    mac = apple_standin.on_a_mac(monkeypatch)
    bench = apple_standin.with_a_phone(monkeypatch)
    mac.value = float("nan")
    bench.faults = [{"Load": "unplug"}]
    for device, named in (("coreml", "output with random weights is not finite"), ("iphone", "was disconnected")):
        said = run("measure", net, "--device", device, "--latent-size", 4, status=2)
        assert named in said
        assert said.count("\n") == 1


def test_records_are_sampled_fitted_and_validated(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, on a device whose time is the params."""

    class ByParams(Clock):
        def measure(self, arch: Architecture, *sizes: int) -> Any:
            from archsearch.cost.operations import operations

            self.asked.append(arch.id)
            return latency_record(sum(s.weights for s in operations(arch, sizes[0], context_tokens=sizes[1])) / 1e5)

    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    clock = ByParams([])
    monkeypatch.setattr(devices, "backend", lambda *_, **__: clock)
    first, other, model = (tmp_path / name for name in ("first.jsonl", "other.jsonl", "model.json"))
    said = run("sample", space, "--num", 10, "--out", first, "--quiet")
    assert "30 records of 10 of the 10 architectures" in said
    run("sample", space, "--num", 10, "--out", first, "--quiet")
    assert len(clock.asked) == 30, "what is there is not measured again"
    assert "fitted to 10 nets" in run("fit", first, "--out", model)
    assert len(LatencyModel.load(model).fitted_to) == 10
    run("sample", space, "--num", 5, "--seed", 1, "--out", other, "--quiet")
    shown = run("validate", model, other)
    assert "5 nets" in shown
    card = json.loads(run("validate", f"predicted:{model}", other, "--json"))
    assert [row["name"] for row in card["rows"]] == ["this model", "MACs alone", "params alone"]
    assert card["rows"][2]["within_5"] == 1


def test_what_cannot_be_timed_is_said_and_the_rest_goes_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = repeats.sample_architectures(load_space("emoji"), 2, seed=0)[0]
    monkeypatch.setattr(devices, "backend", lambda *_, **__: Clock([1, 1, 1], fails=bad.id))
    assert "3 records of 1 of the 2" in run("sample", "emoji", "--num", 2, "--out", tmp_path / "r.jsonl", "--quiet")


def test_a_profiles_fit_prints_every_residual(run: Any, tmp_path: Path) -> None:
    shown = run("fit", "--profile", "iphone-16-pro-max", "--out", tmp_path / "phone.json")
    assert shown.count("fitted") == 2
    assert shown.count("borrowed") == 4
    assert shown.count("check") == 4
    assert LatencyModel.load(tmp_path / "phone.json").device == "iphone-16-pro-max"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["measure", "no-net", *PHONE], "neither a preset nor a file"),
        (["measure", "snapgen/row 9", *PHONE], "snapgen/row 9"),
        (["measure", "snapgen-t2i", "--device", "toaster"], "toaster"),
        (["measure", "snapgen-t2i", "--device", "predicted:toaster"], "iphone-16-pro-max"),
        (["measure", "snapgen-t2i", *PHONE, "--latent-size", "7"], "use a multiple of 4"),
        (["measure", "snapgen-t2i", "--latent-size", "0"], "--latent-size"),
        (["snapgen-t2i"], "No such command 'snapgen-t2i'"),
        (["fit"], "give one of the two"),
        (["fit", "records.jsonl", "--profile", "iphone-15-pro"], "give one of the two"),
        (["fit", "--profile", "toaster"], "use iphone-15-pro, iphone-16-pro-max"),
        (["fit", "records.jsonl"], "records.jsonl: does not exist"),
        (["validate", "iphone-15-pro", "records.jsonl"], "records.jsonl: does not exist"),
        (["validate", "model.json", "records.jsonl"], "model.json: does not exist"),
        (["sample", "no-space", "--out", "r.jsonl"], "no-space"),
        (["sample", "emoji", "--out", "."], "is a directory"),
        (["sample", "emoji", "--out", "missing/r.jsonl"], "missing"),
    ],
)
def test_a_mistake_is_one_line(run: Any, arguments: list[object], named: str) -> None:
    said = run(*arguments, status=2)
    assert named in said
    assert said.count("\n") == 1


def test_a_record_of_a_net_too_far_off_is_still_predicted(run: Any, tmp_path: Path) -> None:
    wide = tmp_path / "wide.json"
    wide.write_text(apply_overrides(tiny(), {"levels[1].channels": 4096}).to_json())
    found = json.loads(run("measure", wide, *PHONE, "--json"))
    assert found["interval_ms"][1] > found["median_ms"]


def test_help_names_the_commands(run: Any) -> None:
    shown = run("-h")
    assert all(
        name in shown
        for name in ("measure", "sample", "fit", "validate", "blocks", "latency measure snapgen-t2i --device")
    )


def test_an_input_error_is_the_same_from_the_library() -> None:
    with pytest.raises(InputError, match="unknown device 'toaster'"):
        devices.backend("toaster")


@pytest.fixture
def blocks(run: Any, net: Path, tmp_path: Path) -> Any:
    """The command latency blocks on the tiny net, as predicted, or by a backend put in its place."""
    options = ("--device", "predicted:iphone-15-pro", "--latent-size", 8, "--context-tokens", 5, "--quiet")

    def blocks(*more: object, status: int = 0) -> str:
        return str(run("blocks", net, *options, "--out", tmp_path / "table.json", *more, status=status))

    return blocks


def test_blocks_shows_what_each_costs_and_how_far_to_trust_it(blocks: Any, tmp_path: Path) -> None:
    shown = blocks("--validation-nets", 4)
    for name in (
        "predicted, iphone-15-pro",
        "ResNet down[0].0",
        "CA up[1].1",
        "without any block",
        "100.0%",
        "4 random",
    ):
        assert name in shown
    assert "None is off by more than 10 %" in shown
    taken = (tmp_path / "table.jsonl").read_text()
    found = json.loads(blocks("--validation-nets", 4, "--json"))
    assert (tmp_path / "table.jsonl").read_text() == taken, "what is there is not measured again"
    assert sum(found["blocks"].values()) + found["fixed_ms"] == pytest.approx(found["whole_ms"], rel=0.02)
    assert found["checks"]["before"]["largest"] < 0.1
    assert "| block | ms | share | a copy more, ms |\n| --- | ---: |" in blocks("--validation-nets", 0, "--markdown")


@pytest.mark.parametrize(
    ("ms", "said"),
    [(crowded, "a refit does no better"), (biased, "the costs above are fitted to the sub")],
)
def test_blocks_says_how_its_sums_were_corrected(
    ms: Callable[[Architecture], float], said: str, blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "backend", lambda *_, **__: Fake(ms))
    shown = blocks("--validation-nets", 20, "--min-repeats", 1, "--max-repeats", 1)
    assert said in shown
    assert "refit, each left out" in shown


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--latent-size", 7], "--latent-size: "),
        (["--extra-copies", 0], "--extra-copies"),
        (["--validation-nets", -1], "--validation-nets"),
        (["--validation-nets", 1000, "--seed", "x"], "--seed"),
        (["--device", "toaster"], "toaster"),
        (["--out", "table.yaml"], "is no .json file"),
        (["--out", "missing/table.json"], "missing"),
    ],
)
def test_a_mistake_about_blocks_is_one_line(blocks: Any, more: list[object], named: str) -> None:
    said = blocks(*more, status=2)
    assert named in said
    assert said.count("\n") == 1
