"""A stand-in for the hub on this machine: enough of its HTTP interface for `datasets`."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
Repositories = Mapping[str, Mapping[str, bytes]]  # repository -> file -> content


class Hub:
    """The server's state: what it has, what it was asked for, and what it refuses."""

    def __init__(self, repositories: Repositories) -> None:
        self.repositories = repositories
        self.requests: list[str] = []
        self.broken: set[str] = set()
        self.url = ""

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a request."""
        path = unquote(urlsplit(target).path)
        self.requests.append(f"{method} {path}")
        for name, files in self.repositories.items():
            if f"/{name}" not in path:
                continue
            if name in self.broken:
                return 503, {}, b"{}"
            if path.startswith(f"/api/datasets/{name}"):
                return 200, {}, json.dumps(self._api(name, path, files, body)).encode()
            if path.startswith(f"/datasets/{name}/resolve/"):
                file = path.removeprefix(f"/datasets/{name}/resolve/").split("/", 1)[1]
                if file in files:
                    return 200, _headers(files[file]), files[file]
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _api(self, name: str, path: str, files: Mapping[str, bytes], body: bytes) -> object:
        rest = path.removeprefix(f"/api/datasets/{name}")
        if rest.startswith("/tree/"):
            parts = rest.removeprefix("/tree/").split("/", 1)
            folder = parts[1] if len(parts) > 1 else ""
            below = {f: c for f, c in files.items() if f.startswith(f"{folder}/" if folder else "")}
            return [_entry(file, content) for file, content in below.items()]
        if rest.startswith("/paths-info/"):
            asked = json.loads(body or b"{}").get("paths", [])
            return [_entry(file, files[file]) for file in asked if file in files]
        return {
            "id": name,
            "sha": COMMIT,
            "private": False,
            "siblings": [{"rfilename": file} for file in files],
        }


def _entry(file: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": file, "size": len(content), "oid": oid}


def _headers(content: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}


@contextmanager
def serve(repositories: Repositories) -> Iterator[Hub]:
    """Serve the repositories on a free port of this machine."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if "form" in (self.headers.get("Content-Type") or ""):
                from urllib.parse import parse_qs

                body = json.dumps({"paths": parse_qs(body.decode()).get("paths", [])}).encode()
            status, headers, content = hub.answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = _reply

        def log_message(self, format: str, *args: object) -> None:
            """Keep the log in ``hub.requests`` only."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
