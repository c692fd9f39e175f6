// The CPU's own copy of the parameters: blocks of one vector's width, as kernels.hpp describes, and the program that
// points into it. Rebuilt when parameters change; never written to a file.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "../base_numbers.hpp"
#include "../lower.hpp"
#include "../memory.hpp"
#include "../parallel.hpp"
#include "../wide_rows.hpp"
#include "isa.hpp"
#include "kernels.hpp"
#include "lu_matrix.hpp"

namespace nvpflow::cpu {

template <class T>
class Packed {
 public:
  /// weights: bfloat16 rounds the kernels (Dense::narrow). wide_blocks: of Dense.
  Packed(const FlowSpec& spec, const ParamLayout& layout, const Kernels<T>& kernels, Weights weights,
         bool wide_blocks = prefers_wide_blocks())
      : Packed(spec, lower(spec, layout), kernels, weights, wide_blocks) {}
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  /// parameters: the flat buffer. transposed: with the transposed weights, in one go, where weights are not rounded,
  /// without the rest() and without the matrices of linear layers that only the inverse reads: for training. mean_low:
  /// Backend::set_parameters. No other thread may use this object meanwhile.
  void pack(const T* parameters, bool transposed = false, int threads = 1, const float* mean_low = nullptr);
  /// The transposed weights, built on first use after pack(); safe from several threads.
  void ensure_transposed() const;
  const Program<T>& program() const { return program_; }
  /// Of the parameters: what is folded from others is out of date.
  std::uint64_t version() const { return version_; }
  void set_version(std::uint64_t version) { version_ = version; }

  /// Of flows with takes_float64_rows: the program with the identity in place of the first layer, whose log-determinant
  /// it keeps, and that layer, to be put in front of it or behind it.
  const Program<T>& rest() const { return rest_; }
  const WideRows& first() const { return first_; }

 private:
  struct DenseSource {
    std::int64_t kernel[kMaxHeads], bias[kMaxHeads];  // offsets in the flat buffer; the last layer joins the heads
    std::int64_t columns[kMaxHeads];                  // outputs of each; 0 where there is none
  };

  Packed(const FlowSpec& spec, const Lowered& lowered, const Kernels<T>& kernels, Weights weights, bool wide_blocks);
  void reserve(const Lowered& lowered);
  template <class From>
  Layer<T> layer_of(Kind kind, const From& from);
  void add(const LoweredCoupling& from);
  void add(const LoweredDiagonal& from);
  void add(const LoweredLinear& from);
  void add(const LoweredSpline& from);
  void add_dense(const LoweredDense& from);
  Network<T> add_network(const LoweredNetwork& from);
  const std::int64_t* keep(const std::vector<std::int64_t>& places);
  FeatureRows rows_of(const Places& places);
  void pack_kernel(const Dense<T>& dense, const T* kernel, std::int64_t first, std::int64_t n, std::int64_t begin,
                   std::int64_t end);
  void pack_bias(const DenseSource& source, Dense<T>& dense, const T* parameters);
  void pack_inputs(const DenseSource& source, Dense<T>& dense, const T* parameters, std::int64_t begin,
                   std::int64_t end, T* transposed);
  void keep_narrow();
  void narrow(Dense<T>& d);
  void pack_diagonal(Layer<T>& layer, const T* parameters);
  void pack_context(const T* parameters);
  void pack_constants(const Splines<T>& splines, const T* parameters);
  void pack_linear(Layer<T>& layer, LuMatrix<T>& matrix, const T* parameters, bool training, int threads);
  bool is_plain() const;
  std::int64_t constants_size(const Splines<T>& splines) const;
  void place_rest(const FlowSpec& spec);
  void pack_rest(const T* parameters, const float* mean_low);
  void choose_tiles(const Kernels<T>& kernels, bool wide_blocks);
  void place_transposed() const;
  /// f(dense layer) for those of couplings, then those of linear layers.
  template <class F>
  void each_dense(F&& f) const {
    for (const Dense<T>& d : dense_) f(const_cast<Dense<T>&>(d));
    for (const LuMatrix<T>& matrix : matrices_) {
      f(const_cast<Dense<T>&>(matrix.linear().forward));
      f(const_cast<Dense<T>&>(matrix.linear().inverse));
    }
  }

  std::int64_t lanes_;
  std::uint64_t version_ = 0;
  void (*const transpose_)(const Dense<T>&, std::int64_t, std::int64_t, T*);
  std::vector<Dense<T>> dense_;
  std::vector<DenseSource> sources_;
  std::vector<DenseGradient> gradients_;
  std::vector<BlockAffine<T>> affines_;
  std::vector<Layer<T>> layers_;
  std::vector<std::size_t> diagonal_, linear_;  // which of them
  std::deque<LuMatrix<T>> matrices_;            // of the linear ones
  std::deque<Splines<T>> splines_;
  std::deque<std::vector<std::int64_t>> places_;
  BaseNumbers<T> base_;
  Program<T> program_, rest_;
  std::vector<Layer<T>> rest_layers_;
  std::vector<T> context_statistics_;  // mean and exp(-log_std), [2 C]
  std::vector<T> identity_;            // zeros, then ones, each as long as the vectors that read them
  WideRows first_;
  AlignedBuffer weights_, narrow_;
  mutable AlignedBuffer transposed_;
  std::int64_t transposed_size_ = 0;  // elements
  mutable ForkSafeMutex transpose_mutex_;
  mutable std::atomic<bool> transposed_ready_{false};
};

}  // namespace nvpflow::cpu
