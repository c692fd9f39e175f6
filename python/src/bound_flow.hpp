// The object behind nvpflow._core.Flow, and calls of its kernels without the GIL.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>

#include "arrays.hpp"
#include "bound_spec.hpp"
#include "gil.hpp"

namespace nvpflow::python {

/// nvpflow._core.Flow.
struct BoundFlow : ZeroedMemory {
  static constexpr const char* kName = "Flow";
  Flow flow;
  DType dtype;
  std::int64_t features;
  std::int64_t context_size;
  /// Index of the CUDA device, or kHost.
  int device;
  /// What rows of data are to it.
  Kind data;
  /// From this many rows on a call is long enough (about five microseconds) to let other Python threads run.
  std::int64_t release_rows;
  /// What fit sets the standardize layer from unless it is told: build's choice, as num_threads is of no file.
  Statistics statistics = Statistics::automatic;
  bool ready = true;

  BoundFlow(const FlowSpec& spec, std::uint64_t seed, Device on, Precision precision, Weights weights, Init init);
  /// Large weights go without the GIL: the system takes back their pages one by one.
  ~BoundFlow();
  BoundFlow(const BoundFlow&) = delete;
  BoundFlow& operator=(const BoundFlow&) = delete;
  /// Throws where the object was never initialised.
  void require_ready() const;
  std::int64_t row_bytes() const { return features * size_of(dtype); }
  /// Whether rows of data go out as float64 although the flow is float32: of dtype= and out=, beside `like`.
  bool gives_float64(PyObject* wanted, PyObject* out, const InputArray& like) const {
    const bool none = (wanted == nullptr || wanted == Py_None) && (out == nullptr || out == Py_None);
    return !none && wants_float64(wanted, out, dtype, like.on_device ? Kind::data : data);
  }
  InputArray rows_of(PyObject* object, const char* name) const {
    return input_rows(object, name, dtype, features, device, data, &flow);
  }
};

/// type: the name of its class in Python.
[[noreturn]] void raise_uninitialised(const char* type);

/// Calls f with a value of the flow's type, so that it can say `auto`.
template <class F>
auto by_dtype(DType dtype, F&& f) {
  return dtype == DType::float32 ? f(float{}) : f(double{});
}

/// As Python has them: an array or None.
py::object low_or_none(const std::vector<float>& mean_low);
/// (log p, quantile or None), or None.
py::object as_python(const std::optional<Threshold>& threshold);

/// Calls f, without the GIL where the work on so many rows is long enough.
template <class F>
void run_released(const BoundFlow& flow, std::int64_t rows, F&& f) {
  if (rows >= flow.release_rows) {
    const GilReleased released;
    f();
  } else {
    f();
  }
}

/// Calls f(execution) on arrays that lie where x does.
template <class F>
void run_beside(const BoundFlow& flow, const InputArray& x, std::int64_t rows, const ContextRows& context, F&& f) {
  run_released(flow, rows, [&] {
    Execution how = x.on_device ? Execution::on_stream(x.stream) : Execution();
    how.float64_rows = x.wide;
    how.context = context;
    f(how);
    if (!x.on_device) return;
    // These libraries know nothing of the stream: their arrays may go as soon as the call is over.
    if (x.library == Library::jax || x.library == Library::other) cuda_synchronize(x.device, x.stream);
  });
}

}  // namespace nvpflow::python
