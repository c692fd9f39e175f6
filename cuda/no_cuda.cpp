// The CUDA backend's functions in a build without CUDA: they say so.

#include <nvpflow/error.hpp>

#include "../cpp/src/backend.hpp"

namespace nvpflow {

std::string cuda_why_unavailable() {
  return "this nvpflow was built without CUDA (" NVPFLOW_CUDA_LEFT_OUT
         "); `NVPFLOW_CUDA=ON pip install .` builds it with CUDA, and fetches its compiler";
}

int cuda_device_count() { return 0; }

namespace {

[[noreturn]] void refuse() { throw Error(ErrorCode::device, "CUDA cannot be used: " + cuda_why_unavailable()); }

}  // namespace

std::string cuda_device_name(int) { refuse(); }

std::unique_ptr<Backend> make_cuda_backend(const FlowSpec&, const ParamLayout&, int, Precision) { refuse(); }

struct DeviceMemory::State {};
DeviceMemory::DeviceMemory(int, std::int64_t) { refuse(); }
void* DeviceMemory::data() const { return nullptr; }
int DeviceMemory::device() const { return 0; }
void DeviceMemory::upload(const void*, std::int64_t) { refuse(); }
void cuda_download(int, void*, const void*, std::int64_t, void*) { refuse(); }
void cuda_wait(int, void*, void*) { refuse(); }
void cuda_synchronize(int, void*) { refuse(); }
int cuda_device_of(const void*) { return -1; }

}  // namespace nvpflow
