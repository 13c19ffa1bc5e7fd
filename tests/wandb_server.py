"""A stand-in for W&B's server on the loopback: the few calls that a run's metrics and files need."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """What came in: `rows` of the history, `config`, names of `files`; `dead` drops every call, `hooks` see each path."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.operations: list[str] = []
        self.complete: list[bool] = []
        self.dead = False

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers as W&B's server would, with as little as its SDK takes."""

    server: Server

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""

    def body(self) -> bytes:
        """What was sent."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            found = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, value: Any) -> None:
        """JSON."""
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        """A file."""
        self.body()
        self.answer({})

    def do_GET(self) -> None:
        """Anything else."""
        self.answer({})

    def do_POST(self) -> None:
        """GraphQL and the file stream."""
        data = self.body()
        if self.server.dead:
            time.sleep(0.05)
            self.send_error(503)
            return
        if self.path.endswith("/graphql"):
            self.answer(self.graphql(json.loads(data)))
        elif self.path.endswith("/file_stream"):
            self.stream(json.loads(data))
            self.answer({"exitcode": None, "limits": {}})
        else:
            self.answer({})

    def stream(self, sent: dict[str, Any]) -> None:
        """Rows of the history."""
        files = sent.get("files", {})
        self.server.rows += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.server.summary.update(json.loads(line))
        if "complete" in sent:
            self.server.complete.append(bool(sent["complete"]))

    def graphql(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answers to the mutations and queries of a run."""
        query, variables = asked.get("query", ""), asked.get("variables") or {}
        self.server.operations.append(asked.get("operationName") or query.split("(")[0].strip())
        if "upsertBucket" in query:
            if isinstance(variables.get("config"), str):
                self.server.config.update(json.loads(variables["config"]))
            project = {"name": "kd", "entity": {"name": "me"}}
            bucket = {"id": "b1", "name": variables.get("name") or "x", "displayName": "x", "project": project}
            return {"data": {"upsertBucket": {"inserted": True, "bucket": bucket}}}
        if "createRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"{self.server.url}/put/{f}"} for f in variables.get("files", [])]
            return {"data": {"createRunFiles": {"runID": "b1", "uploadHeaders": [], "files": files}}}
        viewer = {"id": "u1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": viewer, "serverInfo": None, "project": None, "model": None}}


@contextmanager
def running() -> Iterator[Server]:
    """The server, until the block ends."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
