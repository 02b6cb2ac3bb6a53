"""How long one forward pass takes: backends that measure it, each for one kind of device."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from archsearch import machine
from archsearch.latency.base import MeasurementError, sample_inputs
from archsearch.latency.steady_state import RunTimes, SteadyStateConfig, time_until_steady
from archsearch.score import LatencyRecord
from snapgen.architecture.schema import Architecture
from snapgen.config import Config
from snapgen.errors import InputError

if TYPE_CHECKING:
    import onnxruntime


ModelInputs = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


class HostConfig(Config):
    """How the host is timed."""

    threads: int = Field(default=1, ge=1, le=1024)
    rule: SteadyStateConfig = SteadyStateConfig()
    timeout: float = Field(default=900, gt=0)
    """Seconds after which all runs of one candidate are given up."""


class HostBackend:
    """ONNX Runtime on this machine's CPU, float32, random weights.

    With one thread a run's time is the processor time of that thread: on an idle machine that is the wall clock's;
    next to a busy one it leaves out the time in which another process held the core. What it cannot leave out is a
    neighbour on the same core's other hyperthread, or in the shared cache. With several threads it is the wall clock's.
    `archsearch.latency.steady_state.time_until_steady` says how often a net is run.
    """

    def __init__(self, options: HostConfig) -> None:
        self.options = options

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        """See `Backend.measure`."""
        arch.check_latent(latent_size)
        with tempfile.TemporaryDirectory(prefix="archsearch-") as folder, _failures(arch):
            path = Path(folder) / "unet.onnx"
            feed = _write_net(arch, latent_size, context_tokens, path)
            began = time.perf_counter()
            session = open_session(path, threads=self.options.threads)
            load_ms = (time.perf_counter() - began) * 1e3
            timing = self._time(session, feed)
        lower, median, upper = (seconds * 1e3 for seconds in timing.quartiles())
        return LatencyRecord(
            median_ms=median,
            lower_quartile_ms=lower,
            upper_quartile_ms=upper,
            runs=len(timing.runs),
            source="measured",
            device="host",
            compute_units="CPU",
            chip=machine.chip(),
            os=machine.operating_system(),
            threads=self.options.threads,
            load_ms=load_ms,
            runtime=f"onnxruntime {machine.installed('onnxruntime')}",
            steady=timing.steady,
        )

    def _time(self, session: onnxruntime.InferenceSession, feed: ModelInputs) -> RunTimes:
        import onnxruntime

        clock = time.thread_time if self.options.threads == 1 else time.perf_counter
        deadline = time.perf_counter() + self.options.timeout
        given_up = onnxruntime.RunOptions()
        binding = session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("output")

        def run() -> float:
            began = clock()
            session.run_with_iobinding(binding, given_up)
            seconds = clock() - began
            # The alarm ends a long run; between short ones it may come too late.
            if time.perf_counter() >= deadline:
                given_up.terminate = True
                raise TimeoutError
            return seconds

        with _alarm(self.options.timeout, lambda: setattr(given_up, "terminate", True)):
            try:
                timing = time_until_steady(run, self.options.rule)
            except Exception:
                if given_up.terminate:
                    raise MeasurementError(f"not done after {self.options.timeout:g} s") from None
                raise
        (output,) = binding.copy_outputs_to_cpu()
        if not np.isfinite(output).all():
            raise MeasurementError("its output with random weights is not finite")
        return timing


def _write_net(arch: Architecture, latent_size: int, context_tokens: int, path: Path) -> ModelInputs:
    """The net with random weights as an ONNX file, and an input for it; its weights are never in memory together."""
    import torch

    from archsearch.latency import onnx_export
    from snapgen.models.unet import UNet

    with torch.device("meta"):
        net = UNet(arch).eval()
    net.to_empty(device="cpu")
    inputs = sample_inputs(arch, latent_size, context_tokens)
    onnx_export.export(net, inputs, path, random_weights=True)
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def open_session(path: Path, *, threads: int) -> onnxruntime.InferenceSession:
    """An ONNX file, optimised and ready to run on so many threads of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def _alarm(seconds: float, ring: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, ring)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _failures(arch: Architecture) -> Iterator[None]:
    """Whatever stops this one candidate, as one kind of failure; ONNX Runtime's errors share no class but Exception."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MeasurementError(f"{arch.id} could not be timed on the host: {reason}") from error
