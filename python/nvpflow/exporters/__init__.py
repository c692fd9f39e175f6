"""Flows in the terms of other libraries: modules of plain PyTorch, and ONNX files.

What they compute is the flow's, without nvpflow and at the speed of those libraries. `to_torch` is for second
derivatives, ``torch.func`` and programs in TorchScript; `to_onnx` for runtimes without Python. An `nvpflow.Flow` is
faster than either, and so are `nvpflow.torch` for training and C++ and C for programs of their own.

Examples
--------
>>> import nvpflow, torch
>>> module = nvpflow.exporters.to_torch(nvpflow.build(input_size=3))
>>> torch.func.vmap(torch.func.hessian(module.log_prob))(torch.zeros(5, 3)).shape
torch.Size([5, 3, 3])
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, get_args

from nvpflow import _checks, _hints
from nvpflow.flow import Flow

if TYPE_CHECKING:
    from nvpflow.exporters._torch import PlainFlow

__all__ = ["to_onnx", "to_torch"]

Method = Literal["log_prob", "forward", "inverse", "sample"]
METHODS: tuple[Method, ...] = get_args(Method)


@_hints.explained
def to_torch(flow: Flow) -> PlainFlow:
    """Return the flow as a ``torch.nn.Module`` of PyTorch's own operations.

    Parameters
    ----------
    flow
        The model and its weights, which are copied.

    Returns
    -------
    torch.nn.Module
        In the flow's dtype and on its device, with these methods. Rows are tensors [..., D], and the context of a flow
        that has one is [..., C]; their leading axes broadcast, and results have them.

        ``forward(x, context=None)``
            (z [..., D], log|det dz/dx| [...], nats): data to latent.
        ``inverse(z, context=None)``
            (x [..., D], log|det dx/dz| [...], nats): latent to data.
        ``log_prob(x, context=None)``
            log p(x) [...], nats.
        ``sample(n, context=None, generator=None)``
            n rows [n, D] from a ``torch.Generator``, or PyTorch's default one; under contexts [..., C] n rows for each,
            [..., n, D].

    Raises
    ------
    TypeError
        `flow` is not an `nvpflow.Flow`.
    ValueError
        A float32 flow whose data have means that float32 does not hold; export ``flow.astype("float64")``.
    ImportError
        PyTorch is not installed.

    Notes
    -----
    Every derivative that PyTorch has is there: double backward, forward mode, ``torch.func``. ``torch.jit.script``,
    ``torch.jit.trace`` and ``torch.export`` take the module, and what they save needs PyTorch only. A pickled module
    names its class, and needs nvpflow to be installed where it is loaded. For ONNX take `to_onnx`.

    Results are those of the flow but for rounding. Rows are treated likewise: one with NaN or infinity has NaN for a
    result, and of a finite row nothing is NaN. Splines are computed by the same formulas, in which nothing cancels.

    Parameters are the ones that `nvpflow.Flow.fit` trains, with kernels as PyTorch has them, [out, in]; all else are
    buffers. There is no way back: train with `nvpflow.torch.FlowModule` what is to become a flow again.
    """
    _check(flow)
    from nvpflow.exporters._torch import module_of

    return module_of(flow)


@_hints.explained
def to_onnx(flow: Flow, path: str | os.PathLike[str], method: Method = "log_prob") -> float:
    """Write one method of the flow as an ONNX file, after it has been run by onnxruntime and compared with the flow.

    Parameters
    ----------
    flow
        The model. Its weights become constants of the file.
    path
        The file, which is replaced if it is there: as a whole, or not at all.
    method
        With inputs and outputs of the flow's dtype, of any number of rows:

        ==============  ====================================  =============================================
        ``"log_prob"``  ``x`` [batch, D]                      ``log_prob`` [batch], nats
        ``"forward"``   ``x`` [batch, D]                      ``z`` [batch, D], ``log_det`` [batch]
        ``"inverse"``   ``z`` [batch, D]                      ``x`` [batch, D], ``log_det`` [batch]
        ``"sample"``    ``n`` [1], an int64                   ``x`` [n, D], ``log_prob`` [n]
        ==============  ====================================  =============================================

        A flow with a context has an input ``context`` [batch, C] behind these, a row for each row; of ``"sample"``
        instead of ``n``. Samples are drawn by the runtime's own random numbers, anew in each session. For the same
        samples again, take ``"inverse"`` and give it noise of your own.

    Returns
    -------
    float
        The largest difference on 256 rows between onnxruntime and the flow, ``|a - b| / (1 + |b|)``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. Or a float32 flow whose data have means that float32 does not hold. Or more weights than
        the 2 GB of an ONNX file.
    RuntimeError
        onnxruntime cannot run the model, or computes something else. No file has been written.
    ImportError
        onnx or onnxruntime is not installed.
    OSError
        The file cannot be written.

    Notes
    -----
    The file needs operator set 18, and no operators beyond ONNX's own: every runtime since 2023 reads it. onnxruntime
    has no error function in float64; a float64 flow with the activation "gelu" is refused for that.
    """
    _check(flow)
    if _checks.text("method", method) not in METHODS:
        raise ValueError(f"method is {_checks.shortened(repr(method))}, expected one of {', '.join(METHODS)}")
    from nvpflow.exporters._onnx_file import write

    return write(flow, os.fsdecode(path), method)


def _check(flow: Flow) -> None:
    if not isinstance(flow, Flow):
        do = "; nvpflow.load reads one from a file" if isinstance(flow, (str, os.PathLike)) else ""
        if hasattr(flow, "to_flow"):
            do = "; give module.to_flow()"
        raise TypeError(f"flow is {_checks.describe(flow)}, expected an nvpflow.Flow{do}")
    _checks.whole_mean(flow)
    _checks.no_discrete("flow", flow.spec)
