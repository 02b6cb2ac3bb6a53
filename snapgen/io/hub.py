"""Model folders by path, or by OWNER/NAME on the Hugging Face hub, and how they get there.

Only models named that way are downloaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from snapgen.errors import InputError, first_line

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of checkpoints that hold all weights in a single file, without a configuration."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Pattern of a model's name on the hub: OWNER/NAME."""


def resolve_model_folder(
    name_or_path: str | Path, files: Sequence[str], *, remedy: str, single_file: str = "StableDiffusionPipeline"
) -> Path:
    """Find a local model folder, or download OWNER/NAME from the hub unless it is in the hub's cache.

    Args:
        name_or_path: path of a folder, or OWNER/NAME.
        files: glob patterns of the files to download.
        remedy: advice for the error if ``name_or_path`` is neither a folder nor of the form OWNER/NAME.
        single_file: class of diffusers that reads a checkpoint of a single file, for the error if it is one.

    Raises:
        InputError: if there is no such folder and no such model on the hub.
    """
    path = Path(name_or_path).expanduser()
    try:
        if name_or_path != "" and path.is_dir():
            return path
        exists = name_or_path != "" and path.exists()
    except (OSError, ValueError):  # the name is too long or has a null byte
        exists = False
    if exists:
        advice = "name the folder that holds config.json and the weights"
        if path.suffix.lower() in SINGLE_FILES:
            advice = f"make one: diffusers.{single_file}.from_single_file({str(path)!r}).save_pretrained('FOLDER')"
        raise InputError(path, "is a file, not a folder", advice)
    if isinstance(name_or_path, Path) or not HUB_NAME.fullmatch(name_or_path):
        raise InputError(name_or_path or "name", "does not exist", remedy)
    return _download(name_or_path, tuple(files))


@functools.cache
def _download(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(files)))
        if not any(folder.rglob("*.safetensors")):
            half = [re.sub(r"(-\*-of-\*)?\.safetensors$", r".fp16\1.safetensors", file) for file in files]
            half += [re.sub(r"\.index\.json$", ".index.fp16.json", file) for file in files]
            folder = Path(snapshot_download(name, allow_patterns=half))
        return folder
    except Exception as error:  # the client raises its own exceptions and those of its HTTP library
        problem = f"is not a local folder and could not be downloaded from the hub ({first_line(error)})"
        raise InputError(name, problem, "check the name and the network, or name a folder") from None


def push_folder(folder: Path, name: str, *, public: bool = False, update: bool = False, message: str) -> str:
    """Upload a folder as a model of the hub, in one commit.

    Args:
        folder: the folder.
        name: OWNER/NAME of the model.
        public: whether everybody may see it.
        update: whether the model may be there already.
        message: of the commit.

    Returns:
        Address of the model.

    Raises:
        InputError: without a token, if the name is taken, or if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not get_token():
        raise InputError("push", "there is no token of the hub", "run hf auth login, or set HF_TOKEN")
    api = HfApi()
    try:
        created = api.create_repo(name, private=not public, exist_ok=update)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 409:
            raise InputError(name, "is taken", "give another name, or --update it") from None
        remedies = {401: "run hf auth login with a token that is valid", 403: "use a token that may write to it"}
        problem = f"was refused by the hub ({status}: {first_line(error)})"
        raise InputError(name, problem, remedies.get(status, "try again later")) from None
    except Exception as error:  # the client raises its own exceptions and those of its HTTP library
        raise InputError(name, f"could not be pushed ({first_line(error)})", "check the network") from None
    return str(created)


def check_hub_name(name: str) -> None:
    """Check that a name is of the form OWNER/NAME.

    Raises:
        InputError: if it is not.
    """
    if not HUB_NAME.fullmatch(name):
        raise InputError(name, "is no name of a model on the hub", "write OWNER/NAME")
