"""The Hugging Face hub on loopback, as far as downloading a model asks for it; it can break off and fall silent."""
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = "model.safetensors"


class Hub:
    """One repository, `name`, with the files of a folder. The first `halts` downloads of the weights send half, set
    `half_sent` and hang until `go_on` is set. status: 200, or the answer to everything."""

    def __init__(self, name: str, folder: Path, halts: int = 0, status: int = 200):
        self.name, self.folder, self.halts, self.status = name, folder, halts, status
        self.half_sent, self.go_on, self.asked = threading.Event(), threading.Event(), []

    def answer(self, path: str) -> tuple[bytes | None, dict]:
        """Content and headers; None: there is no such thing."""
        api, files = f"/api/models/{self.name}/", f"/{self.name}/resolve/{COMMIT}/"
        contents = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        path = path.partition("?")[0]
        if path == f"{api}revision/main":
            listed = [{"rfilename": name} for name in contents]
            return json.dumps({"id": self.name, "sha": COMMIT, "siblings": listed}).encode(), {}
        if path == f"{api}tree/{COMMIT}":
            tree = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in contents.items()]
            return json.dumps(tree).encode(), {}
        content = contents.get(path.removeprefix(files)) if path.startswith(files) else None
        return content, {} if content is None else {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT}


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def respond(self, body: bool):
        content, headers = self.hub.answer(self.path)
        status = self.hub.status if self.hub.status != 200 or content is not None else 404
        content = content if status == 200 else b""
        if body:
            self.hub.asked.append(self.path.rpartition("/")[2])
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]) if body else 0
        if begin and status == 200:
            status, headers = 206, headers | {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content) - begin), "Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        content = content[begin:]
        with contextlib.suppress(OSError):  # a killed client
            if self.path.endswith(LARGE) and self.hub.halts > 0 and status in (200, 206):
                self.hub.halts -= 1
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.hub.half_sent.set()
                self.hub.go_on.wait(60)
                content = content[len(content) // 2 :]
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(hub: Hub):
    """Serve the hub; yields its address for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
