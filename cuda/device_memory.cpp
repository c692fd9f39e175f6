// Device memory and streams for callers that have no CUDA of their own: the Python bindings.

#include <cstdint>
#include <memory>

#include <nvpflow/device.hpp>

#include "kernels.hpp"
#include "packed.hpp"
#include "runtime.hpp"
#include "staging.hpp"

namespace nvpflow {

struct DeviceMemory::State {
  int device;
  cuda::Memory memory{cuda::Memory::Kind::device};
};

DeviceMemory::DeviceMemory(int device, std::int64_t bytes) {
  const cuda::OnDevice on(device);
  state_ = std::make_shared<State>();
  state_->device = device;
  state_->memory.reserve(bytes, "an array");
}

void* DeviceMemory::data() const { return state_->memory.data(); }
int DeviceMemory::device() const { return state_->device; }

void DeviceMemory::upload(const void* from, std::int64_t bytes) {
  const cuda::OnDevice on(state_->device);
  const cuda::OwnedStream stream;
  cuda::upload(state_->memory, from, bytes, "an array", stream);
}

void cuda_download(int device, void* to, const void* from, std::int64_t bytes, void* stream) {
  const cuda::OnDevice on(device);
  cuda::synchronize(static_cast<cuda::Stream>(stream));
  cuda::Lane().receive(to, from, bytes);
}

void cuda_wait(int device, void* waiting, void* for_stream) {
  const cuda::OnDevice on(device);
  const cuda::OwnedEvent event;
  cuda::record(event, static_cast<cuda::Stream>(for_stream));
  cuda::wait(static_cast<cuda::Stream>(waiting), event);
}

void cuda_synchronize(int device, void* stream) {
  const cuda::OnDevice on(device);
  cuda::synchronize(static_cast<cuda::Stream>(stream));
}

int cuda_device_of(const void* pointer) {
  cuda::enter_cuda();
  return cuda::device_of(pointer);
}

}  // namespace nvpflow
