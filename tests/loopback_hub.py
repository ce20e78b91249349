"""A Hugging Face Hub on the loopback, for the genuine client: what ecosystem.md, section 3, lists.

Repositories live in memory. Some faults can be switched on for a repository: see `LoopbackHub`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def file_hash(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(path) else git_hash(content)


@dataclass
class Repository:
    """Commits (hash -> files), what branches and tags point to, and who may see it."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        seed = f"{len(self.commits)}" + "".join(sorted(map(git_hash, files.values())))
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


class LoopbackHub:
    """The server, in a thread; a context manager.

    ``faults`` of a repository, file name -> what happens to its download: ``"dies"`` (connection
    closed half-way), ``"short"`` (half the file, as if it were whole), ``"long"`` (announced
    larger than it is), ``"other"`` (other bytes of the same length), ``"huge"`` (announced with
    a terabyte), ``"broken"`` (status 500), ``"forbidden"`` and ``"gone"`` (403 and 404 without
    the Hub's own code, as a proxy answers), ``"drips"`` (an answer that never ends, a byte at a
    time), ``"stalls"`` (half the file, and then nothing). ``"upload"`` as a file name: ``"dies"``
    closes the connection at the commit, ``"refused"`` answers 403. ``"info"`` as a file name:
    ``"drips"`` for what the repository is.
    """

    TOKEN = "hf_loopback"

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], **options) -> Repository:
        """A repository that holds ``files``."""
        self.repositories[name] = repository = Repository(**options)
        repository.commit(files)
        return repository


def _handler(hub: LoopbackHub) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        # -- answers -------------------------------------------------------------------------

        def answer(self, status=200, body=b"", headers=None):
            if isinstance(body, (dict, list)):
                body = json.dumps(body).encode()
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, str(value))
            if "Content-Length" not in (headers or {}):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status, code, **more):
            headers = {"X-Error-Code": code, "X-Error-Message": code, **more}
            self.answer(status, {"error": code}, headers)

        # -- requests ------------------------------------------------------------------------

        def route(self):
            size = int(self.headers.get("Content-Length") or 0)
            self.content = self.rfile.read(size)
            if self.headers.get("Transfer-Encoding") == "chunked":
                self.content = b"".join(self.chunks())
            url = urlsplit(self.path)
            self.query = parse_qs(url.query)
            path = unquote(url.path)
            hub.requests.append((self.command, path, self.headers.get("User-Agent", "")))
            for pattern, handle in self.routes:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    return handle(self, *found.groups())
            return self.refuse(404, "RepoNotFound")

        do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = route

        def chunks(self):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def repository(self, name) -> Repository | None:
            """The repository, if it is there and the token may see it; else the refusal."""
            found = hub.repositories.get(name)
            known = self.headers.get("Authorization") == f"Bearer {hub.TOKEN}"
            if found is None or (found.private and not known):
                self.refuse(404 if known else 401, "RepoNotFound")
                return None
            return found

        def anything(self, *_):
            self.answer(body={})

        def create(self):
            wanted = json.loads(self.content)
            name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            if self.headers.get("Authorization") != f"Bearer {hub.TOKEN}":
                return self.refuse(401, "Unauthorized")
            new = name not in hub.repositories
            if new:
                private = wanted.get("private") or wanted.get("visibility") == "private"
                repository = hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
                repository.private = bool(private)
            return self.answer(200 if new else 409, {"url": f"{hub.url}/{name}", "name": name})

        def validate(self):
            self.answer(body={"errors": [], "warnings": []})

        def info(self, name, revision="main"):
            if (repository := self.repository(name)) is None:
                return None
            if repository.faults.get("info") == "drips":
                return self.drip()
            if (sha := repository.resolve(revision)) is None:
                return self.refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": path} for path in repository.commits[sha]]
            body = {"id": name, "modelId": name, "sha": sha, "siblings": siblings}
            return self.answer(body=body | {"private": repository.private, "tags": []})

        def tree(self, name, revision, folder=None):
            """The files below a folder; without ``recursive``, its files and folders."""
            if (repository := self.repository(name)) is None:
                return None
            start = f"{folder}/" if folder else ""
            files = repository.commits[repository.resolve(revision)]
            below = {path: content for path, content in files.items() if path.startswith(start)}
            if folder and not below:
                return self.refuse(404, "EntryNotFound")
            entries = []
            if self.query.get("recursive", ["False"])[0].lower() == "false":
                folders = {p[len(start) :].split("/")[0] for p in below if "/" in p[len(start) :]}
                entries = [
                    {"type": "directory", "path": start + inner, "size": 0, "oid": "0" * 40}
                    for inner in sorted(folders)
                ]
                below = {p: c for p, c in below.items() if "/" not in p[len(start) :]}
            for path, content in below.items():
                entry = {"type": "file", "path": path, "size": len(content)}
                entry["oid"] = git_hash(content)
                if is_large(path):
                    entry["lfs"] = {"oid": file_hash(path, content), "size": len(content)}
                    entry["lfs"]["pointerSize"] = 130
                entries.append(entry)
            return self.answer(body=entries)

        def preupload(self, name, revision):
            if (repository := self.repository(name)) is None:
                return None
            files = []
            for entry in json.loads(self.content)["files"]:
                path = entry["path"]
                mode = "lfs" if is_large(path) else "regular"
                told = {"path": path, "uploadMode": mode, "shouldIgnore": False}
                present = repository.commits[repository.resolve(revision)]
                if path in present:
                    told["oid"] = file_hash(path, present[path])
                files.append(told)
            return self.answer(body={"files": files})

        def batch(self, name):
            objects = []
            for entry in json.loads(self.content)["objects"]:
                actions = {
                    "upload": {"href": f"{hub.url}/lfs/{entry['oid']}"},
                    "verify": {"href": f"{hub.url}/verify"},
                }
                objects.append({**entry, "actions": actions})
            self.answer(body={"transfer": "basic", "objects": objects})

        def put(self, oid):
            hub.uploads[oid] = self.content
            self.answer()

        def commit(self, name, revision):
            if (repository := self.repository(name)) is None:
                return None
            fault = repository.faults.get("upload")
            if fault == "dies":
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if fault == "refused" or self.headers.get("Authorization") != f"Bearer {hub.TOKEN}":
                return self.refuse(403, "Forbidden")
            files = dict(repository.commits[repository.resolve(revision)])
            for line in self.content.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.uploads[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
            sha = repository.commit(files, revision)
            return self.answer(
                body={"commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"}
            )

        def branch(self, name, branch):
            if (repository := self.repository(name)) is None:
                return None
            if branch in repository.refs:
                return self.refuse(409, "Conflict")
            repository.refs[branch] = repository.refs["main"]
            return self.answer()

        def tag(self, name, revision):
            if (repository := self.repository(name)) is None:
                return None
            if (tag := json.loads(self.content)["tag"]) in repository.refs:
                return self.refuse(409, "Conflict")
            repository.refs[tag] = repository.resolve(revision)
            return self.answer()

        def models(self):
            """Public repositories with all the tags asked for, which the Hub takes from cards."""
            found = []
            for name, repository in hub.repositories.items():
                text = repository.files.get("README.md", b"").decode()
                if repository.private or not text.startswith("---\n"):
                    continue
                card = yaml.safe_load(text.split("---\n")[1])
                tags = [*card.get("tags", ()), *(f"dataset:{d}" for d in card.get("datasets", ()))]
                tags += [f"base_model:{card['base_model']}"] if "base_model" in card else []
                if set(self.query.get("filter", ())) <= set(tags):
                    body = {"id": name, "tags": tags, "cardData": card, "downloads": 7}
                    found.append(body | {"private": False})
            self.answer(body=found)

        def drip(self):
            """Half a minute of a header: never a pause that is long enough for a timeout."""
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            with contextlib.suppress(OSError):
                for _ in range(150):
                    self.wfile.write(b"a")
                    self.wfile.flush()
                    time.sleep(0.2)
            self.close_connection = True

        def resolve(self, name, revision, path):
            if (repository := self.repository(name)) is None:
                return None
            if repository.gated:
                return self.refuse(403, "GatedRepo")
            if (sha := repository.resolve(revision)) is None:
                return self.refuse(404, "RevisionNotFound")
            if path not in repository.commits[sha]:
                return self.refuse(404, "EntryNotFound", **{"X-Repo-Commit": sha})
            content = repository.commits[sha][path]
            fault = repository.faults.get(path)
            if fault == "broken":
                return self.refuse(500, "Broken")
            if fault in ("forbidden", "gone"):
                return self.answer(403 if fault == "forbidden" else 404, b"no")
            if fault == "drips":
                return self.drip()
            headers = {"X-Repo-Commit": sha, "ETag": f'"{file_hash(path, content)}"'}
            length = len(content)
            if fault in ("long", "huge") and self.command == "HEAD":
                length = 2 * length if fault == "long" else 1 << 40
            if fault == "other":
                content = bytes([content[-1] ^ 1]) + content[1:]
            if self.command == "HEAD":
                return self.answer(headers=headers | {"Content-Length": length})
            status, start = 200, 0
            if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                status, start = 206, int(found[1])
                headers["Content-Range"] = f"bytes {start}-{length - 1}/{length}"
            half = len(content) // 2
            if fault == "short":
                content = content[:half]
            if fault not in ("dies", "stalls"):
                return self.answer(status, content[start:], headers)
            # Nobody gets beyond the middle.
            headers["Content-Length"] = length - start
            self.answer(status, content[start:half], headers)
            self.wfile.flush()
            if fault == "stalls":
                self.rfile.read(1)  # until the client gives up
            self.close_connection = True
            return None

        name = r"([\w.\-]+/[\w.\-]+)"
        data_set = r"(datasets/[\w.\-]+/[\w.\-]+)"  # its name in `repositories` too
        routes: ClassVar[list] = [
            (r"POST /api/repos/create", create),
            (r"POST /api/validate-yaml", validate),
            (r"GET /api/models", models),
            (rf"GET /api/models/{name}", info),
            (rf"POST /api/models/{name}/branch/(.+)", branch),
            (rf"POST /api/models/{name}/tag/(.+)", tag),
            (rf"GET /api/models/{name}/revision/(.+)", info),
            (rf"GET /api/models/{name}/tree/([^/]+)", tree),
            (rf"POST /api/models/{name}/preupload/(.+)", preupload),
            (rf"POST /api/models/{name}/commit/(.+)", commit),
            (rf"POST /{name}\.git/info/lfs/objects/batch", batch),
            (r"PUT /lfs/(\w+)", put),
            (r"POST /verify", anything),
            (rf"(?:GET|HEAD) /{name}/resolve/([^/]+)/(.+)", resolve),
            (rf"GET /api/{data_set}", info),
            (rf"GET /api/{data_set}/revision/(.+)", info),
            (rf"GET /api/{data_set}/tree/([^/]+)(?:/(.+))?", tree),
            (rf"(?:GET|HEAD) /{data_set}/resolve/([^/]+)/(.+)", resolve),
            (r"GET /api/(?!models/|datasets/).*", anything),
        ]

    return Handler
