"""Where the parts for C and C++ programs lie: headers, libraries, the CMake package."""

from __future__ import annotations

import os

from nvpflow import _core

# Beside the compiled part, which an editable install keeps elsewhere than the Python files.
_FOLDER = os.path.dirname(os.path.abspath(_core.__file__))


def get_include() -> str:
    """Return the folder of the headers: ``nvpflow.h`` for C, ``nvpflow/*.hpp`` for C++.

    The libraries and a pkg-config file are in the folder ``lib`` beside it.
    """
    return os.path.join(_FOLDER, "include")


def get_cmake_dir() -> str:
    """Return the folder of ``nvpflow-config.cmake``, for CMake's ``-Dnvpflow_DIR=``."""
    return os.path.join(_FOLDER, "lib", "cmake", "nvpflow")
