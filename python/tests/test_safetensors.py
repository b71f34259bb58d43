"""The drop-ins for what safetensors reads with."""

import pytest
import stoker
from conftest import bytes_of
from stoker.safetensors import load_file, safe_open


def test_load_file(every_type):
    path, tensors = every_type
    loaded = load_file(str(path))
    assert loaded.keys() == tensors.keys()
    assert all(bytes_of(loaded[name]) == data for name, (_, _, data) in tensors.items())


def test_safe_open(every_type):
    path, tensors = every_type
    with safe_open(path, framework="pt", device="cpu") as file:
        assert file.keys() == list(tensors)
        assert file.metadata() == {"format": "pt"}
        assert bytes_of(file.get_tensor("of_I32")) == tensors["of_I32"][2]
        with pytest.raises(stoker.NotFoundError):
            file.get_tensor("nonesuch")
    with safe_open(path, framework="np") as file:
        assert file.get_tensor("of_F32").tobytes() == tensors["of_F32"][2]
    with pytest.raises(ValueError):
        safe_open(path, framework="tf")


def test_safe_open_of_nothing(tmp_path):
    with pytest.raises(stoker.NotFoundError):
        safe_open(tmp_path / "gone")
    with pytest.raises(stoker.ReadError):
        safe_open(tmp_path)
    nested = b"[" * 100_000
    for data in (len(nested).to_bytes(8, "little") + nested, b"", b"\x05\0\0\0\0\0\0\0[1,2]", b"\xff" * 20):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(stoker.CheckpointError):
            safe_open(tmp_path / "bad")
