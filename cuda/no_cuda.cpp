// The CUDA backend's functions in a build without CUDA: they say so.

#include <nvpflow/backend.hpp>
#include <nvpflow/error.hpp>

namespace nvpflow {

std::string cuda_why_unavailable() {
  return "this nvpflow was built without CUDA; on a machine with a CUDA device install it with the environment variable "
         "NVPFLOW_CUDA=ON, which fetches CUDA's compiler for the build: NVPFLOW_CUDA=ON pip install .";
}

int cuda_device_count() { return 0; }

std::string cuda_device_name(int) { throw Error(ErrorCode::device, cuda_why_unavailable()); }

std::unique_ptr<Backend> make_cuda_backend(const FlowSpec&, const ParamLayout&, int, Precision) {
  throw Error(ErrorCode::device, cuda_why_unavailable());
}

}  // namespace nvpflow
