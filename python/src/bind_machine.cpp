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
  module.def("available_threads", &available_threads,
             "Threads this process may use (affinity, cgroup quota, NVPFLOW_NUM_THREADS or OMP_NUM_THREADS).");
  module.def("cuda_why_unavailable", &cuda_why_unavailable, py::call_guard<GilReleased>());
  module.def("cuda_device_count", &cuda_device_count, py::call_guard<GilReleased>());
  module.def("cuda_device_name", &cuda_device_name, py::arg("index"), py::call_guard<GilReleased>());
}

}  // namespace nvpflow::python
