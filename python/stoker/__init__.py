"""Model weights from files to device memory at the speed of the wire, checked on the way.

import stoker
weights = stoker.load("Llama-2-7b-hf", device="cuda:0")
"""

from ._load import iter_load, load
from ._native import Tensor, __version__, close_devices, device_memory
from .errors import (
    Cancelled,
    ChangedError,
    CheckpointError,
    CorruptError,
    DeviceError,
    ForkError,
    NodeError,
    NotFoundError,
    NotSupportedError,
    OutOfMemoryError,
    PickleRefused,
    ReadError,
    StokerError,
)

__all__ = [
    "Cancelled",
    "ChangedError",
    "CheckpointError",
    "CorruptError",
    "DeviceError",
    "ForkError",
    "NodeError",
    "NotFoundError",
    "NotSupportedError",
    "OutOfMemoryError",
    "PickleRefused",
    "ReadError",
    "StokerError",
    "Tensor",
    "__version__",
    "close_devices",
    "device_memory",
    "iter_load",
    "load",
]
