"""Normalizing flows of coupling layers: exact densities, sampling and training, on a C++ core.

>>> import numpy as np, nvpflow
>>> x = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32)
>>> x[:, 1] += x[:, 0] ** 2
>>> flow = nvpflow.build(input_size=2, num_flows=4, hidden_sizes=(64,))
>>> history = flow.fit(x, epochs=5, progress=False)
>>> z, log_det = flow.forward(x)
>>> log_p = flow.log_probability(x)
"""

import datetime as _datetime  # noqa: F401  NumPy's C code imports it, and loses sight of an interrupt there

# Before everything else, so that a failure says what to do about it.
try:
    from nvpflow._core import CudaError, FileFormatError, TrainingError, __version__, available_threads, cpu_isa
except ImportError as error:
    if "sub-interpreter" in str(error):
        raise
    # Ctrl-C in the middle of an import is no failure of it: C code makes an ImportError of it, and keeps the cause.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            raise cause  # noqa: B904
        cause = cause.__cause__ or cause.__context__
    raise ImportError(
        f"{error}\nnvpflow's compiled part cannot be imported. Is it not built? Run `pip install .` in the project's "
        "folder, and start Python outside the folder python/.",
        name=error.name,
        path=error.path,
    ) from error

from typing import TYPE_CHECKING

from nvpflow import cuda, functional, layers
from nvpflow._blame import blame
from nvpflow._data import DataReport, DataWarning, Finding, check_data
from nvpflow._paths import get_cmake_dir, get_include
from nvpflow._spec import FlowSpec
from nvpflow.adam import Adam, AdamState
from nvpflow.certificate import Certificate
from nvpflow.conditioned import ConditionedFlow
from nvpflow.density_history import DensityHistory
from nvpflow.flow import Flow, Threshold, build, load
from nvpflow.history import History
from nvpflow.importance_sampling import Importance, ModeCheck, check_modes, importance

__all__ = [
    "Adam",
    "AdamState",
    "Certificate",
    "ConditionedFlow",
    "CudaError",
    "DataReport",
    "DataWarning",
    "DensityHistory",
    "FileFormatError",
    "Finding",
    "Flow",
    "FlowSpec",
    "History",
    "Importance",
    "ModeCheck",
    "Threshold",
    "TrainingError",
    "__version__",
    "available_threads",
    "blame",
    "build",
    "check_data",
    "check_modes",
    "cpu_isa",
    "cuda",
    "functional",
    "get_cmake_dir",
    "get_include",
    "importance",
    "layers",
    "load",
]

# Modules that are imported where they are first asked for, and the library that each needs.
_LAZY = {
    "dask": "distributed",
    "demo": "numpy",
    "exporters": "numpy",
    "importers": "numpy",
    "jax": "jax",
    "plot": "matplotlib",
    "report": "matplotlib",
    "sklearn": "sklearn",
    "tables": "numpy",
    "torch": "torch",
}

if TYPE_CHECKING:  # a function __getattr__ would let checkers believe in every name
    from nvpflow import dask as dask
    from nvpflow import demo as demo
    from nvpflow import exporters as exporters
    from nvpflow import importers as importers
    from nvpflow import jax as jax
    from nvpflow import plot as plot
    from nvpflow import report as report
    from nvpflow import sklearn as sklearn
    from nvpflow import tables as tables
    from nvpflow import torch as torch
else:

    def __getattr__(name):
        """Import a module of `_LAZY` (PEP 562); its ImportError says what to install."""
        from importlib import import_module

        if name in _LAZY:
            return import_module(f"nvpflow.{name}")
        raise AttributeError(f"module 'nvpflow' has no attribute {name!r}")

    def __dir__():
        """Return the names that there are, without modules whose library is not installed."""
        from importlib.util import find_spec

        return sorted({*globals(), *(name for name, library in _LAZY.items() if find_spec(library) is not None)})
