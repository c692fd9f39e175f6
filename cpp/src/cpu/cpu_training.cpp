#include "cpu_training.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "../memory.hpp"
#include "../parallel.hpp"
#include "../row_order.hpp"
#include "../training.hpp"
#include "cpu_adam.hpp"
#include "cpu_flow.hpp"
#include "kernels.hpp"
#include "packed.hpp"

namespace nvpflow::cpu {
namespace {

/// Places of an order that are worth a thread of their own: some 100 us.
constexpr std::int64_t kPlaces = 4096;

template <class T>
class CpuTraining final : public Training {
 public:
  CpuTraining(const FlowSpec& spec, const ParamLayout& layout, const TrainingData& data, const void* parameters,
              int threads)
      : kernels_(chosen_kernels<T>()),
        // In full also where the flow's own weights are rounded: small steps would be lost.
        packed_(spec, layout, kernels_, Weights::full),
        flow_(spec, layout, kernels_, packed_.program()),
        adam_(layout, threads),
        data_(data),
        threads_(threads) {
    const auto size = static_cast<std::size_t>(layout.size());
    const T* begin = static_cast<const T*>(parameters);
    parameters_.assign(begin, begin + size);
    gradient_.resize(size);
    write();
  }

  void gradient(const RowOrder& order, std::int64_t first, std::int64_t count, std::int64_t total_rows,
                bool accumulate) override {
    if (!accumulate) batch_sum_ = 0, batch_rows_ = total_rows;
    fill_index(order, first, count);
    GradientCall<T> call;
    call.in = static_cast<const T*>(data_.x);
    call.index = index_.data();
    call.context.rows = static_cast<const T*>(data_.context);
    call.context.index = index_.data();
    call.nll = true;
    call.nll_factor = 1.0 / static_cast<double>(total_rows);
    call.weights = data_.weights;
    batch_sum_ += flow_.gradient(packed_.program(), call, count, gradient_.data(), accumulate, threads_);
  }

  HostGradient read_gradient() override { return {gradient_.data(), batch_sum_}; }
  void write_gradient(double sum_log_prob, std::int64_t total_rows) override {
    batch_sum_ = sum_log_prob, batch_rows_ = total_rows;
  }

  void update(const AdamStep& step, double clip_norm) override {
    if (report_.bad_step != 0) return;
    const double loss = -batch_sum_ / static_cast<double>(batch_rows_);
    if (!std::isfinite(loss)) return refuse(step, true, loss);
    report_.gradient_norm = adam_.update(step, clip_norm, gradient_.data(), parameters_.data());
    if (!std::isfinite(report_.gradient_norm)) return refuse(step, false, report_.gradient_norm);
    report_.sum_log_prob += batch_sum_;
    write();
  }

  void add_log_prob(bool validation, const RowOrder& order, std::int64_t first, std::int64_t count) override {
    fill_index(order, first, count);
    const double* weights = validation ? data_.validation_weights : data_.weights;
    report_.sum_log_prob += flow_.sum_log_prob(
        count, 0, threads_,
        [&](std::int64_t begin, std::int64_t end, T* log_prob, T* scratch) {
          TransformCall<T> call;
          call.in = static_cast<const T*>(validation ? data_.validation : data_.x);
          call.index = index_.data() + begin;
          call.log_prob = log_prob;
          call.context.rows = static_cast<const T*>(validation ? data_.validation_context : data_.context);
          call.context.index = index_.data() + begin;
          kernels_.transform(packed_.program(), call, 0, end - begin, scratch);
        },
        [&](std::int64_t i) { return weights == nullptr ? 1.0 : weights[index_[static_cast<std::size_t>(i)]]; });
  }

  TrainingReport report() override {
    const TrainingReport done = report_;
    report_.sum_log_prob = 0;
    return done;
  }
  std::int64_t steps_per_report() const override { return 1; }

  Arrays read(bool) override { return {parameters_.data(), adam_.first_moment(), adam_.second_moment()}; }
  void write() override { packed_.pack(parameters_.data(), true, threads_); }

 private:
  void fill_index(const RowOrder& order, std::int64_t first, std::int64_t count) {
    index_.resize(std::max(index_.size(), static_cast<std::size_t>(count)));
    parallel_for(count, kPlaces, threads_, [&](std::int64_t begin, std::int64_t end) {
      std::int64_t* index = index_.data() + begin;
      order.each(first + begin, end - begin, [=](std::int64_t i, std::int64_t row) { index[i] = row; });
    });
  }

  void refuse(const AdamStep& step, bool loss, double value) {
    report_.bad_step = step.step;
    report_.bad_loss = loss;
    report_.bad_value = value;
  }

  const Kernels<T>& kernels_;
  Packed<T> packed_;
  const CpuFlow<T> flow_;
  CpuAdam<T> adam_;
  TrainingData data_;
  int threads_;
  AlignedVector<T> parameters_, gradient_;
  std::vector<std::int64_t> index_;
  double batch_sum_ = 0;
  std::int64_t batch_rows_ = 1;
  TrainingReport report_;
};

}  // namespace

template <class T>
std::unique_ptr<Training> make_training(const FlowSpec& spec, const ParamLayout& layout, const TrainingData& data,
                                        const void* parameters, int threads) {
  return std::make_unique<CpuTraining<T>>(spec, layout, data, parameters, threads);
}

template std::unique_ptr<Training> make_training<float>(const FlowSpec&, const ParamLayout&, const TrainingData&,
                                                        const void*, int);
template std::unique_ptr<Training> make_training<double>(const FlowSpec&, const ParamLayout&, const TrainingData&,
                                                         const void*, int);

}  // namespace nvpflow::cpu
