"""A W&B server on 127.0.0.1 that takes runs, or refuses every key; it keeps what it is asked. No artifacts."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """`queries` are (operation, variables) of the GraphQL requests, `streams` the rows of history by run id."""

    daemon_threads = True

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.queries, self.streams = status, [], {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def runs(self) -> list[dict[str, Any]]:
        """Variables of the requests that begin a run; later ones about it name no display name."""
        return [v for name, v in self.queries if name == "UpsertBucket" and v.get("displayName")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            request = json.loads(content)
            name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
            self.server.queries.append((name, request.get("variables") or {}))
            answer = {"data": reply(name, request.get("variables") or {}, self.server.url)}
        elif self.path.endswith("/file_stream"):
            chunk = json.loads(content).get("files", {}).get("wandb-history.jsonl", {})
            rows = self.server.streams.setdefault(self.path.split("/")[-2], [])
            rows += [json.loads(row) for row in chunk.get("content", [])]
        body = json.dumps(answer if self.server.status == 200 else {"error": "invalid API key"}).encode()
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        """Keep the tests' output readable."""


def reply(name: str, variables: dict[str, Any], url: str) -> dict[str, Any]:
    """The `data` of the answers without which W&B's client does not go on."""
    project = {"name": variables.get("project"), "entity": {"name": "someone"}}
    bucket = {"id": "1", "name": variables.get("name"), "displayName": variables.get("displayName"), "project": project}
    files = [{"name": file, "uploadUrl": f"{url}/put/{file}"} for file in variables.get("files") or []]
    answers = {
        "Viewer": {"viewer": {"id": "1", "entity": "someone", "username": "someone", "teams": {"edges": []}}},
        "RunResumeStatus": {"model": {"id": "1", "name": variables.get("project"), "bucket": None}},
        "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
        "CreateRunFiles": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}},
    }
    return answers.get(name, {})


@contextmanager
def serve(status: int = 200) -> Iterator[WandbServer]:
    """Run a server in a thread; `status` is that of all its answers, 401 for one that refuses every key."""
    with WandbServer(status) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
