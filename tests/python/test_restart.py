"""A server that is killed, and the one after it: what was in memory still is, and so are the workers."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from stoker_server import Server, free_port

MIB = 1 << 20
CHUNK = 16 * MIB
FLAGS = ("--dram", "512MiB", "--kv", "256MiB", "--workers", "3")
RECORD_BYTES, HEADER_BYTES = 256, 4096


def config(**models: pathlib.Path) -> str:
    return "".join(f'[models.{name}]\npath = "{path}"\ncontext = 512\n' for name, path in models.items())


def ask(server: Server, model: str = "a") -> str:
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    code, answer, _ = server.post("/v1/completions", body)
    assert code == 200, answer
    return answer["choices"][0]["text"]


def read_bytes(server: Server) -> float:
    return server.metric("stoker_store_read_bytes_total")


def adopted_bytes(server: Server) -> float:
    return server.metric("stoker_store_adopted_bytes_total")


def resident(server: Server) -> dict[str, int]:
    return {row["model"]: row["bytes"] for row in server.json("ps")["cached"]}


def restarted(server: Server) -> str:
    """Kills the server and starts another one; returns what that logged until it was ready."""
    server.kill()
    logged = server.log.stat().st_size
    server.start()
    # No request waits for the log, so readiness doesn't either.
    return until("it says that it serves", lambda: said_since(server, logged))


def said_since(server: Server, logged: int) -> str | None:
    text = server.log.read_bytes()[logged:].decode()
    return text if "the API is served" in text else None


def serving(server: Server) -> dict[str, int]:
    """Which process serves each model."""
    return {row["model"]: row["pid"] for row in server.json("ps")["instances"]}


def runs(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(what: str, is_so, seconds: float = 20):
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.01)
    return found


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def kept_file(keeper: int, name: str) -> pathlib.Path:
    """The keeper's descriptor of the pool or of the ledger, as a file that can be written to."""
    for entry in pathlib.Path(f"/proc/{keeper}/fd").iterdir():
        if os.readlink(entry).startswith(f"/memfd:stoker-{name}"):
            os.chmod(entry, 0o600)
            return entry
    raise AssertionError(f"the keeper has no {name}")


def slots_of(keeper: int) -> list[int]:
    """Slots that the ledger has records for."""
    ledger = kept_file(keeper, "ledger").read_bytes()[HEADER_BYTES:]
    states = [ledger[at : at + 8] for at in range(0, len(ledger), RECORD_BYTES)]
    return [slot for slot, state in enumerate(states) if state != bytes(8)]


def flip(file, at: int):
    file.seek(at)
    (byte,) = file.read(1)
    file.seek(at)
    file.write(bytes([byte ^ 1]))


def test_a_killed_server_has_everything_in_memory_again(gguf):
    with Server(config(a=gguf, b=gguf), FLAGS) as server:
        keeper = server.keeper()
        assert os.stat(pathlib.Path(server.home.name) / "stoker/keeper.sock").st_mode & 0o777 == 0o600
        assert os.getsid(keeper) == keeper, "a session of its own"
        first = ask(server), ask(server, "b")
        assert first[0] == first[1]
        before, size = resident(server), gguf.stat().st_size
        assert before == {"a": size, "b": size}
        assert read_bytes(server) == 2 * size
        counts, workers = [], serving(server)
        assert set(workers) == {"a", "b"}
        for _ in range(4):
            log = restarted(server)
            assert "took over what the node before had in memory" in log
            assert adopted_bytes(server) == 2 * size
            assert resident(server) == before
            assert (ask(server), ask(server, "b")) == first
            assert read_bytes(server) == 0, "nothing came from disk"
            assert serving(server) == workers, "the same processes"
            assert server.metric("stoker_node_worker_starts_total") <= 1
            counts.append((descriptors(keeper), descriptors(server.process.pid)))
        assert runs(keeper)
        assert counts[-1][0] == counts[0][0], f"descriptors of the keeper: {counts}"
        assert counts[-1][1] <= counts[0][1] + 2, f"descriptors of the server: {counts}"
        # In whole, also what a worker has mapped now.
        server.json("unload", "--all", "--dram")
        assert resident(server) == {}
        restarted(server)
        assert adopted_bytes(server) == 0
        server.stop()
        until("the keeper ends with a proper stop", lambda: not runs(keeper))
        assert not (pathlib.Path(server.home.name) / "stoker/keeper.sock").exists()


def test_damaged_records_and_wrong_bytes_are_read_again(gguf):
    size = gguf.stat().st_size
    with Server(config(a=gguf), FLAGS) as server:
        keeper = server.keeper()
        answer = ask(server)
        slots = slots_of(keeper)
        assert len(slots) == -(-size // CHUNK)
        server.kill()
        with kept_file(keeper, "ledger").open("r+b") as ledger:
            flip(ledger, HEADER_BYTES + slots[0] * RECORD_BYTES + 32)
        with kept_file(keeper, "pool").open("r+b") as pool:
            flip(pool, slots[2] * CHUNK + 12345)
        server.start()
        log = server.log.read_text()
        assert "a chunk in kept memory is wrong and was dropped" in log
        assert "wrong=1 damaged=1" in log, log
        assert adopted_bytes(server) == size - 2 * CHUNK
        assert ask(server) == answer
        assert read_bytes(server) == 2 * CHUNK, "these two, and no more"


def test_a_replaced_file_is_not_taken_from_memory(gguf, tmp_path):
    size = gguf.stat().st_size
    path = tmp_path / "model.gguf"
    shutil.copy(gguf, path)
    with Server(config(a=path, b=gguf), FLAGS) as server:
        answer = ask(server)
        ask(server, "b")
        server.kill()
        # The same length and bytes, but how should anybody know?
        other = tmp_path / "other.gguf"
        shutil.copy(gguf, other)
        other.rename(path)
        server.start()
        assert resident(server) == {"b": size}
        assert ask(server) == answer
        assert read_bytes(server) == size
        # A model that isn't named any more.
        server.kill()
        server.config.write_text(config(b=gguf))
        server.start()
        assert resident(server) == {"b": size}


def test_other_budgets(gguf):
    size = gguf.stat().st_size
    with Server(config(a=gguf, b=gguf, c=gguf), FLAGS) as server:
        for model in "abc":
            ask(server, model)
        server.kill()
        server.flags = ("--dram", "160MiB", *FLAGS[2:])
        server.start()
        status = server.json("ps")
        assert status["dram"]["used"] <= 160 * MIB
        assert adopted_bytes(server) > 160 * MIB - CHUNK - (-size % CHUNK) * 3
        ask(server)
        server.kill()
        server.flags = ("--dram", "1GiB", *FLAGS[2:])
        server.start()
        assert server.json("ps")["dram"]["configured"] == 1024 * MIB
        assert adopted_bytes(server) >= size
        for model in "abc":
            ask(server, model)
        assert resident(server) == dict.fromkeys("abc", size)


def test_a_killed_keeper_is_replaced(gguf):
    with Server(config(a=gguf), FLAGS) as server:
        answer = ask(server)
        for _ in range(2):
            keeper = server.keeper()
            os.kill(keeper, signal.SIGKILL)
            found = until("another keeper", lambda: [k for k in server.children("keeper") if k != keeper])  # noqa: B023
            until("it has the memory", lambda: slots_of_or_none(found[0]))  # noqa: B023
        assert server.metric("stoker_node_keeper_restarts_total") == 2
        restarted(server)
        assert ask(server) == answer
        assert read_bytes(server) == 0
        # Both: what was in memory is lost, and nothing else.
        keeper = found[0]
        server.kill()
        os.kill(keeper, signal.SIGKILL)
        server.start()
        assert ask(server) == answer
        assert read_bytes(server) == gguf.stat().st_size


def slots_of_or_none(keeper: int):
    with contextlib.suppress(AssertionError, OSError):
        return slots_of(keeper)


def test_one_server_for_a_directory(gguf):
    with Server(config(a=gguf), FLAGS) as server:
        answer = ask(server)

        def another(port: int):
            environment = {**server.environment, "STOKER_LISTEN": f"127.0.0.1:{port}"}
            return subprocess.Popen(
                [server.binary, "serve", *FLAGS], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )

        with another(free_port()) as second:
            errors = second.communicate(timeout=60)[1].decode()
            assert second.returncode == 1
            assert "another stoker uses the runtime directory" in errors
        assert ask(server) == answer, "the first one is none the worse"
        # Both at once, over what a killed one left: one has it.
        server.kill()
        pair = {port: another(port) for port in (free_port(), free_port())}
        until("one gives up", lambda: any(process.poll() is not None for process in pair.values()), 60)
        ended = {process.poll() is not None: port for port, process in pair.items()}
        loser, winner = pair[ended[True]], pair[ended[False]]
        assert "another stoker uses the runtime directory" in loser.communicate(timeout=60)[1].decode()
        server.port, server.process = ended[False], winner
        until("the other serves", lambda: ready(server))
        assert ask(server) == answer
        assert read_bytes(server) == 0
        winner.terminate()
        winner.communicate(timeout=60)
        assert winner.returncode == 0


def ready(server: Server) -> bool:
    try:
        return server.get("/readyz")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("hangs", [False, True], ids=["streams", "hangs"])
def test_who_has_the_memory_is_known_before_it_is_used(gguf, tmp_path, hangs):
    """One is in the middle of a stream when the server is killed; or hangs, and would read on for ever."""
    with Server(config(a=gguf, b=gguf), ("--dram", "128MiB", *FLAGS[2:])) as server:
        answer = ask(server)
        worker = serving(server)["a"]
        body = {"model": "a", "prompt": "Once", "max_tokens": 400, "temperature": 0}
        stream = threading.Thread(target=post, args=(server, body))
        stream.start()
        until("it computes", lambda: any(row["sequences"] for row in server.json("ps")["instances"]))
        with hung_worker(server, tmp_path) if hangs else contextlib.nullcontext() as hung:
            log = restarted(server)
            assert runs(worker)
            assert ("a worker of the node before did not end" in log) == hangs
            if hung:
                assert hung.wait(10) == -signal.SIGKILL
        assert adopted_bytes(server) == gguf.stat().st_size
        stream.join()
        assert ask(server) == answer
        assert serving(server) == {"a": worker}
        # Both models in turn, in room for one and a bit: slots are used again.
        for _ in range(2):
            assert ask(server, "b") == answer
            assert ask(server) == answer


def test_workers_of_another_configuration_are_replaced(gguf):
    with Server(config(a=gguf, b=gguf), FLAGS) as server:
        answer = ask(server), ask(server, "b")
        workers = server.workers()
        server.kill()
        server.flags = (*FLAGS, "--threads", "1")
        server.start()
        until("the workers before end", lambda: not any(map(runs, workers)))
        assert (ask(server), ask(server, "b")) == answer
        assert not set(server.workers()) & set(workers)
        assert read_bytes(server) == 0
        # Without room for both, one is let go of, as it is idle.
        server.kill()
        server.flags = ("--dram", "128MiB", *FLAGS[2:], "--threads", "1")
        server.start()
        assert server.json("ps")["dram"]["used"] <= 128 * MIB
        assert ask(server, "b") == answer[1]


def test_memory_that_somebody_else_has_mapped_is_left_to_them(gguf, tmp_path):
    with Server(config(a=gguf), FLAGS) as server:
        answer = ask(server)
        with hung_worker(server, tmp_path, name="somebody") as holder:
            log = restarted(server)
            assert "is in use by others" in log
            assert adopted_bytes(server) == 0
            assert ask(server) == answer
            assert read_bytes(server) == gguf.stat().st_size
            assert holder.poll() is None, "nobody's to kill"
        # The new memory is what is kept now.
        restarted(server)
        assert adopted_bytes(server) == gguf.stat().st_size


@contextlib.contextmanager
def hung_worker(server: Server, tmp_path: pathlib.Path, name: str = "worker"):
    """A process that looks like a worker, has the pool as workers have it, and doesn't care whether its node lives.

    A real one that is stopped is ended by the kernel when its parent is gone: SIGHUP to a stopped orphan.
    """
    pool = os.open(kept_file(server.keeper(), "pool"), os.O_RDONLY)
    fcntl.flock(pool, fcntl.LOCK_SH)
    (tmp_path / name).write_text("import time\nprint(flush=True)\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [server.binary, name], executable=sys.executable, cwd=tmp_path, stdin=pool, stdout=subprocess.PIPE
    )
    os.close(pool)
    try:
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def post(server: Server, body: dict):
    with contextlib.suppress(OSError, ValueError):
        server.post("/v1/completions", body)
