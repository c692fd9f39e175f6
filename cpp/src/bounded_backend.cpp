#include "bounded_backend.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/spec.hpp>

#include "backend.hpp"
#include "bounded_columns.hpp"
#include "float_mode.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "training.hpp"

namespace nvpflow {
namespace {

/// Numbers of the rows that are behind the bounds at a time, and rows that are worth a thread.
constexpr std::int64_t kChunkElements = 1 << 17, kThreadRows = 1 << 10;

/// Working memory of the calling thread, kept for its next call.
unsigned char* thread_memory(std::int64_t bytes) {
  thread_local AlignedBuffer buffer;
  return static_cast<unsigned char*>(buffer.reserve(bytes));
}

/// So many elements into an array, which may be null.
template <class Element>
Element* at(void* array, std::int64_t elements) {
  return array == nullptr ? nullptr : static_cast<Element*>(array) + elements;
}
template <class Element>
const Element* at(const void* array, std::int64_t elements) {
  return array == nullptr ? nullptr : static_cast<const Element*>(array) + elements;
}

/// T: of the flow. Y: of rows behind the bounds, float64 also for a float32 flow that standardizes them in float64.
template <class T, class Y>
class BoundedBackend final : public Backend {
 public:
  BoundedBackend(const FlowSpec& spec, std::unique_ptr<Backend> behind)
      : features_(spec.input_size),
        context_size_(spec.context_size),
        columns_(*spec.bounds()),
        chunk_(std::max<std::int64_t>(1, kChunkElements / spec.input_size)),
        behind_(std::move(behind)) {}

  void set_parameters(const void* parameters, const float* mean_low) override {
    behind_->set_parameters(parameters, mean_low);
  }

  void transform(Direction direction, const void* in, std::int64_t rows, void* out, void* log_det,
                 const Execution& how) const override {
    const bool inverse = direction == Direction::inverse;
    each_chunk(rows, how, [&](const Chunk& chunk) {
      T* const of_rows = at<T>(log_det, chunk.first);
      if (inverse) {
        behind_->transform(direction, at<T>(in, chunk.first * features_), chunk.rows, chunk.y, of_rows, chunk.how);
        undo(chunk, out, how);
        return add(of_rows, chunk, 1, kInfinity);
      }
      apply(chunk, in, nullptr, Holding::numbers, how);
      T* const z = at<T>(out, chunk.first * features_);
      behind_->transform(direction, chunk.y, chunk.rows, z, of_rows, chunk.how);
      add(of_rows, chunk, 1, -kInfinity);
      for (std::int64_t r = 0; r < chunk.rows; ++r) {
        if (is_outside(chunk.log_det[r])) std::fill_n(z + r * features_, features_, kInfinity);
      }
    });
  }

  void log_prob(const void* x, std::int64_t rows, void* out, const Execution& how) const override {
    each_chunk(rows, how, [&](const Chunk& chunk) { log_prob(chunk, x, nullptr, at<T>(out, chunk.first), how); });
  }

  void sample(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* x, void* log_prob,
              const Execution& how) const override {
    each_chunk(rows, how, [&](const Chunk& chunk) {
      T* const of_rows = at<T>(log_prob, chunk.first);
      const std::uint64_t row = first_row + static_cast<std::uint64_t>(chunk.first);
      const bool rounds = !columns_.discrete().empty();
      behind_->sample(seed, row, chunk.rows, chunk.y, rounds ? nullptr : of_rows, chunk.how);
      undo(chunk, x, how);
      if (!rounds) return add(of_rows, chunk, -1, -kInfinity);
      each_row(chunk, x, nullptr, how, [&](auto* values, std::int64_t) { columns_.round(values); });
      if (of_rows != nullptr) this->log_prob(chunk, x, nullptr, of_rows, how);
    });
  }

  void noise(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* z,
             const Execution& how) const override {
    behind_->noise(seed, first_row, rows, z, how);
  }

  void conditioner(std::int64_t layer, const void* in, std::int64_t rows, void* s, void* t,
                   const Execution& how) const override {
    behind_->conditioner(layer, in, rows, s, t, how);
  }

  void vjp(Direction direction, const void* in, std::int64_t rows, const void* grad_out, const void* grad_log_det,
           void* grad_in, void* grad_parameters, bool accumulate, const Execution& how) const override {
    const bool inverse = direction == Direction::inverse;
    each_chunk(rows, how, [&](const Chunk& chunk) {
      const T* const given = at<T>(grad_out, chunk.first * features_);
      const T* const of_log_det = at<T>(grad_log_det, chunk.first);
      T* const to = at<T>(grad_in, chunk.first * features_);
      const bool add_to = accumulate || chunk.first > 0;
      if (inverse) {
        const T* const z = at<T>(in, chunk.first * features_);
        behind_->transform(direction, z, chunk.rows, chunk.y, nullptr, chunk.how);
        undo_backward(chunk, given, of_log_det, how);
        Execution narrow = chunk.how;
        narrow.float64_rows = false;
        return behind_->vjp(direction, z, chunk.rows, chunk.g, of_log_det, to, grad_parameters, add_to, narrow);
      }
      apply(chunk, in, nullptr, Holding::numbers, how);
      const T* const g = without_outside(chunk, given, features_, chunk.g);
      const T* const weights = without_outside(chunk, of_log_det, 1, chunk.weights);
      behind_->vjp(direction, chunk.y, chunk.rows, g, weights, to, grad_parameters, add_to, chunk.how);
      apply_backward(chunk, in, Holding::numbers, weights, to, how);
    });
  }

  void log_prob_vjp(const void* x, std::int64_t rows, const void* grad_log_prob, void* log_prob, void* grad_x,
                    void* grad_parameters, bool accumulate, const Execution& how) const override {
    each_chunk(rows, how, [&](const Chunk& chunk) {
      apply(chunk, x, nullptr, Holding::integers, how);
      const T* const given = at<T>(grad_log_prob, chunk.first);
      if (given == nullptr) std::fill_n(chunk.weights, chunk.rows, T(1));
      const T* const weights = without_outside(chunk, given == nullptr ? chunk.weights : given, 1, chunk.weights);
      T* const of_rows = at<T>(log_prob, chunk.first);
      T* const to = at<T>(grad_x, chunk.first * features_);
      behind_->log_prob_vjp(chunk.y, chunk.rows, weights, of_rows, to, grad_parameters, accumulate || chunk.first > 0,
                            chunk.how);
      add(of_rows, chunk, 1, -kInfinity);
      apply_backward(chunk, x, Holding::integers, weights, to, how);
    });
  }

  double nll_gradient(const void* x, const WeighedRows& rows, double total, void* grad_parameters, bool accumulate,
                      const Execution& how) const override {
    double sum = 0;
    each_chunk(rows.count, with_context(rows.index, rows.count, how), [&](const Chunk& chunk) {
      apply(chunk, x, rows.index, Holding::integers, how);
      for (std::int64_t r = 0; r < chunk.rows; ++r) {
        const auto cotangent = static_cast<T>(-rows.weight(chunk.first + r) / total);
        chunk.weights[r] = is_outside(chunk.log_det[r]) ? T(0) : cotangent;
      }
      behind_->log_prob_vjp(chunk.y, chunk.rows, chunk.weights, chunk.log_prob, nullptr, grad_parameters,
                            accumulate || chunk.first > 0, chunk.how);
      add(chunk.log_prob, chunk, 1, -kInfinity);
      sum += sum_by_weight(rows, chunk);
    });
    return sum;
  }

  double sum_log_prob(const void* x, const WeighedRows& rows, const Execution& how) const override {
    double sum = 0;
    each_chunk(rows.count, with_context(rows.index, rows.count, how), [&](const Chunk& chunk) {
      log_prob(chunk, x, rows.index, chunk.log_prob, how);
      sum += sum_by_weight(rows, chunk);
    });
    return sum;
  }

  void prepare() const override {
    thread_memory(chunk_bytes(chunk_));
    behind_->prepare();
  }

  std::shared_ptr<const void> fold(const void* context) const override { return behind_->fold(context); }

  /// Of rows behind the bounds, where training has brought them.
  std::unique_ptr<Training> begin_training(const TrainingData& data, const void* parameters, std::int64_t slice_rows,
                                           const Execution& how) const override {
    return behind_->begin_training(data, parameters, slice_rows, how);
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  /// Rows first, first + 1, ... of a call on their way, and how the backend behind is called on them.
  struct Chunk {
    std::int64_t first, rows;
    Execution how;
    double* log_det;            // [rows], of the bounds
    Y* y;                       // [rows, D], behind the bounds
    T *g, *weights, *log_prob;  // [rows, D], [rows], [rows]
  };

  /// Of the chunk's log p.
  static double sum_by_weight(const WeighedRows& rows, const Chunk& chunk) {
    double sum = 0;
    for (std::int64_t r = 0; r < chunk.rows; ++r) {
      sum += rows.weight(chunk.first + r) * static_cast<double>(chunk.log_prob[r]);
    }
    return sum;
  }

  static bool is_outside(double log_det) { return log_det == -std::numeric_limits<double>::infinity(); }

  std::int64_t chunk_bytes(std::int64_t rows) const {
    const auto one = static_cast<std::int64_t>(sizeof(double) + 2 * sizeof(T));
    return rows * (features_ * static_cast<std::int64_t>(sizeof(Y) + sizeof(T)) + one);
  }

  /// f(chunk) of all rows in order; once also of none.
  template <class F>
  void each_chunk(std::int64_t rows, const Execution& how, F&& f) const {
    if (how.device_arrays) {
      throw Error(ErrorCode::unavailable,
                  "rows in a device's memory are of a flow with bounds, which are applied to rows of the host; pass "
                  "arrays of the host");
    }
    const FloatMode mode;
    std::int64_t first = 0;
    do {
      Chunk chunk;
      chunk.first = first;
      chunk.how = how;
      chunk.how.float64_rows = sizeof(Y) > sizeof(T);
      chunk.rows = take_context(first, rows, chunk.how.context);
      unsigned char* memory = thread_memory(chunk_bytes(chunk.rows));
      const auto carve = [&](auto*& to, std::int64_t elements) {
        using Element = std::remove_reference_t<decltype(*to)>;
        to = static_cast<Element*>(static_cast<void*>(memory));
        memory += elements * static_cast<std::int64_t>(sizeof(Element));
      };
      carve(chunk.log_det, chunk.rows);  // what has the largest elements first
      carve(chunk.y, chunk.rows * features_);
      carve(chunk.g, chunk.rows * features_);
      carve(chunk.weights, chunk.rows);
      carve(chunk.log_prob, chunk.rows);
      f(chunk);
      first += chunk.rows;
    } while (first < rows);
  }

  /// How many rows from `first` on are a chunk; makes the context of the call that of the chunk.
  std::int64_t take_context(std::int64_t first, std::int64_t rows, ContextRows& context) const {
    const std::int64_t width = context_size_ * static_cast<std::int64_t>(sizeof(T)), left = rows - first;
    if (context.gradient != nullptr) context.gradient = static_cast<unsigned char*>(context.gradient) + first * width;
    if (context.rows == nullptr || context.repeat >= rows) return std::min(chunk_, left);
    const auto* const given = static_cast<const unsigned char*>(context.rows);
    context.rows = given + first / context.repeat * width;
    if (context.repeat <= chunk_) return std::min(chunk_ / context.repeat * context.repeat, left);
    const std::int64_t of_this = context.repeat - first % context.repeat;
    context.repeat = ContextRows::kForAll;
    return std::min({chunk_, of_this, left});
  }

  /// How a call on the rows of an index runs: their contexts follow each other.
  Execution with_context(const std::int64_t* index, std::int64_t rows, Execution how) const {
    if (index == nullptr || how.context.rows == nullptr || how.context.repeat != 1) return how;
    thread_local std::vector<T> gathered;
    gathered.resize(static_cast<std::size_t>(rows * context_size_));
    for (std::int64_t r = 0; r < rows; ++r) {
      std::copy_n(at<T>(how.context.rows, index[r] * context_size_), context_size_,
                  gathered.data() + r * context_size_);
    }
    how.context.rows = gathered.data();
    how.context.repeat = 1;
    return how;
  }

  /// f(row of data, its place in the chunk) for the rows of a chunk, by several threads. Data: const void or void.
  template <class Data, class F>
  void each_row(const Chunk& chunk, Data* data, const std::int64_t* index, const Execution& how, F&& f) const {
    using Wide = std::conditional_t<std::is_const_v<Data>, const double, double>;
    using Own = std::conditional_t<std::is_const_v<Data>, const T, T>;
    parallel_for(chunk.rows, kThreadRows, how.threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t row = index == nullptr ? chunk.first + r : index[chunk.first + r];
        if (how.float64_rows) {
          f(static_cast<Wide*>(data) + row * features_, r);
        } else {
          f(static_cast<Own*>(data) + row * features_, r);
        }
      }
    });
  }

  void apply(const Chunk& chunk, const void* x, const std::int64_t* index, Holding holding,
             const Execution& how) const {
    each_row(chunk, x, index, how, [&](const auto* row, std::int64_t r) {
      chunk.log_det[r] = columns_.apply(row, chunk.y + r * features_, holding);
    });
  }

  void undo(const Chunk& chunk, void* x, const Execution& how) const {
    each_row(chunk, x, nullptr, how,
             [&](auto* row, std::int64_t r) { chunk.log_det[r] = columns_.undo(chunk.y + r * features_, row); });
  }

  /// g [rows, D]: null: not wanted.
  void apply_backward(const Chunk& chunk, const void* x, Holding holding, const T* g_log_det, T* g,
                      const Execution& how) const {
    if (g == nullptr) return;
    each_row(chunk, x, nullptr, how, [&](const auto* row, std::int64_t r) {
      const double of_log_det = g_log_det == nullptr ? 0 : static_cast<double>(g_log_det[r]);
      columns_.apply_backward(row, holding, of_log_det, g + r * features_);
    });
  }

  /// Chunk::g: the cotangents of chunk.y.
  void undo_backward(const Chunk& chunk, const T* g_x, const T* g_log_det, const Execution& how) const {
    parallel_for(chunk.rows, kThreadRows, how.threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        columns_.undo_backward(chunk.y + r * features_, g_x == nullptr ? nullptr : g_x + r * features_,
                               g_log_det == nullptr ? 0 : static_cast<double>(g_log_det[r]), chunk.g + r * features_);
      }
    });
  }

  /// Cotangents [rows, width] such that those of rows outside are zero; `to` where they are not as given.
  const T* without_outside(const Chunk& chunk, const T* given, std::int64_t width, T* to) const {
    if (given == nullptr || std::none_of(chunk.log_det, chunk.log_det + chunk.rows, is_outside)) return given;
    if (to != given) std::copy_n(given, chunk.rows * width, to);
    for (std::int64_t r = 0; r < chunk.rows; ++r) {
      if (is_outside(chunk.log_det[r])) std::fill_n(to + r * width, width, T(0));
    }
    return to;
  }

  void log_prob(const Chunk& chunk, const void* x, const std::int64_t* index, T* out, const Execution& how) const {
    apply(chunk, x, index, Holding::integers, how);
    behind_->log_prob(chunk.y, chunk.rows, out, chunk.how);
    add(out, chunk, 1, -kInfinity);
  }

  /// To numbers of the rows (null: not wanted) `sign` times the log-determinants of the bounds. What gets lost as
  /// inf - inf becomes `lost`, such that the density of the row is 0.
  static void add(T* numbers, const Chunk& chunk, double sign, T lost) {
    for (std::int64_t r = 0; numbers != nullptr && r < chunk.rows; ++r) {
      const double before = static_cast<double>(numbers[r]), more = sign * chunk.log_det[r], sum = before + more;
      const bool is_lost = std::isnan(sum) && !std::isnan(before) && !std::isnan(more);
      numbers[r] = is_lost ? lost : static_cast<T>(sum);
    }
  }

  const std::int64_t features_, context_size_;
  const BoundedColumns columns_;
  const std::int64_t chunk_;
  const std::unique_ptr<Backend> behind_;
};

}  // namespace

std::unique_ptr<Backend> make_bounded_backend(const FlowSpec& spec, std::unique_ptr<Backend> behind) {
  if (spec.dtype == DType::float64) return std::make_unique<BoundedBackend<double, double>>(spec, std::move(behind));
  if (takes_float64_rows(spec)) return std::make_unique<BoundedBackend<float, double>>(spec, std::move(behind));
  return std::make_unique<BoundedBackend<float, float>>(spec, std::move(behind));
}

}  // namespace nvpflow
