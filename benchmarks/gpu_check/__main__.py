"""Command line of the check: ``python -m benchmarks.gpu_check``; see the package."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from archsearch.studies.signals import terminable
from benchmarks.gpu_check import runner, system_info
from benchmarks.gpu_check.page import MARKDOWN, Page
from benchmarks.gpu_check.parts import PARTS, TOTAL, Part
from benchmarks.gpu_check.runner import Ending
from benchmarks.gpu_check.section import read
from benchmarks.gpu_check.setup import Setup
from snapgen.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = Path(__file__).with_name("reference.json")
CAPTIONS = "captions"
"""Name of the text encoder (`benchmarks.gpu_check.captions`): a zip file among the wheels."""
MIN_PART_SECONDS = 5.0
"""Remaining time below which no further part is started."""
BAD_INPUT, INTERRUPTED = 2, 130


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="use small networks and few steps; for a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder for the results")
    parser.add_argument("--wheels", type=Path, help="folder created by make gpu-wheels")
    parser.add_argument("--limit", type=float, default=TOTAL, help="time limit of the whole check in seconds")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="JSON file of reference losses on the CPU")
    options = parser.parse_args(arguments)
    if options.limit <= 0:
        parser.error("--limit must be above 0")
    return options


def environment_of(options: argparse.Namespace, work: Path) -> dict[str, str]:
    """Environment variables for the processes of the parts: package paths, caches and visible devices.

    Raises:
        InputError: if the wheels cannot be installed.
    """
    paths = [str(ROOT)]
    wheels: Path | None = options.wheels
    if wheels is not None:
        paths.append(str(install_wheels(wheels, work / "site")))
        if (wheels / f"{CAPTIONS}.zip").is_file():
            shutil.unpack_archive(wheels / f"{CAPTIONS}.zip", work / CAPTIONS)
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment.setdefault(
        "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    )  # networks of many sizes are created and freed
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def install_wheels(wheels: Path, site: Path) -> Path:
    """Install the wheels of a folder into another folder without any download; return the latter.

    Raises:
        InputError: if there are no wheels, or pip fails.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise InputError(wheels, "contains no wheels", "name the folder created by make gpu-wheels", place="--wheels")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    pip += ["--disable-pip-version-check", "--root-user-action=ignore", "--target", str(site), *files]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise InputError(
            wheels, reason, "build them for this machine's Python version: make gpu-wheels", place="--wheels"
        )
    return site


def about(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, str]:
    """Description of the machine, by name.

    Raises:
        InputError: if the check cannot run on it.
    """
    if options.device == "cpu" and not options.small:
        raise InputError("--device", "the full check would take hours on a CPU", "add --small (SMALL=1)")
    try:
        info = system_info.query(environment)
    except RuntimeError as error:
        raise InputError("torch", str(error), "check the installation of torch") from None
    if options.device == "cuda" and "cuda" not in info:
        raise InputError("--device", "torch sees no CUDA device", "use --device cpu --small (DEVICE=cpu SMALL=1)")
    info.pop("cuda", None)
    info.setdefault("device", "the CPU")
    shape = "small: tests the code on small networks; the measurements are not meaningful" if options.small else "full"
    return {"device": info.pop("device"), **info, "commit": commit(), "size": shape}


def commit() -> str:
    """Commit of the working tree, or ``unknown`` without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def shares(parts: Sequence[Part], left: float) -> list[float]:
    """Time limit of each part if all use up their share; the first elastic part gets the time that is left over."""
    planned = sum(part.seconds for part in parts)
    scale = left / TOTAL if left > TOTAL and planned >= TOTAL else 1.0
    limits = [part.seconds * scale for part in parts]
    surplus = max(0.0, left - sum(limits))
    elastic = next((i for i, part in enumerate(parts) if part.elastic), None)
    if elastic is not None:
        limits[elastic] += surplus
    return limits


def check(options: argparse.Namespace, page: Page, environment: dict[str, str], work: Path, until: float) -> None:
    """Run the parts one after another, and write the results after every change.

    Raises:
        KeyboardInterrupt: after it has been recorded in the results.
    """
    log = options.out / "log.txt"
    for number, part in enumerate(page.parts):
        left = until - time.monotonic()
        seconds = min(left, shares(page.parts[number:], left)[0])
        if seconds < MIN_PART_SECONDS:
            page.endings[part.name] = Ending("not begun", "the time limit of the check was reached", 0)
            page.write()
            continue
        path = work / f"{part.name}.json"
        setup = Setup(
            device=options.device,
            small=options.small,
            out=str(options.out.resolve()),
            work=str(work / part.name),
            reference=str(options.reference.resolve()),
            seconds=seconds,
        )
        _log(f"{part.title}: at most {seconds:.0f} s")
        page.endings[part.name] = _run_part(part, setup, path, page, environment, log)
        page.write()
        _log(f"  {page.endings[part.name].state} after {page.endings[part.name].seconds:.0f} s")


def _run_part(part: Part, setup: Setup, path: Path, page: Page, environment: dict[str, str], log: Path) -> Ending:
    def changed() -> None:
        page.sections[part.name] = read(path)
        page.write()

    command = [sys.executable, "-m", "benchmarks.gpu_check.child", part.name, str(path), setup.to_json()]
    page.sections[part.name] = read(path)
    began = time.monotonic()
    try:
        ending = runner.run(
            command, seconds=setup.seconds, log=log, environment=environment, changed=changed, watched=path
        )
    except KeyboardInterrupt:
        page.endings[part.name] = Ending("interrupted", "by a signal", time.monotonic() - began)
        raise
    finally:
        page.sections[part.name] = read(path)
    skipped = page.sections[part.name]["skipped"]
    return ending._replace(state="skipped", reason=skipped) if skipped and ending.state == "done" else ending


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check.

    Returns:
        Exit status: 0 if every part is done or skipped, 1 if not, 2 for invalid input, 130 if interrupted.
    """
    options = options_of(arguments)
    until = time.monotonic() + options.limit
    argv = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.gpu_check", *argv])
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder, terminable():
        page: Page | None = None
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            environment = environment_of(options, Path(folder))
            # Use a new cache: entries of an earlier run may come from another kind of device.
            environment["ARCHSEARCH_CACHE"] = str(Path(folder) / "cache")
            info = about(options, environment)
            chosen = [part for part in PARTS if part.name in options.only]
            page = Page(options.out, {**info, "limit": f"{options.limit:.0f} s"}, command, chosen)
            page.write()
            (options.out / "log.txt").write_bytes(b"")
            check(options, page, environment, Path(folder), until)
        except InputError as error:
            sys.stderr.write(f"gpu-check: {error}\n")
            return BAD_INPUT
        except OSError as error:
            sys.stderr.write(f"gpu-check: {options.out}: {error.strerror or error}; name another folder (OUT=)\n")
            return BAD_INPUT
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if page is not None:
                page.write()
            _log(f"interrupted; the results so far are in {options.out / MARKDOWN}")
            return INTERRUPTED
    _log(f"Send the folder: {options.out.resolve()}")
    return int(page is None or any(ending.state not in ("done", "skipped") for ending in page.endings.values()))


def _log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
