"""Start, watch and stop a `stoker serve` for tests."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`with Server(config_text, flags) as server:`; everything it writes lies in a temporary directory."""

    def __init__(
        self,
        config: str = "",
        flags: tuple[str, ...] = (),
        models: pathlib.Path | None = None,
        preexec=None,
    ):
        self.preexec = preexec
        self.binary = os.environ.get("STOKER_TEST_BINARY", str(ROOT / "target/debug/stoker"))
        self.home = tempfile.TemporaryDirectory(prefix="stoker-test-")
        home = pathlib.Path(self.home.name)
        self.models = models or home / "models"
        self.config = home / "stoker.toml"
        self.config.write_text(config)
        self.port = free_port()
        self.flags = flags
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "STOKER_CONFIG": str(self.config),
            "STOKER_MODELS": str(self.models),
            "STOKER_LISTEN": f"127.0.0.1:{self.port}",
            "STOKER_LOG": os.environ.get("STOKER_LOG", "info"),
        }
        self.log = home / "server.log"
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self.start()

    def start(self):
        """Also after `kill`: in the same directories."""
        self.process = subprocess.Popen(
            [self.binary, "serve", *self.flags],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=self.log.open("ab"),
            stdin=subprocess.DEVNULL,
            preexec_fn=self.preexec,
        )
        deadline = time.monotonic() + 60
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended at start:\n{self.log.read_text()[-4000:]}")
            try:
                if self.get("/readyz")[0] == 200:
                    return self
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"not ready in 60 s:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.02)  # the interval of asking, not a hope

    def kill(self):
        """As the kernel does it: nothing is said, nothing is put away."""
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_):
        self.stop()
        self.home.cleanup()

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(45)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise RuntimeError("the server did not stop within 45 s of SIGTERM") from None

    def get(self, path: str, headers: dict | None = None) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, path: str, body, headers: dict | None = None) -> tuple[int, dict, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"content-type": "application/json", **(headers or {})}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.loads(response.read()), dict(response.headers)
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            try:
                return error.code, json.loads(text), dict(error.headers)
            except json.JSONDecodeError:
                return error.code, {"text": text}, dict(error.headers)

    def command(self, *args: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [self.binary, *args], env=self.environment, capture_output=True, text=True, timeout=300
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"stoker {' '.join(args)} exited {done.returncode}: {done.stderr}")
        return done

    def json(self, *args: str):
        return json.loads(self.command("--json", *args).stdout)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples whose labels include the given ones."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            match = re.match(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$", line)
            if not match or match[1] != name:
                continue
            found = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            if all(found.get(k) == v for k, v in labels.items()):
                total += float(match[3])
        return total

    def workers(self) -> list[int]:
        """Process ids of the server's workers, those that an earlier server has started included."""
        sockets = set()
        for line in pathlib.Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[-1].startswith(self.home.name) and fields[-1].endswith(".next"):
                sockets.add(f"socket:[{fields[6]}]")

        def listens(pid: int) -> bool:
            try:
                command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                files = pathlib.Path(f"/proc/{pid}/fd").iterdir()
                return command[1:2] == [b"worker"] and any(os.readlink(file) in sockets for file in files)
            except OSError:
                return False

        return [int(name) for name in os.listdir("/proc") if name.isdigit() and listens(int(name))]

    def keeper(self) -> int:
        """Process id of the keeper that this server (not one before it) has started."""
        (pid,) = self.children("keeper")
        return pid

    def children(self, what: str) -> list[int]:
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                stat = (entry / "stat").read_text()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            if parent == self.process.pid and command.split(b"\0")[1:2] == [what.encode()]:
                found.append(int(entry.name))
        return found

    def resident_bytes(self) -> int:
        """Proportional resident memory of the server and its workers, the pool's shared pages counted once."""
        total = 0
        for pid in [self.process.pid, *self.workers()]:
            try:
                text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += int(re.search(r"^Pss:\s+(\d+) kB", text, re.M)[1]) << 10
        return total
