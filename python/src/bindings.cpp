// The module nvpflow._core: everything but the hot methods, by pybind11.

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

#include <nvpflow/backend.hpp>
#include <nvpflow/device.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/train.hpp>

#include "../../cpp/src/file_format.hpp"
#include "../../cpp/src/float_mode.hpp"
#include "../../cpp/src/parallel.hpp"
#include "arrays.hpp"
#include "bound_flow.hpp"
#include "device_arrays.hpp"
#include "plain_methods.hpp"
#include "xla_handlers.hpp"

namespace nvpflow::python {
namespace {

/// Arithmetic of about five microseconds: from here on the GIL is released.
constexpr double kReleaseFlops = 3e5;
/// What an output of a dense layer costs beside its multiply-adds (an activation), and a row beside its layers, in
/// FLOPs of the same time; and what a gradient costs, in forward passes.
constexpr double kOutputFlops = 40, kRowFlops = 3000;
constexpr std::int64_t kGradientCost = 5;
/// How often a long fit takes the GIL to look for signals and report progress.
constexpr auto kProgressInterval = std::chrono::milliseconds(50);

PyObject* file_format_error = nullptr;
PyObject* training_error = nullptr;
PyObject* cuda_error = nullptr;

/// Messages may quote a path that is not UTF-8: such bytes come through as the surrogates that os.fsdecode gives.
void set_text(PyObject* type, const char* message) {
  PyObject* text = PyUnicode_DecodeFSDefault(message);
  if (text == nullptr) return;
  PyErr_SetObject(type, text);
  Py_DECREF(text);
}

void set_os_error(const Error& error) {
  // OSError(errno, text) picks FileNotFoundError, IsADirectoryError and so on by itself.
  PyObject* value =
      PyObject_CallFunction(PyExc_OSError, "iN", error.system_error(), PyUnicode_DecodeFSDefault(error.what()));
  if (value == nullptr) return;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value)), value);
  Py_DECREF(value);
}

void set_error(const Error& error) {
  switch (error.code()) {
    case ErrorCode::invalid_argument:
      return set_text(PyExc_ValueError, error.what());
    case ErrorCode::type_mismatch:
      return set_text(PyExc_TypeError, error.what());
    case ErrorCode::out_of_memory:
      return set_text(PyExc_MemoryError, error.what());
    case ErrorCode::file_format:
      return set_text(file_format_error, error.what());
    case ErrorCode::not_finite:
    case ErrorCode::none_kept:
      return set_text(training_error, error.what());
    case ErrorCode::unavailable:
      return set_text(PyExc_RuntimeError, error.what());
    case ErrorCode::device:
      return set_text(cuda_error, error.what());
    case ErrorCode::io:
      return set_os_error(error);
  }
}

/// The bytes of a str, bytes or os.PathLike, as the file system wants them.
std::string path_of(const py::object& path) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), static_cast<void*>(&bytes)) == 0) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

// ---- FlowSpec ----------------------------------------------------------------------------------------------------

const LayerSpec& first_coupling(const FlowSpec& spec) {
  for (const LayerSpec& layer : spec.layers) {
    if (layer.kind == LayerKind::coupling) return layer;
  }
  throw Error(ErrorCode::invalid_argument, "the spec has no coupling layer");
}

bool has_standardize(const FlowSpec& spec) {
  return std::any_of(spec.layers.begin(), spec.layers.end(),
                     [](const LayerSpec& layer) { return layer.kind == LayerKind::standardize; });
}

std::string spec_repr(const FlowSpec& spec) {
  const LayerSpec& layer = first_coupling(spec);
  const FlowSpec regular = FlowSpec::real_nvp(spec.input_size, spec.num_couplings(), layer.hidden_sizes,
                                              layer.activation, layer.scale_bound, has_standardize(spec), spec.dtype);
  if (spec != regular) return "FlowSpec.from_json('" + spec_to_json(spec) + "')";
  std::ostringstream text;
  text << "FlowSpec(input_size=" << spec.input_size << ", num_flows=" << spec.num_couplings()
       << ", hidden_sizes=" << py::repr(py::tuple(py::cast(layer.hidden_sizes))).cast<std::string>() << ", activation='"
       << name_of(layer.activation) << "', scale_bound=" << py::repr(py::float_(layer.scale_bound)).cast<std::string>()
       << ", standardize=" << (has_standardize(spec) ? "True" : "False") << ", dtype='" << name_of(spec.dtype) << "')";
  return text.str();
}

BoundSpec spec_from_text(const std::string& text) {
  BoundSpec spec = spec_from_json(text);
  spec.validate();
  return spec;
}

void bind_spec(py::module_& module) {
  py::class_<BoundSpec>(module, "FlowSpec", "What a flow is: sizes, layers and dtype; immutable.")
      .def(py::init([](std::int64_t input_size, std::int64_t num_flows, std::vector<std::int64_t> hidden_sizes,
                       const std::string& activation, double scale_bound, bool standardize, const std::string& dtype) {
             return BoundSpec(FlowSpec::real_nvp(input_size, num_flows, std::move(hidden_sizes),
                                                 parse_activation(activation), scale_bound, standardize,
                                                 parse_dtype(dtype)));
           }),
           py::arg("input_size"), py::arg("num_flows") = 4, py::arg("hidden_sizes") = std::vector<std::int64_t>{256},
           py::arg("activation") = "relu", py::arg("scale_bound") = 1.0, py::arg("standardize") = false,
           py::arg("dtype") = "float32")
      .def_property_readonly("input_size", [](const BoundSpec& s) { return s.input_size; })
      .def_property_readonly("num_flows", [](const BoundSpec& s) { return s.num_couplings(); })
      .def_property_readonly("hidden_sizes",
                             [](const BoundSpec& s) { return py::tuple(py::cast(first_coupling(s).hidden_sizes)); })
      .def_property_readonly("activation",
                             [](const BoundSpec& s) { return std::string(name_of(first_coupling(s).activation)); })
      .def_property_readonly("scale_bound", [](const BoundSpec& s) { return first_coupling(s).scale_bound; })
      .def_property_readonly("standardize", [](const BoundSpec& s) { return has_standardize(s); })
      .def_property_readonly("dtype", [](const BoundSpec& s) { return std::string(name_of(s.dtype)); })
      .def_property_readonly("_takes_float64_rows", [](const BoundSpec& s) { return takes_float64_rows(s); })
      .def("to_json", [](const BoundSpec& s) { return spec_to_json(s); })
      .def_static("from_json", &spec_from_text)
      .def("__eq__",
           [](const BoundSpec& a, const py::object& b) {
             return py::isinstance<BoundSpec>(b) && a == b.cast<const BoundSpec&>();
           })
      .def("__hash__", [](const BoundSpec& s) { return py::hash(py::str(spec_to_json(s))); })
      .def("__repr__", [](const BoundSpec& s) { return spec_repr(s); })
      .def(py::pickle([](const BoundSpec& s) { return spec_to_json(s); }, &spec_from_text));
}

// ---- Flow --------------------------------------------------------------------------------------------------------

template <class T>
std::span<const T> view(const InputArray& in, std::int64_t size) {
  return {static_cast<const T*>(in.data), static_cast<std::size_t>(size)};
}

template <class T>
std::span<T> view(const OutputArray& out) {
  return {static_cast<T*>(out.data), static_cast<std::size_t>(out.bytes) / sizeof(T)};
}

/// Calls f with a value of the flow's type, so that it can say `auto`.
template <class F>
auto by_dtype(DType dtype, F&& f) {
  return dtype == DType::float32 ? f(float{}) : f(double{});
}

void require_some(const InputArray& in) {
  if (in.rows > 0) return;
  throw Error(ErrorCode::invalid_argument, "x has no rows: the mean over an empty batch is not defined");
}

/// An array of the flow's parameters' size, in the memory and of the library of x.
OutputArray parameter_array(const BoundFlow& self, const char* name, const InputArray& x, PyObject* given = nullptr) {
  InputArray like = x;
  like.rows = self.flow.num_parameters();
  like.single = false;
  return output_array(given, name, self.dtype, 0, like);
}

py::object nll(const BoundFlow& self, const Arguments& given) {
  const InputArray in = self.rows_of(given[0], "x");
  double result = 0;
  if (in.on_device) {
    const FloatMode mode;
    require_some(in);
    run_beside(self, in, in.rows, [&](const Execution& how) {
      result = -self.flow.backend().sum_log_prob(in.data, nullptr, in.rows, how) / static_cast<double>(in.rows);
    });
    return py::float_(result);
  }
  run_released(self, in.rows, [&] {
    result = by_dtype(in.wide ? DType::float64 : self.dtype,
                      [&](auto t) { return self.flow.nll(view<decltype(t)>(in, in.rows * self.features)); });
  });
  return py::float_(result);
}

py::object nll_gradient(const BoundFlow& self, const Arguments& given) {
  const InputArray in = self.rows_of(given[0], "x");
  OutputArray gradient = parameter_array(self, "gradient", in);
  double result = 0;
  if (in.on_device) {
    const FloatMode mode;
    require_some(in);
    run_beside(self, in, in.rows, [&](const Execution& how) {
      const Backend& backend = self.flow.backend();
      const double sum = backend.nll_gradient(in.data, nullptr, in.rows, in.rows, gradient.data, false, how);
      result = -sum / static_cast<double>(in.rows);
    });
    return py::make_tuple(result, object_of(std::move(gradient)));
  }
  run_released(self, kGradientCost * in.rows, [&] {
    if (in.wide) {
      result = self.flow.nll_gradient(view<double>(in, in.rows * self.features), view<float>(gradient));
      return;
    }
    result = by_dtype(self.dtype, [&](auto t) {
      using T = decltype(t);
      return self.flow.nll_gradient(view<T>(in, in.rows * self.features), view<T>(gradient));
    });
  });
  return py::make_tuple(result, object_of(std::move(gradient)));
}

void require_beside(const InputArray& array, const char* name, const InputArray& x) {
  if (array.on_device == x.on_device) {
    if (x.on_device) wait_beside(array, x);
    return;
  }
  throw Error(ErrorCode::invalid_argument, std::string(x.on_device ? "x" : name) + " is on a CUDA device, " +
                                               (x.on_device ? name : "x") +
                                               " in the host's memory; expected both in one place");
}

/// The cotangents that a vector-Jacobian product is asked for.
struct Wanted {
  bool x, parameters;
};

Wanted wanted_of(const std::string& wrt) {
  if (wrt != "both" && wrt != "x" && wrt != "parameters") {
    throw Error(ErrorCode::invalid_argument, "wrt is '" + wrt + "', expected 'both', 'x' or 'parameters'");
  }
  return {wrt != "parameters", wrt != "x"};
}

struct NamedInput {
  const InputArray& array;
  const char* name;
};

/// Arrays for the wanted ones, new or given in out=(grad_x, grad_parameters); the call f(grad_x, grad_parameters) fills
/// them. None for what is not wanted.
template <class F>
py::object gradients(const BoundFlow& self, const InputArray& in, const std::string& wrt, PyObject* out,
                     std::initializer_list<NamedInput> inputs, F&& f) {
  constexpr const char *first = "out[0] (grad_x)", *second = "out[1] (grad_parameters)";
  const Wanted wanted = wanted_of(wrt);
  const auto [out_first, out_second] = out_pair(out, "grad_parameters");
  OutputArray grad_in, parameters;
  if (wanted.x) grad_in = output_array(out_first, first, self.dtype, self.features, in);
  if (wanted.parameters) parameters = parameter_array(self, second, in, out_second);
  for (const NamedInput& input : inputs) {
    refuse_overlap(grad_in, first, input.array, input.name, input.array.bytes);
    refuse_overlap(parameters, second, input.array, input.name, input.array.bytes);
  }
  refuse_overlap(grad_in, first, parameters, second);
  run_beside(self, in, kGradientCost * in.rows, [&](const Execution& how) { f(grad_in.data, parameters.data, how); });
  return py::make_tuple(wanted.x ? object_of(std::move(grad_in)) : py::none(),
                        wanted.parameters ? object_of(std::move(parameters)) : py::none());
}

py::object vjp(const BoundFlow& self, const Arguments& given) {
  const std::string direction = given.text(3, "forward"), wrt = given.text(4, "both");
  if (direction != "forward" && direction != "inverse") {
    throw Error(ErrorCode::invalid_argument, "direction is '" + direction + "', expected 'forward' or 'inverse'");
  }
  const Direction way = direction == "forward" ? Direction::forward : Direction::inverse;
  const InputArray in = way == Direction::forward ? self.rows_of(given[0], "x")
                                                  : input_rows(given[0], "x", self.dtype, self.features, self.device,
                                                               Kind::other, &self.flow);
  InputArray g_out, g_log_det;
  if (given.given(1)) {
    g_out = input_rows(given[1], "grad_out", self.dtype, self.features, self.device);
    require_beside(g_out, "grad_out", in);
    if (g_out.rows != in.rows || g_out.single != in.single) {
      throw Error(ErrorCode::invalid_argument, "grad_out has " + std::to_string(g_out.rows) +
                                                   " rows or another number of axes than x, expected the shape of x");
    }
  }
  if (given.given(2)) g_log_det = input_vector(given[2], "grad_log_det", self.dtype, in);
  const std::initializer_list<NamedInput> inputs = {{in, "x"}, {g_out, "grad_out"}, {g_log_det, "grad_log_det"}};
  return gradients(self, in, wrt, given[5], inputs, [&](void* grad_in, void* parameters, const Execution& how) {
    self.flow.backend().vjp(way, in.data, in.rows, g_out.data, g_log_det.data, grad_in, parameters, false, how);
  });
}

py::object log_prob_vjp(const BoundFlow& self, const Arguments& given) {
  const InputArray in = self.rows_of(given[0], "x");
  const InputArray g = input_vector(given[1], "grad_log_prob", self.dtype, in);
  const std::initializer_list<NamedInput> inputs = {{in, "x"}, {g, "grad_log_prob"}};
  return gradients(self, in, given.text(2, "both"), given[3], inputs, [&](void* grad_in, void* parameters, auto& how) {
    self.flow.backend().log_prob_vjp(in.data, in.rows, g.data, nullptr, grad_in, parameters, false, how);
  });
}

/// log_prob, and what log_prob_vjp gives for the parameters, in one pass; `out` (None: a new array) takes the latter
/// and must not overlap the others.
py::object log_prob_and_vjp(const BoundFlow& self, const Arguments& given) {
  const InputArray in = self.rows_of(given[0], "x");
  const InputArray g = input_vector(given[1], "grad_log_prob", self.dtype, in);
  OutputArray log_prob = output_array(nullptr, "log_prob", self.dtype, 0, in);
  OutputArray parameters = parameter_array(self, "grad_parameters", in, given[2]);
  run_beside(self, in, kGradientCost * in.rows, [&](const Execution& how) {
    self.flow.backend().log_prob_vjp(in.data, in.rows, g.data, log_prob.data, nullptr, parameters.data, false, how);
  });
  return py::make_tuple(object_of(std::move(log_prob)), object_of(std::move(parameters)));
}

py::object noise(const BoundFlow& self, std::int64_t rows, std::uint64_t seed) {
  OutputArray z = new_array(self.dtype, rows, self.features);
  run_released(self, rows, [&] { self.flow.backend().noise(seed, 0, rows, z.data, Execution(self.threads())); });
  return object_of(std::move(z));
}

py::object conditioner(const BoundFlow& self, const Arguments& given) {
  const auto layer = given.object(0).cast<std::int64_t>();
  const InputArray in = input_rows(given[1], "x", self.dtype, self.features, kHost);
  const FlowSpec& spec = self.flow.spec();
  const bool known = layer >= 0 && layer < static_cast<std::int64_t>(spec.layers.size());
  const std::int64_t width = known ? spec.transformed(spec.layers[static_cast<std::size_t>(layer)]).count : 1;
  OutputArray s = new_array(self.dtype, in.rows, width);
  OutputArray t = new_array(self.dtype, in.rows, width);
  run_released(self, in.rows, [&] {
    by_dtype(self.dtype, [&](auto v) {
      using T = decltype(v);
      self.flow.conditioner(layer, view<T>(in, in.rows * self.features), view<T>(s), view<T>(t));
    });
  });
  return py::make_tuple(s.array, t.array);
}

/// parameters, mean_low: None or Flow::mean_low, float32
py::object set_flat_parameters(BoundFlow& self, const Arguments& given) {
  const InputArray in = input_rows(given[0], "parameters", self.dtype, self.flow.num_parameters(), kHost);
  if (!in.single) throw Error(ErrorCode::invalid_argument, "parameters has two axes, expected one");
  InputArray low;
  if (given.given(1)) low = input_rows(given[1], "mean_low", DType::float32, self.features, kHost);
  {
    const GilReleased released;
    by_dtype(self.dtype, [&](auto t) {
      self.flow.set_parameters(view<decltype(t)>(in, self.flow.num_parameters()),
                               view<float>(low, given.given(1) ? self.features : 0));
    });
  }
  return py::none();
}

/// Calls f, without the GIL where it passes over more bytes than some microseconds allow.
template <class F>
void run_released_over(std::size_t bytes, F&& f) {
  constexpr std::size_t kLong = 1 << 17;
  if (bytes < kLong) return f();
  const GilReleased released;
  f();
}

/// Whether the flow's parameters are these, bit for bit.
py::object has_flat_parameters(const BoundFlow& self, const Arguments& given) {
  const InputArray in = input_rows(given[0], "parameters", self.dtype, self.flow.num_parameters(), kHost);
  if (!in.single) throw Error(ErrorCode::invalid_argument, "parameters has two axes, expected one");
  const auto bytes = static_cast<std::size_t>(self.flow.num_parameters() * size_of(self.dtype));
  const void* own = by_dtype(
      self.dtype, [&](auto t) { return static_cast<const void*>(self.flow.parameters<decltype(t)>().data()); });
  bool same = false;
  run_released_over(bytes, [&] { same = std::memcmp(own, in.data, bytes) == 0; });
  return py::bool_(same);
}

py::object flat_parameters(const py::object& self) {
  const auto& bound = self.cast<const BoundFlow&>();
  bound.require_ready();
  const void* data = by_dtype(
      bound.dtype, [&](auto t) { return static_cast<const void*>(bound.flow.parameters<decltype(t)>().data()); });
  return readonly_view(data, bound.dtype, bound.flow.num_parameters(), self);
}

py::object low_or_none(const std::vector<float>& mean_low) {
  if (mean_low.empty()) return py::none();
  const OutputArray array = new_array(DType::float32, static_cast<std::int64_t>(mean_low.size()), 0);
  std::copy(mean_low.begin(), mean_low.end(), static_cast<float*>(array.data));
  return array.array;
}

py::object mean_low(const BoundFlow& self) {
  const std::vector<float> low = [&] {
    const GilReleased released;  // whoever sets the parameters keeps this waiting
    return self.flow.mean_low();
  }();
  return low_or_none(low);
}

/// The flat parameters and what set_flat_parameters takes beside them, of one moment.
py::tuple copy_state(const BoundFlow& self) {
  const OutputArray copy = new_array(self.dtype, self.flow.num_parameters(), 0);
  std::vector<float> low;
  {
    // Also where they are few: whoever sets the parameters keeps this call waiting.
    const GilReleased released;
    by_dtype(self.dtype, [&](auto t) { self.flow.copy_parameters(view<decltype(t)>(copy), &low); });
  }
  return py::make_tuple(copy.array, low_or_none(low));
}

py::object copy_flat_parameters(const BoundFlow& self) { return copy_state(self)[0]; }

py::list tensors_of(const ParamLayout& layout) {
  py::list list;
  for (const TensorInfo& t : layout.tensors()) {
    list.append(py::make_tuple(t.name, py::tuple(py::cast(t.shape)), t.offset));
  }
  return list;
}

py::list layout(const BoundFlow& self) { return tensors_of(self.flow.layout()); }

// ---- training ----------------------------------------------------------------------------------------------------

FitOptions options_from(const py::dict& dict) {
  FitOptions o;
  for (const auto& [key, value] : dict) {
    const auto name = key.cast<std::string>();
    if (name == "epochs")
      o.epochs = value.cast<std::int64_t>();
    else if (name == "batch_size")
      o.batch_size = value.cast<std::int64_t>();
    else if (name == "learning_rate")
      o.learning_rate = value.cast<double>();
    else if (name == "schedule") {
      const auto schedule = value.cast<std::string>();
      if (schedule != "constant" && schedule != "cosine") {
        throw Error(ErrorCode::invalid_argument, "schedule is '" + schedule + "', expected 'constant' or 'cosine'");
      }
      o.schedule = schedule == "cosine" ? Schedule::cosine : Schedule::constant;
    } else if (name == "weight_decay")
      o.weight_decay = value.cast<double>();
    else if (name == "clip_norm")
      o.clip_norm = value.cast<double>();
    else if (name == "averaging")
      o.averaging = value.cast<double>();
    else if (name == "patience")
      o.patience = value.cast<std::int64_t>();
    else if (name == "validation_fraction")
      o.validation_fraction = value.cast<double>();
    else if (name == "max_round_trip")
      o.max_round_trip = value.cast<double>();
    else if (name == "standardize")
      o.standardize = parse_statistics(value.cast<std::string>());
    else if (name == "max_deviation")
      o.max_deviation = value.cast<double>();
    else if (name == "seed")
      o.seed = value.cast<std::uint64_t>();
    else if (name == "num_threads")
      o.num_threads = value.cast<int>();
    else if (name == "checkpoint")
      o.checkpoint = path_of(py::reinterpret_borrow<py::object>(value));
    else
      throw Error(ErrorCode::invalid_argument, "unknown training option '" + name + "'");
  }
  return o;
}

py::dict record_dict(const EpochRecord& r) {
  using namespace py::literals;
  return py::dict("epoch"_a = r.epoch, "train_loss"_a = r.train_loss, "validation_loss"_a = r.validation_loss,
                  "learning_rate"_a = r.learning_rate, "gradient_norm"_a = r.gradient_norm, "seconds"_a = r.seconds,
                  "round_trip"_a = r.round_trip);
}

/// Takes the GIL a few times a second: for signals, for the progress bar, for the caller's callback.
class PythonObserver final : public FitObserver {
 public:
  PythonObserver(py::object on_progress, py::object on_epoch)
      : on_progress_(std::move(on_progress)), on_epoch_(std::move(on_epoch)) {}

  bool on_progress(std::int64_t epoch, std::int64_t step, std::int64_t steps) override {
    const auto now = std::chrono::steady_clock::now();
    const bool first_step = epoch > 0 && !std::exchange(training_, epoch > 0);
    if (now - last_ < kProgressInterval && !first_step) return true;
    last_ = now;
    if (!ends_it_) park_if_finalizing();
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    // Epoch 0 is the preparation: there is nothing to report yet.
    return on_progress_.is_none() || epoch == 0 || goes_on(on_progress_(epoch, step, steps));
  }

  bool on_epoch(const EpochRecord& record) override {
    if (!ends_it_) park_if_finalizing();
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    return on_epoch_.is_none() || goes_on(on_epoch_(record_dict(record)));
  }

 private:
  static bool goes_on(const py::object& answer) { return answer.ptr() != Py_False; }

  py::object on_progress_, on_epoch_;
  std::chrono::steady_clock::time_point last_;
  bool ends_it_ = is_finalizing();  // as GilReleased's; made with the GIL
  bool training_ = false;           // the preparation is over
};

/// x, validation, options, on_progress, on_epoch
py::object fit_flow(BoundFlow& self, const Arguments& given) {
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
    if (held_out.rows == 0) throw Error(ErrorCode::invalid_argument, "validation has no rows, expected at least one");
  }
  const FitOptions fit_options = options_from(given.object(2).cast<py::dict>());
  PythonObserver observer(given.object(3), given.object(4));
  History history;
  {
    const GilReleased released;
    history = by_dtype(in.wide || held_out.wide ? DType::float64 : self.dtype, [&](auto t) {
      using T = decltype(t);
      return fit(self.flow, view<T>(in, in.rows * self.features), view<T>(held_out, held_out.rows * self.features),
                 fit_options, &observer);
    });
  }
  py::list epochs;
  for (const EpochRecord& r : history.epochs) epochs.append(record_dict(r));
  using namespace py::literals;
  return py::dict("epochs"_a = epochs, "best_epoch"_a = history.best_epoch, "best_loss"_a = history.best_loss,
                  "stop_reason"_a = history.stop_reason, "train_rows"_a = history.train_rows,
                  "validation_rows"_a = history.validation_rows, "standardized"_a = history.standardized,
                  "rows_left_out"_a = history.rows_left_out);
}

/// x, statistics
py::object initialize_from(BoundFlow& self, const Arguments& given) {
  const InputArray in = input_rows(given[0], "x", self.dtype, self.features, kHost, self.data);
  const Statistics statistics = parse_statistics(given.object(1).cast<std::string>());
  std::vector<std::string> how;
  {
    const GilReleased released;
    how = by_dtype(in.wide ? DType::float64 : self.dtype, [&](auto t) {
      return self.flow.initialize_from(view<decltype(t)>(in, in.rows * self.features), statistics);
    });
  }
  return py::cast(how);
}

/// Any integer that fits an int; set_num_threads knows the range.
int thread_count(const py::object& value) {
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) {
    throw py::type_error("num_threads is " + std::string(Py_TYPE(value.ptr())->tp_name) + ", expected an integer");
  }
  const Py_ssize_t threads = PyNumber_AsSsize_t(value.ptr(), nullptr);  // null: too large ones are clipped
  if (threads == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (threads < 0 || threads > std::numeric_limits<int>::max()) {
    throw py::value_error("num_threads is " + py::str(value).cast<std::string>() + ", expected 0 (automatic) to 4096");
  }
  return static_cast<int>(threads);
}

/// f with its first argument checked: Python can make a Flow without initialising it.
template <class R, class Self, class... A>
auto on_ready(R (*f)(Self&, A...)) {
  return [f](Self& self, A... arguments) -> R {
    self.require_ready();
    return f(self, std::forward<A>(arguments)...);
  };
}

py::object save(const BoundFlow& self, const Arguments& given) {
  const std::string text = path_of(given.object(0));
  {
    const GilReleased released;
    self.flow.save(text);
  }
  return py::none();
}

py::object reload(BoundFlow& self, const Arguments& given) {
  const std::string text = path_of(given.object(0));
  {
    const GilReleased released;
    self.flow.reload(text);
  }
  return py::none();
}

void swap(BoundFlow& self, BoundFlow& other) {
  other.require_ready();
  const GilReleased released;
  self.flow.swap(other.flow);
}

PyObject* get_num_threads(PyObject* self, void*) {
  return guarded([&] { return PyLong_FromLong(bound(self).flow.num_threads()); });
}

int set_num_threads(PyObject* self, PyObject* value, void*) {
  try {
    BoundFlow& flow = bound(self);
    if (value == nullptr) throw py::attribute_error("num_threads cannot be deleted");
    flow.flow.set_num_threads(thread_count(py::reinterpret_borrow<py::object>(value)));
    return 0;
  } catch (...) {
    set_python_error();
    return -1;
  }
}

PyGetSetDef kNumThreads = {
    "num_threads", &get_num_threads, &set_num_threads,
    "Threads of a batch call; small batches use fewer. 0: as many as this process may use, which\n"
    "NVPFLOW_NUM_THREADS, or else OMP_NUM_THREADS, can bound.",
    nullptr};

// Whoever sets the parameters keeps these waiting, as well.
std::vector<std::string> column_names(const BoundFlow& self) {
  const GilReleased released;
  return self.flow.column_names();
}

void set_column_names(BoundFlow& self, const std::vector<std::string>& names) {
  const GilReleased released;
  self.flow.set_column_names(names);
}

/// (log p, quantile or None), or None.
py::object as_python(const std::optional<Threshold>& threshold) {
  if (!threshold) return py::none();
  const bool known = !std::isnan(threshold->quantile);
  return py::make_tuple(threshold->log_prob, known ? py::object(py::float_(threshold->quantile)) : py::none());
}

py::object get_threshold(const BoundFlow& self) {
  std::optional<Threshold> threshold;
  {
    const GilReleased released;  // another thread may be replacing the parameters
    threshold = self.flow.threshold();
  }
  return as_python(threshold);
}

void set_threshold(BoundFlow& self, std::optional<double> log_prob, std::optional<double> quantile) {
  std::optional<Threshold> threshold;
  if (log_prob) threshold = Threshold{.log_prob = *log_prob, .quantile = quantile.value_or(std::nan(""))};
  const GilReleased released;
  self.flow.set_threshold(threshold);
}

/// What runs code of the caller's; see plain_methods.hpp for why pybind11 does not bind it.
void add_plain_methods(py::class_<BoundFlow>& type) {
  for (PyMethodDef* method : {
           plain<&nll>("nll", 1, 1, {"x"},
                       "nll($self, x)\n--\n\n"
                       "Mean negative log-likelihood of x [B, D], nats, summed in float64."),
           plain<&nll_gradient>("nll_gradient", 1, 1, {"x"},
                                "nll_gradient($self, x)\n--\n\n"
                                "Mean negative log-likelihood of x [B, D], nats, and its gradient [num_parameters] "
                                "(order of parameters())."),
           plain<&vjp>(
               "vjp", 1, 3, {"x", "grad_out", "grad_log_det", "direction", "wrt", "out"},
               "vjp($self, x, grad_out=None, grad_log_det=None, *, direction='forward', wrt='both', out=None)\n--\n\n"
               "Vector-Jacobian product of forward (or inverse): from the cotangents of the output [B, D] and of "
               "log_det\n"
               "[B] (None: zero) to those of x [B, D] and of the flat parameters [num_parameters]. wrt: 'both', or 'x' "
               "or\n"
               "'parameters' where the other is not wanted (None), which saves up to half of the work. out: a tuple\n"
               "(grad_x, grad_parameters) of arrays to write to."),
           plain<&log_prob_vjp>(
               "log_prob_vjp", 2, 2, {"x", "grad_log_prob", "wrt", "out"},
               "log_prob_vjp($self, x, grad_log_prob, *, wrt='both', out=None)\n--\n\n"
               "Vector-Jacobian product of log_prob: from its cotangent [B] to those of x [B, D] and of the flat "
               "parameters\n"
               "[num_parameters]; wrt and out as in vjp. With ones, wrt='x' is the score, the gradient of log p(x) by "
               "x."),
           plain<&save>("save", 1, 1, {"path"},
                        "save($self, path)\n--\n\n"
                        "Write the flow to one safetensors file, atomically: on failure an old file stays as it was."),
           plain<&reload>(
               "reload", 1, 1, {"path"},
               "reload($self, path)\n--\n\n"
               "Replace the weights by those of a model file of the same spec, while other threads may call the flow: "
               "each\n"
               "call sees the old or the new ones whole. The threshold is the file's. A file whose column names differ "
               "from the\n"
               "flow's is refused; the flow's stay. On an error (OSError, FileFormatError) nothing has changed."),
           plain<&set_flat_parameters>("_set_flat_parameters", 1, 2, {"parameters", "mean_low"}, nullptr),
           plain<&has_flat_parameters>("_has_flat_parameters", 1, 1, {"parameters"}, nullptr),
           plain<&log_prob_and_vjp>("_log_prob_and_vjp", 3, 3, {"x", "grad_log_prob", "out"}, nullptr),
           plain<&conditioner>("_conditioner", 2, 2, {"layer", "x"}, nullptr),
           plain<&initialize_from>("_initialize_from", 2, 2, {"x", "statistics"}, nullptr),
           plain<&fit_flow>("_fit", 5, 5, {"x", "validation", "options", "on_progress", "on_epoch"}, nullptr),
       }) {
    add_method(type, method);
  }
  PyObject* num_threads = PyDescr_NewGetSet(reinterpret_cast<PyTypeObject*>(type.ptr()), &kNumThreads);
  if (num_threads == nullptr) throw py::error_already_set();
  type.attr("num_threads") = py::reinterpret_steal<py::object>(num_threads);
}

void bind_flow(py::module_& module) {
  py::class_<BoundFlow> type(module, "Flow", "The compiled part of nvpflow.Flow.");
  type.def(py::init([](const BoundSpec& spec, std::uint64_t seed, const std::string& device,
                       const std::string& precision, const std::string& weights, const std::string& init) {
             const GilReleased released;
             return std::make_unique<BoundFlow>(spec, seed, parse_device(device), parse_precision(precision),
                                                parse_weights(weights), parse_init(init));
           }),
           py::arg("spec"), py::arg("seed") = 0, py::kw_only(), py::arg("device") = "cpu",
           py::arg("precision") = "float32", py::arg("weights") = "full", py::arg("init") = "fan_in")
      .def_property_readonly("spec", on_ready(+[](const BoundFlow& f) { return BoundSpec(f.flow.spec()); }))
      .def_property_readonly("num_parameters", on_ready(+[](const BoundFlow& f) { return f.flow.num_parameters(); }))
      .def_property_readonly("device", on_ready(+[](const BoundFlow& f) { return name_of(f.flow.device()); }),
                             "Where the flow runs: 'cpu' or 'cuda:N'.")
      .def_property_readonly("precision",
                             on_ready(+[](const BoundFlow& f) { return std::string(name_of(f.flow.precision())); }),
                             "How products of float32 numbers are formed: 'float32', 'tf32' or 'bfloat16'.")
      .def_property_readonly("weights",
                             on_ready(+[](const BoundFlow& f) { return std::string(name_of(f.flow.weights())); }),
                             "How the kernels are stored for computing: 'full' or 'bfloat16'.")
      .def("_swap", on_ready(&swap))
      .def("_statistics", on_ready(+[](const BoundFlow& f) { return std::string(name_of(f.statistics)); }))
      .def("_set_statistics",
           on_ready(+[](BoundFlow& f, const std::string& name) { f.statistics = parse_statistics(name); }))
      .def("_column_names", on_ready(&column_names))
      .def("_set_column_names", on_ready(&set_column_names))
      .def("_threshold", on_ready(&get_threshold))
      .def("_set_threshold", on_ready(&set_threshold))
      .def("_layout", on_ready(&layout))
      .def("_flat_parameters", &flat_parameters)
      .def("_copy_flat_parameters", on_ready(&copy_flat_parameters))
      .def("_copy_state", on_ready(&copy_state))
      .def("_mean_low", on_ready(&mean_low))
      .def("_noise", on_ready(&noise), py::arg("n"), py::arg("seed"));
  add_plain_methods(type);
  add_hot_methods(type);
}

/// path, expected
py::object load_file(const Arguments& given) {
  const std::string path = path_of(given.object(0));
  const py::object expected = given.object(1);
  LoadedModel model;
  const FlowSpec* spec = expected.is_none() ? nullptr : &expected.cast<const BoundSpec&>();
  {
    const GilReleased released;
    model = load_model(path, spec);
  }
  const std::int64_t count = static_cast<std::int64_t>(model.parameters.size()) / size_of(model.spec.dtype);
  const OutputArray flat = new_array(model.spec.dtype, count, 0);
  run_released_over(model.parameters.size(), [&] {
    std::memcpy(flat.data, model.parameters.data(), model.parameters.size());
    model.parameters = {};  // which takes its time, too
  });
  return py::make_tuple(BoundSpec(model.spec), flat.array, low_or_none(model.mean_low), model.column_names,
                        as_python(model.threshold));
}

PyObject* cpu_isa_text(PyObject*, PyObject*) {
  return guarded([] { return py::str(std::string(cpu_isa())).release().ptr(); });
}

PyMethodDef kCpuIsa = {
    "cpu_isa", cpu_isa_text, METH_NOARGS,
    "cpu_isa()\n--\n\n"
    "Instruction set of the CPU kernels: 'avx512', 'avx2', 'neon' or 'baseline' (NVPFLOW_ISA forces one)."};

py::tuple isas_available() {
  py::list names;
  std::istringstream text(cpu_isas_available());
  for (std::string name; std::getline(text, name, ',');) names.append(name);
  return py::tuple(names);
}

/// pybind11 passes over the constructor of an object that has been made, in silence, and over __setstate__.
void refuse_second_init(const py::object& type) {
  for (const char* name : {"__init__", "__setstate__"}) {
    if (!py::hasattr(type, name) || !type.attr("__dict__").contains(name)) continue;
    const py::object first = type.attr(name);
    type.attr(name) = py::cpp_function(
        [first, name](const py::handle& self, const py::args& args, const py::kwargs& keywords) {
          auto* instance = reinterpret_cast<py::detail::instance*>(self.ptr());
          if (instance->get_value_and_holder().instance_registered()) {
            throw py::type_error(std::string(Py_TYPE(self.ptr())->tp_name) + "." + name +
                                 "() was called on an object that has been made already; make a new one");
          }
          return first(self, *args, **keywords);
        },
        py::is_method(type));  // without a name: pybind11 looks at that
  }
}

PyObject* new_exception(py::module_& module, const char* name, PyObject* base, const char* doc) {
  PyObject* type = PyErr_NewExceptionWithDoc((std::string("nvpflow.") + name).c_str(), doc, base, nullptr);
  if (type == nullptr) throw py::error_already_set();
  module.attr(name) = py::handle(type);
  return type;  // kept for ever, as the module is
}

}  // namespace

BoundFlow::BoundFlow(const FlowSpec& spec, std::uint64_t seed, Device on, Precision precision, Weights weights,
                     Init init)
    : flow(spec, seed, on, precision, weights, init),
      dtype(spec.dtype),
      features(spec.input_size),
      device(on.kind == DeviceKind::cuda ? on.index : kHost),
      data(takes_float64_rows(spec) ? Kind::wide_data : Kind::data) {
  double flops = kRowFlops;
  for (const TensorInfo& t : flow.layout().tensors()) {
    flops += (t.role == TensorRole::bias ? kOutputFlops : 2.0) * static_cast<double>(t.size);
  }
  // Calls to a device's driver may wait, however few the rows are.
  const double least = device == kHost ? kReleaseFlops : 0;
  release_rows = std::max<std::int64_t>(1, static_cast<std::int64_t>(least / flops));
}

void raise_uninitialised() {
  PyErr_SetString(PyExc_TypeError, "this Flow was never initialised: call Flow.__init__ from the subclass");
  throw py::error_already_set();
}

void BoundFlow::require_ready() const {
  if (!ready) raise_uninitialised();
}

int BoundFlow::threads() const {
  const int wanted = flow.num_threads();
  return wanted > 0 ? wanted : available_threads();
}

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

void park_if_finalizing() {
  if (!is_finalizing()) return;
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

GilReleased::~GilReleased() {
  if (!ends_it_) park_if_finalizing();
#ifdef __GLIBCXX__
  // Python may still begin to end while this thread waits for the GIL; its pthread_exit unwinds the stack as an
  // exception of this kind, which must not leave a destructor.
  try {
    PyEval_RestoreThread(state_);
  } catch (abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  PyEval_RestoreThread(state_);
#endif
}

void set_python_error() {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const Error& error) {
    set_error(error);
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

// Python calls our PyInit__core, below, and that pybind11's, under this name.
#define PyInit__core nvpflow_init_core
PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  import_numpy();
  file_format_error = new_exception(module, "FileFormatError", PyExc_ValueError,
                                    "A model file is damaged, foreign, or newer than this library.");
  training_error =
      new_exception(module, "TrainingError", PyExc_ArithmeticError,
                    "Training met a NaN or infinite loss or gradient (the best weights are kept), or kept no epoch.");
  cuda_error =
      new_exception(module, "CudaError", PyExc_RuntimeError, "CUDA cannot be used here, or a CUDA device failed.");
  // NOLINTNEXTLINE(performance-unnecessary-value-param): pybind11 says what its translators take
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& error) {
      set_error(error);
    }
  });
  module.attr("__version__") = version();
  add_function(module, &kCpuIsa);
  module.def("cpu_isas_available", &isas_available, "Instruction sets that this build and this processor have.");
  module.def("activation_names", [] { return py::tuple(py::cast(activation_names())); });
  module.def("available_threads", &available_threads,
             "Threads this process may use (affinity, cgroup quota, NVPFLOW_NUM_THREADS or OMP_NUM_THREADS).");
  add_function(module, plain<&load_file>("_load_model", 1, 2, {"path", "expected"}, nullptr));
  module.def("cuda_why_unavailable", &cuda_why_unavailable, py::call_guard<GilReleased>());
  module.def("cuda_device_count", &cuda_device_count, py::call_guard<GilReleased>());
  module.def("cuda_device_name", &cuda_device_name, py::arg("index"), py::call_guard<GilReleased>());
  bind_device_array(module);
  bind_spec(module);
  bind_flow(module);
  refuse_second_init(module.attr("FlowSpec"));
  refuse_second_init(module.attr("Flow"));
  module.def("_layout_of", [](const BoundSpec& spec) { return tensors_of(ParamLayout(spec)); });
  module.def("_xla_handlers", &xla_handlers);
}

#undef PyInit__core

/// pybind11's entry asks for the GIL by PyGILState_Ensure, which waits for ever in a sub-interpreter.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return nvpflow_init_core();
  PyErr_SetString(
      PyExc_ImportError,
      "nvpflow cannot be imported in a sub-interpreter, expected the main interpreter of its process; under "
      "mod_wsgi set WSGIApplicationGroup %{GLOBAL}, elsewhere use threads or processes");
  return nullptr;
}

}  // namespace nvpflow::python
