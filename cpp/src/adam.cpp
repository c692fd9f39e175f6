#include <nvpflow/adam.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/train.hpp>

#include "cpu/cpu_adam.hpp"
#include "float_mode.hpp"
#include "flow_access.hpp"
#include "memory.hpp"
#include "option_checks.hpp"
#include "training.hpp"

namespace nvpflow {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

/// Moments of one dtype, and a copy of the parameters to update.
template <class T>
struct Moments {
  Moments(const Flow& flow, int threads)
      : adam(flow.layout(), threads), parameters(static_cast<std::size_t>(flow.num_parameters())) {}

  double update(Flow& flow, const AdamStep& step, double clip_norm, const T* gradient) {
    std::vector<float> mean_low;
    flow.copy_parameters<T>(parameters, &mean_low);
    const double norm = adam.update(step, clip_norm, gradient, parameters.data());
    if (!std::isfinite(norm)) {
      throw Error(ErrorCode::not_finite,
                  "gradient has the norm " + std::to_string(norm) + ", expected a finite one; the flow is as it was");
    }
    flow.set_parameters<T>(parameters, mean_low);
    return norm;
  }

  cpu::CpuAdam<T> adam;
  AlignedVector<T> parameters;
};

}  // namespace

void AdamOptions::validate() const { options::check_all(*this); }

struct Adam::Steps {
  std::int64_t size = 0, steps = 0, epochs = 0;
  std::unique_ptr<Moments<float>> narrow;  // of the one dtype or the other
  std::unique_ptr<Moments<double>> wide;

  template <class T>
  Moments<T>* moments() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return narrow.get();
    } else {
      return wide.get();
    }
  }

  /// f(first moment, second moment) of the dtype that there is.
  template <class F>
  void visit(F&& f) const {
    if (narrow != nullptr) {
      f(narrow->adam.first_moment(), narrow->adam.second_moment());
    } else {
      f(wide->adam.first_moment(), wide->adam.second_moment());
    }
  }
};

Adam::Adam(const Flow& flow) : steps_(std::make_unique<Steps>()) {
  const int threads = FlowAccess::threads(flow);
  steps_->size = flow.num_parameters();
  if (flow.spec().dtype == DType::float32) {
    steps_->narrow = std::make_unique<Moments<float>>(flow, threads);
  } else {
    steps_->wide = std::make_unique<Moments<double>>(flow, threads);
  }
}

Adam::~Adam() = default;
Adam::Adam(Adam&&) noexcept = default;
Adam& Adam::operator=(Adam&&) noexcept = default;

template <class T>
double Adam::step(Flow& flow, std::span<const T> gradient, const AdamOptions& options) {
  options.validate();
  Moments<T>* const moments = steps_->moments<T>();
  if (moments == nullptr || (flow.spec().dtype == DType::float32) != (sizeof(T) == sizeof(float))) {
    throw Error(ErrorCode::type_mismatch, "gradient is of another dtype than the flow, expected the flow's");
  }
  const auto size = static_cast<std::int64_t>(gradient.size());
  if (size != steps_->size || flow.num_parameters() != steps_->size) {
    fail("gradient holds " + std::to_string(size) + " elements and the flow " + std::to_string(flow.num_parameters()) +
         " parameters, expected " + std::to_string(steps_->size) + " of both");
  }
  const FloatMode mode;
  AdamStep step;
  step.step = steps_->steps + 1;
  step.learning_rate = options.learning_rate;
  step.weight_decay = options.weight_decay;
  const double norm = moments->update(flow, step, options.clip_norm, gradient.data());
  ++steps_->steps;
  return norm;
}

AdamState Adam::state() const {
  AdamState state;
  state.steps = steps_->steps;
  state.epochs = steps_->epochs;
  if (state.steps == 0) return state;
  steps_->visit([&](const auto* first, const auto* second) {
    state.first_moment.assign(first, first + steps_->size);
    state.second_moment.assign(second, second + steps_->size);
  });
  return state;
}

void Adam::set_state(const AdamState& state) {
  const auto size = static_cast<std::size_t>(steps_->size);
  const bool fits = state.first_moment.size() == size && state.second_moment.size() == size;
  const bool is_new = state.steps == 0 && state.first_moment.empty() && state.second_moment.empty();
  if (state.steps < 0 || state.epochs < 0 || !(fits || is_new)) {
    fail("state has made " + std::to_string(state.steps) + " steps with moments of " +
         std::to_string(state.first_moment.size()) + " and " + std::to_string(state.second_moment.size()) +
         " parameters, expected " + std::to_string(size) + " as the flow has; give that of this flow, or a new one");
  }
  steps_->steps = state.steps;
  steps_->epochs = state.epochs;
  steps_->visit([&](auto* first, auto* second) {
    using T = std::remove_pointer_t<decltype(first)>;
    const auto copy = [&](const std::vector<double>& from, T* to) {
      std::fill_n(to, size, T(0));
      std::transform(from.begin(), from.end(), to, [](double value) { return static_cast<T>(value); });
    };
    copy(state.first_moment, first);
    copy(state.second_moment, second);
  });
}

template double Adam::step<float>(Flow&, std::span<const float>, const AdamOptions&);
template double Adam::step<double>(Flow&, std::span<const double>, const AdamOptions&);

}  // namespace nvpflow
