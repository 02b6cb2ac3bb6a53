"""Packages of the npm registry at pinned versions, from which the embedded data set is made."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from snapgen.errors import InputError


@dataclass(frozen=True)
class NpmPackage:
    """An npm package at one version; ``sha512`` is the registry's integrity value in base64."""

    name: str
    version: str
    sha512: str

    @property
    def file(self) -> str:
        """Name of the package's tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def read(self, folder: Path, member: str) -> bytes:
        """Content of a file of the package, e.g. ``package/LICENSE``, from the tarball in ``folder``."""
        with tarfile.open(folder / self.file) as tar:
            file = tar.extractfile(member)
            assert file is not None, f"{self.file} has no {member}"
            return file.read()


def fetch(package: NpmPackage, folder: Path) -> Path:
    """Path of the package's tarball in ``folder``, downloaded with ``npm pack`` if it is missing.

    Raises:
        InputError: if it cannot be downloaded, or differs from the pinned version.
    """
    path = folder / package.file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            raise InputError(path, "is missing, and npm could not download it", f"run {' '.join(command)}") from None
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise InputError(path, f"is not {package.name} {package.version}", "delete it, to download it again")
    return path
