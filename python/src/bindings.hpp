// What each bind_*.cpp adds to the module or to the type Flow.
#pragma once

#include <pybind11/pybind11.h>

#include "call_context.hpp"

namespace nvpflow::python {

/// Instruction sets, threads, CUDA devices.
void bind_machine(py::module_& module);
/// FlowSpec, the names of activations, and the layout of a spec's parameters.
void bind_spec(py::module_& module);
/// Flow and ConditionedFlow, with the methods below.
void bind_flow(py::module_& module);
/// DeviceArray: nvpflow.cuda's own array, for callers without a library of their own.
void bind_device_array(py::module_& module);
/// Which rows fit trains on.
void bind_training(py::module_& module);
void bind_adam(py::module_& module);
void bind_arrow(py::module_& module);
/// Loading a model file.
void bind_files(py::module_& module);

/// nll, vjp and their like.
void add_gradient_methods(py::class_<BoundFlow>& type);
void add_gradient_methods(py::class_<BoundCondition>& type);
/// fit, and setting the first layer from data.
void add_training_methods(py::class_<BoundFlow>& type);
/// fit_density.
void add_density_methods(py::class_<BoundFlow>& type);
/// save and reload.
void add_file_methods(py::class_<BoundFlow>& type);
/// The methods that programs call a million times a second: plain C functions, because pybind11's array arguments cost
/// several times as much as the smallest flow.
void add_hot_methods(py::class_<BoundFlow>& type);
void add_hot_methods(py::class_<BoundCondition>& type);

}  // namespace nvpflow::python
