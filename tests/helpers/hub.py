"""A local stand-in of the Hugging Face hub: folders served as repositories, by the few calls of huggingface_hub.

Not a test itself. The endpoint is read when huggingface_hub is imported, so tests use it in a subprocess
(`environment`) or replace `huggingface_hub.constants` (`patch`). Simplified: files are sent directly where the hub
redirects to its content network, and listings come in one page.
"""

import hashlib
import json
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class StandInHub:
    """Serves `models` and `datasets`, each {"owner/name": folder} (any revision) or {"owner/name": {revision: folder}}.

    gated: {"owner/name": token}, files of these need that token. cut: {file: bytes}, the next download of that file
    breaks off there, once. hang: {file: bytes}, downloads of that file stop sending there while the dict has it.
    `requests` lists (method, path, Range header or None); `sent` counts body bytes by file, named as in its repository.
    """

    def __init__(self, models=None, datasets=None, *, gated=None, cut=None, hang=None):
        self.repositories = {"models": models or {}, "datasets": datasets or {}}
        self.gated, self.cut, self.hang = gated or {}, cut or {}, hang or {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.sent: dict[str, int] = {}
        self.closing = threading.Event()
        self.connections: list[socket.socket] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # else kept-alive connections would go on being served
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed already

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment for a subprocess that talks to this hub and keeps its cache in `home`."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return {**ours, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **more}

    def patch(self, monkeypatch, home: Path) -> None:
        """Point this process's huggingface_hub to this hub and to an empty cache in `home`."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def downloads(self) -> list[str]:
        """The files whose bodies were sent, sorted."""
        return sorted(self.sent)

    def find(self, kind: str, repo: str, revision: str) -> tuple[Path, str] | None:
        """(folder, commit) of a revision, which may be a commit of an earlier answer; None if there is no such."""
        folders = self.repositories[kind][repo]
        if not isinstance(folders, dict):
            return folders, revision if re.fullmatch("[0-9a-f]{40}", revision) else _sha1(f"{repo}@{revision}")
        for name, folder in folders.items():
            if revision in (name, _sha1(f"{repo}@{name}")):
                return folder, _sha1(f"{repo}@{name}")
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        # Matched before unquoting: a revision such as refs/pr/1 is one quoted part of the path.
        raw = urlsplit(self.path).path
        api, file = API.fullmatch(raw), FILE.fullmatch(raw)
        if not api and not file:
            return self.fail(404, "EntryNotFound")
        kind, repo = (api[1], api[2]) if api else ("datasets" if file[1] else "models", file[2])
        if repo not in self.hub.repositories[kind]:
            return self.fail(404, "RepoNotFound")
        found = self.hub.find(kind, repo, unquote((api[4] if api else file[3]) or "main"))
        if found is None:
            return self.fail(404, "RevisionNotFound")
        folder, commit = found
        if api:
            answer = [self.describe(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
            if api[3] != "tree":
                answer = {"id": repo, "sha": commit, "siblings": [{"rfilename": entry["path"]} for entry in answer]}
            return self.send(json.dumps(answer).encode(), {"Content-Type": "application/json"})
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.gated[repo]}":
            return self.fail(403, "GatedRepo", f"Access to {repo} is restricted")
        target = folder / unquote(file[4])
        if not target.is_file():
            return self.fail(404, "EntryNotFound", commit=commit)
        self.send(target.read_bytes(), {"ETag": f'"{_etag(target)}"', "X-Repo-Commit": commit}, name=unquote(file[4]))

    def describe(self, folder: Path, path: Path) -> dict:
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": _sha1(name)}

    def send(self, body: bytes, headers: dict[str, str], name: str | None = None) -> None:
        """A whole answer, or of a file (`name`) the part that a Range header asks for; cut or hanging if so set."""
        start, total, status = 0, len(body), 200
        if name and (part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, end = int(part[1]), min(int(part[2] or total - 1), total - 1)
            if start >= total:
                return self.fail(416, "RangeNotSatisfiable")
            body, status = body[start : end + 1], 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end}/{total}"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = len(body)
        if name in self.hub.hang:
            stop = self.hub.hang[name]
        elif name in self.hub.cut:
            stop = self.hub.cut.pop(name)
        if name:  # counted before it is sent: the client may look at once
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(body[:stop])
        try:
            self.wfile.write(body[:stop])
            self.wfile.flush()
            while name in self.hub.hang and not self.hub.closing.wait(0.02):
                pass
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        self.close_connection = self.close_connection or stop < len(body)

    def fail(self, status: int, code: str, message: str = "", commit: str | None = None) -> None:
        self.send_response(status)
        commits = {"X-Repo-Commit": commit} if commit else {}
        errors = {"X-Error-Code": code, "X-Error-Message": message or code}
        for key, value in {**errors, **commits, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
