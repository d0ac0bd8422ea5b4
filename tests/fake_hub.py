"""A hub in a folder: repositories as bytes, written in the cache's layout or served over HTTP."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A repository at one commit, which is a hash of its files."""

    kind: str
    name: str
    files: dict[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name in sorted(self.files):
            digest.update(name.encode() + b"\0" + self.files[name])
        return digest.hexdigest()

    @property
    def tree(self) -> list[dict]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": _blob(content)}
            for name, content in sorted(self.files.items())
        ]

    def fill_cache(
        self, hub: Path, only: Iterable[str] | None = None, *, listing: bool = True
    ) -> Path:
        """Write the repository as huggingface_hub's cache holds it, and return its snapshot.

        Args:
            hub: The folder ``HF_HOME/hub``.
            only: The files that were fetched; None is all.
            listing: Also keep the listing of the commit, as huggingface_hub 2 does.
        """
        home = hub / f"{self.kind}s--{self.name.replace('/', '--')}"
        snapshot = home / "snapshots" / self.commit
        for name in self.files if only is None else only:
            blob = home / "blobs" / _blob(self.files[name])
            link = snapshot / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(self.files[name])
            link.symlink_to(blob)
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(self.commit)
        if listing:
            files = {e["path"]: {"size": e["size"], "blob_id": e["oid"]} for e in self.tree}
            (home / "trees").mkdir(exist_ok=True)
            (home / "trees" / f"{self.commit}.json").write_text(
                json.dumps({"format_version": 1, "files": files})
            )
        return snapshot


def _blob(content: bytes) -> str:
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


@dataclass
class HubServer:
    """The endpoints of the hub that a download or an upload asks for, on a port of this machine.

    Attributes:
        repositories: What it has.
        token: Who may upload.
        private: Names of the repositories that were created as private ones.
        requests: ``METHOD path`` of every request so far.
        cut_after: Breaks the connection after so many bytes of a file's content, once for each
            file named here.
    """

    repositories: list[Repository]
    requests: list[str] = field(default_factory=list)
    cut_after: dict[str, int] = field(default_factory=dict)
    refuse: set[str] = field(default_factory=set)
    token: str = "hf_writer"  # noqa: S105 (of no hub)
    private: set[str] = field(default_factory=set)

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def downloads(self) -> list[str]:
        """Paths of the files whose content was asked for."""
        return [
            r.split("/resolve/")[1]
            for r in self.requests
            if r.startswith("GET /") and "/resolve/" in r
        ]

    def find(self, kind: str, name: str) -> Repository | None:
        found = [r for r in self.repositories if (r.kind, r.name) == (kind, name)]
        return found[0] if found else None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """Take an upload: validate the card, create the repository, say how, take the files."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(content)
            name = f"{wanted['organization']}/{wanted['name']}"
            place = {"url": f"{self.hub.url}/{name}"}
            if self.hub.find("model", name):
                return self._json({"error": "You already created this model repo", **place}, 409)
            self.hub.repositories.append(Repository("model", name, {}))
            if wanted.get("visibility") == "private":
                self.hub.private.add(name)
            return self._json(place)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        repository = self.hub.find("model", found[1])
        if found[2] == "preupload":
            names = [file["path"] for file in json.loads(content)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{"path": name, **how} for name in names]})
        for line in content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = entry["value"]
                repository.files[file["path"]] = base64.b64decode(file["content"])
        url = f"{self.hub.url}/{repository.name}/commit/{repository.commit}"
        return self._json({"commitUrl": url, "commitOid": repository.commit})

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, act in (
            (r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/(.+))?", self._information),
            (r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/([^/]+).*", self._tree),
            (r"/(?:(dataset)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if found := re.fullmatch(pattern, path):
                repository = self.hub.find(found[1] or "model", found[2])
                if repository is None:
                    return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
                if repository.gated:
                    return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
                if found[3] not in (None, "main", repository.commit):
                    return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return act(repository, found.groups())
        return self._send(404, b"")

    def _information(self, repository: Repository, _: tuple) -> None:
        siblings = [{"rfilename": name} for name in repository.files]
        self._json({"id": repository.name, "sha": repository.commit, "siblings": siblings})

    def _tree(self, repository: Repository, _: tuple) -> None:
        self._json(repository.tree)

    def _file(self, repository: Repository, groups: tuple) -> None:
        name = groups[3]
        common = {"X-Repo-Commit": repository.commit}
        if name not in repository.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", **common})
        if name in self.hub.refuse and self.command == "GET":
            return self._send(500, b"")
        content = repository.files[name]
        common["ETag"] = f'"{_blob(content)}"'
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            common["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        status = 206 if start else 200
        if self.command == "GET" and name in self.hub.cut_after:
            kept = content[: self.hub.cut_after.pop(name)]
            self._send(status, kept, common, length=len(content))
            self.close_connection = True
            return None
        return self._send(status, content[start:], common)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
