// nvpflow._core.Flow: the object, its parameters and its properties.

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

#include "arrays.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "call_context.hpp"
#include "errors.hpp"
#include "gil.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {
namespace {

/// Arithmetic of about five microseconds: from here on the GIL is released.
constexpr double kReleaseFlops = 3e5;
/// What an output of a dense layer costs beside its multiply-adds (an activation), and a row beside its layers, in
/// FLOPs of the same time.
constexpr double kOutputFlops = 40, kRowFlops = 3000;

Kind kind_of_rows(const FlowSpec& spec) {
  if (takes_float64_rows(spec)) return Kind::wide_data;
  return is_bounded(spec.base) ? Kind::bounded_data : Kind::data;
}

py::object noise(const BoundFlow& self, std::int64_t rows, std::uint64_t seed) {
  OutputArray z = new_array(self.dtype, rows, self.features);
  run_released(self, rows, [&] { self.flow.noise_unchecked(seed, 0, rows, z.data); });
  return object_of(std::move(z));
}

py::object conditioner(const Caller& caller, const Arguments& given) {
  const BoundFlow& self = caller.flow;
  const auto layer = given.object(0).cast<std::int64_t>();
  const InputArray in = input_rows(given[1], "x", self.dtype, self.features, kHost);
  const FlowSpec& spec = self.flow.spec();
  const bool known = layer >= 0 && layer < static_cast<std::int64_t>(spec.layers.size());
  const auto* coupling = known ? std::get_if<Coupling>(&spec.layers[static_cast<std::size_t>(layer)]) : nullptr;
  const std::int64_t width = coupling != nullptr ? coupling->transformed.count(spec.input_size) : 1;  // refused below
  const GivenContext context = context_of(caller, given[2], in);
  const std::int64_t context_rows = in.single || context.array.single ? 1 : in.rows;
  OutputArray s = new_array(self.dtype, in.rows, width);
  OutputArray t = new_array(self.dtype, in.rows, width);
  run_released(self, in.rows, [&] {
    by_dtype(self.dtype, [&](auto v) {
      using T = decltype(v);
      const Context c = context.given() ? Context(view<T>(context.array, context_rows * self.context_size)) : Context();
      self.flow.conditioner(layer, view<T>(in, in.rows * self.features), view<T>(s), view<T>(t), c);
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

py::object mean_low(const BoundFlow& self) {
  const std::vector<float> low = [&] {
    const GilReleased released;  // whoever sets the parameters keeps this waiting
    return self.flow.mean_low();
  }();
  return low_or_none(low);
}

/// The flat parameters and what set_flat_parameters takes beside them, of one moment.
py::tuple copy_state(const BoundFlow& self) {
  const FlatArray copy(self.dtype, self.flow.num_parameters());
  const auto size = static_cast<std::size_t>(self.flow.num_parameters());
  std::vector<float> low;
  {
    // Also where they are few: whoever sets the parameters keeps this call waiting.
    const GilReleased released;
    by_dtype(self.dtype, [&](auto t) {
      using T = decltype(t);
      self.flow.copy_parameters(std::span<T>(static_cast<T*>(copy.data), size), &low);
    });
  }
  return py::make_tuple(copy.array, low_or_none(low));
}

/// An array for a flow's parameters, not initialised.
py::object new_flat_parameters(const BoundSpec& spec) { return FlatArray(spec.dtype, ParamLayout(spec).size()).array; }

py::object copy_flat_parameters(const BoundFlow& self) { return copy_state(self)[0]; }

py::list layout(const BoundFlow& self) { return tensors_of(self.flow.layout()); }

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

std::vector<std::string> context_names(const BoundFlow& self) {
  const GilReleased released;
  return self.flow.context_names();
}

void set_context_names(BoundFlow& self, const std::vector<std::string>& names) {
  const GilReleased released;
  self.flow.set_context_names(names);
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

py::object get_import_report(const BoundFlow& self) {
  std::string text;
  {
    const GilReleased released;
    text = self.flow.import_report();
  }
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

void set_import_report(BoundFlow& self, const std::optional<std::string>& text) {
  const GilReleased released;
  self.flow.set_import_report(text.value_or(""));
}

py::object condition_context(const py::object& self) {
  const auto& condition = self.cast<const BoundCondition&>();
  condition.require_ready();
  return readonly_view(condition.rows.rows, condition.flow->dtype, condition.flow->context_size, self);
}

py::object read_context_row(BoundFlow& self, const Arguments& given) { return context_row(self, given[0]); }

/// What takes arrays of the caller's; see plain_methods.hpp for why pybind11 does not bind it.
void add_plain_methods(py::class_<BoundFlow>& type) {
  for (PyMethodDef* method : {
           plain<&set_flat_parameters>("_set_flat_parameters", 1, 2, {"parameters", "mean_low"}, nullptr),
           plain<&has_flat_parameters>("_has_flat_parameters", 1, 1, {"parameters"}, nullptr),
           plain<&read_context_row>("_context_row", 1, 1, {"context"}, nullptr),
           plain<&conditioner>("_conditioner", 2, 2, {"layer", "x", "context"}, nullptr),
       }) {
    add_method(type, method);
  }
  PyObject* num_threads = PyDescr_NewGetSet(reinterpret_cast<PyTypeObject*>(type.ptr()), &kNumThreads);
  if (num_threads == nullptr) throw py::error_already_set();
  type.attr("num_threads") = py::reinterpret_steal<py::object>(num_threads);
}

void bind_condition(py::module_& module) {
  py::class_<BoundCondition> type(module, "ConditionedFlow", "The compiled part of nvpflow.ConditionedFlow.");
  type.def(py::init([](const py::object& flow, const py::object& context) {
             return std::make_unique<BoundCondition>(flow, context);
           }),
           py::arg("flow"), py::arg("context"))
      .def_property_readonly("flow", on_ready(+[](const BoundCondition& c) { return c.owner; }),
                             "The flow that the view looks at.")
      .def_property_readonly("context", &condition_context, "What it is conditioned on: [C], read-only.");
  add_gradient_methods(type);
  add_hot_methods(type);
}

}  // namespace

py::object low_or_none(const std::vector<float>& mean_low) {
  if (mean_low.empty()) return py::none();
  const OutputArray array = new_array(DType::float32, static_cast<std::int64_t>(mean_low.size()), 0);
  std::copy(mean_low.begin(), mean_low.end(), static_cast<float*>(array.data));
  return array.array;
}

py::object as_python(const std::optional<Threshold>& threshold) {
  if (!threshold) return py::none();
  const bool known = !std::isnan(threshold->quantile);
  return py::make_tuple(threshold->log_prob, known ? py::object(py::float_(threshold->quantile)) : py::none());
}

BoundFlow::BoundFlow(const FlowSpec& spec, std::uint64_t seed, Device on, Precision precision, Weights weights,
                     Init init)
    : flow(spec, seed, on, precision, weights, init),
      dtype(spec.dtype),
      features(spec.input_size),
      context_size(spec.context_size),
      device(on.kind == DeviceKind::cuda ? on.index : kHost),
      data(kind_of_rows(spec)) {
  const double multiply_adds = flow.layout().multiply_adds_per_row();
  const double flops = kRowFlops + flow.layout().flops_per_row() +
                       kOutputFlops * (static_cast<double>(flow.layout().size()) - multiply_adds);
  // Calls to a device's driver may wait, however few the rows are.
  const double least = device == kHost ? kReleaseFlops : 0;
  release_rows = std::max<std::int64_t>(1, static_cast<std::int64_t>(least / flops));
}

BoundFlow::~BoundFlow() {
  run_released_over(static_cast<std::size_t>(flow.num_parameters() * size_of(dtype)),
                    [this] { const Flow gone = std::move(flow); });
}

void raise_uninitialised(const char* type) {
  const std::string name(type);
  raise(PyExc_TypeError, "this " + name + " was never initialised: call " + name + ".__init__ from the subclass");
}

void BoundFlow::require_ready() const {
  if (!ready) raise_uninitialised(kName);
}

void bind_flow(py::module_& module) {
  module.def("_new_flat_parameters", &new_flat_parameters);
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
      .def("_context_names", on_ready(&context_names))
      .def("_set_context_names", on_ready(&set_context_names))
      .def("_threshold", on_ready(&get_threshold))
      .def("_set_threshold", on_ready(&set_threshold))
      .def("_import_report", on_ready(&get_import_report))
      .def("_set_import_report", on_ready(&set_import_report))
      .def("_layout", on_ready(&layout))
      .def("_flat_parameters", &flat_parameters)
      .def("_copy_flat_parameters", on_ready(&copy_flat_parameters))
      .def("_copy_state", on_ready(&copy_state))
      .def("_mean_low", on_ready(&mean_low))
      .def("_noise", on_ready(&noise), py::arg("n"), py::arg("seed"));
  add_plain_methods(type);
  add_gradient_methods(type);
  add_training_methods(type);
  add_density_methods(type);
  add_file_methods(type);
  add_hot_methods(type);
  bind_condition(module);
}

}  // namespace nvpflow::python
