// What this build and this machine have: instruction sets, threads, CUDA devices.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include <nvpflow/device.hpp>
#include <nvpflow/threads.hpp>

#include "bindings.hpp"
#include "errors.hpp"
#include "gil.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {
namespace {

PyObject* cpu_isa_text(PyObject*, PyObject*) {
  return guarded([] { return py::str(std::string(cpu_isa())).release().ptr(); });
}

PyMethodDef kCpuIsa = {
    "cpu_isa", cpu_isa_text, METH_NOARGS,
    "cpu_isa()\n--\n\n"
    "Instruction set of the CPU kernels: 'avx512', 'avx2', 'neon' or 'baseline' (NVPFLOW_ISA forces one)."};

PyObject* available_threads_number(PyObject*, PyObject*) {
  return guarded([] { return py::int_(available_threads()).release().ptr(); });
}

PyMethodDef kAvailableThreads = {
    "available_threads", available_threads_number, METH_NOARGS,
    "available_threads()\n--\n\n"
    "Threads that a flow uses by itself (num_threads 0): the processors of the affinity mask, cut to the cgroup's\n"
    "quota and to the environment's NVPFLOW_NUM_THREADS, or else OMP_NUM_THREADS. Counted once, at the first flow or\n"
    "the first call. RuntimeError where NVPFLOW_NUM_THREADS is no number above 0."};

py::tuple isas_available() {
  py::list names;
  std::istringstream text(cpu_isas_available());
  for (std::string name; std::getline(text, name, ',');) names.append(name);
  return py::tuple(names);
}

}  // namespace

void bind_machine(py::module_& module) {
  add_function(module, &kCpuIsa);
  module.def("cpu_isas_available", &isas_available, "Instruction sets that this build and this processor have.");
  add_function(module, &kAvailableThreads);
  module.def("cuda_why_unavailable", &cuda_why_unavailable, py::call_guard<GilReleased>());
  module.def("cuda_device_count", &cuda_device_count, py::call_guard<GilReleased>());
  module.def("cuda_device_name", &cuda_device_name, py::arg("index"), py::call_guard<GilReleased>());
}

}  // namespace nvpflow::python
