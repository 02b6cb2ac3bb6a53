"""A PostgreSQL server of the tests' own: an empty database on a free port, gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.archsearch.studies.search.test_run import until


def program(name: str) -> str | None:
    """Path of a PostgreSQL program: on PATH, or where Debian installs it."""
    return shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)


def database() -> Iterator[str]:
    """The URL of an empty database."""
    pytest.importorskip("psycopg", reason="pip install 'archsearch[postgresql]'")
    initdb, postgres = program("initdb"), program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("no PostgreSQL server is installed; on Debian: apt-get install postgresql")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A server refuses to run as root; the folder must be its own user's, outside of root's temporary folders.
    user = "postgres" if os.getuid() == 0 else None
    with TemporaryDirectory(prefix="archsearch-pg-", dir="/tmp") as folder:
        if user is not None:
            shutil.chown(folder, user)
        data = str(Path(folder) / "data")
        made = subprocess.run(
            [initdb, "-D", data, "-U", "tester", "-A", "trust", "--no-sync"], user=user, capture_output=True, cwd=folder
        )
        if made.returncode:
            pytest.skip(f"initdb: {made.stderr.decode()[-200:]}")
        command = [postgres, "-D", data, "-p", str(port), "-k", folder, "-c", "fsync=off", "-h", "127.0.0.1"]
        process = subprocess.Popen(command, user=user, cwd=folder, stderr=subprocess.DEVNULL)
        try:
            until(lambda: _answers(port))
            yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def _answers(port: int) -> bool:
    import psycopg

    try:
        psycopg.connect(f"host=127.0.0.1 port={port} user=tester dbname=postgres").close()
    except psycopg.OperationalError:
        return False
    return True
