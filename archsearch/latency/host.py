"""Latency backend for the CPU of this machine, with ONNX Runtime."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field

from archsearch import machine
from archsearch.latency import onnx_export
from archsearch.latency.base import MeasurementError, measurement_errors, sample_inputs
from archsearch.latency.steady_state import RunTimes, SteadyStateConfig, time_until_steady
from archsearch.score import LatencyRecord
from snapgen.architecture.schema import Architecture
from snapgen.config import Config, parse_config

if TYPE_CHECKING:
    import onnxruntime

ModelInputs = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


class HostConfig(Config):
    """Settings of measurements on this machine's CPU."""

    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of one forward pass; a study's latency.threads sets it."""
    rule: SteadyStateConfig = SteadyStateConfig()
    """When repeated runs count as steady."""
    timeout: float = Field(default=900, gt=0)
    """Seconds before the measurement of a candidate is aborted."""


class HostBackend:
    """Measures with ONNX Runtime on this machine's CPU, in float32 with random weights.

    With one thread, the time of a run is the CPU time of that thread: equal to wall-clock time on an idle machine, and
    without the time in which other processes occupy the core on a busy one. It does not compensate for processes on the
    core's other hyperthread or in the shared cache. With several threads it is wall-clock time.
    `archsearch.latency.steady_state.time_until_steady` determines the number of runs.
    """

    def __init__(self, options: HostConfig) -> None:
        self.options = options

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        """See `Backend.measure`."""
        arch.validate_latent_size(latent_size)
        with measurement_errors(arch, "the host"), tempfile.TemporaryDirectory(prefix="archsearch-") as folder:
            path = Path(folder) / "unet.onnx"
            model_inputs = _write_net(arch, latent_size, context_tokens, path)
            start = time.perf_counter()
            session = open_session(path, threads=self.options.threads)
            load_ms = (time.perf_counter() - start) * 1e3
            timing = self._time(session, model_inputs)
        return LatencyRecord(
            **timing.fields(),
            device="host",
            compute_units="CPU",
            chip=machine.chip(),
            os=machine.operating_system(),
            threads=self.options.threads,
            load_ms=load_ms,
            runtime=f"onnxruntime {machine.installed('onnxruntime')}",
        )

    def _time(self, session: onnxruntime.InferenceSession, inputs: ModelInputs) -> RunTimes:
        import onnxruntime

        clock = time.thread_time if self.options.threads == 1 else time.perf_counter
        deadline = time.perf_counter() + self.options.timeout
        run_options = onnxruntime.RunOptions()
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("output")

        def run() -> float:
            start = clock()
            session.run_with_iobinding(binding, run_options)
            seconds = clock() - start
            # The alarm aborts a long run, but short runs may complete before they notice it.
            if time.perf_counter() >= deadline:
                run_options.terminate = True
                raise TimeoutError
            return seconds

        alarm = threading.Timer(self.options.timeout, setattr, (run_options, "terminate", True))
        alarm.daemon = True
        alarm.start()
        try:
            timing = time_until_steady(run, self.options.rule)
        except Exception:
            if run_options.terminate:
                raise MeasurementError(f"timed out after {self.options.timeout:g} s") from None
            raise
        finally:
            alarm.cancel()
        (output,) = binding.copy_outputs_to_cpu()
        if not np.isfinite(output).all():
            raise MeasurementError("its output with random weights is not finite")
        return timing


def _write_net(arch: Architecture, latent_size: int, context_tokens: int, path: Path) -> ModelInputs:
    """Write the net with random weights as an ONNX file, one weight in memory at a time; returns inputs for it."""
    from snapgen.models.unet import UNet, check_memory  # slow to import

    check_memory(arch, copies=1)
    with torch.device("meta"):
        net = UNet(arch).eval()
    net.to_empty(device="cpu")
    inputs = sample_inputs(arch, latent_size, context_tokens)
    onnx_export.export(net, inputs, path, random_weights=True)
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def open_session(path: Path, *, threads: int) -> onnxruntime.InferenceSession:
    """Open an ONNX file as an optimized session that runs on that number of CPU threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def on_host(options: Mapping[str, Any]) -> HostBackend:
    """The backend ``host``.

    Raises:
        InputError: for an invalid option.
    """
    return HostBackend(parse_config(dict(options), HostConfig, source="latency"))
