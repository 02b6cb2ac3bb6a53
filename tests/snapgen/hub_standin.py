"""A stand-in of the Hugging Face hub's API on this machine: create, preupload, commit, list and download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"
COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """Models by name, each with its files; only requests with `TOKEN` may change them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process that is to use it."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that is up within the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."}, {"X-Error-Message": "Invalid token"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            wanted = json.loads(body)["files"]
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
            self._answer(200, {"files": files})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.models[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.environment['HF_ENDPOINT']}/{name}/commit/{COMMIT}"
            self._answer(200, {"commitUrl": url, "commitOid": COMMIT})
        else:
            self._answer(404, {"error": path})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        url = f"{self.server.environment['HF_ENDPOINT']}/{name}"
        if name in self.server.models:
            self._answer(409, {"error": "You already created this model repo", "url": url})
            return
        self.server.models[name] = {}
        self.server.private[name] = bool(wanted.get("private", wanted.get("visibility") == "private"))
        self._answer(200, {"url": url, "name": name})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            name, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            name, _, tree = name.partition("/tree/")
            files = self.server.models.get(name)
            if files is None:
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif tree:
                sizes = [{"type": "file", "path": p, "size": len(b), "oid": _oid(b)} for p, b in files.items()]
                self._answer(200, sizes)
            else:
                siblings = [{"rfilename": file} for file in files]
                self._answer(200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": True, "rest": rest})
            return
        name, _, file = path.removeprefix("/").partition("/resolve/")
        content = self.server.models.get(name, {}).get(file.partition("/")[2])
        if content is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._answer(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
