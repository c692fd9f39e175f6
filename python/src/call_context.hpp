// Under which context a call runs: that of context=, or the one that a view of the flow has.
#pragma once

#include <string>

#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>

#include "arrays.hpp"
#include "bound_flow.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {

/// nvpflow._core.ConditionedFlow: a flow under one context.
struct BoundCondition : ZeroedMemory {
  static constexpr const char* kName = "ConditionedFlow";
  py::object owner;  // of the flow
  const BoundFlow* flow;
  ConditionedFlow view;
  ContextRows rows;
  bool ready = true;

  /// context: a NumPy array, as context_row gives it.
  BoundCondition(py::object flow, const py::object& context);
  /// Throws where the object was never initialised.
  void require_ready() const {
    if (!ready) raise_uninitialised(kName);
  }
};

template <>
Caller Caller::of<BoundCondition>(PyObject* self);

/// The context of one call, and what keeps it alive.
struct GivenContext {
  InputArray array;  // empty: none, or that of a view
  ContextRows rows;

  bool given() const { return static_cast<bool>(array.owner); }
};

/// What is given as context= under this name, [n, C] or [C]; throws where it is missing or superfluous. rows: what n is
/// in a message.
InputArray read_context_rows(const BoundFlow& flow, PyObject* given, const char* name, const std::string& rows);
/// One context [C] as a NumPy array.
py::object context_row(const BoundFlow& flow, PyObject* given);

/// Of a flow that has a context, or of an argument that is superfluous; throws where it is missing, or of another shape
/// than x asks for.
GivenContext read_context(const Caller& caller, PyObject* given, const InputArray& x);

/// The context of a call on the rows of x: context= as [B, C] or [C].
inline GivenContext context_of(const Caller& caller, PyObject* given, const InputArray& x) {
  if (caller.condition != nullptr) return {{}, *caller.condition};
  if (caller.flow.context_size == 0 && (given == nullptr || given == Py_None)) return {};
  return read_context(caller, given, x);
}

/// An output must not overlap it.
inline void refuse_overlap(const OutputArray& out, const char* name, const GivenContext& context) {
  if (context.given()) refuse_overlap(out, name, context.array, "context", context.array.bytes);
}

/// The context of a sample: context= as [M, C] or [C].
GivenContext sample_context(const Caller& caller, PyObject* given);

}  // namespace nvpflow::python
