// The object behind nvpflow._core.FlowSpec.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

#include <nvpflow/spec.hpp>

namespace nvpflow::python {

namespace py = pybind11;

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

/// A layout in Python: (name, shape, offset) of each tensor.
py::list tensors_of(const ParamLayout& layout);

}  // namespace nvpflow::python
