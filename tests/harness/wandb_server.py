"""The part of W&B's server that a run needs, on a local port, with outages at will.

It speaks what wandb 0.31 sends: GraphQL for the run itself, the file stream for history and exit
code, uploads of small files. It has no artifacts, so a table or an artifact is refused.
"""

import contextlib
import gzip
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RUN = {"id": "run", "description": "", "config": "{}", "sweepName": None}
PROJECT = {"id": "project", "name": "p", "entity": {"id": "entity", "name": "e"}}


class Server(ThreadingHTTPServer):
    """Attributes: ``health`` is ``well``, ``silent`` (never answers) or ``sick`` (answers 500)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.health = "well"
        self.history: list[dict] = []
        self.upserts: list[dict] = []
        self.exit_codes: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_) -> None:
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        while self.server.health == "silent":
            time.sleep(0.1)
        answer: dict = {}
        if self.path == "/graphql":
            answer = {"data": self._graphql(json.loads(body))}
        elif self.path.endswith("/file_stream"):
            self._file_stream(json.loads(body))
        text = json.dumps(answer).encode()
        self.send_response(500 if self.server.health == "sick" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST  # noqa: N815 the name that http.server asks for

    def log_message(self, *_) -> None:
        pass

    def _graphql(self, request: dict) -> dict:
        given = request.get("variables") or {}
        match request.get("operationName"):
            case "RunResumeStatus":
                return {"model": PROJECT | {"bucket": self._known(given["name"])}}
            case "UpsertBucket":
                self.server.upserts.append(given)
                run = RUN | {"name": given["name"], "displayName": "d", "project": PROJECT}
                return {"upsertBucket": {"bucket": run, "inserted": True}}
            case "CreateRunFiles":
                files = [{"name": n, "uploadUrl": f"{self.server.url}/{n}"} for n in given["files"]]
                return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": {"organization": None}}
            case "Viewer":
                return {"viewer": None}
        return {}

    def _known(self, name: str) -> dict | None:
        history = self.server.history
        if not history:
            return None
        counts = {"historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(history[-1])]), "eventsTail": "[]"}
        rest = {"name": name, "displayName": "d", "tags": [], "notes": "", "summaryMetrics": "{}"}
        return RUN | counts | tails | rest | {"wandbConfig": '{"t": 1}'}

    def _file_stream(self, request: dict) -> None:
        new = request.get("files", {}).get("wandb-history.jsonl")
        if new:
            del self.server.history[new["offset"] :]
            self.server.history += map(json.loads, new["content"])
        if "exitcode" in request:
            self.server.exit_codes.append(request["exitcode"])


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.health = "well"
        server.shutdown()
        server.server_close()
