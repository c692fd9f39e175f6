// The flows' functions as XLA calls them, for nvpflow.jax.
#pragma once

#include <pybind11/pybind11.h>

namespace nvpflow::python {

/// A dict from the name of each handler to a capsule with its address, which jax.ffi.register_ffi_target takes.
pybind11::dict xla_handlers();

}  // namespace nvpflow::python
