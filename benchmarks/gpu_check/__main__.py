"""The command: ``python -m benchmarks.gpu_check``; see the package."""

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
from benchmarks.gpu_check import place, runner
from benchmarks.gpu_check.page import MARKDOWN, Page
from benchmarks.gpu_check.parts import PARTS, TOTAL, Part
from benchmarks.gpu_check.runner import Ending
from benchmarks.gpu_check.section import read
from benchmarks.gpu_check.setup import Setup
from snapgen.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = Path(__file__).with_name("reference.json")
CAPTIONS = "captions"
"""The text encoder (`benchmarks.gpu_check.captions`): a zip file among the wheels, a folder beside the parts' own."""
LEAST_SECONDS = 5.0
"""That a part is begun with."""
BAD_INPUT, INTERRUPTED = 2, 130


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="everything made small; for a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of what is to be sent")
    parser.add_argument("--wheels", type=Path, help="folder that make gpu-wheels filled")
    parser.add_argument("--limit", type=float, default=TOTAL, help="seconds, at most, of the whole check")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="the CPU's losses")
    options = parser.parse_args(arguments)
    if options.limit <= 0:
        parser.error("--limit must be above 0")
    return options


def environment_of(options: argparse.Namespace, work: Path) -> dict[str, str]:
    """Of the parts' processes: where packages are found, and which devices are seen.

    Raises:
        InputError: if the wheels cannot be installed.
    """
    paths = [str(ROOT)]
    wheels: Path | None = options.wheels
    if wheels is not None:
        paths.append(str(installed(wheels, work / "site")))
        if (wheels / f"{CAPTIONS}.zip").is_file():
            shutil.unpack_archive(wheels / f"{CAPTIONS}.zip", work / CAPTIONS)
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    found["TOKENIZERS_PARALLELISM"] = "false"
    found.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # nets of many sizes come and go
    if options.device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
        found.setdefault("OMP_NUM_THREADS", "1")
    return found


def installed(wheels: Path, site: Path) -> Path:
    """The wheels of a folder, unpacked into another; nothing is downloaded.

    Raises:
        InputError: if there are none, or pip refuses one.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise InputError(wheels, "holds no wheels", "name the folder that make gpu-wheels filled", place="--wheels")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    pip += ["--disable-pip-version-check", "--root-user-action=ignore", "--target", str(site), *files]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise InputError(wheels, why, "collect them for this machine's Python: make gpu-wheels", place="--wheels")
    return site


def about(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, str]:
    """What the check runs on.

    Raises:
        InputError: if it cannot run there.
    """
    if options.device == "cpu" and not options.small:
        raise InputError("--device", "cpu would take hours in full size", "add --small (SMALL=1)")
    try:
        found = place.asked(environment)
    except RuntimeError as error:
        raise InputError("torch", str(error), "repair the installation of torch") from None
    if options.device == "cuda" and "cuda" not in found:
        raise InputError("--device", "torch sees no CUDA device", "use --device cpu --small (DEVICE=cpu SMALL=1)")
    found.pop("cuda", None)
    found.setdefault("device", "the CPU")
    shape = "small: the same code on small nets, which measures nothing worth knowing" if options.small else "full"
    return {"device": found.pop("device"), **found, "commit": commit(), "size": shape}


def commit() -> str:
    """The commit of the working tree, if git tells."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def shares(parts: Sequence[Part], left: float) -> list[float]:
    """Seconds of each part, were each to use up its share of what is left; the first elastic one gets what is over."""
    wanted = sum(part.seconds for part in parts)
    scale = left / TOTAL if left > TOTAL and wanted >= TOTAL else 1.0
    given = [part.seconds * scale for part in parts]
    over = max(0.0, left - sum(given))
    elastic = next((i for i, part in enumerate(parts) if part.elastic), None)
    if elastic is not None:
        given[elastic] += over
    return given


def check(options: argparse.Namespace, page: Page, environment: dict[str, str], work: Path, until: float) -> None:
    """Run the parts one after another, and write the file at every change.

    Raises:
        KeyboardInterrupt: once the file says so, if that comes.
    """
    log = options.out / "log.txt"
    for number, part in enumerate(page.parts):
        left = until - time.monotonic()
        seconds = min(left, shares(page.parts[number:], left)[0])
        if seconds < LEAST_SECONDS:
            page.endings[part.name] = Ending("not begun", "the whole check's time was up", 0)
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
        _say(f"{part.title}: at most {seconds:.0f} s")
        page.endings[part.name] = _ended(part, setup, path, page, environment, log)
        page.write()
        _say(f"  {page.endings[part.name].state} after {page.endings[part.name].seconds:.0f} s")


def _ended(part: Part, setup: Setup, path: Path, page: Page, environment: dict[str, str], log: Path) -> Ending:
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
        page.endings[part.name] = Ending("interrupted", "from outside", time.monotonic() - began)
        raise
    finally:
        page.sections[part.name] = read(path)
    skipped = page.sections[part.name]["skipped"]
    return ending._replace(state="skipped", reason=skipped) if skipped and ending.state == "done" else ending


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; its exit status: 0 if every part is done or skipped, 1 if not, 2 for a mistake in the input."""
    options = options_of(arguments)
    until = time.monotonic() + options.limit
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.gpu_check", *given])
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder, terminable():
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            environment = environment_of(options, Path(folder))
            # Nothing of an earlier run's caches: some are kept by the kind of device, and all must be made here.
            environment["ARCHSEARCH_CACHE"] = str(Path(folder) / "cache")
            found = about(options, environment)
            chosen = [part for part in PARTS if part.name in options.only]
            page = Page(options.out, {**found, "limit": f"{options.limit:.0f} s"}, command, chosen)
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
            page.write()
            _say(f"interrupted; what was done is in {options.out / MARKDOWN}")
            return INTERRUPTED
    _say(f"Send the folder: {options.out.resolve()}")
    return int(any(ending.state not in ("done", "skipped") for ending in page.endings.values()))


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
