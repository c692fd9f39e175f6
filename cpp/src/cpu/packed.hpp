// The CPU's own copy of the parameters: blocks of one vector's width, as kernels.hpp describes, and the program that
// points into it. Rebuilt when parameters change; never written to a file.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "../parallel.hpp"
#include "kernels.hpp"

namespace nvpflow::cpu {

/// Memory at 64 bytes, kept when it is large enough. Throws Error(out_of_memory) with the size.
class AlignedBuffer {
 public:
  void* reserve(std::int64_t bytes);

 private:
  struct Free {
    void operator()(void* p) const noexcept;
  };
  std::unique_ptr<void, Free> memory_;
  std::int64_t capacity_ = 0;
};

template <class T>
class Packed {
 public:
  /// weights: bfloat16 rounds the kernels (Dense::narrow).
  Packed(const FlowSpec& spec, const ParamLayout& layout, const Kernels<T>& kernels, Weights weights);
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  /// parameters: the flat buffer. Nobody else may use this object meanwhile.
  void pack(const T* parameters);
  /// The transposed weights, built on first use after pack(); safe from several threads.
  void ensure_transposed() const;
  const Program<T>& program() const { return program_; }

 private:
  struct DenseSource {
    std::int64_t kernel[2], bias[2];  // offsets in the flat buffer; the head joins scale and translation
    std::int64_t columns[2];          // outputs of each; columns[1] is 0 for hidden layers
  };

  void add_coupling(const FlowSpec& spec, const ParamLayout& layout, std::size_t index);
  void add_standardize(const ParamLayout& layout, std::size_t index);
  void pack_kernel(const Dense<T>& dense, const T* kernel, std::int64_t first, std::int64_t n);
  void pack_dense(const DenseSource& source, Dense<T>& dense, const T* parameters);
  void keep_narrow();
  void narrow(Dense<T>& d);
  void pack_standardize(Layer<T>& layer, const T* parameters);
  void choose_tiles(const Kernels<T>& kernels);

  std::int64_t lanes_;
  void (*const transpose_)(const Dense<T>&, T*);
  std::vector<Dense<T>> dense_;
  std::vector<DenseSource> sources_;
  std::vector<DenseGradient> gradients_;
  std::vector<Layer<T>> layers_;
  Program<T> program_;
  AlignedBuffer weights_, narrow_;
  mutable AlignedBuffer transposed_;
  std::int64_t transposed_size_ = 0;  // elements
  mutable ForkSafeMutex transpose_mutex_;
  mutable std::atomic<bool> transposed_ready_{false};
};

}  // namespace nvpflow::cpu
