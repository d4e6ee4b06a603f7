"""A stand-in for the Hugging Face Hub's HTTP interface, on this machine: what an upload asks of it, and no more."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

READS, WRITES = "hf_reads", "hf_writes"
"""Tokens."""
MEMBERS = ("org", "mine")
"""Where the second may write."""


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    large: dict[str, bytes] = field(default_factory=dict)
    """Those of the files that are stored as large ones."""
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    summaries: list[str] = field(default_factory=list)


@dataclass
class Hub:
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256."""
    requests: list[str] = field(default_factory=list)

    def create(self, body: dict[str, Any], token: str) -> tuple[int, Any]:
        name = f"{body['organization']}/{body['name']}"
        if token == READS or body["organization"] not in MEMBERS:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
        private = body.get("private") or body.get("visibility") == "private"
        self.repositories[name] = Repository(bool(private))
        return 200, {"url": f"{self.endpoint}/{name}"}

    def info(self, name: str) -> tuple[int, Any]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[name]
        siblings: list[dict[str, Any]] = []
        for path, content in repository.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            siblings.append({"rfilename": path, "size": len(content), "blobId": blob})
        for path, content in repository.large.items():
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append({"rfilename": path, "size": len(content), "blobId": "1" * 40, "lfs": lfs})
        told = {"id": name, "sha": repository.commits[-1], "private": repository.private, "tags": []}
        return 200, told | {"siblings": siblings}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        repository = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") != repository.commits[-1]:
                    return 412, {"error": "A commit has happened since"}
                repository.summaries.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.large[value["path"]] = self.stored[value["oid"]]
        repository.commits.append(f"{len(repository.commits):040}")
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": repository.commits[-1]}


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub without repositories while this lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, status: int, values: dict[str, Any]) -> None:
            content = json.dumps(values).encode()
            self.send_response(status)
            if status >= 400:
                self.send_header("X-Error-Message", values["error"])
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            if self.command == "PUT":
                hub.stored[path.rpartition("/")[2]] = body
                return self.answer(200, {})
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in (READS, WRITES):
                return self.answer(401, {"error": "Invalid username or password."})
            match path.strip("/").split("/"):
                case ["api", "repos", "create"]:
                    self.answer(*hub.create(json.loads(body), token))
                case ["api", "validate-yaml"]:
                    self.answer(200, {"errors": [], "warnings": []})
                case ["api", "models", owner, name]:
                    self.answer(*hub.info(f"{owner}/{name}"))
                case ["api", "models", _, _, "preupload", "main"]:
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
                    files = [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]
                    self.answer(200, {"files": files})
                case [_, _, "info", "lfs", "objects", "batch"]:
                    objects = [
                        one | {"actions": {"upload": {"href": f"{hub.endpoint}/large/{one['oid']}"}}}
                        for one in json.loads(body)["objects"]
                    ]
                    self.answer(200, {"transfer": "basic", "objects": objects})
                case ["api", "models", owner, name, "commit", "main"]:
                    self.answer(*hub.commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()]))
                case _:
                    self.answer(404, {"error": f"no {path}"})

        do_GET = do_POST = do_PUT = do

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
