"""The command line in several processes, launched on the CPU as on GPUs: accelerate's ``--cpu`` starts but one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launched(*arguments: str, processes: int, cwd: Path) -> subprocess.CompletedProcess[str]:
    options = ["--multi_gpu", f"--num_processes={processes}", "--main_process_port=0"]
    launch = ["-m", "accelerate.commands.launch", *options] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "archsearch", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
