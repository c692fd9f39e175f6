// The device's copy of a flow: its layers, and its parameters in the order that the kernels read. The layers never
// change and are shared; the parameters are packed by the device from their flat form.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../cpp/src/lower.hpp"
#include "../cpp/src/wide_rows.hpp"
#include "kernels.hpp"
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
  enum class Heads { scale, translation, both };
  /// The parameters behind one output of a dense layer: a bias, and of input i that at kernel + i * stride. stride 0:
  /// none, the output is 0.
  struct Output {
    std::int64_t bias = -1, kernel = -1, stride = 0;
  };
  /// Where the numbers of a dense layer come from.
  struct DenseSource {
    std::vector<std::int64_t> rows;  // of the tensors, for each packed input; empty: as they are
    std::vector<Output> outputs;     // empty: launch_pack_linear forms them, no copies of parameters
  };
  /// Rows of the tensors for each input that a network reads, and features for each that it transforms; empty: as they
  /// are.
  struct NetworkPlaces {
    std::vector<std::int64_t> rows, columns;
  };

  void add(const LoweredCoupling& from);
  void add(const LoweredSpline& from);
  void add(const LoweredDiagonal& from);
  void add(const LoweredLinear& from);
  template <class From>
  NetworkPlaces begin(Kind kind, const From& from, Layer<T>& layer);
  NetworkPlaces find_features(const Places& conditioning, const Places& transformed, bool gathered, Layer<T>& layer);
  template <class AddLast>
  void add_network(const LoweredNetwork& from, const NetworkPlaces& places, AddLast add_last);
  void enter_block(const LoweredNetwork& from, std::size_t block, std::size_t blocks, Dense& dense);
  void add_hidden(const LoweredDense& from, std::vector<std::int64_t> rows, Dense dense);
  void add_heads(const LoweredDense& from, std::vector<std::int64_t> rows, const std::vector<std::int64_t>& columns,
                 Heads heads, Dense dense);
  void add_numbers(const LoweredDense& from, std::vector<std::int64_t> rows, const std::vector<std::int64_t>& columns,
                   const Layer<T>& layer, Dense dense);
  void add_dense(std::int64_t in, std::int64_t out, DenseSource source, Dense dense);
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
