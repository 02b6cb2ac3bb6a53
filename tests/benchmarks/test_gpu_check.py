from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from archsearch.studies.config.study import load_config
from benchmarks.gpu_check import __main__, kinds, nets, reference, runner, steps, system_info, tests, wheels
from benchmarks.gpu_check.child import main as child, missing
from benchmarks.gpu_check.page import MARKDOWN, RAW, Page
from benchmarks.gpu_check.parts import PARTS, TOTAL, Part
from benchmarks.gpu_check.runner import Ending
from benchmarks.gpu_check.section import Section, read
from benchmarks.gpu_check.setup import Setup
from benchmarks.train_step_nets import Setting
from snapgen.errors import InputError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def ended(code: str, tmp_path: Path, *, seconds: float = 60) -> Ending:
    """Ending of a process that runs the code."""
    line = [sys.executable, "-c", code]
    return runner.run(line, seconds=seconds, log=tmp_path / "log.txt", environment=ENVIRONMENT)


# --- the runner ---


def test_a_part_that_ends_is_done(tmp_path: Path) -> None:
    assert ended("print('hello')", tmp_path).state == "done"
    assert (tmp_path / "log.txt").read_text() == "hello\n"


def test_a_part_that_hangs_is_cut_off_with_its_processes(tmp_path: Path) -> None:
    started = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(600)"
    inner = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    ending = ended(started.format(inner), tmp_path, seconds=3)
    assert ending.state == "cut off"
    assert "3 s" in ending.reason
    if (tmp_path / "pid").exists():  # on a busy machine the inner process may not have started
        number = int((tmp_path / "pid").read_text() or 0)
        for _ in range(100):
            stat = Path(f"/proc/{number}/stat")
            if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.1)
        else:
            pytest.fail("the inner process is still running")


def test_a_part_that_refuses_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.2)
    ignores_sigterm = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    assert ended(ignores_sigterm, tmp_path, seconds=2).state == "cut off"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('out of luck')", "status 1: ValueError: out of luck"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("class OutOfMemoryError(Exception): ...\nraise OutOfMemoryError('no memory')", "OutOfMemoryError: no memory"),
    ],
)
def test_a_part_that_crashes_gives_the_reason(code: str, reason: str, tmp_path: Path) -> None:
    ending = ended(code, tmp_path)
    assert ending.state == "failed"
    assert reason in ending.reason


def test_changes_of_the_watched_file_are_reported(tmp_path: Path) -> None:
    contents: list[str] = []
    watched = tmp_path / "section.json"
    code = f"import pathlib, time; pathlib.Path({str(watched)!r}).write_text('here'); time.sleep(1)"
    line = [sys.executable, "-c", code]
    runner.run(
        line,
        seconds=60,
        log=tmp_path / "log.txt",
        environment=ENVIRONMENT,
        changed=lambda: contents.append(watched.read_text()),
        watched=watched,
    )
    assert "here" in contents


# --- a part's process ---


def setup_in(folder: Path) -> Setup:
    return Setup("cpu", True, str(folder), str(folder / "work"), "", 60)


def test_a_missing_package_skips_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("steps", "Steps", 1, ("json", "such-a-package"))
    monkeypatch.setattr("benchmarks.gpu_check.child.PARTS", (part,))
    child("steps", tmp_path / "steps.json", setup_in(tmp_path))
    assert read(tmp_path / "steps.json")["skipped"] == "not installed: such-a-package"


def test_an_input_error_skips_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InputError("minilm", "is not here", "bring it")

    monkeypatch.setattr("benchmarks.gpu_check.child.run_of", lambda _: refuse)
    child("steps", tmp_path / "steps.json", setup_in(tmp_path))
    assert read(tmp_path / "steps.json")["skipped"] == "minilm: is not here; bring it"


def test_all_packages_of_the_parts_are_requirements() -> None:
    assert not [package for part in PARTS for package in missing(part.needs) if package != "pytest"]


# --- the page ---


def page_of(folder: Path, parts: tuple[Part, ...] = PARTS) -> Page:
    return Page(folder, {"device": "a device"}, "the command", parts)


def test_a_page_can_be_written_at_any_time(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    page.write()
    assert (tmp_path / MARKDOWN).read_text().count("**Not begun**") == len(PARTS)
    section = Section(tmp_path / "tests.json")
    table = section.table("Tests", ["test", "outcome"])
    section.say("Some | words.")
    table.add("a|b", None)
    section.record(what="test", value=1.5)
    page.sections["tests"] = read(tmp_path / "tests.json")
    page.endings["tests"] = Ending("cut off", "its time was up", 2.4)
    page.write()
    text, raw = (tmp_path / MARKDOWN).read_text(), json.loads((tmp_path / RAW).read_text())
    assert "| The tests that need CUDA | cut off: its time was up | 2 |" in text
    assert "| a\\|b | – |" in text
    assert "Some | words." in text
    assert raw["parts"]["tests"]["records"] == [{"what": "test", "value": 1.5}]
    assert raw["parts"]["tests"]["state"] == "cut off"
    assert not list(tmp_path.glob("*.part"))


def test_an_incomplete_section_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text('{"blocks": [')
    assert read(tmp_path / "steps.json")["blocks"] == []


def test_time_is_distributed_over_the_parts() -> None:
    assert sum(__main__.shares(PARTS, TOTAL)) == pytest.approx(TOTAL) == pytest.approx(480)
    saved = __main__.shares(PARTS[1:], TOTAL)
    elastic = [part.elastic for part in PARTS[1:]].index(True)
    assert saved[elastic] == pytest.approx(PARTS[1:][elastic].seconds + PARTS[0].seconds)
    assert sum(__main__.shares(PARTS, 2 * TOTAL)) == pytest.approx(2 * TOTAL)


# --- the command ---


def test_the_full_check_is_refused_on_a_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert __main__.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "SMALL=1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_no_cuda_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert __main__.main(["--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CUDA device; use --device cpu --small" in line


def test_a_folder_without_wheels_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--small", "--out", str(tmp_path / "out"), "--wheels", str(tmp_path)]
    assert __main__.main(arguments) == 2
    assert "contains no wheels" in capsys.readouterr().err


def test_an_interrupted_check_leaves_its_results(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--small", "--out", str(tmp_path)]
    process = subprocess.Popen([*line, "--only", "steps", "ladder"], cwd=ROOT, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if (tmp_path / "log.txt").exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    text = (tmp_path / MARKDOWN).read_text()
    assert "interrupted: by a signal" in text
    assert "**Not begun**" in text


@pytest.mark.slow
def test_the_small_check_runs_to_its_end(tmp_path: Path) -> None:
    """Run the complete small check, which covers everything except CUDA itself."""
    line = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    log = (tmp_path / "log.txt").read_text() if (tmp_path / "log.txt").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    raw = json.loads((tmp_path / RAW).read_text())
    records = {name: part["records"] for name, part in raw["parts"].items()}
    assert {name: part["state"] for name, part in raw["parts"].items()} == {part.name: "done" for part in PARTS}
    assert {record["outcome"] for record in records["tests"]} == {"passed"}
    check_steps(records["steps"])
    assert [record["row"] for record in records["ladder"]] == ["0", "1", "2a"]
    assert {record["name"] for record in records["search"]} == {"base"}
    assert all(record["here"] == record["cpu"] for record in records["search"])
    judged = [record for record in records["emoji"] if record["what"] == "judged"]
    assert [record["net"] for record in judged] == ["before", "after"]
    assert all({"frechet_distance", "retrieval_r10"} <= record["measures"].keys() for record in judged)
    assert len([record for record in records["emoji"] if record["what"] == "stage"]) == 6
    assert {record["entry"] for record in records["teacher"]} == {"distilled", "alone"}
    text = (tmp_path / MARKDOWN).read_text()
    assert "published, iPhone 15 Pro" in text
    assert "1 of 1 losses are within the tolerance" in text
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {MARKDOWN, RAW, "log.txt", "emoji-0.png"}


def check_steps(records: list[dict[str, object]]) -> None:
    taken = [record for record in records if record["what"] == "step"]
    assert {record["net"] for record in taken} == set(steps.ALL)
    assert any("compiled" in str(record["case"]) for record in taken)
    assert any("checkpointed" in str(record["case"]) for record in taken)
    (shares,) = (record["shares"] for record in records if record["what"] == "kinds")
    assert isinstance(shares, dict)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares["depthwise convolution"], shares["matrix product"], shares["optimizer and average"]) > 0


# --- the parts ---


def test_the_files_with_tests_for_cuda_are_found() -> None:
    assert {"tests/snapgen/test_on_cuda.py", "tests/snapgen/training/test_loop.py"} <= set(tests.marked())
    assert "tests/snapgen/coreml/test_convert.py" not in tests.marked()


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::cudnn_convolution", [[2, 8, 4, 4], [16, 8, 3, 3]], "convolution"),
        ("aten::cudnn_convolution", [[2, 8, 4, 4], [8, 1, 3, 3]], "depthwise convolution"),
        ("aten::convolution_backward", [[2, 8, 4, 4], [2, 8, 4, 4], [8, 1, 3, 3]], "depthwise convolution"),
        ("aten::_conv_depthwise2d", [], "depthwise convolution"),
        ("aten::addmm", [], "matrix product"),
        ("aten::_scaled_dot_product_flash_attention_backward", [], "attention"),
        ("aten::native_group_norm_backward", [], "normalisation"),
        ("aten::silu_backward", [], "elementwise"),
        ("aten::_fused_adamw_", [], "optimizer and average"),
        ("aten::_foreach_lerp_", [], "optimizer and average"),
        ("aten::copy_", [], "copies"),
        ("aten::cat", [], "copies"),
        ("triton_poi_fused_silu_0", [], "compiled kernels"),
        ("aten::bernoulli_", [], "other"),
    ],
)
def test_operations_have_kinds(name: str, shapes: list[list[int]], kind: str) -> None:
    assert kinds.kind_of(name, shapes) == kind


def test_a_peak_is_known_by_the_devices_name() -> None:
    assert system_info.flops_of("NVIDIA H200") == system_info.flops_of("NVIDIA H100 80GB HBM3") == 989e12
    assert system_info.flops_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert system_info.flops_of("NVIDIA GeForce RTX 5090") is None


def test_a_share_of_the_peak_by_hand() -> None:
    # 2 images of 5 GMACs: 60 GFLOPs forward and backward, in half a second.
    assert steps.utilisation(5_000_000_000, 2, 0.5, 1e12) == pytest.approx(0.12)


def test_the_tolerance_by_hand() -> None:
    # Variances 0.02 and 0.08, their mean 0.05; the difference of two means over two seeds has the same.
    spread, error = reference.tolerance({"a": [1.0, 1.2], "b": [2.0, 2.4], "c": [3.0]}, 2)
    assert spread == pytest.approx(error) == pytest.approx(0.05**0.5)


def test_the_reference_matches_the_study() -> None:
    content = reference.read(__main__.REFERENCE)
    settings = load_config(reference.STUDY)
    archs = reference.points(settings, settings.load_space(), ["base", "snapgen", "2"])
    assert {arch.id for arch in archs.values()} <= content["losses"].keys()
    assert all(len(entry["losses"]) >= len(settings.protocol.train_seeds) for entry in content["losses"].values())


def test_a_damaged_reference_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text("{}")
    with pytest.raises(InputError, match="is not a reference"):
        reference.read(tmp_path / "reference.json")


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def timed(_: object, setting: Setting) -> None:
        tried.append(setting.stage.batch_size)
        if setting.stage.batch_size > 2:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(steps.Bench, "_timed", timed)
    case = steps.cases(small=True)[0]
    size = nets.families(small=True)[case.family]
    section = Section(tmp_path / "steps.json")
    table = section.table("none", [])
    bench = steps.Bench(section, case, size.entries, table, table, None, small=True)
    bench.run(nets.setting_of(size, torch.device("cpu"), latent=8, batch=8))
    assert tried == [8, 4, 2]


def test_the_most_important_cases_come_first() -> None:
    found = steps.cases(small=False)
    assert {case.family for case in found} == {"snapgen-imagenet", "snapgen-t2i"}
    assert {(case.latent, case.compiled, case.checkpointed) for case in found} >= {
        (latent, compiled, checkpointed)
        for latent, compiled, checkpointed in [(32, False, False), (128, False, False), (128, True, False)]
    }
    first_compiled = next(i for i, case in enumerate(found) if case.compiled)
    assert all(case.compiled or case.latent == 32 for case in found[first_compiled:])


def test_every_requirement_is_collected_preinstalled_or_not_needed() -> None:
    lines = (ROOT / "setup.cfg").read_text().partition("install_requires =\n")[2].partition("\n\n")[0].splitlines()
    required = {line.strip().partition(">")[0].partition("=")[0] for line in lines}
    collected = {name.partition(">")[0].partition("=")[0] for name in wheels.WHEELS}
    assert required <= collected | set(wheels.PREINSTALLED) | set(wheels.NOT_NEEDED)
    assert not collected & {*wheels.PREINSTALLED, *wheels.NOT_NEEDED}


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("optuna-5.0.0-py3-none-any.whl", True),
        ("pydantic_core-2.50.5-cp312-cp312-manylinux_2_17_x86_64.whl", True),
        ("pydantic_core-2.50.5-cp311-cp311-manylinux_2_17_x86_64.whl", False),
        ("pydantic_core-2.50.5-cp312-cp312-macosx_11_0_arm64.whl", False),
    ],
)
def test_wheels_are_for_the_other_machine(name: str, fits: bool) -> None:
    assert wheels._fits(name, "3.12") is fits


def test_a_folder_that_is_too_large_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.whl").write_bytes(b"\0" * 1000)
    monkeypatch.setattr(wheels, "MAX_BYTES", 999)
    with pytest.raises(InputError, match=r"the largest is large\.whl"):
        wheels._check_size(tmp_path)
