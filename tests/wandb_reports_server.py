"""The stand-in for W&B's server, with the projects, reports and workspaces that wandb-workspaces asks for and saves."""

from __future__ import annotations

import json
from typing import Any

from wandb_server import Server


class ReportsServer(Server):
    """`views` are what was saved, with their specifications, `artifacts` what was announced.

    With `keeps_no_view` it refuses everything once a view is to be saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.views: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.keeps_no_view = False

    def graphql(self, query: str, variables: dict[str, Any]) -> Any:
        if "upsertView" in query:
            self.refuses = self.keeps_no_view
            return {"upsertView": {"view": self._saved(variables), "inserted": True}}
        if "models(" in query or "query GetProjects" in query:
            return self._projects()
        if "query ArtifactType(" in query:
            return {"project": {"artifact": None}}
        if "mutation CreateArtifact (" in query:  # and has its files already, so nothing is uploaded
            self.artifacts.append(variables["input"])
            sequence = {"latestArtifact": {"id": "1"}}
            return {
                "createArtifact": {
                    "artifact": {"id": "1", "state": "COMMITTED", "artifactSequence": sequence}
                }
            }
        return super().graphql(query, variables)

    def _saved(self, asked: dict[str, Any]) -> dict[str, Any]:
        view = asked | {"spec": json.loads(asked["spec"])}
        self.views.append(view)
        return {
            "id": f"view{len(self.views)}", "type": asked["type"], "name": asked["name"], "spec": asked["spec"],
            "displayName": asked["displayName"], "description": asked["description"], "updatedAt": None,
            "project": {"id": "1", "name": asked["projectName"], "entityName": asked["entityName"]},
        }  # fmt: skip

    def _projects(self) -> Any:
        edges = [
            {"node": self._project(name), "cursor": name}
            for name in {run["project"] for run in self.runs.values()}
        ]
        return {"models": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}

    def _project(self, name: str) -> dict[str, Any]:
        at = "2026-01-01T00:00:00"
        return {
            "id": name, "name": name, "entityName": "us", "createdAt": at, "isBenchmark": False, "user": None,
        }  # fmt: skip
