"""PyTorch tensors over loaded memory. PyTorch is imported when the first tensor is made, and only if it is installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from .errors import NotSupportedError

if TYPE_CHECKING:
    from ._native import Tensor

# Types that not every version imports through DLPack: handed over as integers of the same size, viewed as what they are.
_BITS = {
    "bool": "uint8",
    "uint16": "int16",
    "uint32": "int32",
    "uint64": "int64",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
    "float8_e8m0fnu": "uint8",
    "float4_e2m1fn_x2": "uint8",
}


def find() -> Any | None:
    """The module, if it is installed."""
    if "torch" in sys.modules:
        return sys.modules["torch"]
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch


def from_native(torch: Any, tensor: Tensor) -> Any:
    """A `torch.Tensor` over the same memory, which it keeps."""
    bits = _BITS.get(tensor.dtype)
    if bits is None:
        return torch.from_dlpack(tensor)
    dtype = getattr(torch, tensor.dtype, None)
    if dtype is None:
        raise NotSupportedError(f"PyTorch {torch.__version__} has no {tensor.dtype}: install a newer one")
    return torch.from_dlpack(tensor.view(bits)).view(dtype)


def converted(tensor: Any, dtype: Any) -> Any:
    """A floating-point tensor of two bytes or more in another type; any other as it is."""
    if tensor.is_floating_point() and tensor.element_size() > 1:
        return tensor.to(dtype)
    return tensor


def make_room(torch: Any) -> bool:
    """Gives back device memory that PyTorch keeps for itself. Whether that may have helped."""
    if not torch.cuda.is_initialized():
        return False
    torch.cuda.empty_cache()
    return True
