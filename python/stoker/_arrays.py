"""NumPy arrays over loaded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import NotSupportedError

if TYPE_CHECKING:
    from ._native import Tensor

# Types that NumPy lacks: the integers of the same size that their bytes are shown as.
_BITS = {
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
    "float8_e8m0fnu": "uint8",
}


def to_numpy(tensor: Tensor) -> Any:
    """An array over the same memory."""
    import numpy

    if tensor.device != "cpu":
        raise NotSupportedError(f"the tensor is on {tensor.device}: NumPy's are in host memory")
    bits = _BITS.get(tensor.dtype)
    if bits is None:
        return _writable(numpy, tensor)
    try:
        import ml_dtypes
    except ImportError:
        raise NotSupportedError(
            f'NumPy has no {tensor.dtype}: install ml_dtypes, or take the bits with .view("{bits}").numpy()'
        ) from None
    return _writable(numpy, tensor.view(bits)).view(getattr(ml_dtypes, tensor.dtype))


def _writable(numpy: Any, tensor: Tensor) -> Any:
    # NumPy before 2.1 imports every array read-only; the memory is the caller's own all the same.
    array = numpy.from_dlpack(tensor)
    if tensor.read_only:
        array.flags.writeable = False
    elif not array.flags.writeable:
        array = numpy.lib.stride_tricks.as_strided(array, writeable=True)
    return array


def convert(tensor: Tensor, dtype: str) -> Any:
    """A floating-point tensor as an array of another floating-point type; any other tensor as it is."""
    import numpy

    if tensor.dtype not in ("float64", "float32", "float16", "bfloat16") or tensor.dtype == dtype:
        return tensor
    if tensor.dtype == "bfloat16":
        # The upper half of a float32.
        values = (tensor.view("uint16").numpy().astype(numpy.uint32) << 16).view(numpy.float32)
    else:
        values = tensor.numpy()
    if dtype in ("float64", "float32", "float16"):
        return values.astype(dtype)
    try:
        import ml_dtypes
    except ImportError:
        raise NotSupportedError(f"NumPy has no {dtype}: install ml_dtypes or PyTorch") from None
    return values.astype(getattr(ml_dtypes, dtype))
