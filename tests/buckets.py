"""A bucket for tests: what TensorStore asks of Google's storage, kept in memory.

TensorStore reads where the service is, and the token for it, from the environment, once: whoever
uses the bucket is a process of its own.
"""

import contextlib
import http.server
import json
import os
import re
import threading
import urllib.parse

ENVIRONMENT = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "JAX_PLATFORMS": "cpu"}


class Bucket(http.server.ThreadingHTTPServer):
    """Objects by name. `refused`: "GET", "POST" or "DELETE" that nobody is permitted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.refused: set[str] = set()
        self.lock, self.count = threading.Lock(), 0

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {**os.environ, **ENVIRONMENT, "TENSORSTORE_GCS_HTTP_URL": url}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def log_message(self, *_):
        pass

    def _answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _asked(self):
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        name = urllib.parse.unquote(re.sub(r".*/b/[^/]+/o/?", "", url.path))
        return name, query

    def _refused(self):
        if self.command in self.server.refused:
            self._answer(403, b'{"error": {"code": 403, "message": "no permission"}}')
        return self.command in self.server.refused

    def _as_expected(self, name, query):
        now = self.server.generations.get(name, 0)
        return int(query.get("ifGenerationMatch", now)) == now

    def do_GET(self):
        name, query = self._asked()
        if self._refused():
            return
        with self.server.lock:
            if not name:
                names = sorted(self.server.objects)
                found = [n for n in names if n.startswith(query.get("prefix", ""))
                         and n >= query.get("startOffset", "")
                         and n < query.get("endOffset", "\U0010ffff")]  # fmt: skip
                items = [{"name": n, "size": str(len(self.server.objects[n]))} for n in found]
                self._answer(200, json.dumps({"items": items}).encode())
                return
            content = self.server.objects.get(name)
            generation = self.server.generations.get(name)
        if content is None:
            self._answer(404)
            return
        span = re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            self._answer(200, content, x_goog_generation=generation)
            return
        begin, end = span.groups()
        first = int(begin) if begin else max(len(content) - int(end), 0)
        last = min(int(end) if begin and end else len(content) - 1, len(content) - 1)
        self._answer(206, content[first : last + 1], x_goog_generation=generation,
                     Content_Range=f"bytes {first}-{last}/{len(content)}")  # fmt: skip

    def do_POST(self):
        _, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self._refused():
            return
        with self.server.lock:
            if not self._as_expected(query["name"], query):
                self._answer(412)
                return
            self.server.count += 1
            self.server.objects[query["name"]] = content
            self.server.generations[query["name"]] = self.server.count
            about = {"name": query["name"], "generation": str(self.server.count)}
        self._answer(200, json.dumps(about).encode())

    def do_DELETE(self):
        name, _ = self._asked()
        if self._refused():
            return
        with self.server.lock:
            known = self.server.generations.pop(name, None)
            self.server.objects.pop(name, None)
        self._answer(204 if known else 404)


@contextlib.contextmanager
def bucket():
    """A bucket that is served while the context lasts; its name does not matter."""
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
