"""A stand-in for W&B's server: keeps what the real client sends, and says of a run what it has been sent."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """`history` has the rows by run id, each at the place where the client wanted it; `refuses` any request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.refuses = False
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.exits: dict[str, list[int]] = {}
        self.begun: list[str] = []  # run ids in the order of the uploads

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def graphql(self, query: str, variables: dict[str, Any]) -> Any:
        project = {"id": "1", "name": "bnlight", "entity": {"id": "1", "name": "us"}}
        if "RunResumeStatus" in query:
            return {"model": project | {"bucket": self._status(variables["name"])}}
        if "upsertBucket" in query:
            name = variables["name"]
            self.begun.append(name)
            bucket = {"id": "1", "name": name, "displayName": name, "project": project, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": name not in self.history}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return None

    def _status(self, run: str) -> Any:
        if run not in self.history:
            return None
        rows = self.history[run]
        tail = json.dumps([json.dumps(rows[max(rows)])]) if rows else "[]"
        return {
            "id": "1", "name": run, "displayName": run, "summaryMetrics": "{}", "config": "{}", "tags": [],
            "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0, "historyTail": tail,
            "eventsTail": "[]", "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        rows = self.history.setdefault(run, {})
        file = sent.get("files", {}).get("wandb-history.jsonl")
        for index, line in enumerate(file["content"] if file else []):
            rows[file["offset"] + index] = json.loads(line)
        if sent.get("complete"):
            self.exits.setdefault(run, []).append(sent["exitcode"])


class _Requests(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer: Any = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.graphql(asked["query"], asked.get("variables") or {})}
        elif found := re.fullmatch(r"/files/.*/(\w+)/file_stream", self.path):
            self.server.stream(found[1], json.loads(body))
        content = json.dumps(answer).encode()
        self.send_response(401 if self.server.refuses else 200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST  # noqa: N815 - a run's files

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """The server in a thread of its own."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
