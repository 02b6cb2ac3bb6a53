"""The loader of saved nets, from a folder or the hub: weights in one safetensors file or in shards, also of a variant.

A net is built on the meta device first. Sizes are compared with the headers of its files before anything is allocated,
values are read one tensor at a time, and whatever is wrong is told in one line.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from snapgen import config as settings, devices, files
from snapgen.errors import InputError, first_line
from snapgen.io import hub
from snapgen.progress import silence_libraries

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model"
"""Name of diffusers' weight files, without suffix."""
TRANSFORMERS_WEIGHTS_NAME = "model"
RESTORE = "restore it from its source"
MAX_WEIGHTS = 5000
"""Largest number of weights of a net of another library; SDXL's U-Net has 1,680."""
SAME_TRAINING = "use both files of the same training"
OWN_FIELD = "prediction_type"
"""Field that this package adds to the configurations of other classes."""
SCHEDULER = "scheduler/scheduler_config.json"
"""Configuration of the scheduler within a pipeline's folder."""
MODEL_FILES = (
    CONFIG_NAME,
    f"{WEIGHTS_NAME}.safetensors",
    f"{WEIGHTS_NAME}.safetensors.index.json",
    f"{WEIGHTS_NAME}-*-of-*.safetensors",
)
"""Glob patterns of the files that diffusers writes for a model."""


@dataclass(frozen=True)
class Weights:
    """Weights of a saved net: shapes are known from the headers of its files, values are read on demand."""

    source: str | Path
    """Where they come from, for error messages."""
    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]
    """Returns the stored tensor of a name."""
    files: tuple[Path, ...] = ()

    @classmethod
    def in_memory(cls, tensors: Mapping[str, Tensor], source: str | Path) -> Weights:
        """Weights that are loaded already, e.g. a module's ``state_dict``."""
        return cls(source, {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__)

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read a weight, on the CPU.

        Raises:
            InputError: if it cannot be read, is not of floats, or holds values that are not finite.
        """
        tensor = self.read(name)
        if not tensor.is_floating_point():
            raise InputError(self.source, f"is {tensor.dtype}, not floats", SAME_TRAINING, place=name)
        tensor = tensor.to("cpu", dtype)
        if not tensor.isfinite().all():
            raise InputError(self.source, "holds values that are not finite", "fetch or train it again", place=name)
        return tensor

    def check_fit(self, expected: Mapping[str, torch.Size]) -> None:
        """Check that these are exactly the weights of a net, and that there is memory for them.

        Raises:
            InputError: if one is missing, unexpected or of another shape, of which it names the first; or they are too
                large for the memory that is free.
        """
        problems = {name: "is missing" for name in expected if name not in self.shapes}
        problems |= {name: "is unexpected" for name in self.shapes if name not in expected}
        for name in expected.keys() & self.shapes.keys():
            if self.shapes[name] != expected[name]:
                problems[name] = f"is of shape {list(self.shapes[name])}, not {list(expected[name])}"
        if problems:
            place, problem = min(problems.items())
            problem += f" (weights that do not fit {CONFIG_NAME}: {len(problems):,})"
            raise InputError(self.source, problem, SAME_TRAINING, place=place)
        devices.check_memory(4 * sum(map(math.prod, expected.values())), self.source)


@dataclass(frozen=True)
class SavedNet:
    """A net's folder, its configuration, and its weights, of which only the headers are read."""

    folder: Path
    config: dict[str, Any]
    weights: Weights


def open_net(folder: Path, component: str = "") -> SavedNet:
    """Open a net that diffusers' ``save_pretrained`` wrote.

    Args:
        folder: the net's folder, or a pipeline's folder, of which the sub-folder ``component`` is opened.
        component: e.g. ``unet``.

    Raises:
        InputError: if a file is missing or damaged.
    """
    if component and (folder / component / CONFIG_NAME).is_file():
        folder /= component
    return SavedNet(folder, read_json(folder / CONFIG_NAME), open_weights(folder))


def load_net(folder: Path, *classes: type[nn.Module]) -> Any:
    """Load a net of one of several diffusers classes, in float32 on the CPU and in evaluation mode.

    Raises:
        InputError: if a file is missing or damaged, describes another class, or holds weights of another net.
    """
    saved = open_net(folder)
    return fill(meta_net(saved, *classes), saved.weights)


def meta_net(saved: SavedNet, *classes: type[nn.Module]) -> Any:
    """Build a saved net on the meta device, where it has shapes but no values.

    Args:
        saved: the net.
        classes: diffusers classes that it may be of.

    Raises:
        InputError: if it is of another class, or its configuration is not valid.
    """
    by_name, path = {net_class.__name__: net_class for net_class in classes}, saved.folder / CONFIG_NAME
    name = saved.config.get("_class_name")
    if not isinstance(name, str) or name not in by_name:
        remedy = f"name the folder of one of: {', '.join(by_name)}"
        raise InputError(path, f"describes {name or 'no model'!s:.60}", remedy, place="_class_name")
    initializers = (vars(base)["__init__"] for base in by_name[name].__mro__ if "__init__" in vars(base))
    known = {OWN_FIELD, *(field for each in initializers for field in inspect.signature(each).parameters)}
    for field, value in saved.config.items():
        if field not in known and not field.startswith("_") and value is not None:
            problem = f"is {value!r:.60}, and {name} has no such field here (diffusers {diffusers.__version__})"
            raise InputError(path, problem, "update diffusers, or remove it if it changes nothing", place=field)
    with _configuration_errors(path, name, saved.weights), silence_libraries():
        return by_name[name].from_config(saved.config)  # type: ignore[attr-defined]


def fill(net: Any, weights: Weights, dtype: torch.dtype = torch.float32) -> Any:
    """Load checked weights into a net of a diffusers class on the meta device; returns it in evaluation mode.

    Raises:
        InputError: if they do not fit, cannot be read, or hold values that are not finite.
    """
    stored_names = {name: name for name in weights.shapes}
    net._fix_state_dict_keys_on_load(stored_names)  # moves names of older versions to the present ones
    renamed = Weights(
        weights.source,
        {name: weights.shapes[stored] for name, stored in stored_names.items()},
        lambda name: weights.read(stored_names[name]),
    )
    renamed.check_fit(shapes_of(net))
    net.load_state_dict({name: renamed.load(name, dtype) for name in renamed.shapes}, assign=True)
    return net.eval()


def shapes_of(net: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a net's weights by name."""
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def load_transformers_model(folder: Path, model_class: Any, model_config: Any) -> Any:
    """Load a transformers model from its folder, in float32 on the CPU; what pools its output may be missing.

    Its own loader maps names between versions, and allocates whatever the configuration describes, so that the sizes
    are compared first.

    Raises:
        InputError: if a file is missing or damaged, or the weights do not fit the configuration.
    """
    weights, path = open_weights(folder, TRANSFORMERS_WEIGHTS_NAME), folder / CONFIG_NAME
    with _configuration_errors(path, model_class.__name__, weights), silence_libraries():
        build = model_class.from_config if hasattr(model_class, "from_config") else model_class._from_config
        on_meta = build(copy.deepcopy(model_config))
        on_meta.tie_weights()
    needed = sum(tensor.numel() for name, tensor in on_meta.named_parameters() if "pooler" not in name)
    stored = sum(map(math.prod, weights.shapes.values()))
    if needed > stored:
        problem = f"describes a model of {needed:,} weights, but its files hold {stored:,}"
        raise InputError(path, problem, SAME_TRAINING)
    devices.check_memory(4 * stored, weights.source)
    with _read_errors(weights.source), silence_libraries():
        model, info = model_class.from_pretrained(
            folder,
            config=model_config,
            variant=_variant(weights.files[0]),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    problems = {name: "is missing" for name in info["missing_keys"] if "pooler" not in name}
    problems |= {str(key[0]): "is of another shape" for key in info["mismatched_keys"]}
    problems |= {
        name: "holds values that are not finite"
        for name, tensor in model.state_dict().items()
        if not tensor.isfinite().all()
    }
    if problems:
        place, problem = min(problems.items())
        raise InputError(weights.source, problem, SAME_TRAINING, place=place)
    return model.eval()


def find_pretrained(name_or_path: str | Path) -> Path:
    """Find the folder of a U-Net by path, or by OWNER/NAME on the Hugging Face hub, downloading it if need be.

    Raises:
        InputError: if there is no such folder and no such model on the hub.
    """
    files = [*MODEL_FILES, *(f"unet/{file}" for file in MODEL_FILES), SCHEDULER]
    return hub.resolve_model_folder(
        name_or_path, files, remedy="name a diffusers U-Net's folder, or OWNER/NAME on the hub"
    )


def open_weights(folder: Path, name: str = WEIGHTS_NAME) -> Weights:
    """Open the weight files of a folder and read their headers.

    Args:
        folder: the folder.
        name: name of the files without suffix, `WEIGHTS_NAME` or `TRANSFORMERS_WEIGHTS_NAME`.

    Raises:
        InputError: if a file is missing, damaged or not in safetensors format.
    """
    paths = weight_files(folder, name)
    handles: dict[str, Any] = {}
    shapes: dict[str, torch.Size] = {}
    for file in paths:
        with _read_errors(file):  # safetensors compares the header with the size of the file
            files.check_header(file)
            handle: Any = safe_open(file, "pt")
            shapes |= {key: torch.Size(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
            handles |= dict.fromkeys(handle.keys(), (file, handle))

    def read(key: str) -> Tensor:
        file, handle = handles[key]
        with _read_errors(file):
            tensor: Tensor = handle.get_tensor(key)
        return tensor

    return Weights(paths[0] if len(paths) == 1 else folder, shapes, read, paths)


def weight_files(folder: Path, name: str = WEIGHTS_NAME) -> tuple[Path, ...]:
    """Weight files of a folder: one file, or the shards that its index lists; a variant (fp16) if there is no other.

    The shortest name is the one without a variant.

    Raises:
        InputError: if there are none, or the index is damaged.
    """
    indices = sorted(folder.glob(f"{name}*.safetensors.index*.json"), key=_length)
    shards = set(folder.glob("*-of-*.safetensors"))
    unsharded = sorted(set(folder.glob(f"{name}*.safetensors")) - shards, key=_length)
    if unsharded and (not indices or _length(unsharded[0]) < _length(indices[0])):
        paths = unsharded[:1]
    elif indices:
        paths = [folder / file for file in _shards(indices[0])]
    else:
        remedy = "save it with safe_serialization=True, or name another folder"
        raise InputError(folder, f"has no {name}.safetensors", remedy)
    for file in paths:
        if not file.is_file():
            raise InputError(file, "is not a file" if file.exists() else "does not exist", RESTORE)
    return tuple(paths)


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists, which are beside it."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(index, "does not map weights to files", RESTORE, place="weight_map")
    return sorted(set(names))


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    A YAML parser would read numbers such as 1e-05 as text.

    Raises:
        InputError: if the file is missing or damaged.
    """
    text = settings.read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"is not valid JSON ({first_line(error)})", RESTORE) from None
    if not isinstance(value, dict):
        raise InputError(path, "is not a JSON object", RESTORE)
    return value


def _variant(file: Path) -> str | None:
    """The variant in the name of a weight file, e.g. fp16 in ``model.fp16-00001-of-00002.safetensors``."""
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", file.name).partition(".")[2] or None


def _length(path: Path) -> int:
    return len(path.name)


@contextlib.contextmanager
def _read_errors(path: str | Path) -> Iterator[None]:
    """Convert the errors of safetensors and transformers, which are of many kinds, for a file that they read."""
    try:
        yield
    except Exception as error:
        raise InputError(path, f"cannot be read ({first_line(error)})", RESTORE) from None


@contextlib.contextmanager
def _configuration_errors(path: Path, class_name: str, weights: Weights) -> Iterator[None]:
    """Build a net on the meta device, of at most about twice as many weights as there are; convert its errors.

    diffusers and transformers validate little, so that a wrong value raises anything, or asks for a million layers.
    """
    limit, created, thread = min(MAX_WEIGHTS, 2 * len(weights.shapes) + 100), 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal created
        created += threading.get_ident() == thread  # the hook is called for the nets of all threads
        if created > limit:
            raise ValueError(f"it asks for more than {limit:,} weights, and the files hold {len(weights.shapes):,}")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    except InputError as error:
        raise InputError(path, error.problem, error.remedy, place=error.place) from None
    except Exception as error:
        problem = f"is not a valid configuration of {class_name} ({first_line(error)})"
        raise InputError(path, problem, RESTORE) from None
    finally:
        hook.remove()
