"""A stand-in for W&B's server: keeps what the real client sends, and tells the client what it has been sent."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """`history` has the rows by run id, each at the place where the client wanted it, `runs` what else is known.

    It `refuses` any request, `knows_no` key, or is `silent` about the names of queries; a `page` is that many runs.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.refuses = self.knows_no = False
        self.silent: set[str] = set()
        self.page = 1000
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.exits: dict[str, list[int]] = {}
        self.begun: list[str] = []  # run ids in the order of the uploads

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def graphql(self, query: str, variables: dict[str, Any]) -> Any:
        if any(name in query for name in self.silent):
            time.sleep(10)
        if "viewer {" in query:
            teams = {"edges": []}
            viewer = {"id": "1", "entity": "us", "username": "us", "email": "", "flags": "{}", "teams": teams}
            return {"viewer": None if self.knows_no else viewer}
        if "query Runs(" in query:
            return {"project": self._runs(variables)}
        if "HistoryPage" in query or "HistoryKeys" in query or "ParquetHistory" in query:
            return {"project": {"run": self._rows(variables)}}
        project = {"id": "1", "name": "bnlight", "entity": {"id": "1", "name": "us"}}
        if "RunResumeStatus" in query:
            return {"model": project | {"bucket": self._status(variables["name"])}}
        if "upsertBucket" in query:
            name = variables["name"]
            self.begun.append(name)
            self.runs.setdefault(name, {}).update({k: v for k, v in variables.items() if v is not None})
            bucket = {"id": "1", "name": name, "displayName": name, "project": project, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": name not in self.history}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return None

    def _runs(self, asked: dict[str, Any]) -> Any:
        """A page of the project's runs, as the public API lists them."""
        known = [run for run in self.runs.values() if run["project"] == asked["project"]]
        if not known or asked["entity"] != "us":
            return None
        group = json.loads(asked["filters"]).get("group")
        known = [run for run in known if group in (None, run.get("groupName"))]
        begin = int(asked.get("cursor") or 0)
        end = min(begin + min(asked["perPage"], self.page), len(known))
        edges = [{"node": self._node(run), "cursor": str(end)} for run in known[begin:end]]
        info = {"endCursor": str(end), "hasNextPage": end < len(known)}
        runs = {"edges": edges, "pageInfo": info}
        return {"internalId": "1", "runCount": len(known), "readOnly": False, "runs": runs}

    def _node(self, run: dict[str, Any]) -> dict[str, Any]:
        name = run["name"]
        codes = self.exits.get(name)
        state = "running" if not codes else "failed" if codes[-1] else "finished"
        absent = ("sweepName", "description", "notes", "systemMetrics", "historyKeys")
        return dict.fromkeys(absent) | {
            "id": name, "name": name, "projectId": "1", "displayName": run.get("displayName"), "state": state,
            "config": run.get("config", "{}"), "group": run.get("groupName"), "jobType": run.get("jobType"),
            "user": {"name": "us", "username": "us"}, "commit": run.get("commit"), "tags": run.get("tags", []),
            "readOnly": False, "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00",
            "summaryMetrics": run.get("summary", "{}"), "historyLineCount": len(self.history.get(name, {})),
        }  # fmt: skip

    def _rows(self, asked: dict[str, Any]) -> Any:
        """Some of a run's history, where W&B's core looks for it: nothing of it is in parquet files."""
        name = asked.get("name") or asked.get("runName") or asked["run"]
        rows = {row["_step"]: row for row in self.history.get(name, {}).values()}
        wanted = range(asked.get("minStep", 0), asked.get("maxStep", 0))
        return {
            "historyKeys": {"lastStep": max(rows, default=-1)},
            "parquetHistory": {"parquetUrls": [], "liveData": []},
            "history": [json.dumps(rows[step]) for step in sorted(rows) if step in wanted],
        }

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
        if summary := sent.get("files", {}).get("wandb-summary.json"):
            self.runs[run]["summary"] = summary["content"][0]
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
        with contextlib.suppress(ConnectionError):  # who has waited too long is gone
            self.send_response(401 if self.server.refuses else 200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_PUT = do_POST  # noqa: N815 - a run's files

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def serving(kind: type[Server] = Server) -> Iterator[Any]:
    """A server of this kind in a thread of its own."""
    server = kind()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
