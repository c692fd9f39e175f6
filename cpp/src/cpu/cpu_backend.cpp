// The CPU backend: keeps the packed parameters, splits rows among threads, calls the kernel table.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <nvpflow/backend.hpp>
#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "../float_mode.hpp"
#include "../host_training.hpp"
#include "../left_right.hpp"
#include "../memory.hpp"
#include "../parallel.hpp"
#include "isa.hpp"
#include "kernels.hpp"
#include "packed.hpp"

namespace nvpflow {
namespace {

using cpu::GradientCall;
using cpu::Kernels;
using cpu::Packed;
using cpu::Program;
using cpu::TransformCall;

/// Below this much arithmetic a call is not worth another thread.
constexpr double kFlopsPerThread = 4e6;
/// Multiply-adds per row of one weight-gradient task.
constexpr std::int64_t kTaskSize = 16384;
/// Inputs of a task are a multiple of this: whole register blocks, and whole vectors of every width, or a kernel that
/// takes inputs by vectors would read past the end of a row.
constexpr std::int64_t kTaskRows = 16;
/// Tape that each of several threads may fill before they meet.
constexpr std::int64_t kTapeBytesPerThread = 3 << 19;
/// Rows whose log-probabilities are added up in one sum.
constexpr std::int64_t kSumRows = 1024;
/// Standardized rows of a gradient that are kept at a time.
constexpr std::int64_t kStagedBytes = 4 << 20;
/// Parameters that one thread updates at a time.
constexpr std::int64_t kUpdateSize = 1 << 14;

/// Working memory of the calling thread, kept for its next call.
template <class T>
T* thread_scratch(std::int64_t elements) {
  thread_local AlignedBuffer buffer;
  return static_cast<T*>(buffer.reserve(elements * static_cast<std::int64_t>(sizeof(T))));
}

template <class T>
const Kernels<T>& chosen_kernels() {
  if constexpr (sizeof(T) == 4) {
    return *cpu::chosen_isa().float32;
  } else {
    return *cpu::chosen_isa().float64;
  }
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

/// A part of the parameters whose gradient one thread forms at a time.
struct Task {
  std::int64_t layer;
  std::int32_t dense;
  std::int64_t first, last;
};

template <class T>
class CpuBackend final : public Backend {
 public:
  CpuBackend(FlowSpec spec, ParamLayout layout, Weights weights)
      : spec_(std::move(spec)),
        layout_(std::move(layout)),
        weights_(weights),
        kernels_(chosen_kernels<T>()),
        packed_([this] { return make_packed(); }) {
    const Program<T>& program = packed_.initial().program();
    tile_rows_ = program.tile_rows;
    gradient_rows_ = program.gradient_rows;
    transform_scratch_ = kernels_.transform_scratch(program);
    staged_size_ = takes_float64_rows(spec_) ? tile_rows_ * spec_.input_size : 0;
    tape_size_ = kernels_.tape_size(program, gradient_rows_);
    plan_tasks(program);
    const double rows = std::ceil(kFlopsPerThread / flops_per_row_);
    grain_ = std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(rows / static_cast<double>(tile_rows_)))) *
             tile_rows_;
  }

  void set_parameters(const void* parameters, const float* mean_low) override {
    const FloatMode mode;
    if (training_threads_ > 0)
      return packed_.initial().pack(static_cast<const T*>(parameters), true, training_threads_);
    packed_.rewrite([this] { return make_packed(); },
                    [&](Packed<T>& packed) { packed.pack(static_cast<const T*>(parameters), false, 1, mean_low); });
  }

  void transform(Direction direction, const void* in, std::int64_t rows, void* out, void* log_det,
                 const Execution& how) const override {
    TransformCall<T> call;
    call.inverse = direction == Direction::inverse;
    call.in = static_cast<const T*>(in);
    call.out = static_cast<T*>(out);
    call.log_det = static_cast<T*>(log_det);
    run(call, rows, how);
  }

  void log_prob(const void* x, std::int64_t rows, void* out, const Execution& how) const override {
    TransformCall<T> call;
    call.in = static_cast<const T*>(x);
    call.log_prob = static_cast<T*>(out);
    run(call, rows, how);
  }

  void sample(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* x,
              const Execution& how) const override {
    TransformCall<T> call;
    call.inverse = true;
    call.out = static_cast<T*>(x);
    call.seed = seed;
    call.first_row = first_row;
    run(call, rows, how);
  }

  void noise(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* z,
             const Execution& how) const override {
    const FloatMode mode;
    const Reading packed(packed_);
    parallel_for(rows, grain_, how.threads, [&](std::int64_t begin, std::int64_t end) {
      T* scratch = thread_scratch<T>(transform_scratch_);
      kernels_.noise(packed->program(), seed, first_row, begin, end, static_cast<T*>(z), scratch);
    });
  }

  void conditioner(std::int64_t layer, const void* in, std::int64_t rows, void* s, void* t,
                   const Execution& how) const override {
    const FloatMode mode;
    const Reading packed(packed_);
    parallel_for(rows, grain_, how.threads, [&](std::int64_t begin, std::int64_t end) {
      T* scratch = thread_scratch<T>(transform_scratch_);
      kernels_.conditioner(packed->program(), layer, static_cast<const T*>(in), begin, end, static_cast<T*>(s),
                           static_cast<T*>(t), scratch);
    });
  }

  void vjp(Direction direction, const void* in, std::int64_t rows, const void* grad_out, const void* grad_log_det,
           void* grad_in, void* grad_parameters, bool accumulate, const Execution& how) const override {
    GradientCall<T> call;
    call.inverse = direction == Direction::inverse;
    call.in = static_cast<const T*>(in);
    call.grad_out = static_cast<const T*>(grad_out);
    call.grad_log_det = static_cast<const T*>(grad_log_det);
    call.grad_in = static_cast<T*>(grad_in);
    run_gradient(call, rows, static_cast<T*>(grad_parameters), accumulate, how);
  }

  void log_prob_vjp(const void* x, std::int64_t rows, const void* grad_log_prob, void* log_prob, void* grad_x,
                    void* grad_parameters, bool accumulate, const Execution& how) const override {
    GradientCall<T> call;
    call.in = static_cast<const T*>(x);
    call.density = true;
    call.grad_log_det = static_cast<const T*>(grad_log_prob);
    call.log_prob = static_cast<T*>(log_prob);
    call.grad_in = static_cast<T*>(grad_x);
    run_gradient(call, rows, static_cast<T*>(grad_parameters), accumulate, how);
  }

  double nll_gradient(const void* x, const std::int64_t* index, std::int64_t rows, std::int64_t total_rows,
                      void* grad_parameters, bool accumulate, const Execution& how) const override {
    const FloatMode mode;
    GradientCall<T> call;
    call.in = static_cast<const T*>(x);
    call.index = index;
    call.nll = true;
    call.nll_factor = static_cast<T>(1.0 / static_cast<double>(total_rows));
    return run_gradient(call, rows, static_cast<T*>(grad_parameters), accumulate, how);
  }

  double sum_log_prob(const void* x, const std::int64_t* index, std::int64_t rows,
                      const Execution& how) const override {
    const FloatMode mode;
    const Reading packed(packed_);
    const bool wide = how.float64_rows || packed->first().is_split();
    return sum_of_parts<kSumRows>(rows, threads_for(rows, how.threads), [&](std::int64_t begin, std::int64_t end) {
      T* log_prob = thread_scratch<T>(call_scratch()) + transform_scratch_ + staged_size_;
      TransformCall<T> call;
      call.in = index == nullptr ? data_at(x, begin, how) : static_cast<const T*>(x);
      call.index = index == nullptr ? nullptr : index + begin;
      call.log_prob = log_prob;
      if (wide) {
        transform_wide(*packed, call, 0, end - begin, how);
      } else {
        kernels_.transform(packed->program(), call, 0, end - begin, thread_scratch<T>(call_scratch()));
      }
      double sum = 0;
      for (std::int64_t i = 0; i < end - begin; ++i) sum += static_cast<double>(log_prob[i]);
      return sum;
    });
  }

  void adam_step(const AdamStep& step, std::int64_t count, const void* gradient, void* first_moment,
                 void* second_moment, void* parameters, int threads) const override {
    const FloatMode mode;
    const auto t = static_cast<double>(step.step);
    const cpu::AdamCoefficients c = {step.beta1,
                                     step.beta2,
                                     step.epsilon,
                                     step.gradient_factor,
                                     step.learning_rate / (1 - std::pow(step.beta1, t)),
                                     1 / std::sqrt(1 - std::pow(step.beta2, t)),
                                     step.learning_rate * step.weight_decay};
    parallel_for(count, kUpdateSize, threads, [&](std::int64_t begin, std::int64_t end) {
      kernels_.adam(c, end - begin, static_cast<const T*>(gradient) + begin, static_cast<T*>(first_moment) + begin,
                    static_cast<T*>(second_moment) + begin, static_cast<T*>(parameters) + begin);
    });
  }

  double sum_of_squares(const void* values, std::int64_t count, int threads) const override {
    const FloatMode mode;
    return sum_of_parts<kUpdateSize>(count, threads, [&](std::int64_t begin, std::int64_t end) {
      return kernels_.sum_of_squares(static_cast<const T*>(values) + begin, end - begin);
    });
  }

  void prepare() const override {
    const std::int64_t elements = call_scratch();
    T* scratch = thread_scratch<T>(elements);
    // Written, so that the pages are there, and used, so that whatever is made on first use has been made.
    std::memset(scratch, 0, static_cast<std::size_t>(elements) * sizeof(T));
    const std::vector<T> x(static_cast<std::size_t>(tile_rows_ * spec_.input_size));
    sum_log_prob(x.data(), nullptr, tile_rows_, Execution(1));
  }

  std::unique_ptr<Training> begin_training(const TrainingData& data, const void* parameters, std::int64_t,
                                           int threads) const override {
    // In full also where the flow's own weights are rounded: small steps would be lost.
    auto backend = std::make_unique<CpuBackend>(spec_, layout_, Weights::full);
    backend->training_threads_ = threads;
    return std::make_unique<HostTraining<T>>(std::move(backend), layout_, data, parameters, threads);
  }

 private:
  using Reading = typename LeftRight<Packed<T>>::Reading;

  std::unique_ptr<Packed<T>> make_packed() const {
    return std::make_unique<Packed<T>>(spec_, layout_, kernels_, weights_);
  }

  void plan_tasks(const Program<T>& program) {
    for (std::int64_t k = 0; k < program.num_layers; ++k) {
      const cpu::Layer<T>& layer = program.layers[k];
      if (layer.kind == Kind::standardize) {
        tasks_.push_back({k, 0, 0, spec_.input_size});
        flops_per_row_ += 2.0 * static_cast<double>(spec_.input_size);
        continue;
      }
      for (std::int32_t j = 0; j < layer.num_dense; ++j) {
        const std::int64_t in = layer.dense[j].in, out = layer.dense[j].out;
        flops_per_row_ += 2.0 * static_cast<double>(in) * static_cast<double>(out);
        const std::int64_t strip = std::max<std::int64_t>(1, kTaskSize / out / kTaskRows) * kTaskRows;
        for (std::int64_t i = 0; i < in; i += strip) tasks_.push_back({k, j, i, std::min(in, i + strip)});
      }
    }
  }

  /// Threads worth starting for so many rows.
  int threads_for(std::int64_t rows, int threads) const {
    const double worth = static_cast<double>(rows) * flops_per_row_ / kFlopsPerThread;
    return worth >= static_cast<double>(threads) ? threads : std::max(1, static_cast<int>(worth));
  }

  /// Elements of scratch that every call but those of gradients does with.
  std::int64_t call_scratch() const { return transform_scratch_ + staged_size_ + kSumRows; }

  void run(const TransformCall<T>& call, std::int64_t rows, const Execution& how) const {
    const FloatMode mode;
    const Reading packed(packed_);
    if (how.float64_rows || packed->first().is_split()) return run_wide(*packed, call, rows, how);
    if (rows <= grain_ || how.threads <= 1) {
      kernels_.transform(packed->program(), call, 0, rows, thread_scratch<T>(transform_scratch_));
      return;
    }
    parallel_for(rows, tile_rows_, threads_for(rows, how.threads), [&](std::int64_t begin, std::int64_t end) {
      kernels_.transform(packed->program(), call, begin, end, thread_scratch<T>(transform_scratch_));
    });
  }

  // ---- the first layer in float64 ----------------------------------------------------------------------------------

  /// Row r of data, as a call's pointer of T: where rows are float64, it only says where they begin.
  const T* data_at(const void* data, std::int64_t r, const Execution& how) const {
    const std::int64_t element = size_of(how.float64_rows ? DType::float64 : spec_.dtype);
    const void* at = static_cast<const unsigned char*>(data) + r * spec_.input_size * element;
    return static_cast<const T*>(at);
  }

  /// Rows [begin, begin + count) of data x, or those that index names, as the second layer sees them.
  void standardize(const Packed<T>& packed, const T* x, const std::int64_t* index, std::int64_t begin,
                   std::int64_t count, T* y, const Execution& how) const {
    if constexpr (sizeof(T) == 4) packed.first().standardize(x, how.float64_rows, index, begin, count, y);
  }

  void run_wide(const Packed<T>& packed, const TransformCall<T>& call, std::int64_t rows, const Execution& how) const {
    parallel_for(rows, tile_rows_, threads_for(rows, how.threads),
                 [&](std::int64_t begin, std::int64_t end) { transform_wide(packed, call, begin, end, how); });
  }

  /// Rows [begin, end) tile by tile, so that what is staged stays in the cache.
  void transform_wide(const Packed<T>& packed, const TransformCall<T>& call, std::int64_t begin, std::int64_t end,
                      const Execution& how) const {
    T* scratch = thread_scratch<T>(call_scratch());
    T* staged = scratch + transform_scratch_;
    for (std::int64_t r = begin; r < end; r += tile_rows_) {
      const std::int64_t count = std::min(tile_rows_, end - r);
      TransformCall<T> tile = call;
      tile.index = nullptr;
      tile.first_row += static_cast<std::uint64_t>(r);
      if (call.log_det != nullptr) tile.log_det += r;
      if (call.log_prob != nullptr) tile.log_prob += r;
      if (call.inverse) {
        if (call.in != nullptr) tile.in += r * spec_.input_size;
        tile.out = staged;
      } else {
        standardize(packed, call.in, call.index, r, count, staged, how);
        tile.in = staged;
        if (call.out != nullptr) tile.out += r * spec_.input_size;
      }
      kernels_.transform(packed.rest(), tile, 0, count, scratch);
      if constexpr (sizeof(T) == 4) {
        if (call.inverse) packed.first().restore(staged, count, call.out, how.float64_rows, r);
      }
    }
  }

  /// The gradient of a call on rows of data, in chunks of whole tiles: the same sums in the same order as in one go.
  double run_gradient_wide(const Packed<T>& packed, const GradientCall<T>& call, std::int64_t rows, T* gradient,
                           bool accumulate, const Execution& how) const {
    const std::int64_t features = spec_.input_size,
                       tile_bytes = gradient_rows_ * features * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t chunk = gradient_rows_ * std::max<std::int64_t>(1, kStagedBytes / tile_bytes);
    std::vector<T> before;  // the gradient of the mean, which is formed for standardized rows
    T* to_mean = gradient == nullptr ? nullptr : gradient + layout_.tensors().front().offset;
    if (gradient != nullptr && accumulate) {
      before.assign(to_mean, to_mean + features);
      std::fill_n(to_mean, features, T(0));
    }
    std::vector<T> staged(static_cast<std::size_t>(std::min(chunk, rows) * features));
    double total = 0;
    std::int64_t first = 0;
    do {
      const std::int64_t count = std::min(chunk, rows - first);
      parallel_for(count, tile_rows_, threads_for(count, how.threads), [&](std::int64_t begin, std::int64_t end) {
        standardize(packed, call.in, call.index, first + begin, end - begin, staged.data() + begin * features, how);
      });
      GradientCall<T> part = call;
      part.in = staged.data();
      part.index = nullptr;
      if (call.grad_out != nullptr) part.grad_out += first * features;
      if (call.grad_log_det != nullptr) part.grad_log_det += first;
      if (call.log_prob != nullptr) part.log_prob += first;
      if (call.grad_in != nullptr) part.grad_in += first * features;
      total += gradient_of(packed.rest(), part, count, gradient, accumulate || first > 0, how.threads);
      if (call.grad_in != nullptr) scale_gradient(packed, part.grad_in, count);
      first += count;
    } while (first < rows);
    if (gradient != nullptr) {
      scale_gradient(packed, to_mean, 1);
      for (std::size_t j = 0; j < before.size(); ++j) to_mean[j] += before[j];
    }
    return total;
  }

  static void scale_gradient(const Packed<T>& packed, T* g, std::int64_t rows) {
    if constexpr (sizeof(T) == 4) packed.first().scale_gradient(g, rows);
  }

  /// Tiles between two meetings of the threads. Meetings cost, most of all on a busy machine; so does memory.
  std::int64_t tiles_per_thread() const {
    return std::clamp<std::int64_t>(kTapeBytesPerThread / (tape_size_ * static_cast<std::int64_t>(sizeof(T))), 1, 8);
  }

  double run_gradient(const GradientCall<T>& call, std::int64_t rows, T* gradient, bool accumulate,
                      const Execution& how) const {
    const FloatMode mode;
    const Reading packed(packed_);
    packed->ensure_transposed();
    const bool wide = !call.inverse && (how.float64_rows || packed->first().is_split());
    return wide ? run_gradient_wide(*packed, call, rows, gradient, accumulate, how)
                : gradient_of(packed->program(), call, rows, gradient, accumulate, how.threads);
  }

  double gradient_of(const Program<T>& program, GradientCall<T> call, std::int64_t rows, T* gradient, bool accumulate,
                     int threads) const {
    if (rows == 0 && gradient != nullptr && !accumulate) {
      std::memset(gradient, 0, static_cast<std::size_t>(layout_.size()) * sizeof(T));
    }
    const int team = threads_for(rows, threads);
    if (team > 1) return run_gradient_team(program, call, rows, gradient, accumulate, team);
    T* tape = thread_scratch<T>(tape_size_);
    call.gradient = gradient;
    double total = 0;
    for (std::int64_t row = 0; row < rows; row += gradient_rows_) {
      call.add = accumulate || row > 0;
      double sums[cpu::kMaxGradientUnits] = {};
      const std::int64_t count = std::min(gradient_rows_, rows - row);
      const std::int64_t tape_rows = (count + kernels_.lanes - 1) / kernels_.lanes * kernels_.lanes;
      kernels_.gradient_tile(program, call, row, row + count, tape_rows, tape, sums);
      for (const double sum : sums) total += sum;
    }
    return total;
  }

  /// How the threads share the tiles: rows of the parts that a tile is cut into where there are more threads than
  /// tiles.
  std::int64_t part_rows(std::int64_t tiles, int team) const {
    const std::int64_t units = gradient_rows_ / cpu::kGradientUnit, parts = std::min(units, (team + tiles - 1) / tiles);
    return (units + parts - 1) / parts * cpu::kGradientUnit;
  }

  /// The threads share a few tiles, meet, and share the parameters: the same sums in the same order as one thread's.
  double run_gradient_team(const Program<T>& program, const GradientCall<T>& call, std::int64_t rows, T* gradient,
                           bool accumulate, int team) const {
    const std::int64_t tiles = (rows + gradient_rows_ - 1) / gradient_rows_;
    const std::int64_t tape_rows = part_rows(tiles, team), parts = (gradient_rows_ + tape_rows - 1) / tape_rows;
    const std::int64_t tape_size = kernels_.tape_size(program, tape_rows);
    const std::int64_t group = std::min<std::int64_t>(tiles, team * tiles_per_thread());
    T* tapes = thread_scratch<T>(group * parts * tape_size);
    std::vector<double> sums(static_cast<std::size_t>(group * parts * cpu::kMaxGradientUnits));
    double total = 0;
    for (std::int64_t first = 0; first < tiles; first += group) {
      const std::int64_t here = std::min(group, tiles - first);
      std::fill(sums.begin(), sums.end(), 0.0);
      parallel_for(here * parts, 1, team, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const std::int64_t tile = (first + i / parts) * gradient_rows_, row = tile + i % parts * tape_rows;
          const std::int64_t last = std::min({rows, tile + gradient_rows_, row + tape_rows});
          if (row >= last) continue;
          kernels_.gradient_tile(program, call, row, last, tape_rows, tapes + i * tape_size,
                                 sums.data() + i * cpu::kMaxGradientUnits);
        }
      });
      for (const double sum : sums) total += sum;
      if (gradient == nullptr) continue;
      parallel_for(static_cast<std::int64_t>(tasks_.size()), 1, team, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const Task& task = tasks_[static_cast<std::size_t>(i)];
          for (std::int64_t tile = 0; tile < here; ++tile) {
            const std::int64_t row = (first + tile) * gradient_rows_;
            kernels_.weight_gradient(
                program, task.layer, task.dense, task.first, task.last,
                {tapes + tile * parts * tape_size, tape_size, tape_rows, std::min(gradient_rows_, rows - row)},
                gradient, accumulate || row > 0);
          }
        }
      });
    }
    return total;
  }

  const FlowSpec spec_;
  const ParamLayout layout_;
  const Weights weights_;
  // Threads of the training run that owns this backend: there are no calls while the parameters are set, and one
  // packed copy of them is enough. 0: any other backend.
  int training_threads_ = 0;
  const Kernels<T>& kernels_;
  LeftRight<Packed<T>> packed_;
  std::int64_t tile_rows_ = 0, gradient_rows_ = 0, grain_ = 0;
  std::int64_t transform_scratch_ = 0, tape_size_ = 0;
  std::int64_t staged_size_ = 0;  // elements of a tile of standardized rows; 0: of a flow without takes_float64_rows
  double flops_per_row_ = 0;
  std::vector<Task> tasks_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const FlowSpec& spec, const ParamLayout& layout, Weights weights) {
  if (spec.dtype == DType::float32) return std::make_unique<CpuBackend<float>>(spec, layout, weights);
  return std::make_unique<CpuBackend<double>>(spec, layout, Weights::full);
}

}  // namespace nvpflow
