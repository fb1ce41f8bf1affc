"""A bucket on this machine for tests and measurements: a process with `gcp-storage-emulator` (bucket_server.py) and, in
this one, a proxy before it, which records requests and injects faults on demand: status codes, slow answers, connections
dropped before or after the request took effect."""
import contextlib
import http.client
import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

DROP, DROP_ANSWER = "drop", "drop answer"
# What a request meets: a status code, seconds of delay, DROP, DROP_ANSWER (it takes effect) or None.
Faults = Callable[[str, str], int | float | str | None]

SERVE = "import runpy, sys; runpy.run_path(sys.argv[1])['serve'](sys.argv[2:])"
START_BYTES = 400
NOT_FORWARDED = ("connection", "content-length", "date", "server", "transfer-encoding")


class Request(NamedTuple):
    """A request. start: the first START_BYTES of its body, where an upload in parts has the object's name."""

    method: str
    path: str
    size: int  # bytes of the body
    start: bytes


class Emulator(contextlib.AbstractContextManager):
    """A server until `close`, with buckets by name. ImportError without the package gcp-storage-emulator.

    Attributes:
      environment: variables that make gcsfs and TensorStore use it.
      faults: called with method and path of every request.
      requests: all that came, in turn."""

    def __init__(self, *buckets: str):
        if not importlib.util.find_spec("gcp_storage_emulator"):
            raise ImportError("An emulated bucket needs `pip install gcp-storage-emulator`.")
        self.faults: Faults = lambda method, path: None
        self.requests: list[Request] = []
        command = [sys.executable, "-c", SERVE, Path(__file__).with_name("bucket_server.py"), *buckets]
        # In a session of its own: Ctrl-C is for the clients.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._proxy = _Proxy(("127.0.0.1", 0), partial(_Handler, self, int(self._process.stdout.readline())))
        thread = threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url, "NO_GCE_CHECK": "true",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }  # fmt: skip

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._process.communicate()  # closes its standard input

    def naming(self, folder: str) -> list[Request]:
        """The requests that name a folder."""
        return [one for one in self.requests if folder in one.path or folder.encode() in one.start]


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        pass  # killed clients


class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, emulator: Emulator, port: int, *args, **kwargs):
        self.emulator, self.port = emulator, port
        super().__init__(*args, **kwargs)

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.emulator.faults(self.command, self.path)
        self.emulator.requests.append(Request(self.command, self.path, len(body), body[:START_BYTES]))
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, int):
            message = {"error": {"code": fault, "message": f"injected {fault}"}}
            return self._send(fault, {}, json.dumps(message).encode())
        answer = None if fault == DROP else self._forwarded(body)
        if isinstance(fault, str):
            self.close_connection = True
        else:
            self._send(*answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _forwarded(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the server's answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as server:
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in NOT_FORWARDED}
            return answer.status, headers, answer.read()

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
