"""What goes wrong, and what a program learns of it."""

import os
import pickle
import signal
import socket
import struct
import threading
import zipfile

import pytest
import stoker
from conftest import bytes_of, in_tensors, noise, save


def test_the_hierarchy_is_what_programs_catch():
    assert issubclass(stoker.NotFoundError, FileNotFoundError)
    assert issubclass(stoker.OutOfMemoryError, MemoryError)
    assert issubclass(stoker.ReadError, OSError)
    assert issubclass(stoker.NotSupportedError, NotImplementedError)
    for name in stoker.__all__:
        kind = getattr(stoker, name)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            assert issubclass(kind, stoker.StokerError)


def test_bad_files_name_file_and_tensor(tmp_path):
    def bad(text, data=b""):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return path

    for text, tensor in (
        (b"not json", None),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "a"),
        (b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,4]}}', "a"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "a"),
    ):
        path = bad(text, b"1234")
        for device in ("cpu", "simulated"):
            with pytest.raises(stoker.CheckpointError) as caught:
                stoker.load(path, device)
            assert (caught.value.file, caught.value.tensor) == (str(path), tensor)


def test_what_is_not_there(tmp_path, every_type, monkeypatch):
    monkeypatch.setenv("STOKER_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(stoker.NotFoundError) as caught:
        stoker.load(tmp_path / "gone.safetensors", "cpu")
    assert caught.value.file.endswith("gone.safetensors")
    with pytest.raises(stoker.NotFoundError, match="no node"):
        stoker.load("llama", "cpu")
    with pytest.raises(stoker.NotFoundError, match="no \\*.safetensors"):
        stoker.load(tmp_path, "cpu")
    with pytest.raises(stoker.NotFoundError, match="`nonesuch` and 1 more among the"):
        stoker.load(every_type[0], "cpu", names=["nonesuch", "of_F32", "or_this"])
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(stoker.CheckpointError, match="gone.safetensors"):
        stoker.load(tmp_path, "cpu")


def test_pickles_are_refused_with_the_way_out(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    torch_file = tmp_path / "model.pt"
    with zipfile.ZipFile(torch_file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    plain = tmp_path / "weights"
    plain.write_bytes(pickle.dumps({"a": Evil()}))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    for path in (torch_file, plain, folder, folder / "pytorch_model.bin"):
        with pytest.raises(stoker.PickleRefused, match="save_file\\(torch.load") as caught:
            stoker.load(path, "cpu")
        assert caught.value.file.startswith(str(tmp_path))
    assert not (tmp_path / "owned").exists()


def test_arguments_that_mean_nothing(every_type):
    path = every_type[0]
    for device in ("tpu", "cuda:x", "cpu:1", "meta"):
        with pytest.raises(stoker.NotSupportedError):
            stoker.load(path, device)
    with pytest.raises(stoker.NotSupportedError, match="shard= is for devices"):
        stoker.load(path, "cpu", shard=(0, 2))
    with pytest.raises(ValueError, match="ranks go from 0"):
        stoker.load(path, "simulated", shard=(2, 2))
    with pytest.raises(stoker.NotFoundError, match="config.json"):
        stoker.load(path.parent, "simulated", shard=(0, 2))
    with pytest.raises(stoker.NotSupportedError, match="shares a running node"):
        stoker.load(path, "cpu", shared=True)
    with pytest.raises(TypeError):
        stoker.load(path, "cpu", names="of_F32")
    with pytest.raises(TypeError):
        stoker.load([path], "cpu", node="/somewhere")


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU")
def test_no_gpu_is_said_so(every_type):
    with pytest.raises(stoker.DeviceError, match="driver"):
        stoker.load(every_type[0])


def test_more_than_the_device_has(tmp_path):
    # A file with a hole: the simulated device has 16 GiB.
    path = tmp_path / "huge.safetensors"
    n = 17 << 30
    header = f'{{"a":{{"dtype":"U8","shape":[{n}],"data_offsets":[0,{n}]}}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + n)
    before = in_tensors()
    with pytest.raises(stoker.OutOfMemoryError, match="needs 17"):
        stoker.load(path, "simulated")
    assert in_tensors() == before


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_what_the_callback_raises_cancels(large, device):
    class Enough(Exception):
        pass

    calls = []

    def progress(arrived, total):
        calls.append(arrived)
        raise Enough

    before = in_tensors()
    with pytest.raises(Enough):
        stoker.load(large[0], device, progress=progress)
    assert len(calls) == 1 and in_tensors() == before
    # And the next load is as ever.
    assert len(stoker.load(large[0], device)) == len(large[1])


def test_an_iteration_left_early_gives_everything_back(large):
    before = in_tensors()
    for name, tensor in stoker.iter_load(large[0], "simulated"):
        assert bytes_of(tensor) == large[1][name][2]
        break
    del tensor
    assert in_tensors() == before


@pytest.fixture
def silent_node(tmp_path):
    """A node that greets and then says nothing more."""
    path = str(tmp_path / "clients.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    asked = threading.Event()
    pool = os.memfd_create("pool", os.MFD_ALLOW_SEALING)
    held = []

    def serve():
        connection, _ = listener.accept()
        held.append(connection)
        socket.send_fds(connection, [b"C"], [pool])
        connection.recv(1)
        asked.set()

    thread = threading.Thread(target=serve)
    thread.start()
    yield path, asked, held
    thread.join()
    listener.close()
    os.close(pool)


def test_ctrl_c_ends_a_load_that_waits(silent_node):
    path, asked, held = silent_node
    # A shell that started this in the background has it ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.get_ident()

    def interrupt():
        # The load waits by then, and holds no lock of the interpreter: this thread runs.
        asked.wait()
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        stoker.load("llama", "cpu", node=path)
    thread.join()
    held[0].settimeout(30)
    while held[0].recv(1024):
        pass  # until the load has hung up


def test_a_node_that_goes_away_is_said_so(silent_node):
    path, asked, held = silent_node

    def hang_up():
        asked.wait()
        held[0].close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(stoker.NodeError, match="ended|reset"):
        stoker.load("llama", "cpu", node=path)
    thread.join()


def test_a_file_that_changes_meanwhile(tmp_path):
    # Touched all the time, so that it has changed between its header and its last byte however fast the load is.
    path = save(tmp_path / "m.safetensors", {f"t{i}": ("U8", (24 << 20,), noise(i, 24 << 20)) for i in range(6)})
    ended = threading.Event()

    def touch():
        stamp = 0
        while not ended.is_set():
            stamp += 1
            os.utime(path, (stamp, stamp))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(stoker.ChangedError):
            stoker.load(path, "simulated")
    finally:
        ended.set()
        thread.join()
