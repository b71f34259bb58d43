"""Loads."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import _arrays, _native, _torch
from .errors import NotFoundError, NotSupportedError, OutOfMemoryError

if TYPE_CHECKING:
    import torch

    Path = str | os.PathLike[str]
    Loaded = torch.Tensor | _native.Tensor

# A child must not give back memory that its parent uses, nor the other way round.
os.register_at_fork(before=_native.before_fork)

_WEIGHT_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".safetensors.index.json")


def load(
    path_or_model: Path | Sequence[Path],
    device: str | int | torch.device = "cuda:0",
    *,
    shard: tuple[int, int] | None = None,
    names: Iterable[str] | None = None,
    dtype: str | torch.dtype | None = None,
    shared: bool = False,
    progress: Callable[[int, int], object] | None = None,
    node: Path | None = None,
) -> dict[str, Loaded]:
    """Loads tensors onto a device and returns them by name.

    `path_or_model`: a safetensors or GGUF file, a folder with them, several files, or the name of a model that a running
    node has. A path that exists is a path; anything else is asked for from the node. `node` (its socket or runtime
    directory) makes it a name in any case.

    `device`: `"cuda:N"` or `"cpu"`. `names`: only these tensors; nothing else is read. `dtype`: floating-point tensors are
    converted to it, others are kept. `progress`: called with (bytes arrived, bytes in all) while it loads; what it raises
    cancels the load. `shard`: (rank, how many): that rank's part of a model that is split evenly over several devices as in
    Megatron-LM, cut from the same files as they are read; for models whose configuration Stoker knows. `shared`: of a running
    node's model, the node's own copy on the device, mapped without write access where the driver can do that.

    With PyTorch installed the values are `torch.Tensor`s, else `stoker.Tensor`s, which NumPy and others import without a
    copy. Each owns its memory: device memory goes back in pieces of at most 64 MiB, with the last tensor in it.

    Raises a `StokerError`; Ctrl-C cancels the load within a chunk.
    """
    wanted = _Wanted(path_or_model, device, shard, names, dtype, shared, node)
    try:
        return wanted.load(progress)
    except OutOfMemoryError:
        # PyTorch keeps memory that it doesn't use.
        torch = sys.modules.get("torch")
        if wanted.device == "cpu" or torch is None or not _torch.make_room(torch):
            raise
    return wanted.load(progress)


def iter_load(
    path_or_model: Path | Sequence[Path],
    device: str | int | torch.device = "cuda:0",
    *,
    shard: tuple[int, int] | None = None,
    names: Iterable[str] | None = None,
    dtype: str | torch.dtype | None = None,
    shared: bool = False,
    progress: Callable[[int, int], object] | None = None,
    node: Path | None = None,
) -> Iterator[tuple[str, Loaded]]:
    """As `load`, yielding names and tensors in the order in which they land, each as soon as all of it has.

    Left early, it cancels the rest. A failed checksum of a later chunk doesn't take back what was yielded: those bytes were
    checked by themselves.
    """
    wanted = _Wanted(path_or_model, device, shard, names, dtype, shared, node)
    return wanted.each(progress)


class _Wanted:
    """What a load is asked for, checked."""

    def __init__(
        self,
        path_or_model: Path | Sequence[Path],
        device: str | int | torch.device,
        shard: tuple[int, int] | None,
        names: Iterable[str] | None,
        dtype: str | torch.dtype | None,
        shared: bool,
        node: Path | None,
    ) -> None:
        if shard is not None:
            rank, world = shard
            if not 0 <= rank < world:
                raise ValueError(f"shard={shard}: ranks go from 0 to one less than how many there are")
        if isinstance(names, str):
            raise TypeError("names must be several names, not one string")
        self.paths, self.socket, self.model = _source(path_or_model, node)
        if shared and self.model is None:
            raise NotSupportedError("shared=True shares a running node's copy: give a model's name, and node= if need be")
        self.shared = shared
        self.device = _device(device)
        self.names = None if names is None else list(names)
        self.dtype = dtype
        self.shard = shard

    def begin(self) -> _native.Load:
        return _native.Load(self.paths, self.device, self.names, self.socket, self.model, self.shard, self.shared)

    def load(self, progress: Callable[[int, int], object] | None) -> dict[str, Loaded]:
        running = self.begin()
        try:
            arrived, ended = 0, False
            tell = _Tell(progress)
            while not ended:
                arrived, total, ended = running.wait(None if progress is None else arrived)
                tell(arrived, total)
        except BaseException:
            running.cancel()
            raise
        finish = self.finish()
        return {name: finish(tensor) for name, tensor in running.take()}

    def each(self, progress: Callable[[int, int], object] | None) -> Iterator[tuple[str, Loaded]]:
        running = self.begin()
        finish = self.finish()
        try:
            arrived, ended = 0, False
            tell = _Tell(progress)
            while not ended:
                arrived, total, ended = running.wait(arrived)
                tell(arrived, total)
                ready = running.take()
                ready.reverse()
                # Nothing here keeps a tensor that the caller has let go of.
                while ready:
                    name, tensor = ready.pop()
                    tensor = finish(tensor)
                    yield name, tensor
                    del tensor
        finally:
            running.cancel()

    def finish(self) -> Callable[[_native.Tensor], Any]:
        """What makes of a native tensor what the caller gets."""
        finish = self._finish()
        if not self.shared or self.device == "cpu":
            return finish
        told = []

        def of_copy(tensor: _native.Tensor) -> Any:
            if not tensor.read_only and not told:
                told.append(True)
                warnings.warn(
                    "this driver can't map the node's copy without write access: don't write to its tensors in place",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return finish(tensor)

        return of_copy

    def _finish(self) -> Callable[[_native.Tensor], Any]:
        torch = _torch.find()
        dtype = self.dtype
        if torch is None:
            if dtype is None:
                return lambda tensor: tensor
            name = str(dtype)
            return lambda tensor: _arrays.convert(tensor, name)
        if dtype is None:
            return lambda tensor: _torch.from_native(torch, tensor)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        return lambda tensor: _torch.converted(_torch.from_native(torch, tensor), dtype)


class _Tell:
    """Calls back when something has changed."""

    def __init__(self, progress: Callable[[int, int], object] | None) -> None:
        self.progress = progress
        self.told = (0, 0)

    def __call__(self, arrived: int, total: int) -> None:
        if self.progress is not None and total and (arrived, total) != self.told:
            self.told = (arrived, total)
            self.progress(arrived, total)


def _source(path_or_model: Path | Sequence[Path], node: Path | None) -> tuple[list[str], str | None, str | None]:
    """Paths, or a node's socket and a model's name."""
    if isinstance(path_or_model, (str, os.PathLike)):
        given = os.fspath(path_or_model)
        if node is not None:
            return [], socket_of(node), given
        expanded = os.path.expanduser(given)
        if os.path.exists(expanded):
            return [expanded], None, None
        is_path = (
            not isinstance(path_or_model, str) or given.endswith(_WEIGHT_FILES) or given.startswith(("/", ".", "~"))
        )
        socket = socket_of(runtime_dir())
        if is_path:
            raise NotFoundError(f"no file or folder {given}", file=given)
        if not os.path.exists(socket):
            raise NotFoundError(
                f"no file or folder {given}, and no node that could have a model of that name: {socket} isn't there"
            )
        return [], socket, given
    if node is not None:
        raise TypeError("a node's model has one name")
    return [os.path.expanduser(os.fspath(path)) for path in path_or_model], None, None


def _device(device: str | int | torch.device) -> str:
    name = f"cuda:{device}" if isinstance(device, int) else str(device)
    if name == "cuda":
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return f"cuda:{torch.cuda.current_device()}"
    return name


def runtime_dir() -> str:
    """Where `stoker serve` has its sockets by default."""
    own = os.environ.get("STOKER_RUNTIME_DIR")
    if own:
        return own
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(xdg, "stoker") if xdg else f"/tmp/stoker-{os.getuid()}"


def socket_of(node: Path) -> str:
    """A node's socket for clients, given itself or the node's runtime directory."""
    path = os.path.expanduser(os.fspath(node))
    return os.path.join(path, "clients.sock") if os.path.isdir(path) else path
