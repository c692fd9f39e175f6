// A flow on the CPU, without its parameters: what inference and training share. Splits rows among threads and calls the
// kernel table; the parameters come with each call, as a program.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../memory.hpp"
#include "../parallel.hpp"
#include "isa.hpp"
#include "kernels.hpp"

namespace nvpflow::cpu {

template <class T>
const Kernels<T>& chosen_kernels() {
  if constexpr (sizeof(T) == 4) {
    return *chosen_isa().float32;
  } else {
    return *chosen_isa().float64;
  }
}

/// Working memory of the calling thread, kept for its next call.
template <class T>
T* thread_scratch(std::int64_t elements) {
  thread_local AlignedBuffer buffer;
  return static_cast<T*>(buffer.reserve(elements * static_cast<std::int64_t>(sizeof(T))));
}

/// The same for a context that is folded for one call.
template <class T>
T* thread_folded(std::int64_t elements) {
  thread_local AlignedBuffer buffer;
  return static_cast<T*>(buffer.reserve(elements * static_cast<std::int64_t>(sizeof(T))));
}

/// The context of rows from `begin` on.
template <class T>
ContextRows<T> part_of(ContextRows<T> context, std::int64_t begin) {
  if (context.index != nullptr) context.index += begin;
  context.first += begin;
  return context;
}

/// The sum of f(begin, end) over parts of [0, count), each of `size` but the last, in order whatever the threads.
template <std::int64_t size, class F>
double sum_of_parts(std::int64_t count, int threads, F f) {
  constexpr std::int64_t kParts = 64;
  double total = 0;
  for (std::int64_t first = 0; first < count; first += kParts * size) {
    double sums[kParts] = {};
    parallel_for(std::min(count - first, kParts * size), size, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; i += size) sums[i / size] = f(first + i, first + std::min(i + size, end));
    });
    for (const double sum : sums) total += sum;
  }
  return total;
}

template <class T>
class CpuFlow {
 public:
  /// Rows whose log-probabilities are added up in one sum.
  static constexpr std::int64_t kSumRows = 1024;

  /// program: any of the flow's; those of later calls differ in what they point to only.
  CpuFlow(const FlowSpec& spec, const ParamLayout& layout, const Kernels<T>& kernels, const Program<T>& program);

  std::int64_t tile_rows() const { return tile_rows_; }
  std::int64_t gradient_rows() const { return gradient_rows_; }
  /// Rows that are worth a thread of their own, a multiple of the tile's.
  std::int64_t grain() const { return grain_; }
  /// Elements of scratch that the kernels need for transforms.
  std::int64_t transform_scratch() const { return transform_scratch_; }
  /// Threads worth starting for so many rows.
  int threads_for(std::int64_t rows, int threads) const;

  void transform(const Program<T>& program, const TransformCall<T>& call, std::int64_t rows, int threads) const {
    if (rows <= grain_ || threads <= 1) {
      kernels_.transform(program, call, 0, rows, thread_scratch<T>(transform_scratch_));
      return;
    }
    parallel_for(rows, tile_rows_, threads_for(rows, threads), [&](std::int64_t begin, std::int64_t end) {
      kernels_.transform(program, call, begin, end, thread_scratch<T>(transform_scratch_));
    });
  }

  /// Sum over the rows of weight(row) log p, in float64, in a fixed order; find(begin, end, log_prob, scratch) writes
  /// log p of rows [begin, end), at most kSumRows. scratch: transform_scratch() elements, and `more`.
  template <class F, class W>
  double sum_log_prob(std::int64_t rows, std::int64_t more, int threads, F find, W weight) const {
    return sum_of_parts<kSumRows>(rows, threads_for(rows, threads), [&](std::int64_t begin, std::int64_t end) {
      T* scratch = thread_scratch<T>(transform_scratch_ + more + kSumRows);
      T* log_prob = scratch + transform_scratch_ + more;
      find(begin, end, log_prob, scratch);
      double sum = 0;
      for (std::int64_t i = 0; i < end - begin; ++i) sum += weight(begin + i) * static_cast<double>(log_prob[i]);
      return sum;
    });
  }

  /// Writes or adds to the flat gradient (null: not wanted), and returns the sum of log p where the call is one of the
  /// NLL. program: with the transposed weights. The same sums in the same order whatever the threads.
  double gradient(const Program<T>& program, GradientCall<T> call, std::int64_t rows, T* gradient, bool accumulate,
                  int threads) const;

 private:
  /// A part of the parameters whose gradient one thread forms at a time.
  struct Task {
    std::int64_t layer;
    std::int32_t part;
    std::int64_t first, last;
  };

  void plan_tasks(const Program<T>& program);
  void add_tasks(std::int64_t layer, std::int32_t part, PartSize size);
  std::int64_t tiles_per_thread() const;
  std::int64_t part_rows(std::int64_t tiles, int team) const;
  double gradient_by_team(const Program<T>& program, GradientCall<T> call, std::int64_t rows, T* gradient,
                          bool accumulate, int team) const;
  T* start_products(const Program<T>& program, T* products) const;
  void finish_gradient(const Program<T>& program, const GradientCall<T>& call, T* gradient, bool accumulate,
                       int threads) const;

  const Kernels<T>& kernels_;
  const std::int64_t features_, num_parameters_;
  const double flops_per_row_;
  std::int64_t tile_rows_, gradient_rows_, transform_scratch_, tape_size_;
  std::int64_t grain_ = 0;
  std::vector<Task> tasks_;  // those of layers, then those of the base
  std::size_t num_layer_tasks_ = 0;
  std::int64_t base_begin_ = 0, base_end_ = 0;  // the base's parameters
};

}  // namespace nvpflow::cpu
