"""A server that speaks the Hugging Face hub's API on a loopback port, and the storage that it redirects to on another."""

import hashlib
import http.server
import json
import re
import socketserver
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Site:
    """A threaded HTTP server; `log` has method, path, `Range` and `Authorization` of every request."""

    def __enter__(self):
        site = self
        self.log: list[tuple[str, str, str | None, str | None]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                headers = self.headers
                site.log.append((self.command, self.path, headers.get("Range"), headers.get("Authorization")))
                status, headers, body = site.answer(self)
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        class Threaded(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # clients go away

        self.server = Threaded(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def ranges(self) -> list[tuple[int, int]]:
        """First and last byte of every GET that names them."""
        found = [re.fullmatch(r"bytes=(\d+)-(\d+)", r or "") for method, _, r, _ in self.log if method == "GET"]
        return [(int(match[1]), int(match[2])) for match in found if match]


class Storage(Site):
    """Files by name, at addresses that are signed for GET alone, as a hub's storage has them. `gate(begin)` is called
    before a range is answered."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.gives_ranges = True
        self.signature = "sig=1"
        self.gate = lambda begin: None

    def answer(self, request):
        path, _, query = request.path.partition("?")
        data = self.files.get(path.removeprefix("/"))
        if query != self.signature or request.command == "HEAD":
            return 403, {}, b"signed for something else"
        if data is None:
            return 404, {}, b""
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:32]}"'}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")) if self.gives_ranges else None
        if found:
            self.gate(int(found[1]))
            # It may have changed meanwhile.
            data = self.files[path.removeprefix("/")]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:32]}"'}
        if (wanted := request.headers.get("If-Match")) and wanted != headers["ETag"]:
            return 412, {}, b""
        if not found:
            return 200, headers, data
        begin, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        return 206, headers | {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}, data[begin : end + 1]


class Hub(Site):
    """One repository, `o/n`, with the storage's files at one commit. `token`: what it wants to see."""

    def __init__(self, storage: Storage, token: str | None = None):
        self.storage, self.token = storage, token

    def answer(self, request):
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {}, b"{}"
        path = request.path.partition("?")[0]
        if re.fullmatch(r"/api/models/o/n/revision/(main|v1|" + COMMIT + ")", path):
            sibling = lambda name, data: {
                "rfilename": name,
                "size": len(data),
                # Small files are in git, and have no hash that is one of their bytes.
                **({} if name.endswith(".json") else {"lfs": {"sha256": hashlib.sha256(data).hexdigest()}}),
            }
            files = [sibling(*item) for item in self.storage.files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps({"sha": COMMIT, "siblings": files}).encode()
        name = path.removeprefix(f"/o/n/resolve/{COMMIT}/")
        if name == path or name not in self.storage.files:
            return 404, {}, b""
        return 302, {"Location": f"{self.storage.url}/{name}?{self.storage.signature}"}, b""
