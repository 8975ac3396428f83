"""A Hub on the loopback interface, with the routes that huggingface_hub needs to push and load a model."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """Keeps all revisions of each repository, and a list of all requests, in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}  # repository -> path -> content of the main branch
        self.revisions: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, branch or commit) -> files
        self.messages: list[str] = []  # messages of the commits
        self.token: str | None = None  # requests with another token get the status 401
        self.private: dict[str, bool] = {}
        self.uploads: dict[str, bytes] = {}  # sha256 -> content, uploaded through LFS
        self.requests: list[str] = []
        self.refused: str | None = None  # requests that start with this get the status 403

    def tree(self, repo: str, revision: str) -> dict[str, bytes] | None:
        return self.files[repo] if revision == "main" else self.revisions.get((repo, revision))

    def commit_hash(self, repo: str, revision: str = "main") -> str:
        contents = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(self.tree(repo, revision).items())]
        return hashlib.sha1(json.dumps(contents).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _route(self) -> None:
        hub, path, body = self.server, unquote(urlsplit(self.path).path), self._body()
        hub.requests.append(f"{self.command} {path}")
        is_known = hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"
        if hub.refused and hub.requests[-1].startswith(hub.refused):
            self._answer(403)
        elif not is_known and not path.startswith("/uploads/"):
            self._answer(401, headers={"X-Error-Code": "RepoNotFound"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            hub.files.setdefault(repo, {})
            # huggingface_hub 1 says `private`, 2 says `visibility`.
            hub.private[repo] = asked.get("private") is True or asked.get("visibility") == "private"
            self._answer(200, {"url": f"{hub.url}/{repo}", "name": repo})
        elif path == "/api/validate-yaml":
            is_refused = b"license: no-such-license" in json.loads(body)["content"].encode()
            self._answer(400 if is_refused else 200, {"errors": ["license"] if is_refused else [], "warnings": []})
        elif match := re.fullmatch(r"/uploads/(\w{64})", path):
            hub.uploads[match[1]] = body
            self._answer(200)
        elif match := re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git/info/lfs|)(?:/([a-z-]+)(/.*)?)?", path):
            repo, verb, rest = match[1], match[2], match[3] or ""
            if repo not in hub.files:
                self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
            else:
                self._repository(repo, verb, rest, body)
        else:
            self._answer(404)

    def _repository(self, repo: str, verb: str | None, rest: str, body: bytes) -> None:
        hub = self.server
        named = rest.split("/", 2)[1] if verb in ("revision", "tree", "paths-info", "commit", "resolve") else "main"
        files = hub.tree(repo, named)
        if files is None:
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        commit = hub.commit_hash(repo, named)
        hub.revisions[repo, commit] = dict(files)
        if verb in (None, "revision"):
            self._answer(200, {"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
        elif verb in ("tree", "paths-info"):
            self._answer(
                200,
                [{"type": "file", "path": p, "size": len(d), "oid": _git_oid(d)} for p, d in files.items()],
            )
        elif verb == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})
        elif verb == "objects":
            wanted = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{hub.url}/uploads/{o['oid']}"}}} for o in wanted]
            self._answer(200, {"transfer": "basic", "objects": actions})
        elif verb == "commit":
            answer = {}
            if "create_pr=1" in urlsplit(self.path).query:
                files = hub.revisions[repo, "refs/pr/1"] = dict(files)
                answer["pullRequestUrl"] = f"{hub.url}/{repo}/discussions/1"
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "deletedFile":
                    files.pop(line["value"]["path"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.uploads[value["oid"]]
            named = "refs/pr/1" if answer else named
            commit = hub.commit_hash(repo, named)
            self._answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit} | answer)
        elif verb == "resolve":
            name = rest.split("/", 2)[2]
            if name in files:
                headers = {"ETag": f'"{_git_oid(files[name])}"', "X-Repo-Commit": commit}
                self._answer(200, files[name], headers)
            else:
                self._answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            self._answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = _route


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Serve on a free port of the loopback interface during a `with` block."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
