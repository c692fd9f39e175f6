// The CPU backend: keeps the packed parameters, and applies the first layer in float64 where it is asked to.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "../backend.hpp"
#include "../float_mode.hpp"
#include "../left_right.hpp"
#include "../parallel.hpp"
#include "../training.hpp"
#include "cpu_flow.hpp"
#include "cpu_training.hpp"
#include "kernels.hpp"
#include "packed.hpp"

namespace nvpflow {
namespace {

using cpu::CpuFlow;
using cpu::GradientCall;
using cpu::Kernels;
using cpu::Packed;
using cpu::Program;
using cpu::thread_scratch;
using cpu::TransformCall;

/// Standardized rows of a gradient that are kept at a time.
constexpr std::int64_t kStagedBytes = 4 << 20;
/// Vectors of context numbers that folding a context for several rows must spare to be worth it.
constexpr std::int64_t kSparedVectors = 16;

template <class T>
class CpuBackend final : public Backend {
 public:
  CpuBackend(FlowSpec spec, ParamLayout layout, Weights weights)
      : spec_(std::move(spec)),
        layout_(std::move(layout)),
        weights_(weights),
        kernels_(cpu::chosen_kernels<T>()),
        packed_([this] { return make_packed(); }),
        flow_(spec_, layout_, kernels_, packed_.initial().program()),
        staged_size_(takes_float64_rows(spec_) ? flow_.tile_rows() * spec_.input_size : 0) {}

  void set_parameters(const void* parameters, const float* mean_low) override {
    const FloatMode mode;
    const std::uint64_t version = ++version_;
    packed_.rewrite([this] { return make_packed(); },
                    [&](Packed<T>& packed) {
                      packed.pack(static_cast<const T*>(parameters), false, 1, mean_low);
                      packed.set_version(version);
                    });
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

  void sample(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* x, void* log_prob,
              const Execution& how) const override {
    TransformCall<T> call;
    call.inverse = true;
    call.out = static_cast<T*>(x);
    call.log_prob = static_cast<T*>(log_prob);
    call.seed = seed;
    call.first_row = first_row;
    run(call, rows, how);
  }

  void noise(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* z,
             const Execution& how) const override {
    const FloatMode mode;
    const Reading packed(packed_);
    parallel_for(rows, flow_.grain(), how.threads, [&](std::int64_t begin, std::int64_t end) {
      T* scratch = thread_scratch<T>(flow_.transform_scratch());
      kernels_.noise(packed->program(), seed, first_row, begin, end, static_cast<T*>(z), scratch);
    });
  }

  void conditioner(std::int64_t layer, const void* in, std::int64_t rows, void* s, void* t,
                   const Execution& how) const override {
    const FloatMode mode;
    const Reading packed(packed_);
    const cpu::ContextRows<T> context = context_of(*packed, rows, how);
    parallel_for(rows, flow_.grain(), how.threads, [&](std::int64_t begin, std::int64_t end) {
      T* scratch = thread_scratch<T>(flow_.transform_scratch());
      kernels_.conditioner(packed->program(), layer, static_cast<const T*>(in), context, begin, end, static_cast<T*>(s),
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

  double nll_gradient(const void* x, const WeighedRows& rows, double total, void* grad_parameters, bool accumulate,
                      const Execution& how) const override {
    const FloatMode mode;
    GradientCall<T> call;
    call.in = static_cast<const T*>(x);
    call.index = rows.index;
    call.nll = true;
    call.nll_factor = 1.0 / total;
    call.weights = rows.weights;
    call.context.index = how.context.repeat == 1 ? rows.index : nullptr;
    return run_gradient(call, rows.count, static_cast<T*>(grad_parameters), accumulate, how);
  }

  double sum_log_prob(const void* x, const WeighedRows& rows, const Execution& how) const override {
    const FloatMode mode;
    const Reading packed(packed_);
    const bool wide = is_wide(*packed, how);
    const cpu::ContextRows<T> context = context_of(*packed, rows.count, how);
    const std::int64_t* index = rows.index;
    return flow_.sum_log_prob(
        rows.count, staged_size_, how.threads,
        [&](std::int64_t begin, std::int64_t end, T* log_prob, T* scratch) {
          TransformCall<T> call;
          call.in = index == nullptr ? data_at(x, begin, how) : static_cast<const T*>(x);
          call.index = index == nullptr ? nullptr : index + begin;
          call.log_prob = log_prob;
          call.context = cpu::part_of(context, begin);
          if (index != nullptr && context.repeat == 1) call.context.index = index + begin;
          if (wide) {
            transform_wide(*packed, call, 0, end - begin, how, scratch);
          } else {
            kernels_.transform(packed->program(), call, 0, end - begin, scratch);
          }
        },
        [&](std::int64_t row) { return rows.weight(row); });
  }

  void prepare() const override {
    const std::int64_t elements = call_scratch();
    T* scratch = thread_scratch<T>(elements);
    // Written, so that the pages are there, and used, so that whatever is made on first use has been made.
    std::memset(scratch, 0, static_cast<std::size_t>(elements) * sizeof(T));
    const std::vector<T> x(static_cast<std::size_t>(flow_.tile_rows() * spec_.input_size));
    const std::vector<T> context(static_cast<std::size_t>(spec_.context_size));
    Execution how(1);
    how.context.rows = context.data();
    how.context.repeat = nvpflow::ContextRows::kForAll;
    sum_log_prob(x.data(), {.count = flow_.tile_rows()}, how);
  }

  std::shared_ptr<const void> fold(const void* context) const override {
    const FloatMode mode;
    const Reading packed(packed_);
    const T* row = static_cast<const T*>(context);
    auto folded = std::make_shared<Folded>();
    folded->version = packed->version();
    folded->row.assign(row, row + spec_.context_size);
    folded->biases.resize(static_cast<std::size_t>(packed->program().fold_size));
    fold_into(*packed, row, folded->biases.data());
    return folded;
  }

  std::unique_ptr<Training> begin_training(const TrainingData& data, const void* parameters, std::int64_t,
                                           const Execution& how) const override {
    return cpu::make_training<T>(spec_, layout_, data, parameters, how.threads);
  }

 private:
  using Reading = typename LeftRight<Packed<T>>::Reading;

  std::unique_ptr<Packed<T>> make_packed() const {
    return std::make_unique<Packed<T>>(spec_, layout_, kernels_, weights_);
  }

  /// Elements of scratch that every call but those of gradients does with.
  std::int64_t call_scratch() const { return flow_.transform_scratch() + staged_size_ + CpuFlow<T>::kSumRows; }

  /// What fold() makes of one context row.
  struct Folded {
    std::uint64_t version;
    std::vector<T> row;
    AlignedVector<T> biases;
  };

  void fold_into(const Packed<T>& packed, const T* row, T* biases) const {
    kernels_.fold(packed.program(), row, biases, thread_scratch<T>(flow_.transform_scratch()));
  }

  /// The context of a call of so many rows. One for all rows is folded: once by fold(), or here.
  cpu::ContextRows<T> context_of(const Packed<T>& packed, std::int64_t rows, const Execution& how) const {
    cpu::ContextRows<T> context;
    context.rows = static_cast<const T*>(how.context.rows);
    context.repeat = how.context.repeat;
    const auto* folded = static_cast<const Folded*>(how.context.folded);
    if (folded != nullptr) context.rows = folded->row.data(), context.repeat = nvpflow::ContextRows::kForAll;
    if (spec_.context_size == 0 || context.repeat < rows) return context;
    if (folded != nullptr && folded->version == packed.version()) {
      context.folded = folded->biases.data();
    } else if (rows <= 1) {
      return context;  // as a row it costs what folding it would
    } else {
      T* biases = cpu::thread_folded<T>(packed.program().fold_size);
      fold_into(packed, context.rows, biases);
      context.folded = biases;
    }
    context.rows = nullptr;
    return context;
  }

  /// As rows, as gradients need it.
  cpu::ContextRows<T> context_rows_of(const Execution& how) const {
    cpu::ContextRows<T> context;
    context.rows = static_cast<const T*>(how.context.rows);
    context.repeat = how.context.repeat;
    if (how.context.folded != nullptr) {
      context.rows = static_cast<const Folded*>(how.context.folded)->row.data();
      context.repeat = nvpflow::ContextRows::kForAll;
    }
    return context;
  }

  void run(TransformCall<T> call, std::int64_t rows, const Execution& how) const {
    const FloatMode mode;
    const Reading packed(packed_);
    if (spec_.context_size > 0) {
      if (folds_each(how.context.repeat, rows)) return run_by_contexts(*packed, call, rows, how);
      call.context = context_of(*packed, rows, how);
    }
    if (is_wide(*packed, how)) return run_range(*packed, call, 0, rows, how, how.threads);
    flow_.transform(packed->program(), call, rows, how.threads);
  }

  /// Whether contexts of so many rows each are folded: a few rows of each, or few numbers, cost less as rows.
  bool folds_each(std::int64_t each, std::int64_t rows) const {
    return each < rows && each >= kernels_.lanes && each * spec_.context_size >= kSparedVectors * kernels_.lanes;
  }

  /// Rows of several contexts, each of which is folded. The threads share the contexts, or the rows of each where there
  /// are fewer contexts than threads.
  void run_by_contexts(const Packed<T>& packed, const TransformCall<T>& call, std::int64_t rows,
                       const Execution& how) const {
    const std::int64_t each = how.context.repeat, contexts = (rows + each - 1) / each;
    const int threads = flow_.threads_for(rows, how.threads);
    const bool together = contexts < threads;
    parallel_for(contexts, 1, together ? 1 : threads, [&](std::int64_t first, std::int64_t last) {
      T* biases = cpu::thread_folded<T>(packed.program().fold_size);
      TransformCall<T> part = call;
      part.context.folded = biases;
      for (std::int64_t i = first; i < last; ++i) {
        fold_into(packed, static_cast<const T*>(how.context.rows) + i * spec_.context_size, biases);
        run_range(packed, part, i * each, std::min(rows, (i + 1) * each), how, together ? threads : 1);
      }
    });
  }

  bool is_wide(const Packed<T>& packed, const Execution& how) const {
    return how.float64_rows || packed.first().is_split();
  }

  /// Rows [begin, end) of a call.
  void run_range(const Packed<T>& packed, const TransformCall<T>& call, std::int64_t begin, std::int64_t end,
                 const Execution& how, int threads) const {
    const bool wide = is_wide(packed, how);
    parallel_for(end - begin, flow_.tile_rows(), flow_.threads_for(end - begin, threads),
                 [&](std::int64_t first, std::int64_t last) {
                   T* scratch = thread_scratch<T>(call_scratch());
                   if (wide) return transform_wide(packed, call, begin + first, begin + last, how, scratch);
                   kernels_.transform(packed.program(), call, begin + first, begin + last, scratch);
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

  /// Rows [begin, end) tile by tile, so that what is staged stays in the cache.
  void transform_wide(const Packed<T>& packed, const TransformCall<T>& call, std::int64_t begin, std::int64_t end,
                      const Execution& how, T* scratch) const {
    T* staged = scratch + flow_.transform_scratch();
    for (std::int64_t r = begin; r < end; r += flow_.tile_rows()) {
      const std::int64_t count = std::min(flow_.tile_rows(), end - r);
      TransformCall<T> tile = call;
      tile.index = nullptr;
      tile.context = cpu::part_of(call.context, r);
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
                       tile_bytes = flow_.gradient_rows() * features * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t chunk = flow_.gradient_rows() * std::max<std::int64_t>(1, kStagedBytes / tile_bytes);
    std::vector<T> before;  // the gradient of the mean, which is formed for standardized rows
    T* to_mean = gradient == nullptr ? nullptr : gradient + layout_.tensors().front().offset;
    if (gradient != nullptr && accumulate) {
      before.assign(to_mean, to_mean + features);
      std::fill_n(to_mean, features, T(0));
    }
    std::vector<T> staged(static_cast<std::size_t>(std::min(chunk, rows) * features));
    std::vector<double> weights;
    double total = 0;
    std::int64_t first = 0;
    do {
      const std::int64_t count = std::min(chunk, rows - first);
      parallel_for(
          count, flow_.tile_rows(), flow_.threads_for(count, how.threads), [&](std::int64_t begin, std::int64_t end) {
            standardize(packed, call.in, call.index, first + begin, end - begin, staged.data() + begin * features, how);
          });
      GradientCall<T> part = call;
      part.in = staged.data();
      part.index = nullptr;
      if (call.weights != nullptr && call.index == nullptr) part.weights += first;
      if (call.weights != nullptr && call.index != nullptr) part.weights = staged_weights(call, first, count, weights);
      part.context = cpu::part_of(call.context, first);
      if (call.grad_context != nullptr) part.grad_context += first * spec_.context_size;
      if (call.grad_out != nullptr) part.grad_out += first * features;
      if (call.grad_log_det != nullptr) part.grad_log_det += first;
      if (call.log_prob != nullptr) part.log_prob += first;
      if (call.grad_in != nullptr) part.grad_in += first * features;
      total += flow_.gradient(packed.rest(), part, count, gradient, accumulate || first > 0, how.threads);
      if (call.grad_in != nullptr) scale_gradient(packed, part.grad_in, count);
      first += count;
    } while (first < rows);
    if (gradient != nullptr) {
      scale_gradient(packed, to_mean, 1);
      for (std::size_t j = 0; j < before.size(); ++j) to_mean[j] += before[j];
    }
    return total;
  }

  /// Of rows [first, first + count) of those that a call takes.
  static const double* staged_weights(const GradientCall<T>& call, std::int64_t first, std::int64_t count,
                                      std::vector<double>& staged) {
    staged.clear();
    for (std::int64_t i = first; i < first + count; ++i) staged.push_back(call.weights[call.index[i]]);
    return staged.data();
  }

  static void scale_gradient(const Packed<T>& packed, T* g, std::int64_t rows) {
    if constexpr (sizeof(T) == 4) packed.first().scale_gradient(g, rows);
  }

  double run_gradient(GradientCall<T> call, std::int64_t rows, T* gradient, bool accumulate,
                      const Execution& how) const {
    const FloatMode mode;
    const Reading packed(packed_);
    packed->ensure_transposed();
    const std::int64_t* index = call.context.index;
    call.context = context_rows_of(how);
    call.context.index = index;
    call.grad_context = static_cast<T*>(how.context.gradient);
    const bool statistics = gradient != nullptr && spec_.standardize_context;
    std::vector<T> of_context;  // where the caller wants none
    if (statistics && call.grad_context == nullptr) {
      of_context.resize(static_cast<std::size_t>(rows * spec_.context_size));
      call.grad_context = of_context.data();
    }
    const bool wide = !call.inverse && (how.float64_rows || packed->first().is_split());
    const double sum = wide ? run_gradient_wide(*packed, call, rows, gradient, accumulate, how)
                            : flow_.gradient(packed->program(), call, rows, gradient, accumulate, how.threads);
    if (statistics) add_context_statistics(packed->program(), call, rows, gradient, accumulate);
    return sum;
  }

  /// The gradients of context.mean and context.log_std, from that of the context as it came in.
  void add_context_statistics(const Program<T>& program, const GradientCall<T>& call, std::int64_t rows, T* gradient,
                              bool accumulate) const {
    const std::int64_t size = spec_.context_size;
    for (std::int64_t i = 0; i < size; ++i) {
      double mean = 0, log_std = 0;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = call.context.index == nullptr ? r / call.context.repeat : call.context.index[r];
        const auto g = static_cast<double>(call.grad_context[r * size + i]);
        mean -= g;
        log_std -=
            g * (static_cast<double>(call.context.rows[row * size + i]) - static_cast<double>(program.context_mean[i]));
      }
      T* to_mean = gradient + program.context_mean_offset + i;
      T* to_log_std = gradient + program.context_log_std_offset + i;
      *to_mean = static_cast<T>(accumulate ? static_cast<double>(*to_mean) + mean : mean);
      *to_log_std = static_cast<T>(accumulate ? static_cast<double>(*to_log_std) + log_std : log_std);
    }
  }

  const FlowSpec spec_;
  const ParamLayout layout_;
  const Weights weights_;
  const Kernels<T>& kernels_;
  LeftRight<Packed<T>> packed_;
  std::uint64_t version_ = 0;  // of the parameters
  const CpuFlow<T> flow_;
  const std::int64_t staged_size_;  // elements of a tile of standardized rows; 0: without takes_float64_rows
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const FlowSpec& spec, const ParamLayout& layout, Weights weights) {
  if (spec.dtype == DType::float32) return std::make_unique<CpuBackend<float>>(spec, layout, weights);
  return std::make_unique<CpuBackend<double>>(spec, layout, Weights::full);
}

}  // namespace nvpflow
