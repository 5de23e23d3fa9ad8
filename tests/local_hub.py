"""A Hugging Face Hub on this machine, for tests: the routes that `huggingface_hub` calls for model repositories.

    with LocalHub(tmp_path) as hub:
        subprocess.run([sys.executable, "-c", script], env=os.environ | hub.environment())

The client reads its endpoint once, when it is imported, so whatever talks to this server runs in a process of its own.
Every commit keeps its own listing, as on the real Hub: an older revision stays readable. Folder layout:
`blobs/<oid>` (contents) and `repositories/<organisation>/<name>.json` (commits and branches).

With `faults`, it misbehaves: `hub.faults = Faults(rate=0.5)` breaks every second request in one of eight ways.
"""

import base64
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

# Large or binary files go through LFS: uploaded by their hash before the commit, as the real Hub demands.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".wav", ".flac")
# Some of those that the real Hub takes in a card; it refuses all that it does not know.
LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "llama3.1", "other")


# What can go wrong with a request. A number is an answer of that status.
KINDS = (
    "500",
    "503",
    "429",
    "reset",  # the connection is reset in the middle of the request
    "lost answer",  # the request is served, its answer never arrives
    "truncated",  # the answer ends in the middle
    "garbage",  # status 200, and something else than the client asked for
    "hang",  # nothing happens, for longer than a client should wait
)
GARBAGE = (b"<html>Be right back</html>", b"[]", b'{"message": "welcome"}', b"{", b"null")


@dataclass
class Faults:
    """Requests that go wrong, drawn at random from a seed.

    Args:
        rate: share of the requests.
        kinds: in which ways.
        seed: of the draws.
        hang_s: how long a connection hangs before it is closed.
        among: only requests whose method and path, "POST /api/repos/create", hold this.

    Attributes:
        injected: how many of each kind there were.
    """

    rate: float = 0.5
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    hang_s: float = 30.0
    among: str = ""
    injected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.lock = threading.Lock()

    def draw(self, request: str) -> str | None:
        """Return how a request goes wrong, or `None`."""
        with self.lock:
            if self.among not in request or self.random.random() >= self.rate:
                return None
            kind = self.random.choice(self.kinds)
            self.injected[kind] += 1
            return kind


class HubError(Exception):
    """An answer other than success: status, the code that the client turns into an exception, and its headers."""

    def __init__(self, status: int, code: str, **headers: str):
        super().__init__(code)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": code, **headers}


class LocalHub:
    """The server: a context manager around a thread.

    Args:
        folder: where repositories are stored; an existing one is served again.
        faults: what goes wrong; may be set and taken away at any time.
    """

    def __init__(self, folder: Path, faults: Faults | None = None):
        self.faults = faults
        self.blobs = folder / "blobs"
        self.repositories = folder / "repositories"
        self.home = folder / "client"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.requests: list[str] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: str = "home") -> dict[str, str]:
        """Return the variables that send a client process here; processes with different `home` share no cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_local",
            "HF_HOME": str(self.home / home),
            "HF_HUB_DISABLE_XET": "1",  # otherwise large files go to a content store of its own protocol
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def repository_path(self, name: str) -> Path:
        """Return the file that holds one repository."""
        return self.repositories / f"{name}.json"

    def read(self, name: str) -> dict[str, Any]:
        """Return {"commits": {sha: {path: {"oid", "size", "lfs"}}}, "branches": {name: sha}} of a repository."""
        path = self.repository_path(name)
        if not path.is_file():
            raise HubError(404, "RepoNotFound")
        return json.loads(path.read_text())

    def write(self, name: str, repository: dict[str, Any]) -> None:
        """Store a repository."""
        path = self.repository_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(repository))

    def listing(self, name: str, revision: str = "main") -> tuple[str, dict[str, dict[str, Any]]]:
        """Return (sha, {path: entry}) of a branch or commit."""
        repository = self.read(name)
        sha = repository["branches"].get(revision, revision)
        if sha not in repository["commits"]:
            raise HubError(404, "RevisionNotFound")
        return sha, repository["commits"][sha]

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        """Return the bytes of one file."""
        return (self.blobs / self.listing(name, revision)[1][path]["oid"]).read_bytes()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub
    fault: str | None = None

    def log_message(self, format: str, *arguments: object) -> None:
        self.hub.requests.append(format % arguments)

    # --- dispatch --------------------------------------------------------------------------------------------
    def _serve(self) -> None:
        # Segments are unquoted one by one: a branch named "a/b" arrives as "a%2Fb" and stays one segment.
        segments = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        length = int(self.headers.get("Content-Length") or 0)
        self.fault = self.hub.faults and self.hub.faults.draw(f"{self.command} {self.path}")
        body = self.rfile.read(length // 2 if self.fault == "reset" else length)
        if self.fault in ("reset", "hang"):
            time.sleep(self.hub.faults.hang_s if self.fault == "hang" else 0)
            return self._drop()
        if self.fault == "garbage":
            return self._send(200, self.hub.faults.random.choice(GARBAGE))
        if self.fault is not None and self.fault.isdigit():
            headers = {"Retry-After": "0"} if self.fault == "429" else {}
            return self._send(int(self.fault), b'{"error": "as the test ordered"}', **headers)
        try:
            with self.hub.lock:
                self._route(segments)(body)
        except HubError as error:
            self._send(error.status, json.dumps({"error": str(error)}).encode(), **error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, segments: list[str]) -> Callable[[bytes], None]:
        method = "GET" if self.command == "HEAD" else self.command
        match [method, *segments]:
            case ["GET", "api", "whoami-v2"]:
                return lambda body: self._json({"type": "user", "name": "local", "orgs": [], "auth": {}})
            case ["POST", "api", "repos", "create"]:
                return self._create
            case ["POST", "api", "validate-yaml"]:
                return self._validate
            case ["GET", "api", "models", owner, name]:
                return lambda body: self._info(f"{owner}/{name}", "main")
            case ["GET", "api", "models", owner, name, "revision", revision]:
                return lambda body: self._info(f"{owner}/{name}", revision)
            case ["GET", "api", "models", owner, name, "refs"]:
                return lambda body: self._refs(f"{owner}/{name}")
            case ["GET", "api", "models", owner, name, "tree", revision, *folder]:
                return lambda body: self._tree(f"{owner}/{name}", revision, "/".join(folder))
            case ["POST", "api", "models", owner, name, "branch", branch]:
                return lambda body: self._branch(f"{owner}/{name}", branch, body)
            case ["POST", "api", "models", owner, name, "preupload", revision]:
                return lambda body: self._preupload(f"{owner}/{name}", revision, body)
            case ["POST", "api", "models", owner, name, "commit", revision]:
                return lambda body: self._commit(f"{owner}/{name}", revision, body)
            case ["POST", owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                return self._lfs_batch
            case ["PUT", "lfs", oid]:
                return lambda body: self._lfs_upload(oid, body)
            case ["GET", owner, name, "resolve", revision, *path]:
                return lambda body: self._resolve(f"{owner}/{name}", revision, "/".join(path))
        raise HubError(404, "EntryNotFound")

    def _drop(self) -> None:
        """Reset the connection: whoever reads from it gets an error, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        if self.fault == "lost answer":
            return self._drop()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.fault == "truncated":
            self.close_connection = True
            content = content[: len(content) // 2]
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    # --- repositories ----------------------------------------------------------------------------------------
    def _create(self, body: bytes) -> None:
        request = json.loads(body)
        name = f"{request.get('organization') or 'local'}/{request['name']}"
        url = {"url": f"{self.hub.url}/{name}", "id": name, "name": name}
        if self.hub.repository_path(name).is_file():
            return self._json(url | {"error": "You already created this model repo"}, 409)
        first = hashlib.sha1(name.encode()).hexdigest()
        self.hub.write(name, {"commits": {first: {}}, "branches": {"main": first}})
        self._json(url)

    def _validate(self, body: bytes) -> None:
        stated = re.findall(r"^license: *(.+)$", json.loads(body)["content"].partition("\n---\n")[0], re.MULTILINE)
        errors = [
            {"message": f'"license" must be one of [{", ".join(LICENCES)}]'} for _ in set(stated) - set(LICENCES)
        ]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _info(self, name: str, revision: str) -> None:
        sha, files = self.hub.listing(name, revision)
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def _refs(self, name: str) -> None:
        branches = self.hub.read(name)["branches"].items()
        rows = [{"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha} for branch, sha in branches]
        self._json({"branches": rows, "converts": [], "tags": []})

    def _branch(self, name: str, branch: str, body: bytes) -> None:
        repository = self.hub.read(name)
        if branch in repository["branches"]:
            return self._json({"error": "Reference already exists"}, 409)
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repository["branches"][branch] = self.hub.listing(name, start)[0]
        self.hub.write(name, repository)
        self._json({})

    def _tree(self, name: str, revision: str, folder: str) -> None:
        rows = []
        for path, entry in self.hub.listing(name, revision)[1].items():
            if not folder or path.startswith(f"{folder}/"):
                row = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
                if entry["lfs"]:
                    row["lfs"] = {"oid": entry["oid"], "size": entry["size"], "pointerSize": 134}
                rows.append(row)
        self._json(rows)

    # --- uploads ---------------------------------------------------------------------------------------------
    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        files = self.hub.listing(name, revision)[1]
        answers = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in files:
                answer["oid"] = files[file["path"]]["oid"]  # the client leaves out a file that has not changed
            answers.append(answer)
        self._json({"files": answers})

    def _lfs_batch(self, body: bytes) -> None:
        objects: list[dict[str, Any]] = []
        for item in json.loads(body)["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if not (self.hub.blobs / item["oid"]).is_file():
                objects[-1]["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "HashMismatch")
        (self.hub.blobs / oid).write_bytes(body)
        self._json({})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        repository = self.hub.read(name)
        parent, files = self.hub.listing(name, revision)
        files = dict(files)
        for line in filter(None, body.split(b"\n")):
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    if value.get("parentCommit") not in (None, parent):
                        raise HubError(412, "A commit has happened since")
                case "file":
                    content = base64.b64decode(value["content"])
                    oid = _git_oid(content)
                    (self.hub.blobs / oid).write_bytes(content)
                    files[value["path"]] = {"oid": oid, "size": len(content), "lfs": False}
                case "lfsFile":
                    if not (self.hub.blobs / value["oid"]).is_file():
                        raise HubError(400, "LfsObjectMissing")
                    files[value["path"]] = {"oid": value["oid"], "size": value["size"], "lfs": True}
                case "deletedFile":
                    del files[value["path"]]
                case "deletedFolder":
                    files = {path: entry for path, entry in files.items() if not path.startswith(value["path"])}
                case other:
                    raise HubError(400, f"UnknownOperation {other}")
        sha = hashlib.sha1(parent.encode() + body).hexdigest()
        repository["commits"][sha] = files
        repository["branches"][revision] = sha
        self.hub.write(name, repository)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    # --- downloads -------------------------------------------------------------------------------------------
    def _resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self.hub.listing(name, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", **{"X-Repo-Commit": sha})
        entry = files[path]
        headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": f'"{entry["oid"]}"', "X-Linked-Size": str(entry["size"])}
        self._send(200, (self.hub.blobs / entry["oid"]).read_bytes(), **headers)
