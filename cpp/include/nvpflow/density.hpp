/// @file
/// Training on a log-density in place of rows: reverse Kullback-Leibler, with pathwise gradients.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nvpflow/export.h>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/train.hpp>

namespace nvpflow {

/// How fit_density() forms the gradient of the loss. Both have the same mean.
enum class Estimator {
  reparameterized,  ///< through the rows and their log-density
  path,             ///< through the rows alone (Roeder, Wu and Duvenaud 2017): no noise where the flow is the target
};

/// @{
/// "reparameterized" or "path". Throws Error(invalid_argument) for another one.
NVPFLOW_API std::string_view name_of(Estimator estimator);
NVPFLOW_API Estimator parse_estimator(std::string_view name);
/// @}

/// What a LogDensity is called with: B rows of the flow, and where the answers go.
template <class T>
struct DensityCall {
  std::span<const T> x;        ///< [B, D]
  std::span<const T> context;  ///< [B, C]; empty where the flow has none
  std::span<double> log_p;     ///< [B], to write: log p up to a constant, nats
  std::span<T> gradient;       ///< [B, D], to write: its gradient by x; empty: not wanted
};

/// The target. It is called on the thread that called fit_density; what it throws passes through.
template <class T>
using LogDensity = std::function<void(const DensityCall<T>&)>;

/// How fit_density() trains; what FitOptions has, too, means the same.
struct NVPFLOW_API DensityOptions {
  /// Updates.
  std::int64_t steps = 1000;
  /// Rows that are drawn for each.
  std::int64_t batch_size = 1024;
  /// Adam's, at the start of the schedule.
  double learning_rate = 1e-3;
  /// Over all steps.
  Schedule schedule = Schedule::cosine;
  /// Of the gradient.
  Estimator estimator = Estimator::reparameterized;
  /// Decoupled (AdamW), on kernels only.
  double weight_decay = 0.0;
  /// Largest Euclidean norm of the whole gradient. 0: no clipping.
  double clip_norm = 5.0;
  /// In [0, 1): of the weights after each report. 0: no average.
  double averaging = 0.8;
  /// Steps from one report to the next; the last one comes after the last step.
  std::int64_t report_every = 50;
  /// Rows of the seed's sample, always the same ones, by which reports are compared.
  std::int64_t validation = 2048;
  /// Stop after this many reports without a better loss. 0: never.
  std::int64_t patience = 0;
  /// Of the sample that rows are drawn from, and of the order of the contexts.
  std::uint64_t seed = 0;
  /// 0: the flow's own setting.
  int num_threads = 0;
  /// If not empty, the file that is written after every report. If it exists already, training continues from it.
  std::string checkpoint;

  /// As FitOptions::fields.
  template <class Visit>
  static void fields(Visit&& visit) {
    const auto number = [&](const char* name, auto member, const OptionRange& range) { visit(name, member, &range); };
    const auto other = [&](const char* name, auto member) { visit(name, member, nullptr); };
    number("steps", &DensityOptions::steps, {.least = 1, .expected = "at least 1"});
    number("batch_size", &DensityOptions::batch_size, {.least = 1, .expected = "at least 1"});
    number("learning_rate", &DensityOptions::learning_rate, SharedRanges::learning_rate);
    other("schedule", &DensityOptions::schedule);
    other("estimator", &DensityOptions::estimator);
    number("weight_decay", &DensityOptions::weight_decay, SharedRanges::weight_decay);
    number("clip_norm", &DensityOptions::clip_norm, SharedRanges::clip_norm);
    number("averaging", &DensityOptions::averaging, SharedRanges::averaging);
    number("report_every", &DensityOptions::report_every, {.least = 1, .expected = "at least 1"});
    number("validation", &DensityOptions::validation, {.least = 2, .expected = "at least 2 rows"});
    number("patience", &DensityOptions::patience, SharedRanges::patience);
    other("seed", &DensityOptions::seed);
    number("num_threads", &DensityOptions::num_threads, SharedRanges::num_threads);
    other("checkpoint", &DensityOptions::checkpoint);
  }

  /// Throws Error(invalid_argument) naming the field.
  void validate() const;
};

/// The result of the steps since the last report.
struct DensityRecord {
  std::int64_t step = 0;       ///< steps that are done
  double loss = 0;             ///< mean of log q(x) - log p(x) over the rows of these steps, nats
  double validation_loss = 0;  ///< of the weights or their average, the better, over the rows of `validation`
  double ess = 0;  ///< of the same: effective share of the importance weights p / q; NaN where contexts differ
  double learning_rate = 0;  ///< of the last step
  double gradient_norm = 0;  ///< of the last step, before clipping
  double seconds = 0;        ///< wall time of these steps and of the report

  /// As EpochRecord::fields.
  template <class Visit>
  static constexpr void fields(Visit&& visit) {
    visit("step", &DensityRecord::step);
    visit("loss", &DensityRecord::loss);
    visit("validation_loss", &DensityRecord::validation_loss);
    visit("ess", &DensityRecord::ess);
    visit("learning_rate", &DensityRecord::learning_rate);
    visit("gradient_norm", &DensityRecord::gradient_norm);
    visit("seconds", &DensityRecord::seconds);
  }
};

/// The result of a run.
struct DensityHistory {
  std::vector<DensityRecord> reports;  ///< in order
  std::int64_t best_step = 0;          ///< whose weights the flow holds now; 0: the initial ones
  double best_loss = 0;                ///< its validation_loss
  std::string stop_reason;             ///< "steps", "patience", "callback" or "interrupted"
};

/// As FitObserver.
class NVPFLOW_API DensityObserver {
 public:
  virtual ~DensityObserver() = default;
  /// After every slice of work. False: stop at once, stop_reason "interrupted".
  virtual bool on_progress(std::int64_t step, std::int64_t steps) {
    (void)step, (void)steps;
    return true;
  }
  /// False: stop, stop_reason "callback".
  virtual bool on_report(const DensityRecord& record) {
    (void)record;
    return true;
  }
};

/// Fits `flow` to a log-density that is known up to a constant, by minimising KL(q | p) less log of the constant. That
/// is the mean of log q(x) - log p(x) over rows x that the flow draws. Step s takes rows (s - 1) B .. s B of the sample
/// that `seed` names (Flow::sample). A standardize layer and actnorm layers stay as they are: initialize_from() sets
/// them from rows that are roughly where the target is. The parameters of a base that has some are trained by the
/// gradient of the rows' probability. It is REINFORCE, with each loss taken from the mean of the others', and takes one
/// pass more.
///
/// The context of a flow that has one: [C], one for all rows, or [M, C], which rows take in turns. They come in a new
/// order each time that all were taken. The loss is the mean over them. Where the flow standardizes its context and has
/// not yet, several contexts set that. `log_density` gets the context of each row.
///
/// The same options, target and seed give the same weights bit for bit on one instruction set. So they do for any
/// number of threads, and across a stop and a resume from a checkpoint. A checkpoint does not know the target: give it
/// the same one. The flow ends with the weights of the report whose validation_loss is the lowest.
///
/// Throws Error(invalid_argument) for options or contexts that cannot be used. Throws Error(not_finite), naming the
/// step, where log p, its gradient or the loss stops being finite. The flow then holds the best weights so far.
template <class T>
NVPFLOW_API DensityHistory fit_density(Flow& flow, const LogDensity<T>& log_density, const DensityOptions& options = {},
                                       DensityObserver* observer = nullptr, const Context& context = {});

}  // namespace nvpflow
