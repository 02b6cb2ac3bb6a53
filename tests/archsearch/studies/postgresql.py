"""A PostgreSQL server of the tests' own: an empty database on a free port, gone afterwards."""

from __future__ import annotations

import contextlib
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


def _user() -> str | None:
    # A server refuses to run as root; the folder must be its own user's, outside of root's temporary folders.
    return "postgres" if os.getuid() == 0 else None


class Server:
    """A server that can be stopped and started again.

    Raises:
        FileNotFoundError: if PostgreSQL is not installed.
        RuntimeError: if its database cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        initdb, postgres = program("initdb"), program("postgres")
        if initdb is None or postgres is None:
            raise FileNotFoundError("no PostgreSQL server is installed; on Debian: apt-get install postgresql")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        if (user := _user()) is not None:
            shutil.chown(folder, user)
        data = str(folder / "data")
        made = subprocess.run(
            [initdb, "-D", data, "-U", "tester", "-A", "trust", "--no-sync"], user=user, capture_output=True, cwd=folder
        )
        if made.returncode:
            raise RuntimeError(f"initdb: {made.stderr.decode()[-200:]}")
        settings = ["-c", "fsync=off", "-c", "max_connections=200"]
        self._command = [postgres, "-D", data, "-p", str(self._port), "-k", str(folder), "-h", "127.0.0.1", *settings]
        self._folder = folder
        self.url = f"postgresql+psycopg://tester@127.0.0.1:{self._port}/postgres"
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        self.process = subprocess.Popen(self._command, user=_user(), cwd=self._folder, stderr=subprocess.DEVNULL)
        until(self._answers)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Cut all connections and end; with SIGQUIT as in a crash, from which the next start recovers."""
        self.process.send_signal(how)
        self.process.wait(30)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(f"host=127.0.0.1 port={self._port} user=tester dbname=postgres").close()
        except psycopg.OperationalError:
            return False
        return True


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server of one's own, for as long as the block runs."""
    with TemporaryDirectory(prefix="archsearch-pg-", dir="/tmp") as folder:
        server = Server(Path(folder))
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def or_skipped() -> Iterator[Server]:
    """The same for a test, which is skipped where PostgreSQL is not installed."""
    pytest.importorskip("psycopg", reason="pip install 'archsearch[postgresql]'")
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(running())
        except (FileNotFoundError, RuntimeError) as error:
            pytest.skip(str(error))
        yield server
