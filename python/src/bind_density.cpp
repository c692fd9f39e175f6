// fit_density: training on a log-density that Python computes.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include <nvpflow/density.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/spec.hpp>

#include "arrays.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "call_context.hpp"
#include "gil.hpp"
#include "host_arrays.hpp"
#include "plain_methods.hpp"
#include "training_options.hpp"

namespace nvpflow::python {
namespace {

/// As PythonObserver of bind_training.cpp: how often the GIL is taken to look for signals and report progress.
constexpr auto kProgressInterval = std::chrono::milliseconds(50);

bool goes_on(const py::object& answer) { return answer.ptr() != Py_False; }

class ReportObserver final : public DensityObserver {
 public:
  ReportObserver(py::object on_progress, py::object on_report)
      : on_progress_(std::move(on_progress)), on_report_(std::move(on_report)) {}

  bool on_progress(std::int64_t step, std::int64_t steps) override {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < kProgressInterval) return true;
    last_ = now;
    if (!ends_it_) park_if_finalizing();
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    return on_progress_.is_none() || goes_on(on_progress_(step, steps));
  }

  bool on_report(const DensityRecord& record) override {
    if (!ends_it_) park_if_finalizing();
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    return on_report_.is_none() || goes_on(on_report_(record_dict(record)));
  }

  bool ends_it() const { return ends_it_; }

 private:
  py::object on_progress_, on_report_;
  std::chrono::steady_clock::time_point last_;
  bool ends_it_ = is_finalizing();  // made with the GIL
};

/// Calls log_density(x, context or None, whether the gradient is wanted), which has checked what it returns: log_p [B]
/// of float64 and the gradient [B, D] of the flow's dtype. The arrays that it gets are new ones, which it may keep.
class PythonDensity {
 public:
  PythonDensity(py::object function, const BoundFlow& flow, bool ends_it)
      : function_(std::move(function)), flow_(flow), ends_it_(ends_it) {}

  template <class T>
  void operator()(const DensityCall<T>& call) const {
    if (!ends_it_) park_if_finalizing();
    const py::gil_scoped_acquire acquire;
    const auto rows = static_cast<std::int64_t>(call.log_p.size());
    const py::object x = copy_of(call.x, rows, flow_.features);
    const py::object context = flow_.context_size > 0 ? copy_of(call.context, rows, flow_.context_size) : py::none();
    const py::object result = function_(x, context, py::bool_(!call.gradient.empty()));
    const auto pair = result.cast<py::tuple>();
    take(pair[0], "float64", call.log_p.data(), call.log_p.size_bytes());
    if (!call.gradient.empty()) {
      take(pair[1], std::string(name_of(flow_.dtype)), call.gradient.data(), call.gradient.size_bytes());
    }
  }

 private:
  template <class T>
  py::object copy_of(std::span<const T> values, std::int64_t rows, std::int64_t columns) const {
    OutputArray array = new_array(flow_.dtype, rows, columns);
    std::memcpy(array.data, values.data(), values.size_bytes());
    return object_of(std::move(array));
  }

  static void take(const py::object& array, const std::string& dtype, void* to, std::size_t bytes) {
    const HostValues values = host_values(array.ptr());
    if (values.dtype != dtype || values.bytes != static_cast<std::int64_t>(bytes)) {
      throw Error(ErrorCode::invalid_argument, "log_density returned an array of " + values.dtype + " of " +
                                                   std::to_string(values.bytes) + " bytes, expected " +
                                                   std::to_string(bytes) + " of " + dtype);
    }
    std::memcpy(to, values.data, bytes);
  }

  py::object function_;
  const BoundFlow& flow_;
  bool ends_it_;
};

py::dict summary_of(const DensityHistory& history) {
  py::list reports;
  for (const DensityRecord& record : history.reports) reports.append(record_dict(record));
  using namespace py::literals;
  return py::dict("reports"_a = reports, "best_step"_a = history.best_step, "best_loss"_a = history.best_loss,
                  "stop_reason"_a = history.stop_reason);
}

/// log_density, options, on_progress, on_report, context
py::object fit_flow_to_density(BoundFlow& self, const Arguments& given) {
  const InputArray context =
      self.context_size == 0 && !given.given(4) ? InputArray{} : read_context_rows(self, given[4], "context", "M");
  if (context.on_device) {
    throw Error(ErrorCode::invalid_argument, "context is on a CUDA device, expected an array in the host's memory");
  }
  const auto options = options_from<DensityOptions>(given.object(1).cast<py::dict>());
  ReportObserver observer(given.object(2), given.object(3));
  const PythonDensity density(given.object(0), self, observer.ends_it());
  DensityHistory history;
  {
    const GilReleased released;
    history = by_dtype(self.dtype, [&](auto t) {
      using T = decltype(t);
      const LogDensity<T> log_density = [&](const DensityCall<T>& call) { density(call); };
      const Context rows = context.owner ? Context(view<T>(context, context.rows * self.context_size)) : Context();
      return fit_density<T>(self.flow, log_density, options, &observer, rows);
    });
  }
  return summary_of(history);
}

}  // namespace

void add_density_methods(py::class_<BoundFlow>& type) {
  add_method(type,
             plain<&fit_flow_to_density>("_fit_density", 4, 5,
                                         {"log_density", "options", "on_progress", "on_report", "context"}, nullptr));
}

}  // namespace nvpflow::python
