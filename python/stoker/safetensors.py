"""Drop-ins for what `safetensors.torch` reads with: `load_file`, and `safe_open`."""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, Any

from ._load import load
from .errors import NotFoundError, ReadError

if TYPE_CHECKING:
    import torch

    from ._native import Tensor

# The format's own bound of a header.
_HEADER_BYTES_MAX = 100_000_000


def load_file(
    filename: str | os.PathLike[str], device: str | int | torch.device = "cpu"
) -> dict[str, torch.Tensor | Tensor]:
    """As `safetensors.torch.load_file`: every tensor of one file, by name."""
    return load([filename], device)


class safe_open:  # noqa: N801 - the name that it replaces
    """As `safetensors.safe_open`, for whole tensors: `keys`, `get_tensor`, `metadata`.

    A tensor's bytes are read when it is asked for.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str = "pt",
        device: str | int | torch.device = "cpu",
    ) -> None:
        if framework not in ("pt", "torch", "np", "numpy"):
            raise ValueError(f'framework must be "pt" or "np", not "{framework}"')
        self._path = os.fspath(filename)
        self._numpy = framework in ("np", "numpy")
        self._device = device
        try:
            with open(self._path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
                header = json.loads(file.read(length)) if length <= _HEADER_BYTES_MAX else {}
        except FileNotFoundError:
            raise NotFoundError(f"{self._path}: no such file", file=self._path) from None
        except OSError as error:
            raise ReadError(f"{self._path}: {error.strerror}", file=self._path) from None
        # The former: nested beyond all bounds.
        except (RecursionError, ValueError):
            header = {}
        # What is wrong with a header is said by whoever checks it: before the first tensor.
        if not isinstance(header, dict) or not header:
            load([self._path], "cpu", names=[])
        self._metadata = header.pop("__metadata__", None)
        self._keys = list(header)

    def keys(self) -> list[str]:
        return list(self._keys)

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def get_tensor(self, name: str) -> Any:
        if self._numpy:
            from . import _arrays, _native

            running = _native.Load([self._path], "cpu", [name])
            running.wait(None)
            ((_, tensor),) = running.take()
            return _arrays.to_numpy(tensor)
        return load([self._path], self._device, names=[name])[name]

    def __enter__(self) -> safe_open:
        return self

    def __exit__(self, *_: object) -> None:
        pass
