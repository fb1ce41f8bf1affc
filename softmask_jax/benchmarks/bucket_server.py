"""The process that `emulator.py` starts: the server of `gcp-storage-emulator`, in memory, on a free port of loopback.

It adds what the package lacks: preconditions, listings of ranges, generations in answers, and requests that take as long
after 10,000 objects as before."""
import http.server
import logging
import re
import sys
import threading
from functools import partial
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.storage import Storage


class PreconditionFailed(Exception):
    """An object has another generation than a request wants."""


class BucketStorage(Storage):
    """Objects in memory. query: of the request in progress, by name."""

    def __init__(self, buckets: list[str]):
        self.query = {}
        super().__init__(use_memory_fs=True)
        for name in buckets:
            create_bucket(name, self)
            # Deleted objects would be kept for a week.
            self.buckets[name]["softDeletePolicy"] = {"retentionDurationSeconds": "0"}

    def generation(self, bucket: str, name: str) -> str:
        """An object's generation, "0" without one."""
        return str(self.objects.get(bucket, {}).get(name, {}).get("generation", "0"))

    def create_file(self, bucket_name, file_name, *args, **kwargs):
        generation = self.generation(bucket_name, file_name)
        if self.query.get("ifGenerationMatch", [generation])[0] != generation:
            raise PreconditionFailed
        super().create_file(bucket_name, file_name, *args, **kwargs)

    def get_file_list(self, *args, **kwargs):
        objects, prefixes = super().get_file_list(*args, **kwargs)
        start, (end,) = self.query.get("startOffset", [""])[0], self.query.get("endOffset", [None])
        return [about for about in objects if about["name"] >= start and (end is None or about["name"] < end)], prefixes

    def _write_config_to_file(self) -> None:
        # The package writes what is known of all objects at every request, for a server that is started again.
        pass


class Handler(server.RequestHandler):
    """One request."""

    def answer(self) -> None:
        self.storage.query = parse_qs(urlsplit(self.path).query)
        if self.command == "DELETE" and "upload_id" in self.storage.query:  # of an unfinished upload; it stays
            return self.end(204)
        try:
            server.Router(self).handle(self.command)
        except PreconditionFailed:
            self.end(412)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def end(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_response(self, code, message=None) -> None:
        super().send_response(code, message)
        # TensorStore wants to know which generation it reads.
        if self.command == "GET" and (named := re.search(r"/b/([^/]+)/o/([^/?]+)\?.*alt=media", self.path)):
            self.send_header("x-goog-generation", self.storage.generation(unquote(named[1]), unquote(named[2])))


class Server(http.server.HTTPServer):
    """One request at a time, as the storage expects."""

    request_queue_size = 128


def serve(buckets: list[str]) -> None:
    """Print the port, and answer until standard input ends."""
    logging.disable()
    listener = Server(("127.0.0.1", 0), partial(Handler, BucketStorage(buckets)))
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    print(listener.server_port, flush=True)
    sys.stdin.read()
