// Training on a log-density: the rows are the flow's own, the gradient comes back through its inverse.

#include <nvpflow/density.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>

#include "checkpoint_file.hpp"
#include "cpu/cpu_adam.hpp"
#include "fit_start.hpp"
#include "float_mode.hpp"
#include "flow_access.hpp"
#include "option_checks.hpp"
#include "random.hpp"
#include "row_order.hpp"
#include "training.hpp"

namespace nvpflow {
namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

/// The rows that reports are compared by begin here in the seed's sample, where no step comes to.
constexpr std::uint64_t kValidationRow = std::uint64_t{1} << 62;
/// Rows of a slice of a gradient, between two looks at the observer.
constexpr std::int64_t kSliceRows = 4096;

constexpr std::int64_t kRecordFields = [] {
  std::int64_t count = 0;
  DensityRecord::fields([&](const char*, auto) { ++count; });
  return count;
}();

/// Thrown when the observer asks to stop.
struct Stopped {};

/// Mean of log q - log p and the effective share of the weights p / q, of rows that come one by one.
class Weights64 {
 public:
  void add(double log_q, double log_p) {
    const double log_weight = log_p - log_q;
    loss_ -= log_weight;
    ++rows_;
    if (log_weight > largest_) {
      const double factor = std::exp(largest_ - log_weight);
      sum_ *= factor;
      squares_ *= factor * factor;
      largest_ = log_weight;
    }
    const double weight = std::exp(log_weight - largest_);
    sum_ += weight;
    squares_ += weight * weight;
  }
  double loss() const { return loss_ / static_cast<double>(rows_); }
  double ess() const { return sum_ * sum_ / squares_ / static_cast<double>(rows_); }

 private:
  std::int64_t rows_ = 0;
  double loss_ = 0, sum_ = 0, squares_ = 0, largest_ = -std::numeric_limits<double>::infinity();
};

template <class T>
class DensityFit {
 public:
  DensityFit(Flow& flow, const LogDensity<T>& log_density, const DensityOptions& options, DensityObserver* observer,
             const Context& context)
      : flow_(flow),
        log_density_(log_density),
        options_((options.validate(), options)),
        observer_(observer != nullptr ? *observer : silent_),
        features_(flow.spec().input_size),
        context_size_(flow.spec().context_size),
        contexts_(checked_contexts(context)),
        threads_(options.num_threads > 0 ? options.num_threads : FlowAccess::threads(flow)),
        // Weights in full also where the flow's own are rounded: small steps would be lost.
        work_(flow.to(flow.device(), flow.precision(), Weights::full)),
        adam_(flow.layout(), threads_) {
    history_.best_loss = std::numeric_limits<double>::infinity();
    const auto& tensors = flow.layout().tensors();
    const auto base =
        tensors.begin() + static_cast<std::ptrdiff_t>(flow.layout().first_tensor(flow.spec().layers.size()));
    std::copy_if(base, tensors.end(), std::back_inserter(trained_of_base_),
                 [](const TensorInfo& tensor) { return tensor.trained; });
  }

  DensityHistory run() {
    try {
      prepare();
      resume();
      while (history_.stop_reason.empty()) train_until_report();
    } catch (const Stopped&) {
      history_.stop_reason = "interrupted";
    } catch (...) {
      publish();
      throw;
    }
    publish();
    return std::move(history_);
  }

 private:
  // ---- contexts --------------------------------------------------------------------------------------------------

  /// [M, C], M at least 1; nothing for a flow without a context.
  std::span<const T> checked_contexts(const Context& context) const {
    const std::string size = std::to_string(context_size_);
    if (context_size_ == 0) {
      if (context.element() == 0) return {};
      fail("context holds " + std::to_string(context.size()) + " elements, expected none: the flow has no context");
    }
    if (context.element() == 0) {
      fail("context is missing, expected [" + size + "], one for all rows, or [M, " + size + "], taken in turns");
    }
    if (context.element() != sizeof(T)) {
      throw Error(ErrorCode::type_mismatch,
                  "context is of another type, expected the flow's " + std::string(name_of(flow_.spec().dtype)));
    }
    if (context.size() == 0 || context.size() % context_size_ != 0) {
      fail("context holds " + std::to_string(context.size()) + " elements, expected a multiple of " + size +
           ", at least one row");
    }
    const std::span given(static_cast<const T*>(context.data()), static_cast<std::size_t>(context.size()));
    check_finite("context", given, context_size_, [] {});
    return given;
  }

  std::int64_t num_contexts() const {
    return context_size_ == 0 ? 0 : static_cast<std::int64_t>(contexts_.size()) / context_size_;
  }

  /// Which context each of `count` places from `first` on takes, where there are several: into row_contexts_.
  void choose_contexts(std::uint64_t first, std::int64_t count) {
    const auto several = static_cast<std::uint64_t>(num_contexts());
    if (several == 0) return;
    if (several == 1) {
      for (std::int64_t r = 0; r < count; ++r) copy_context(0, r);
      return;
    }
    std::optional<std::uint64_t> pass;
    Shuffle order;
    for (std::int64_t r = 0; r < count; ++r) {
      const std::uint64_t at = first + static_cast<std::uint64_t>(r);
      if (pass != at / several) {
        pass = at / several;
        order = Shuffle(several, options_.seed, kStreamShuffle, *pass);
      }
      copy_context(static_cast<std::int64_t>(order(at % several)), r);
    }
  }
  void copy_context(std::int64_t from, std::int64_t to) {
    std::copy_n(contexts_.data() + from * context_size_, context_size_, row_contexts_.data() + to * context_size_);
  }

  /// A call on rows that begin `first` rows into the batch.
  Execution execution(std::int64_t first = 0) const {
    Execution how(threads_);
    if (context_size_ > 0) {
      how.context.rows = num_contexts() == 1 ? contexts_.data() : row_contexts_.data() + first * context_size_;
      how.context.repeat = num_contexts() == 1 ? ContextRows::kForAll : 1;
    }
    return how;
  }

  // ---- before and after ------------------------------------------------------------------------------------------

  void prepare() {
    check_checkpoint_folder(options_.checkpoint);
    const auto size = static_cast<std::size_t>(flow_.num_parameters());
    parameters_.resize(size);
    gradient_.resize(size);
    flow_.template copy_parameters<T>(parameters_, &mean_low_);
    set_contexts_statistics();
    best_ = parameters_;
    if (options_.averaging > 0) average_.resize(size);
    const std::int64_t rows = std::max(options_.batch_size, std::min(options_.validation, kSliceRows));
    const auto count = static_cast<std::size_t>(rows);
    z_.resize(count * static_cast<std::size_t>(features_));
    x_ = z_;
    target_gradient_ = z_;
    log_q_.resize(count);
    log_p_.resize(count);
    cotangent_of_log_det_.assign(static_cast<std::size_t>(options_.batch_size),
                                 static_cast<T>(-1.0 / static_cast<double>(options_.batch_size)));
    row_contexts_.resize(count * static_cast<std::size_t>(context_size_));
    set_weights(parameters_);
  }

  /// Where they are still zeros, and there is more than one context.
  void set_contexts_statistics() {
    if (!flow_.spec().standardize_context || num_contexts() < 2) return;
    const auto statistics = std::span<T>(parameters_).last(static_cast<std::size_t>(2 * context_size_));
    if (std::any_of(statistics.begin(), statistics.end(), [](T v) { return v != T(0); })) return;
    set_context_statistics(statistics, contexts_, {}, RowOrder(), num_contexts(), [] {});
  }

  void set_weights(const std::vector<T>& weights) { work_.template set_parameters<T>(weights, mean_low_); }

  /// A run without a report leaves the flow as it was.
  void publish() {
    if (history_.best_step > 0) flow_.template set_parameters<T>(best_, mean_low_);
  }

  void poll() {
    if (!observer_.on_progress(step_, options_.steps)) throw Stopped();
  }

  // ---- rows and their densities ----------------------------------------------------------------------------------

  /// Rows first .. first + count of the seed's sample: x_, log_q_, log_p_ and, where wanted, target_gradient_.
  void draw(std::uint64_t first, std::int64_t count, bool with_gradient) {
    choose_contexts(first, count);
    work_.sample_unchecked(options_.seed, first, count, x_.data(), log_q_.data(), execution());
    const auto rows = static_cast<std::size_t>(count), elements = rows * static_cast<std::size_t>(features_);
    require_finite_rows(count);
    const std::span<const T> context(row_contexts_.data(), rows * static_cast<std::size_t>(context_size_));
    const DensityCall<T> call = {
        {x_.data(), elements}, context, {log_p_.data(), rows}, {target_gradient_.data(), with_gradient ? elements : 0}};
    std::fill(call.log_p.begin(), call.log_p.end(), std::numeric_limits<double>::quiet_NaN());
    std::fill(call.gradient.begin(), call.gradient.end(), std::numeric_limits<T>::quiet_NaN());
    log_density_(call);
    require_finite_densities(count, with_gradient);
  }

  /// Of the first `count` rows that were drawn.
  void add_weights(std::int64_t count, Weights64& to) const {
    for (std::size_t r = 0; r < static_cast<std::size_t>(count); ++r) {
      to.add(static_cast<double>(log_q_[r]), log_p_[r]);
    }
  }

  void require_finite_rows(std::int64_t count) const {
    for (std::int64_t r = 0; r < count; ++r) {
      const T* row = x_.data() + r * features_;
      const bool good = std::all_of(row, row + features_, [](T v) { return std::isfinite(v); });
      if (good && std::isfinite(log_q_[static_cast<std::size_t>(r)])) continue;
      diverged("a row of the flow", good ? static_cast<double>(log_q_[static_cast<std::size_t>(r)]) : HUGE_VAL);
    }
  }

  void require_finite_densities(std::int64_t count, bool with_gradient) const {
    for (std::int64_t r = 0; r < count; ++r) {
      const double log_p = log_p_[static_cast<std::size_t>(r)];
      if (!std::isfinite(log_p)) {
        const bool outside = std::isinf(log_p) && log_p < 0;
        refuse_density("", r, log_p,
                       outside ? "; where the target has no density the loss is infinite: build the flow on the "
                                 "target's support, or write the target in numbers that have no bounds"
                               : "; mend log_density there");
      }
      const T* row = target_gradient_.data() + r * features_;
      const T* bad = std::find_if(row, row + (with_gradient ? features_ : 0), [](T v) { return !std::isfinite(v); });
      if (bad != row + (with_gradient ? features_ : 0)) {
        refuse_density("a gradient with ", r, static_cast<double>(*bad), "; mend log_density there");
      }
    }
  }

  [[noreturn]] void refuse_density(const char* what, std::int64_t row, double value, const char* way) const {
    constexpr std::int64_t kShown = 6;
    std::ostringstream text;
    text << "log_density gave " << what
         << (std::isnan(value) ? "NaN"
             : value > 0       ? "inf"
                               : "-inf")
         << at_step() << ", for x = [";
    for (std::int64_t j = 0; j < std::min(features_, kShown); ++j) {
      text << (j == 0 ? "" : ", ") << x_[static_cast<std::size_t>(row * features_ + j)];
    }
    text << (features_ > kShown ? ", ...]" : "]");
    throw Error(ErrorCode::not_finite, text.str() + "; " + kept() + way);
  }

  std::string at_step() const {
    return reporting_ ? " at the report after step " + std::to_string(step_) : " at step " + std::to_string(step_ + 1);
  }
  std::string kept() const {
    return history_.best_step == 0 ? "the flow is left as it was"
                                   : "the flow keeps the weights of step " + std::to_string(history_.best_step);
  }
  [[noreturn]] void diverged(const char* what, double value) const {
    throw Error(ErrorCode::not_finite,
                std::string(what) + " became " + (std::isnan(value) ? "NaN" : "infinite") + at_step() + "; " + kept() +
                    "; try a lower learning_rate or clip_norm, or initialize_from with rows from where the target is");
  }

  // ---- a step ----------------------------------------------------------------------------------------------------

  void train_until_report() {
    const auto start = Clock::now();
    Weights64 seen;
    DensityRecord record;
    do {
      poll();
      step(seen, record);
      ++step_;
    } while (step_ % options_.report_every != 0 && step_ < options_.steps);
    record.step = step_;
    record.loss = seen.loss();
    report(record, start);
  }

  void step(Weights64& seen, DensityRecord& record) {
    const std::int64_t batch = options_.batch_size;
    const auto first = static_cast<std::uint64_t>(step_) * static_cast<std::uint64_t>(batch);
    draw(first, batch, true);
    add_weights(batch, seen);
    if (!std::isfinite(seen.loss())) diverged("loss", seen.loss());
    work_.noise_unchecked(options_.seed, first, batch, z_.data(), Execution(threads_));
    form_cotangents(batch);
    const bool path = options_.estimator == Estimator::path;
    for (std::int64_t done = 0; done < batch; done += kSliceRows) {
      if (done > 0) poll();
      work_.vjp_unchecked(Direction::inverse, z_.data() + done * features_, std::min(kSliceRows, batch - done),
                          target_gradient_.data() + done * features_,
                          path ? nullptr : cotangent_of_log_det_.data() + done, nullptr, gradient_.data(), done > 0,
                          execution(done));
    }
    if (!trained_of_base_.empty()) add_gradient_of_base(batch);
    update(record);
  }

  /// The base's parameters. A row's latents do not follow from them smoothly: a component of a mixture is chosen. So
  /// theirs is the gradient of the rows' probability (REINFORCE): the mean of f times that of log b(z), with f = log q
  /// - log p. Each f counts from the mean of the others (Kool, van Hoof and Welling 2019): that changes no mean, and
  /// there is no noise where the flow is the target.
  void add_gradient_of_base(std::int64_t batch) {
    form_cotangents_of_log_q(batch);
    gradient_at_rows_.resize(gradient_.size());
    for (std::int64_t done = 0; done < batch; done += kSliceRows) {
      poll();
      // At a given x no other term of log q depends on them.
      work_.log_prob_vjp_unchecked(x_.data() + done * features_, std::min(kSliceRows, batch - done),
                                   cotangent_of_log_q_.data() + done, nullptr, nullptr, gradient_at_rows_.data(),
                                   done > 0, execution(done));
    }
    for (const TensorInfo& tensor : trained_of_base_) {
      const auto first = gradient_at_rows_.begin() + tensor.offset;
      std::transform(first, first + tensor.size, gradient_.begin() + tensor.offset, gradient_.begin() + tensor.offset,
                     std::plus<T>());
    }
  }

  /// (f - the mean of the others' f) / B = (f - the mean) / (B - 1).
  void form_cotangents_of_log_q(std::int64_t batch) {
    const auto rows = static_cast<std::size_t>(batch);
    const auto loss = [this](std::size_t r) { return static_cast<double>(log_q_[r]) - log_p_[r]; };
    double sum = 0;
    for (std::size_t r = 0; r < rows; ++r) sum += loss(r);
    const double mean = batch == 1 ? 0 : sum / static_cast<double>(batch);  // of one row there are no others
    const double share = 1 / static_cast<double>(std::max<std::int64_t>(1, batch - 1));
    cotangent_of_log_q_.resize(rows);
    for (std::size_t r = 0; r < rows; ++r) cotangent_of_log_q_[r] = static_cast<T>(share * (loss(r) - mean));
  }

  /// target_gradient_ becomes the cotangent of x: (the score of the flow, of `path`, - that of the target) / B.
  void form_cotangents(std::int64_t batch) {
    const T share = static_cast<T>(1.0 / static_cast<double>(batch));
    if (options_.estimator == Estimator::reparameterized) {
      for (std::int64_t i = 0; i < batch * features_; ++i) target_gradient_[static_cast<std::size_t>(i)] *= -share;
      return;
    }
    score_.resize(static_cast<std::size_t>(batch * features_));
    work_.log_prob_vjp_unchecked(x_.data(), batch, nullptr, nullptr, score_.data(), nullptr, false, execution());
    for (std::size_t i = 0; i < score_.size(); ++i) target_gradient_[i] = share * (score_[i] - target_gradient_[i]);
  }

  void update(DensityRecord& record) {
    AdamStep adam;
    adam.step = step_ + 1;
    adam.learning_rate = record.learning_rate = learning_rate();
    adam.weight_decay = options_.weight_decay;
    record.gradient_norm = adam_.update(adam, options_.clip_norm, gradient_.data(), parameters_.data());
    if (!std::isfinite(record.gradient_norm)) diverged("gradient norm", record.gradient_norm);
    set_weights(parameters_);
  }

  double learning_rate() const {
    if (options_.schedule == Schedule::constant) return options_.learning_rate;
    return cosine(options_.learning_rate, static_cast<double>(step_) / static_cast<double>(options_.steps));
  }

  // ---- a report --------------------------------------------------------------------------------------------------

  /// Of work_'s weights of now, over the rows that are the same in all reports.
  Weights64 validate() {
    Weights64 found;
    for (std::int64_t done = 0; done < options_.validation; done += kSliceRows) {
      poll();
      const std::int64_t count = std::min(kSliceRows, options_.validation - done);
      draw(kValidationRow + static_cast<std::uint64_t>(done), count, false);
      add_weights(count, found);
    }
    if (!std::isfinite(found.loss())) diverged("validation loss", found.loss());
    return found;
  }

  /// Takes the weights of now into their average, as fit() does after an epoch.
  void average(std::size_t reports) {
    const double kept = options_.averaging;
    const auto share = static_cast<T>((1 - kept) / (1 - std::pow(kept, static_cast<double>(reports))));
    for (std::size_t i = 0; i < average_.size(); ++i) average_[i] += share * (parameters_[i] - average_[i]);
  }

  void report(DensityRecord record, Clock::time_point start) {
    reporting_ = true;
    const std::vector<T>* candidate = &parameters_;
    Weights64 found = validate();
    if (options_.averaging > 0) {
      average(history_.reports.size() + 1);
      set_weights(average_);
      const Weights64 of_average = validate();
      set_weights(parameters_);
      if (of_average.loss() < found.loss()) candidate = &average_, found = of_average;
    }
    reporting_ = false;
    record.validation_loss = found.loss();
    record.ess = num_contexts() > 1 ? std::numeric_limits<double>::quiet_NaN() : found.ess();
    record.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    history_.reports.push_back(record);
    if (found.loss() < history_.best_loss) {
      history_.best_loss = found.loss();
      history_.best_step = record.step;
      best_ = *candidate;
      reports_without_ = 0;
    } else {
      ++reports_without_;
    }
    settle_end();
    // Written before the observer is asked: a stop that it asks for is not the training's own end.
    write();
    if (!observer_.on_report(record) && history_.stop_reason.empty()) history_.stop_reason = "callback";
  }

  void settle_end() {
    if (options_.patience > 0 && reports_without_ >= options_.patience) history_.stop_reason = "patience";
    if (step_ >= options_.steps) history_.stop_reason = "steps";
  }

  // ---- checkpoint ------------------------------------------------------------------------------------------------

  nlohmann::json key() const {
    nlohmann::json text = {{"flow", nlohmann::json::parse(to_json(flow_.spec()))}, {"run", "fit_density"}};
    if (context_size_ > 0) {
      std::ostringstream print;
      print << num_contexts() << " rows with fingerprint " << std::hex
            << fingerprint(contexts_.data(), contexts_.size_bytes(), [] {});
      text["context"] = print.str();
    }
    DensityOptions::fields([&](const char* name, auto member, const OptionRange*) {
      using Value = std::remove_cvref_t<decltype(options_.*member)>;
      if constexpr (std::is_enum_v<Value>) {
        text[name] = name_of(options_.*member);
      } else {
        text[name] = options_.*member;
      }
    });
    for (const char* name : {"num_threads", "checkpoint"}) text.erase(name);  // decide nothing
    if (options_.schedule == Schedule::constant) text.erase("steps");         // a constant rate may go on for longer
    return text;
  }

  CheckpointArrays arrays() {
    return {parameters_.data(),
            best_.data(),
            adam_.first_moment(),
            adam_.second_moment(),
            average_.empty() ? nullptr : average_.data(),
            flow_.num_parameters()};
  }

  void write() {
    if (options_.checkpoint.empty()) return;
    CheckpointState state = {step_, history_.best_step, history_.best_loss, std::nullopt, {}};
    for (const DensityRecord& r : history_.reports) {
      DensityRecord::fields([&](const char*, auto member) { state.records.push_back(static_cast<double>(r.*member)); });
    }
    write_checkpoint(options_.checkpoint, key(), flow_.spec().dtype, state, kRecordFields, arrays());
  }

  void resume() {
    if (options_.checkpoint.empty() || !checkpoint_exists(options_.checkpoint)) return;
    static constexpr std::array<const char*, 2> kFirst = {"flow", "run"};
    const ReadCheckpoint found = read_checkpoint(options_.checkpoint, key(), kFirst, flow_.spec().dtype, kRecordFields);
    take_records(found.state);
    found.take(arrays());
    step_ = found.state.adam_steps;
    history_.best_step = found.state.best;
    history_.best_loss = found.state.best_loss;
    set_weights(parameters_);
    settle_end();
  }

  /// What reports leave: steps that are those of reports, finite numbers, the best of them.
  void take_records(const CheckpointState& state) {
    const auto damaged = [this](const std::string& what) { checkpoint_damaged(options_.checkpoint, what); };
    double lowest = std::numeric_limits<double>::infinity();
    std::int64_t best = 0, step = 0;
    for (std::size_t at = 0; at < state.records.size(); at += static_cast<std::size_t>(kRecordFields)) {
      DensityRecord record;
      const double* value = state.records.data() + at;
      DensityRecord::fields([&](const char* name, auto member) {
        const bool may_be_nan = std::string_view(name) == "ess" && num_contexts() > 1;
        if (!std::isfinite(*value) && !may_be_nan) damaged(std::string("its history has no finite ") + name);
        record.*member = static_cast<std::remove_cvref_t<decltype(record.*member)>>(*value++);
      });
      if (record.step <= step) damaged("the steps of its history do not rise");
      step = record.step;
      history_.reports.push_back(record);
      ++reports_without_;
      if (record.validation_loss < lowest) {
        lowest = record.validation_loss;
        best = step;
        reports_without_ = 0;
      }
    }
    if (history_.reports.empty() || state.adam_steps != step) damaged("its adam_steps is not that of its history");
    if (state.best != best || state.best_loss != lowest) damaged("its best report is not that of its history");
  }

  inline static DensityObserver silent_;

  Flow& flow_;
  const LogDensity<T>& log_density_;
  const DensityOptions options_;
  DensityObserver& observer_;
  const std::int64_t features_, context_size_;
  const std::span<const T> contexts_;  // [M, C]
  const int threads_;
  Flow work_;  // with the weights of now
  cpu::CpuAdam<T> adam_;
  std::vector<TensorInfo> trained_of_base_;
  std::vector<T> parameters_, gradient_, gradient_at_rows_, best_, average_;
  std::vector<float> mean_low_;
  std::vector<T> z_, x_, target_gradient_, score_, log_q_, cotangent_of_log_det_, cotangent_of_log_q_, row_contexts_;
  std::vector<double> log_p_;
  std::int64_t step_ = 0, reports_without_ = 0;
  bool reporting_ = false;
  DensityHistory history_;
};

}  // namespace

void DensityOptions::validate() const {
  options::check_all(*this);
  constexpr std::int64_t kMostRows = std::int64_t{1} << 62;
  if (steps <= kMostRows / batch_size) return;
  fail("steps is " + std::to_string(steps) + " of batch_size " + std::to_string(batch_size) +
       ", expected at most 2**62 rows in all");
}

std::string_view name_of(Estimator estimator) {
  switch (estimator) {
    case Estimator::reparameterized:
      return "reparameterized";
    case Estimator::path:
      return "path";
  }
  fail("estimator is the enumerator " + std::to_string(static_cast<int>(estimator)) +
       ", expected 'reparameterized' or 'path'");
}

Estimator parse_estimator(std::string_view name) {
  for (const Estimator known : {Estimator::reparameterized, Estimator::path}) {
    if (name == name_of(known)) return known;
  }
  fail("estimator is '" + std::string(name) + "', expected 'reparameterized' or 'path'");
}

template <class T>
DensityHistory fit_density(Flow& flow, const LogDensity<T>& log_density, const DensityOptions& options,
                           DensityObserver* observer, const Context& context) {
  const FloatMode mode;  // also for what the training itself computes; the density and the observer are called in it
  options.validate();
  if (!log_density) fail("log_density is empty, expected a function");
  if (const Bounds* bounds = flow.spec().bounds(); bounds != nullptr && !bounds->discrete.empty()) {
    fail("the flow has discrete columns, expected none: their samples are rounded, and no gradient goes through that");
  }
  if (flow.spec().dtype != (sizeof(T) == 4 ? DType::float32 : DType::float64)) {
    throw Error(ErrorCode::type_mismatch,
                "log_density is not of " + std::string(name_of(flow.spec().dtype)) + " as the flow is");
  }
  return DensityFit<T>(flow, log_density, options, observer, context).run();
}

template DensityHistory fit_density(Flow&, const LogDensity<float>&, const DensityOptions&, DensityObserver*,
                                    const Context&);
template DensityHistory fit_density(Flow&, const LogDensity<double>&, const DensityOptions&, DensityObserver*,
                                    const Context&);

}  // namespace nvpflow
