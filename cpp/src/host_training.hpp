// A training run on arrays of the host, for backends that work there.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include <nvpflow/backend.hpp>

#include "memory.hpp"
#include "parallel.hpp"
#include "row_order.hpp"

namespace nvpflow {

template <class T>
class HostTraining final : public Training {
 public:
  /// backend: the run's own.
  HostTraining(std::unique_ptr<Backend> backend, const ParamLayout& layout, const TrainingData& data,
               const void* parameters, int threads)
      : backend_(std::move(backend)), layout_(layout), data_(data), threads_(threads) {
    const auto size = static_cast<std::size_t>(layout.size());
    const T* begin = static_cast<const T*>(parameters);
    parameters_.assign(begin, begin + size);
    gradient_.resize(size);
    first_moment_.resize(size);
    second_moment_.resize(size);
    write();
  }

  void gradient(const RowOrder& order, std::int64_t first, std::int64_t count, std::int64_t total_rows,
                bool accumulate) override {
    if (!accumulate) batch_sum_ = 0, batch_rows_ = total_rows;
    fill_index(order, first, count);
    batch_sum_ += backend_->nll_gradient(data_.x, index_.data(), count, total_rows, gradient_.data(), accumulate,
                                         Execution(threads_));
  }

  void update(const AdamStep& step, double clip_norm) override {
    if (report_.bad_step != 0) return;
    const double loss = -batch_sum_ / static_cast<double>(batch_rows_);
    if (!std::isfinite(loss)) return refuse(step, true, loss);
    double square = 0;
    for (const TensorInfo& t : layout_.tensors()) {
      if (t.trained) square += backend_->sum_of_squares(gradient_.data() + t.offset, t.size, threads_);
    }
    report_.gradient_norm = std::sqrt(square);
    if (!std::isfinite(report_.gradient_norm)) return refuse(step, false, report_.gradient_norm);
    report_.sum_log_prob += batch_sum_;
    AdamStep adam = step;
    if (clip_norm > 0 && report_.gradient_norm > clip_norm) adam.gradient_factor = clip_norm / report_.gradient_norm;
    for (const TensorInfo& t : layout_.tensors()) {
      if (!t.trained) continue;
      adam.weight_decay = t.decayed ? step.weight_decay : 0.0;
      backend_->adam_step(adam, t.size, gradient_.data() + t.offset, first_moment_.data() + t.offset,
                          second_moment_.data() + t.offset, parameters_.data() + t.offset, threads_);
    }
    backend_->set_parameters(parameters_.data());
  }

  void add_log_prob(bool validation, const RowOrder& order, std::int64_t first, std::int64_t count) override {
    fill_index(order, first, count);
    report_.sum_log_prob +=
        backend_->sum_log_prob(validation ? data_.validation : data_.x, index_.data(), count, Execution(threads_));
  }

  TrainingReport report() override {
    const TrainingReport done = report_;
    report_.sum_log_prob = 0;
    return done;
  }
  std::int64_t steps_per_report() const override { return 1; }

  Arrays read(bool) override { return {parameters_.data(), first_moment_.data(), second_moment_.data()}; }
  void write() override { backend_->set_parameters(parameters_.data()); }

 private:
  // Places of an order that are worth a thread of their own: some 100 us.
  static constexpr std::int64_t kPlaces = 4096;

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

  std::unique_ptr<Backend> backend_;
  const ParamLayout layout_;
  TrainingData data_;
  int threads_;
  AlignedVector<T> parameters_, gradient_, first_moment_, second_moment_;
  std::vector<std::int64_t> index_;
  double batch_sum_ = 0;
  std::int64_t batch_rows_ = 1;
  TrainingReport report_;
};

}  // namespace nvpflow
