"""A machine's faults are told from those of what runs on it."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from archsearch.latency.base import MeasurementError
from archsearch.machine_faults import MachineFault, machine_fault
from snapgen.errors import InputError, os_errors


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
            "/tmp/x: no space left on device; free disk space",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "this machine: too many open files; close other programs"),
        (OSError(errno.EROFS, "Read-only file system", "runs"), "runs: read-only file system; make it writable"),
        (FileNotFoundError("No usable temporary directory"), "no usable temporary directory; mend this"),
        (RuntimeError("[ONNXRuntimeError] : open file w.bin fail, errcode = 24 - Too many open files"), "ulimit -n"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "free disk space"),
        (RuntimeError("can't start new thread"), "free memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "free memory"),
    ],
)
def test_faults_of_the_machine(error: Exception, said: str) -> None:
    found = machine_fault(error)
    assert isinstance(found, MachineFault)
    assert said in str(found)
    assert "give the command again" in str(found)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("channels do not divide"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionResetError("the app on the phone closed the connection"),
        TimeoutError("timed out"),
        InputError("latent", "is odd", "halve it"),
        MeasurementError("does not compile"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes."),
        MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000, 1000000)"),
    ],
)
def test_faults_of_the_candidate(error: Exception) -> None:
    assert machine_fault(error) is None


def test_a_net_too_large_for_the_machine_is_at_fault_itself() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert machine_fault(raised.value) is None


def test_the_cause_is_found_behind_other_errors() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    measured = MeasurementError("could not be measured")
    measured.__cause__ = full
    assert machine_fault(measured) is not None
    with pytest.raises(InputError) as hidden, os_errors("runs", "free it"):
        raise full
    assert machine_fault(hidden.value) is not None
    handled = ValueError("wrong shape")
    handled.__context__ = full  # met and dealt with on the way
    assert machine_fault(handled) is None
