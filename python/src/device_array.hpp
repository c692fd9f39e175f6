// nvpflow.cuda's own array: memory of a device with a shape.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

namespace nvpflow::python {

/// The legacy default stream, as DLPack and __cuda_array_interface__ write it; CUDA takes it for a stream, too.
inline constexpr std::intptr_t kLegacyStream = 1;

inline std::intptr_t address(const void* stream) { return reinterpret_cast<std::intptr_t>(stream); }
inline void* stream_at(std::intptr_t value) { return reinterpret_cast<void*>(value); }

/// Memory of a device with a shape, for callers without a library of their own.
struct DeviceArray {
  DeviceMemory memory;
  DType dtype;
  std::vector<std::int64_t> shape;
  void* stream;  // on which its contents are made

  DeviceArray(DeviceMemory m, DType t, std::vector<std::int64_t> s, void* on)
      : memory(std::move(m)), dtype(t), shape(std::move(s)), stream(on) {}

  std::int64_t size() const {
    std::int64_t count = 1;
    for (const std::int64_t n : shape) count *= n;
    return count;
  }
  std::int64_t bytes() const { return size() * size_of(dtype); }
};

}  // namespace nvpflow::python
