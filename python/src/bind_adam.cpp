// Adam's state as Python keeps it, and updates for loops of a caller's own.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include <nvpflow/adam.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/train.hpp>

#include "adam_state.hpp"
#include "array_types.hpp"
#include "arrays.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "errors.hpp"
#include "gil.hpp"
#include "host_arrays.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {

std::optional<AdamState> adam_from(const py::object& given) {
  if (given.is_none()) return std::nullopt;
  AdamState state;
  state.steps = given.attr("steps").cast<std::int64_t>();
  state.epochs = given.attr("epochs").cast<std::int64_t>();
  for (const auto& [name, moment] :
       {std::pair{"first_moment", &state.first_moment}, std::pair{"second_moment", &state.second_moment}}) {
    const HostValues values = host_values(given.attr(name).ptr());
    if (values.dtype != "float64") throw Error(ErrorCode::type_mismatch, "adam holds moments of " + values.dtype);
    const auto* begin = static_cast<const double*>(values.data);
    moment->assign(begin, begin + values.bytes / static_cast<std::int64_t>(sizeof(double)));
  }
  return state;
}

void give_adam(const AdamState& state, const py::object& to) {
  to.attr("steps") = state.steps;
  to.attr("epochs") = state.epochs;
  for (const auto& [name, moment] :
       {std::pair{"first_moment", &state.first_moment}, std::pair{"second_moment", &state.second_moment}}) {
    const FlatArray array(DType::float64, static_cast<std::int64_t>(moment->size()));
    std::copy(moment->begin(), moment->end(), static_cast<double*>(array.data));
    to.attr(name) = array.array;
  }
}

namespace {

/// nvpflow._core.Adam: Adam for one flow, whose steps follow each other.
struct BoundAdam {
  py::object owner;  // of the flow
  BoundFlow* flow;
  Adam adam;
  bool busy = false;  // read and written with the GIL

  explicit BoundAdam(py::object object)
      : owner(std::move(object)), flow(&owner.cast<BoundFlow&>()), adam((flow->require_ready(), flow->flow)) {}

  void require_idle() const {
    if (busy) raise(PyExc_RuntimeError, "another thread is in a step of this Adam, expected one thread at a time");
  }
};

/// adam, gradient, learning_rate, weight_decay, clip_norm
py::object step(const Arguments& given) {
  auto& self = given.object(0).cast<BoundAdam&>();
  const InputArray gradient =
      input_rows(given[1], "gradient", self.flow->dtype, self.flow->flow.num_parameters(), kHost);
  if (!gradient.single) throw Error(ErrorCode::invalid_argument, "gradient has two axes, expected one");
  const AdamOptions options{.learning_rate = real_number(given[2], "learning_rate"),
                            .weight_decay = real_number(given[3], "weight_decay"),
                            .clip_norm = real_number(given[4], "clip_norm")};
  self.require_idle();
  self.busy = true;
  const struct Done {
    bool& busy;
    ~Done() { busy = false; }
  } done{self.busy};
  double norm = 0;
  {
    const GilReleased released;
    norm = by_dtype(self.flow->dtype, [&](auto t) {
      return self.adam.step(self.flow->flow, view<decltype(t)>(gradient, self.flow->flow.num_parameters()), options);
    });
  }
  return py::float_(norm);
}

/// adam, state
py::object take_state(const Arguments& given) {
  auto& self = given.object(0).cast<BoundAdam&>();
  self.require_idle();
  if (const std::optional<AdamState> state = adam_from(given.object(1))) self.adam.set_state(*state);
  return py::none();
}

/// adam, state
py::object give_state(const Arguments& given) {
  const auto& self = given.object(0).cast<const BoundAdam&>();
  self.require_idle();
  give_adam(self.adam.state(), given.object(1));
  return py::none();
}

}  // namespace

void bind_adam(py::module_& module) {
  py::class_<BoundAdam>(module, "Adam", "The compiled part of nvpflow.Adam.")
      .def(py::init([](const py::object& flow) { return std::make_unique<BoundAdam>(flow); }), py::arg("flow"));
  for (PyMethodDef* function :
       {plain<&step>("_adam_step", 5, 5, {"adam", "gradient", "learning_rate", "weight_decay", "clip_norm"}, nullptr),
        plain<&take_state>("_adam_take_state", 2, 2, {"adam", "state"}, nullptr),
        plain<&give_state>("_adam_give_state", 2, 2, {"adam", "state"}, nullptr)}) {
    add_function(module, function);
  }
}

}  // namespace nvpflow::python
