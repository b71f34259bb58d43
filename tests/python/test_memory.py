"""A server in a control group whose memory other processes take. Needs a control group that may be made here."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from stoker_server import Server

MIB = 1 << 20
LIMIT = 1024 * MIB

# What the memory's holder runs: takes so many MiB, says so, and keeps them until its input ends.
HOG = "import sys; x = b'x' * (int(sys.argv[1]) << 20); print(len(x), flush=True); sys.stdin.read()"

# Many processes that read a file again and again. In a group that is a bit too small for it, each page was just
# evicted when it is read, which is what the kernel calls a stall.
THRASH = """
import mmap, os, sys
with open(sys.argv[1], "rb") as f:
    m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
m.madvise(mmap.MADV_RANDOM)
for n in range(int(sys.argv[2])):
    if os.fork() == 0:
        break
else:
    print("begun", flush=True)
start = n * len(m) // int(sys.argv[2])
while True:
    for at in range(0, len(m), mmap.PAGESIZE):
        m[(at + start) % len(m)]
"""


class Group:
    """A control group (version 2 or 1) with a limit of memory."""

    def __init__(self, limit: int, parent: "Group | None" = None):
        name = f"stoker-test-{os.getpid()}-{time.monotonic_ns()}"
        roots = [parent.dir] if parent else [pathlib.Path("/sys/fs/cgroup"), pathlib.Path("/sys/fs/cgroup/memory")]
        for root in roots:
            self.dir = root / name
            try:
                self.dir.mkdir()
                if (self.dir / "memory.max").exists():
                    self.usage, limits = "memory.current", "memory.max"
                else:
                    self.usage, limits = "memory.usage_in_bytes", "memory.limit_in_bytes"
                (self.dir / limits).write_text(str(limit))
                (self.dir / self.usage).read_text()
                return
            except OSError:
                with contextlib.suppress(OSError):
                    self.dir.rmdir()
        pytest.skip("no control group with a limit of memory can be made here")

    def enter(self):
        """For `preexec_fn`."""
        (self.dir / "cgroup.procs").write_text("0")

    def held(self) -> int:
        """What is used and isn't page cache: private and shared memory."""
        stat = dict(line.split() for line in (self.dir / "memory.stat").read_text().splitlines())
        prefix = "" if "anon" in stat else "total_"
        cache = int(stat[prefix + "inactive_file"]) + int(stat[prefix + "active_file"])
        return int((self.dir / self.usage).read_text()) - cache

    def __enter__(self):
        return self

    def __exit__(self, *_):
        deadline = time.monotonic() + 20
        while True:
            for pid in (self.dir / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self.dir.rmdir()
                return
            except OSError:
                # The kernel may need a moment to let go.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    @contextlib.contextmanager
    def running(self, code: str, *args: str):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=self.enter,
        )
        try:
            assert process.stdout.readline(), "it did not get its memory"
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def models(gguf, *names: str) -> str:
    return "".join(f'[models.{name}]\npath = "{gguf}"\ncontext = 512\n' for name in names)


def ask(server, model: str):
    return server.post("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 1, "temperature": 0})


def test_budgets_follow_what_others_take(gguf):
    with Group(LIMIT) as group:
        flags = ("--dram", "384MiB", "--kv", "128MiB", "--workers", "4")
        with Server(models(gguf, "a", "b", "c"), flags, preexec=group.enter) as server:
            for model in "ab":
                assert ask(server, model)[0] == 200
            # `b` is cache, `a` is mapped.
            server.json("unload", "b")
            status = server.json("ps")
            assert status["dram"]["budget"] == status["dram"]["configured"] == 384 * MIB
            assert status["shortage"] is None
            cached = {row["model"] for row in status["cached"]}
            assert cached == {"a", "b"}
            chunks = status["instances"][0]["pool_bytes"]
            before = group.held()

            # Room for one and a half models (three quarters of it are for weights, as configured).
            left = LIMIT - before + status["dram"]["used"] - LIMIT // 4
            with group.running(HOG, str((left - 2 * chunks) // MIB)) as hog:
                status = server.json("ps")
                budget = status["dram"]["budget"]
                assert chunks <= budget < 2 * chunks, status
                assert status["dram"]["used"] <= budget, "the cache gave way"
                assert [i["model"] for i in status["instances"]] == ["a"], "what is mapped stays"
                assert f"pid {hog.pid} python" in status["shortage"] and "(not Stoker)" in status["shortage"]
                assert server.metric("stoker_store_evictions_total", reason="budget") > 0
                assert server.metric("stoker_node_budget_bytes", budget="dram", kind="effective") == budget
                assert ask(server, "a")[0] == 200
                # Another model: the idle one makes room, as it would in a small machine.
                code, body, _ = ask(server, "c")
                assert code == 200, body
                assert [i["model"] for i in server.json("ps")["instances"]] == ["c"]

            # Room for none.
            server.json("unload", "--all", "--dram")
            with group.running(HOG, str((left - chunks // 2) // MIB)) as hog:
                code, body, _ = ask(server, "a")
                assert code == 507, body
                message = body["error"]["message"]
                assert f"pid {hog.pid} python" in message and "(not Stoker)" in message, message
                assert "free" in message and "needs" in message
            code, body, _ = ask(server, "a")
            assert code == 200, body
            assert server.json("ps")["shortage"] is None


def test_unloading_gives_the_memory_back(gguf):
    with Group(LIMIT) as group:
        flags = ("--dram", "384MiB", "--kv", "256MiB", "--workers", "4")
        with Server(models(gguf, "a", "b"), flags, preexec=group.enter) as server:
            held = []
            for _ in range(3):
                for model in "ab":
                    assert ask(server, model)[0] == 200
                loaded = group.held()
                server.json("unload", "--all", "--dram")
                # Workers give back what they held before they say that they are idle: the weights, and what they
                # had of the KV cache.
                held.append(group.held())
                assert loaded - held[-1] > 260 * MIB, (loaded, held)
                for pid in server.workers():
                    own = re.search(r"RssAnon:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
                    assert int(own[1]) < 24 * 1024, "an idle worker keeps nothing of a model"
            assert held[-1] < held[0] + 8 * MIB, f"it does not come back: {held}"


def stalled_us() -> int:
    some = pathlib.Path("/proc/pressure/memory").read_text().splitlines()[0]
    return int(some.rpartition("=")[2])


def test_under_pressure_the_cache_is_given_back(gguf, tmp_path):
    if not os.access("/proc/pressure/memory", os.W_OK):
        pytest.skip("this kernel tells nobody of memory pressure")
    file = tmp_path / "file"
    with file.open("wb") as f:
        f.write(os.urandom(40 * MIB))
        # What is in the page cache already would not count for the group that reads it.
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with Group(LIMIT) as group:
        flags = ("--dram", "384MiB", "--kv", "128MiB", "--workers", "4")
        with Server(models(gguf, "a", "b"), flags, preexec=group.enter) as server:
            for model in "ab":
                assert ask(server, model)[0] == 200
            server.json("unload", "b")
            given_back, most = 0.0, 0.0
            with (
                group.running(HOG, "400"),
                Group(32 * MIB, parent=group) as small,
                small.running(THRASH, str(file), "8"),
            ):
                deadline = time.monotonic() + 30
                while not given_back and time.monotonic() < deadline:
                    began, before = time.monotonic(), stalled_us()
                    time.sleep(1)  # the kernel's window
                    most = max(most, (stalled_us() - before) / 1e6 / (time.monotonic() - began))
                    given_back = server.metric("stoker_store_evictions_total", reason="pressure")
                instances = server.json("ps")["instances"]
            if not given_back and most < 0.2:
                pytest.skip(f"no more than {most:.0%} of the time could be made to stall here")
            assert given_back > 0, f"tasks stalled for {most:.0%} of a second, and nothing was given back"
            assert [i["model"] for i in instances] == ["a"], "what is mapped stays"
            # It may come back.
            assert ask(server, "b")[0] == 200
