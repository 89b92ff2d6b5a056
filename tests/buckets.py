"""A bucket for tests: what TensorStore, gcsfs and Google's client ask of its storage, in memory.

They read where the service is, and the token for it, from the environment, once: whoever uses the
bucket is a process of its own.
"""

import contextlib
import http.server
import json
import os
import re
import sys
import threading
import urllib.parse

ENVIRONMENT = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "JAX_PLATFORMS": "cpu"}
MISSING = "no-such-bucket"  # of this name there is no bucket; of every other there is
NAMES = re.compile(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^?]*))?)?$")
LONGEST_LISTING = 100  # objects of an answer; the storage itself gives 1000


class Bucket(http.server.ThreadingHTTPServer):
    """Objects by name.

    `refused`: "GET", "POST", "DELETE" or "bucket" (what it is) that nobody is permitted.
    `unknown`: whoever asks is. `silent`: requests wait for an answer as long as the bucket is
    there. `dead`: connections are closed without an answer. Writes are refused when `writes_left`
    of them have been.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}  # resumable: name, and what has come
        self.refused: set[str] = set()
        self.silent = self.dead = self.unknown = False
        self.writes_left = 10**9
        self.lock, self.count = threading.Lock(), 0
        self.gone = threading.Event()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # whose client was killed, or is done
            super().handle_error(request, client_address)

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {**os.environ, **ENVIRONMENT, "TENSORSTORE_GCS_HTTP_URL": url,
                "STORAGE_EMULATOR_HOST": url, "NO_GCE_CHECK": "true"}  # fmt: skip

    def put(self, name: str, content: bytes) -> None:
        """Write an object; the lock is held."""
        self.count += 1
        self.objects[name], self.generations[name] = content, self.count

    def about(self, name: str) -> dict[str, str]:
        """What the storage tells of an object."""
        return {"kind": "storage#object", "name": name, "bucket": "bucket",
                "size": str(len(self.objects[name])), "metageneration": "1",
                "generation": str(self.generations[name]),
                "updated": "2024-01-01T00:00:00.000Z"}  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body go out together
    server: Bucket

    def log_message(self, *_):
        pass

    def _answer(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status, message):
        self._answer(status, {"error": {"code": status, "message": message}})

    def _asked(self):
        """(bucket, object, query); or None, answered already."""
        length = self.headers["Content-Length"]
        self.body = self.rfile.read(int(length)) if length else self._chunks()
        if self.server.silent:
            self.server.gone.wait()
        if self.server.dead or self.server.gone.is_set():
            self.close_connection = True
            return None
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        bucket, name = NAMES.match(url.path).groups()
        if self.server.unknown:
            self._refuse(401, "Anonymous caller does not have storage.objects.create access")
        elif self.command in self.server.refused or self._spent():
            self._refuse(403, "no permission")
        elif bucket == MISSING:
            self._refuse(404, "The specified bucket does not exist.")
        else:
            return bucket, urllib.parse.unquote(name or ""), query
        return None

    def _spent(self):
        """Whether this is a write, and the last one was before it."""
        with self.server.lock:
            self.server.writes_left -= self.command != "GET"
            return self.command != "GET" and self.server.writes_left < 0

    def _chunks(self):
        """The body of a request without a length."""
        content = b""
        while self.headers.get("Transfer-Encoding") and (n := int(self.rfile.readline(), 16)):
            content += self.rfile.read(n)
            self.rfile.readline()
        return content

    def _as_expected(self, name, query):
        now = self.server.generations.get(name, 0)
        return int(query.get("ifGenerationMatch", now)) == now

    def do_GET(self):
        if (asked := self._asked()) is None:
            return
        bucket, name, query = asked
        if not name and not urllib.parse.urlsplit(self.path).path.endswith("/o"):
            if "bucket" in self.server.refused:
                self._refuse(403, "no permission")
            else:
                self._answer(200, {"kind": "storage#bucket", "name": bucket})
            return
        with self.server.lock:
            if not name:
                self._answer(200, self._listing(query))
                return
            content = self.server.objects.get(name)
            about = None if content is None else self.server.about(name)
        if content is None or about is None:
            self._refuse(404, f"No such object: {bucket}/{name}")
        elif query.get("alt") != "media":
            self._answer(200, about)
        elif (span := re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")) is None:
            self._answer(200, content, x_goog_generation=about["generation"])
        else:
            begin, end = span.groups()
            first = int(begin) if begin else max(len(content) - int(end), 0)
            last = min(int(end) if begin and end else len(content) - 1, len(content) - 1)
            if first > last:
                self._refuse(416, "The requested range cannot be satisfied.")
                return
            self._answer(206, content[first : last + 1], x_goog_generation=about["generation"],
                         Content_Range=f"bytes {first}-{last}/{len(content)}")  # fmt: skip

    def _listing(self, query):
        """Objects by prefix, those behind a delimiter as one; a page of them."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found: dict[str, bool] = {}  # name, and whether it stands for several
        for name in sorted(self.server.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if name >= query.get("endOffset", "\U0010ffff"):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            found[prefix + head + cut if cut else name] = bool(cut)
        after = query.get("pageToken", "")
        names = [name for name in found if name > after]
        most = min(int(query.get("maxResults", LONGEST_LISTING)), LONGEST_LISTING)
        page = names[:most]
        answer = {
            "kind": "storage#objects",
            "items": [self.server.about(name) for name in page if not found[name]],
            "prefixes": [name for name in page if found[name]],
        }
        return answer | ({"nextPageToken": page[-1]} if len(names) > most else {})

    def do_POST(self):
        if (asked := self._asked()) is None:
            return
        _, name, query = asked
        if "upload_id" in query:  # gcsfs posts the pieces, too
            self._piece(query)
            return
        if copied := re.fullmatch(r"(.+)/(rewriteTo/b/[^/]+|moveTo)/o/(.+)", name):
            source, how, target = copied.groups()
            self._copy(source, target, how == "moveTo")
            return
        if query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(self.body)["name"]
            with self.server.lock:
                place = str(len(self.server.uploads))
                self.server.uploads[place] = (name, b"")
            self._answer(
                200, Location=f"http://{self.headers['Host']}{self.path}&upload_id={place}"
            )
            return
        content = self.body
        if query["uploadType"] == "multipart":
            head, content = re.split(rb"\r?\n\r?\n", self.body, maxsplit=2)[1:]
            mark = re.search(r"boundary=\"?([^\";]+)", self.headers["Content-Type"])[1].encode()
            query["name"] = json.loads(re.split(rb"\r?\n--", head)[0])["name"]
            content = re.split(rb"\r?\n--" + re.escape(mark) + rb"--", content)[0]
        self._put(query["name"], content, query)

    def _piece(self, query):
        """What comes of a resumable upload; the last piece makes the object."""
        with self.server.lock:
            name, before = self.server.uploads[query["upload_id"]]
            content = before + self.body
            self.server.uploads[query["upload_id"]] = name, content
        whole = re.match(r"bytes (?:\d+-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])[1]
        if whole == "*" or int(whole) != len(content):
            self._answer(308, Range=f"bytes=0-{len(content) - 1}")
            return
        self._put(name, content, query)

    def _put(self, name, content, query):
        with self.server.lock:
            if not self._as_expected(name, query):
                self._refuse(412, "At least one of the pre-conditions did not hold.")
                return
            self.server.put(name, content)
            about = self.server.about(name)
        self._answer(200, about)

    def _copy(self, source, target, move):
        with self.server.lock:
            if source not in self.server.objects:
                self._refuse(404, f"No such object: {source}")
                return
            self.server.put(target, self.server.objects[source])
            about = self.server.about(target)
            if move:
                del self.server.objects[source], self.server.generations[source]
        self._answer(200, about if move else {"done": True, "resource": about})

    def do_DELETE(self):
        if (asked := self._asked()) is None:
            return
        _, name, _ = asked
        with self.server.lock:
            known = self.server.generations.pop(name, None)
            self.server.objects.pop(name, None)
        if known:
            self._answer(204)
        else:
            self._refuse(404, f"No such object: {name}")


@contextlib.contextmanager
def bucket():
    """A bucket that is served while the context lasts; its name does not matter."""
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.gone.set()
            server.shutdown()
            thread.join()
