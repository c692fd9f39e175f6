"""CUDA devices: whether they can be used, which there are, and arrays on them.

Nothing here is called on import: CUDA starts when a device is asked for.
"""

import numpy as np
from numpy.typing import ArrayLike

from nvpflow import _checks, _core
from nvpflow._core import CudaError, DeviceArray

__all__ = ["CudaError", "DeviceArray", "array", "device_count", "device_name", "is_available", "why_unavailable"]


def is_available() -> bool:
    """Tell whether at least one CUDA device can be used."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Return the reason why no CUDA device can be used, or None where one can.

    Returns
    -------
    str or None
        One of these:

        * this nvpflow was built without CUDA
        * no driver is installed
        * the driver is too old (with its version and the one needed)
        * the driver sees no device
        * this build has no code for the devices' architecture (with both)
        * this process was forked from one that used CUDA
    """
    return _core.cuda_why_unavailable() or None


def device_count() -> int:
    """Return how many CUDA devices the driver shows (``CUDA_VISIBLE_DEVICES`` applies); 0 without a driver.

    Raises
    ------
    CudaError
        This process was forked from one that used CUDA.
    """
    return _core.cuda_device_count()


def device_name(index: int = 0) -> str:
    """Return the driver's name of a device.

    Raises
    ------
    ValueError
        There is no such device.
    CudaError
        CUDA cannot be used here.
    """
    return _core.cuda_device_name(_checks.integer("index", index, bits=32))


def array(values: ArrayLike, device: str = "cuda") -> DeviceArray:
    """Copy rows to a device, for programs that have no library of their own for that.

    Parameters
    ----------
    values
        Of dtype float32 or float64, whichever the flow has.
    device
        "cuda" or "cuda:N".

    Returns
    -------
    DeviceArray
        It has ``__dlpack__`` and ``__cuda_array_interface__``; ``.numpy()`` copies it back.

    Raises
    ------
    TypeError
        Another dtype.
    MemoryError
        The device has no room; the message states the sizes.
    CudaError
        CUDA cannot be used here.
    """
    rows = np.asarray(values)
    if rows.dtype not in (np.dtype("float32"), np.dtype("float64")):  # which a byte-swapped one is not, either
        raise TypeError(f"values has dtype {rows.dtype}, expected float32 or float64 of this machine's byte order")
    return _core._device_array(rows, _checks.text("device", device))
