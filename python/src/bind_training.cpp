// fit, the rows that it trains on, and setting the first layer from data.

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/communicator.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/train.hpp>

#include "adam_state.hpp"
#include "arrays.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "call_context.hpp"
#include "gil.hpp"
#include "plain_methods.hpp"
#include "training_options.hpp"

namespace nvpflow::python {
namespace {

/// How often a long fit takes the GIL to look for signals and report progress.
constexpr auto kProgressInterval = std::chrono::milliseconds(50);

/// Takes the GIL a few times a second: for signals, for the progress bar, for the caller's callback.
class PythonObserver final : public FitObserver {
 public:
  /// look: called where signals are looked for, or None; nvpflow.distributed keeps them till then.
  PythonObserver(py::object on_progress, py::object on_epoch, py::object look = py::none())
      : on_progress_(std::move(on_progress)), on_epoch_(std::move(on_epoch)), look_(std::move(look)) {}

  bool on_progress(std::int64_t epoch, std::int64_t step, std::int64_t steps) override {
    const auto now = std::chrono::steady_clock::now();
    const bool first_step = epoch > 0 && !std::exchange(training_, epoch > 0);
    if (now - last_ < kProgressInterval && !first_step) return true;
    last_ = now;
    if (!ends_it_) park_if_finalizing();
    const py::gil_scoped_acquire acquire;
    look();
    // Epoch 0 is the preparation: there is nothing to report yet.
    return on_progress_.is_none() || epoch == 0 || goes_on(on_progress_(epoch, step, steps));
  }

  bool on_epoch(const EpochRecord& record) override {
    if (!ends_it_) park_if_finalizing();
    const py::gil_scoped_acquire acquire;
    look();
    return on_epoch_.is_none() || goes_on(on_epoch_(record_dict(record)));
  }

 private:
  static bool goes_on(const py::object& answer) { return answer.ptr() != Py_False; }

  void look() const {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!look_.is_none()) look_();
  }

  py::object on_progress_, on_epoch_, look_;
  std::chrono::steady_clock::time_point last_;
  bool ends_it_ = is_finalizing();  // as GilReleased's; made with the GIL
  bool training_ = false;           // the preparation is over
};

/// nvpflow.distributed makes it of what the caller gave: rank, size, and sum and max of an int64 array in place.
class PythonCommunicator final : public Communicator {
 public:
  explicit PythonCommunicator(py::object of)
      : sum_(of.attr("sum")),
        max_(of.attr("max")),
        rank_(of.attr("rank").cast<int>()),
        size_(of.attr("size").cast<int>()) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void sum(std::span<std::int64_t> values) override { exchange(sum_, values); }
  void max(std::span<std::int64_t> values) override { exchange(max_, values); }

 private:
  /// In an array of Python's own: what the caller keeps of it stays valid.
  static void exchange(const py::object& method, std::span<std::int64_t> values) {
    park_if_finalizing();
    const py::gil_scoped_acquire acquire;
    static_assert(sizeof(std::int64_t) == sizeof(double));
    const FlatArray array(DType::float64, static_cast<std::int64_t>(values.size()));
    std::memcpy(array.data, values.data(), values.size_bytes());
    method(array.array.attr("view")("int64"));
    std::memcpy(values.data(), array.data, values.size_bytes());
  }

  py::object sum_, max_;
  int rank_, size_;
};

/// Those of fit_flow, or none.
std::optional<PythonCommunicator> communicator_from(const Arguments& given, int at) {
  if (!given.given(at)) return std::nullopt;
  return std::optional<PythonCommunicator>(std::in_place, given.object(at));
}

/// The context of so many rows, [rows, C]; nothing for a flow without one.
InputArray context_rows(const BoundFlow& self, PyObject* array, const char* name, std::int64_t rows) {
  if (self.context_size == 0 && (array == nullptr || array == Py_None)) return {};
  InputArray in = read_context_rows(self, array, name, "N");
  if (!in.on_device && !in.single && in.rows == rows) return in;
  throw Error(ErrorCode::invalid_argument, std::string(name) +
                                               (in.on_device ? " is on a CUDA device"
                                                : in.single  ? " has one axis"
                                                             : " has " + std::to_string(in.rows) + " rows") +
                                               ", expected (" + std::to_string(rows) + ", " +
                                               std::to_string(self.context_size) +
                                               ") in the host's memory, a row for each row of " +
                                               (std::string(name) == "context" ? "x" : "validation"));
}

Context as_context(const BoundFlow& self, const InputArray& array) {
  if (!array.owner) return {};
  return by_dtype(self.dtype,
                  [&](auto t) { return Context(view<decltype(t)>(array, array.rows * self.context_size)); });
}

/// The arguments of a fit, read.
struct FitArguments {
  InputArray in, held_out, context, held_out_context, weights, held_out_weights;
  FitOptions options;
};

/// x, validation, options, on_progress, on_epoch, context, validation_context, adam, sample_weight, validation_weight,
/// communicator
FitArguments read_fit_arguments(BoundFlow& self, const Arguments& given) {
  const bool among_others = given.given(10) && given.object(10).attr("size").cast<int>() > 1;
  const auto rows_of = [&](PyObject* array, const char* name, DType dtype, Kind kind) {
    InputArray in = input_rows(array, name, dtype, self.features, kHost, kind);
    if (in.single) {
      throw Error(ErrorCode::invalid_argument,
                  std::string(name) + " has one axis, expected (N, " + std::to_string(self.features) + ")");
    }
    return in;
  };
  InputArray in = rows_of(given[0], "x", self.dtype, self.data), held_out;
  if (given.given(1)) {
    held_out = rows_of(given[1], "validation", self.dtype, self.data);
    // Both of one dtype: float32 is widened without loss.
    if (in.wide && !held_out.wide) held_out = rows_of(given[1], "validation", DType::float64, Kind::data);
    if (held_out.wide && !in.wide) in = rows_of(given[0], "x", DType::float64, Kind::data);
    if (held_out.rows == 0 && !among_others)
      throw Error(ErrorCode::invalid_argument, "validation has no rows, expected at least one");
  }
  const InputArray context = context_rows(self, given[5], "context", in.rows);
  InputArray held_out_context;
  if (given.given(1)) held_out_context = context_rows(self, given[6], "the context of validation", held_out.rows);
  // fit itself checks them: those of one process may all be 0.
  const auto weights_of = [&](int i, const char* name, const InputArray& rows) {
    return given.given(i) ? unchecked_weights(given[i], name, rows) : InputArray{};
  };
  const InputArray weights = weights_of(8, "sample_weight", in);
  const InputArray held_out_weights = weights_of(9, "the weights of validation", held_out);
  return {in,
          held_out,
          context,
          held_out_context,
          weights,
          held_out_weights,
          options_from<FitOptions>(given.object(2).cast<py::dict>())};
}

/// An error before training begins is told to the other processes.
template <class F>
auto told_to_others(std::optional<PythonCommunicator>& communicator, F&& f) {
  try {
    return f();
  } catch (const Error& error) {
    if (communicator) fail_together(*communicator, error);
    throw;
  } catch (const std::exception& error) {
    const Error told(ErrorCode::unavailable, error.what());
    try {
      if (communicator) fail_together(*communicator, told);
    } catch (const Error&) {  // this process raises the error itself
    }
    throw;
  }
}

/// Arguments: see read_fit_arguments.
py::object fit_flow(BoundFlow& self, const Arguments& given) {
  std::optional<PythonCommunicator> communicator = communicator_from(given, 10);
  const auto [in, held_out, context, held_out_context, weights, held_out_weights, fit_options] =
      told_to_others(communicator, [&] { return read_fit_arguments(self, given); });
  const FitWeights fit_weights(view<double>(weights, weights.owner ? in.rows : 0),
                               view<double>(held_out_weights, held_out_weights.owner ? held_out.rows : 0));
  PythonObserver observer(given.object(3), given.object(4),
                          communicator ? py::getattr(given.object(10), "look", py::none()) : py::none());
  const py::object given_adam = given.object(7);
  // A copy, so that other threads see it change at one moment, with the GIL.
  std::optional<AdamState> adam = adam_from(given_adam);
  History history;
  const auto run = [&] {
    const GilReleased released;
    history = by_dtype(in.wide || held_out.wide ? DType::float64 : self.dtype, [&](auto t) {
      using T = decltype(t);
      return fit(self.flow, view<T>(in, in.rows * self.features), view<T>(held_out, held_out.rows * self.features),
                 fit_weights, fit_options, &observer, as_context(self, context), as_context(self, held_out_context),
                 adam ? &*adam : nullptr, communicator ? &*communicator : nullptr);
    });
  };
  try {
    run();
  } catch (...) {  // the flow has the weights of the last epoch that was finished, and so has the state
    if (adam) give_adam(*adam, given_adam);
    throw;
  }
  if (adam) give_adam(*adam, given_adam);
  py::list epochs;
  for (const EpochRecord& r : history.epochs) epochs.append(record_dict(r));
  using namespace py::literals;
  return py::dict("epochs"_a = epochs, "best_epoch"_a = history.best_epoch, "best_loss"_a = history.best_loss,
                  "stop_reason"_a = history.stop_reason, "train_rows"_a = history.train_rows,
                  "validation_rows"_a = history.validation_rows, "effective_rows"_a = history.effective_rows,
                  "standardized"_a = history.standardized, "rows_left_out"_a = history.rows_left_out,
                  "folds"_a = history.folds, "initial_loss"_a = history.initial_loss);
}

/// x, statistics, context, sample_weight, allow_degenerate
py::object initialize_from(BoundFlow& self, const Arguments& given) {
  const InputArray in = input_rows(given[0], "x", self.dtype, self.features, kHost, self.data);
  const InputArray context = context_rows(self, given[2], "context", in.rows);
  const InputArray weights = input_weights(given[3], "sample_weight", in);
  const Statistics statistics = parse_statistics(given.object(1).cast<std::string>());
  const bool allow_degenerate = given.given(4) && given.object(4).cast<bool>();
  std::vector<std::string> how;
  {
    const GilReleased released;
    how = by_dtype(in.wide ? DType::float64 : self.dtype, [&](auto t) {
      return self.flow.initialize_from(view<decltype(t)>(in, in.rows * self.features), statistics,
                                       as_context(self, context), view<double>(weights, weights.owner ? in.rows : 0),
                                       allow_degenerate);
    });
  }
  return py::cast(how);
}

/// Throws where float64 numbers are not what weights are.
py::object check_weights_of(const Arguments& given) {
  const auto name = given.object(0).cast<std::string>();
  const HostValues values = host_values(given[1]);
  if (values.dtype != "float64") throw Error(ErrorCode::type_mismatch, name + " has dtype " + values.dtype);
  const std::int64_t rows = values.bytes / static_cast<std::int64_t>(sizeof(double));
  SampleWeights({static_cast<const double*>(values.data), static_cast<std::size_t>(rows)}).check(name.c_str(), rows);
  return py::none();
}

/// What this process cannot begin is told to the others, which wait for it.
py::object fail_together_of(const Arguments& given) {
  PythonCommunicator others(given.object(0));
  const Error error(ErrorCode::invalid_argument, given.object(1).cast<std::string>());
  {
    const GilReleased released;
    try {
      fail_together(others, error);
    } catch (const Error&) {  // the caller raises its own
    }
  }
  return py::none();
}

}  // namespace

void bind_training(py::module_& module) {
  add_function(module, plain<&fail_together_of>("_fail_together", 2, 2, {"communicator", "message"}, nullptr));
  module.def("_rows_of_process", [](std::int64_t rows, std::int64_t shards, int rank, int size) {
    return rows_of_process(rows, shards, rank, size);
  });
  add_function(module, plain<&check_weights_of>("_check_weights", 2, 2, {"name", "weights"}, nullptr));
  // Of `total` rows, at most `most` that fit sets aside for validation, and at most `most` that it trains on.
  module.def("_split_rows", [](std::int64_t total, double share, std::uint64_t seed, std::int64_t most) {
    const FitSplit rows = split_rows(total, share, seed, most);
    return std::pair(rows.set_aside, rows.trained_on);
  });
}

void add_training_methods(py::class_<BoundFlow>& type) {
  for (PyMethodDef* method : {
           plain<&initialize_from>("_initialize_from", 2, 5,
                                   {"x", "statistics", "context", "sample_weight", "allow_degenerate"}, nullptr),
           plain<&fit_flow>("_fit", 5, 11,
                            {"x", "validation", "options", "on_progress", "on_epoch", "context", "validation_context",
                             "adam", "sample_weight", "validation_weight", "communicator"},
                            nullptr),
       }) {
    add_method(type, method);
  }
}

}  // namespace nvpflow::python
