#include "call_context.hpp"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>

#include "bindings.hpp"
#include "errors.hpp"
#include "layout.hpp"

namespace nvpflow::python {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

std::string rows_shape(const BoundFlow& flow, const std::string& rows) {
  return std::string("(").append(rows).append(", ").append(std::to_string(flow.context_size)).append(")");
}

std::string row_shape(const BoundFlow& flow) {
  return std::string("(").append(std::to_string(flow.context_size)).append(",)");
}

/// As the core wants it: never null, also where nothing is read.
const void* rows_behind(const InputArray& array) {
  static constexpr unsigned char kNothing = 0;
  return array.data == nullptr ? &kNothing : array.data;
}

BoundFlow& flow_of(const py::object& object) {
  if (!py::isinstance<BoundFlow>(object)) {
    raise(PyExc_TypeError, std::string("flow is ") + Py_TYPE(object.ptr())->tp_name + ", expected a Flow");
  }
  auto& flow = object.cast<BoundFlow&>();
  flow.require_ready();
  return flow;
}

}  // namespace

InputArray read_context_rows(const BoundFlow& flow, PyObject* given, const char* name, const std::string& rows) {
  if (flow.context_size == 0) {
    fail(std::string(name) + " is " + Py_TYPE(given)->tp_name +
         ", expected None: the flow has no context; build it with context_size=");
  }
  if (given == nullptr || given == Py_None) {
    fail(std::string(name) + " is missing, expected an array " + rows_shape(flow, rows) + " or " + row_shape(flow) +
         ": the flow is a density p(x | context)");
  }
  return input_rows(given, name, flow.dtype, flow.context_size, flow.device, Kind::context, &flow.flow);
}

py::object context_row(const BoundFlow& flow, PyObject* given) {
  const InputArray row = read_context_rows(flow, given, "context", "1");
  if (!row.single) {
    fail("context has shape " + rows_shape(flow, std::to_string(row.rows)) + ", expected " + row_shape(flow) +
         ": a view has one context; context= of the flow's methods takes one for each row");
  }
  if (row.on_device) return numpy_copy(row.data, flow.dtype, {flow.context_size}, row.device, row.stream);
  return row.owner;
}

BoundCondition::BoundCondition(py::object object, const py::object& context)
    : owner(std::move(object)), flow(&flow_of(owner)), view([&] {
        const InputArray row = input_rows(context.ptr(), "context", flow->dtype, flow->context_size, kHost);
        if (!row.single) fail("context has two axes, expected (C,)");
        return by_dtype(flow->dtype, [&](auto t) {
          return flow->flow.condition(nvpflow::python::view<decltype(t)>(row, flow->context_size));
        });
      }()) {
  rows.rows = view.context().data();
  rows.repeat = ContextRows::kForAll;
  rows.folded = view.context().folded();
}

template <>
Caller Caller::of<BoundCondition>(PyObject* self) {
  const auto& condition = bound_as<BoundCondition>(self);
  condition.flow->require_ready();
  return {*condition.flow, &condition.rows};
}

GivenContext read_context(const Caller& caller, PyObject* given, const InputArray& x) {
  const BoundFlow& flow = caller.flow;
  GivenContext context{read_context_rows(flow, given, "context", "B"), {}};
  const InputArray& array = context.array;
  require_beside(array, "context", x);
  if (!array.single && (x.single || array.rows != x.rows)) {
    const std::string count = std::to_string(array.rows), shape = rows_shape(flow, count);
    const bool repeats = x.rows == 1 && array.rows > 1;
    fail("context has shape " + shape + ", expected " +
         (x.single ? row_shape(flow) + " beside one row"
                   : rows_shape(flow, std::to_string(x.rows)) + ", one for each row, or " + row_shape(flow) +
                         ", one for all") +
         (repeats ? "; np.tile(x, (" + count + ", 1)) puts the row beside each context" : ""));
  }
  context.rows.rows = rows_behind(array);
  if (array.single) context.rows.repeat = ContextRows::kForAll;
  return context;
}

GivenContext sample_context(const Caller& caller, PyObject* given) {
  if (caller.condition != nullptr) return {{}, *caller.condition};
  if (caller.flow.context_size == 0 && (given == nullptr || given == Py_None)) return {};
  GivenContext context{read_context_rows(caller.flow, given, "context", "M"), {}};
  context.rows.rows = rows_behind(context.array);
  context.rows.repeat = ContextRows::kForAll;
  return context;
}

}  // namespace nvpflow::python
