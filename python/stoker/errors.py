"""What can go wrong, by what a program can do about it."""

from __future__ import annotations


class StokerError(Exception):
    """Any failure of this package. `file` and `tensor` say where, as far as that is known."""

    file: str | None
    tensor: str | None

    def __init__(self, message: str = "", *, file: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CheckpointError(StokerError, ValueError):
    """A file is no checkpoint, or contradicts itself: header, index, offsets, types."""


class PickleRefused(CheckpointError):
    """A pickled file (`.bin`, `.pt`, `.ckpt`): opening one can run any program. The message says how to convert it."""


class CorruptError(StokerError):
    """Bytes are not what their checksum says: fetch the file again."""


class ChangedError(StokerError):
    """A file was replaced while it was being loaded: load it again."""


class ReadError(StokerError, OSError):
    """The operating system failed to read a file."""


class NotFoundError(StokerError, FileNotFoundError):
    """There is no such file, model or tensor."""


class OutOfMemoryError(StokerError, MemoryError):
    """There is not enough memory, on the device or on the host."""


class DeviceError(StokerError, RuntimeError):
    """There is no such device or no driver, or the device failed."""


class NodeError(StokerError, ConnectionError):
    """A running node can't be reached, or couldn't do what it was asked."""


class NotSupportedError(StokerError, NotImplementedError):
    """Not possible with this version."""


class ForkError(StokerError, RuntimeError):
    """What belongs to the parent process was used in a forked child."""


class Cancelled(StokerError):
    """The load was cancelled."""
