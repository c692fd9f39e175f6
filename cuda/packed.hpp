// The device's copy of a flow: its layers, and its parameters in the order that the kernels read. The layers never
// change and are shared; the parameters are packed by the device from their flat form.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../cpp/src/lower.hpp"
#include "../cpp/src/wide_rows.hpp"
#include "kernels.cuh"
#include "runtime.hpp"

namespace nvpflow::cuda {

/// Layers of one flow on one device, and where each packed element comes from.
template <class T>
class Layers {
 public:
  /// On the current device, with `stream` for the copies; waits for them.
  Layers(const FlowSpec& spec, const ParamLayout& layout, Stream stream);

  /// With pointers of the host, for plans.
  const Program<T>& on_host() const { return host_; }
  /// With pointers of the device but for the parameters.
  const Program<T>& on_device() const { return device_; }
  /// For each packed or transposed element the flat parameter that it is, or -1. In device memory.
  const std::int64_t* packed_source() const { return static_cast<const std::int64_t*>(packed_source_.data()); }
  const std::int64_t* transposed_source() const { return static_cast<const std::int64_t*>(transposed_source_.data()); }

 private:
  /// Which heads of a coupling a dense layer makes; those that it has not are zero.
  enum class Heads { none, scale, translation, both };
  /// Where the numbers of a dense layer come from.
  struct DenseSource {
    Heads head = Heads::none;                           // its outputs alternate between scale and translation
    std::vector<std::int64_t> rows = {}, columns = {};  // of the tensors, for each packed input and output; empty: as
                                                        // they are
    bool formed = false;                                // by launch_pack_linear: no copies of parameters
  };
  /// DenseSource::rows of a network's first layer, DenseSource::columns of its last.
  struct NetworkPlaces {
    std::vector<std::int64_t> rows, columns;
  };

  void add(const LoweredCoupling& from);
  void add(const LoweredSpline&) {}  // make_cuda_backend refuses it
  void add(const LoweredDiagonal& from);
  void add(const LoweredLinear& from);
  static Role role_of(const LoweredNetwork& network, std::size_t j, Heads heads);
  void add_network(const LoweredNetwork& from, const NetworkPlaces& places, Heads heads);
  void enter_block(const LoweredNetwork& from, std::size_t block, std::size_t blocks, Dense& dense);
  void add_dense(const LoweredDense& from, DenseSource source, Dense kind);
  std::int64_t reserve_packed(std::int64_t elements);
  void add_matrix();
  void fill_sources(const Dense& dense, const DenseSource& source);
  std::int64_t keep(const std::vector<std::int64_t>& places);

  std::vector<Layer<T>> layers_;
  std::vector<Dense> dense_;
  std::vector<DenseSource> sources_;
  std::vector<std::int32_t> places_;
  std::vector<std::int64_t> packed_from_, transposed_from_;  // empty once they are on the device
  struct Copy {
    std::int64_t to, from, count;
  };
  std::vector<Copy> copies_;  // of parameters as they are, into packed_from_
  Program<T> host_, device_;
  Memory device_layers_{Memory::Kind::device}, device_dense_{Memory::Kind::device},
      device_places_{Memory::Kind::device};
  Memory packed_source_{Memory::Kind::device}, transposed_source_{Memory::Kind::device};
};

/// Parameters as the kernels read them.
template <class T>
class Packed {
 public:
  explicit Packed(std::shared_ptr<const Layers<T>> layers);

  /// parameters: flat, in device memory. wanted: of the matrices of linear layers.
  void pack(const T* parameters, Matrices wanted, Stream stream);
  const Program<T>& program() const { return program_; }

  /// Of flows with takes_float64_rows, after pack(): makes rest(), as on the CPU, of the same parameters in device
  /// memory, of which it zeroes those of the first layer; of_host: in the host's.
  void pack_rest(T* parameters, const float* of_host, const float* mean_low, Stream stream);
  const Program<T>& rest() const { return rest_; }
  const WideRows& first() const { return first_; }

 private:
  void pack_into(const Program<T>& program, const T* parameters, Matrices wanted, bool transposed, Stream stream);

  std::shared_ptr<const Layers<T>> layers_;
  Memory linear_workspace_{Memory::Kind::device};
  Memory packed_{Memory::Kind::device}, transposed_{Memory::Kind::device}, rest_packed_{Memory::Kind::device};
  Program<T> program_, rest_;
  WideRows first_;
};

/// Copies to device memory and waits; for what is copied once.
void upload(Memory& to, const void* from, std::int64_t bytes, const char* what, Stream stream);

}  // namespace nvpflow::cuda
