// What the bindings' files share: the bound object and the translation of errors.
#pragma once

#include <cstring>
#include <new>

#include <nvpflow/flow.hpp>

#include "arrays.hpp"

namespace nvpflow::python {

/// Memory of objects that Python can make without initialising them (Flow.__new__, a subclass that forgets
/// super().__init__()) is zero, so that what looks into them can tell.
struct ZeroedMemory {
  static void* operator new(std::size_t size) { return std::memset(::operator new(size), 0, size); }
  static void operator delete(void* p) { ::operator delete(p); }
};

/// nvpflow._core.FlowSpec: zeroed, an empty spec that validate() refuses.
struct BoundSpec : ZeroedMemory, FlowSpec {
  BoundSpec(FlowSpec spec) : FlowSpec(std::move(spec)) {}  // NOLINT(misc-explicit-constructor): it is one
};

/// nvpflow._core.Flow.
struct BoundFlow : ZeroedMemory {
  Flow flow;
  DType dtype;
  std::int64_t features;
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
  int threads() const;
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

[[noreturn]] void raise_uninitialised();

/// Sets the Python error of the exception in flight; call inside a catch block.
void set_python_error();

/// The methods that programs call a million times a second: plain C functions, because pybind11's array arguments cost
/// several times as much as the smallest flow. Adds them to the bound type.
void add_hot_methods(py::class_<BoundFlow>& type);

bool is_finalizing();
/// Never returns once the interpreter is ending. Not for the thread that ends it.
void park_if_finalizing();

/// Lets other Python threads run. When the interpreter has ended meanwhile, this thread, a daemon's, stops here for
/// good: taking the GIL would end it in the middle of C++ code, as Python before 3.14 does.
class GilReleased {
 public:
  GilReleased() : ends_it_(is_finalizing()), state_(PyEval_SaveThread()) {}
  ~GilReleased();
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  bool ends_it_;  // who has the GIL while the interpreter ends is the thread that ends it
  PyThreadState* state_;
};

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
void run_beside(const BoundFlow& flow, const InputArray& x, std::int64_t rows, F&& f) {
  run_released(flow, rows, [&] {
    if (!x.on_device) {
      Execution how(flow.threads());
      how.float64_rows = x.wide;
      return f(how);
    }
    f(Execution::on_stream(x.stream));
    // These libraries know nothing of the stream: their arrays may go as soon as the call is over.
    if (x.library == Library::jax || x.library == Library::other) cuda_synchronize(x.device, x.stream);
  });
}

}  // namespace nvpflow::python
