// What the bindings' files share: the bound object and the translation of errors.
#pragma once

#include <nvpflow/flow.hpp>

#include "arrays.hpp"

namespace nvpflow::python {

/// nvpflow._core.Flow.
struct BoundFlow {
  Flow flow;
  DType dtype;
  std::int64_t features;
  /// From this many rows on a call is long enough (about five microseconds) to let other Python threads run.
  std::int64_t release_rows;

  BoundFlow(const FlowSpec& spec, std::uint64_t seed);
  int threads() const;
  std::int64_t row_bytes() const { return features * size_of(dtype); }
};

/// Sets the Python error of the exception in flight; call inside a catch block.
void set_python_error();

/// The methods that programs call a million times a second: plain C functions, because pybind11's array arguments cost
/// several times as much as the smallest flow. Adds them to the bound type.
void add_hot_methods(py::class_<BoundFlow>& type);

/// Calls f without the GIL where `rows` are many.
template <class F>
void run_released(const BoundFlow& flow, std::int64_t rows, F&& f) {
  if (rows >= flow.release_rows) {
    const py::gil_scoped_release release;
    f();
  } else {
    f();
  }
}

}  // namespace nvpflow::python
