// The training loop: independent of the backend, which forms the gradients and the updates.

#include <nvpflow/train.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

#include "backend.hpp"
#include "bounded_rows.hpp"
#include "checkpoint.hpp"
#include "checkpoint_file.hpp"
#include "column_statistics.hpp"
#include "fit_rows.hpp"
#include "fit_start.hpp"
#include "float_mode.hpp"
#include "flow_access.hpp"
#include "layer_start.hpp"
#include "layers/layer.hpp"
#include "memory.hpp"
#include "mixture_start.hpp"
#include "option_checks.hpp"
#include "parallel.hpp"
#include "random.hpp"
#include "row_order.hpp"
#include "rows_outside.hpp"
#include "sample_weights.hpp"
#include "training.hpp"
#include "weighted_table.hpp"
#include "wide_rows.hpp"

namespace nvpflow {
namespace {

using options::short_text;
using Clock = std::chrono::steady_clock;

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// Arithmetic between two looks at the observer, in float32: 0.2 s on one core with AVX-512, 0.6 with 16-byte vectors.
/// A batch that is cut in slices reads the weights and adds to the gradient once for each.
constexpr double kSliceFlops = 16e9;

/// The weight decay that is taken where none is given: a prior that weighs less the more rows there are. Measured by
/// tests/bench/defaults.py; in proportion to columns / rows it cost half a nat on 18,000 rows of ten columns.
double decay_of(std::int64_t columns, double rows) {
  const double share = 225.0 * static_cast<double>(columns) / std::max(1.0, rows);
  return std::min(1.0, share * share);
}

/// A share of the rows that is fewer than this does not tell which epoch of a flow that whitens is better than none.
constexpr std::int64_t kFewValidationRows = 200;
/// Compared rows below which an epoch has to be better than the start by three standard errors, and not by two.
constexpr double kFewCompared = 200;
/// ... and by so many nats in all. Few rows do not show tails: 30 rows took an epoch that lost 2.5 nats.
constexpr double kLeastGain = 60;
/// Folds where nothing is said, and rows below which each of them is left out once.
constexpr std::int64_t kFolds = 5, kLeaveOneOutRows = 10;

const double* values_or_null(const std::vector<double>& values) { return values.empty() ? nullptr : values.data(); }

/// Thrown through the preparation of a fit when the observer asks to stop.
struct Stopped {};

/// Where the standardize layer is applied in float64, the rows are standardized once, before training, and the run sees
/// a flow whose first layer is the identity: only the layer's log-determinant is missing there.
struct Standardized {
  bool on = false;
  WideRows layer;
  std::vector<float> mean_low;
  double log_det = 0;  // 0 where it is not on
};

/// T: of the flow. Rows of X: T, or double for a float32 flow with takes_float64_rows. Rows go through the flow's
/// bounds once, before training: the run sees a flow without them.
template <class T, class X>
class Trainer {
 public:
  Trainer(Flow& flow, std::span<const X> x, std::span<const X> validation, const FitWeights& weights,
          const FitOptions& options, FitObserver* observer, const Context& context, const Context& validation_context,
          AdamState* adam)
      : flow_(flow),
        spec_(flow.spec().behind_bounds()),
        options_(options),
        adam_(adam),
        observer_(observer != nullptr ? *observer : silent_),
        features_(flow.spec().input_size),
        given_x_(x),
        given_validation_(validation),
        given_weights_(weights),
        weights_(weights.x.begin(), weights.x.end()),
        validation_weights_(weights.validation.begin(), weights.validation.end()),
        context_(checked_context<T>(flow.spec(), "context", context, rows_in(x.size()))),
        validation_context_(checked_context<T>(flow.spec(), "the context of validation", validation_context,
                                               rows_in(validation.size()))),
        main_(FitRows(checked_rows(), held_out_rows(), options.seed)),
        threads_(options.num_threads > 0 ? options.num_threads : FlowAccess::threads(flow)) {
    // Forward and back.
    const double per_row = 3 * flow.layout().flops_per_row();
    const double most = kSliceFlops * sizeof(float) / sizeof(T);
    slice_ = std::clamp<std::int64_t>(static_cast<std::int64_t>(most / per_row), 64, 1 << 16);
    count_rows();
    constexpr double kMaxDeviation = 1000;
    max_deviation_ =
        options.max_deviation.value_or(layers::facts_of(flow.spec().base).has_heavy_tails ? 0 : kMaxDeviation);
    history_.best_loss = history_.initial_loss = std::numeric_limits<double>::infinity();
  }

  History run() {
    try {
      prepare();
      resume();
      while (history_.stop_reason.empty()) epoch();
    } catch (const Stopped&) {
      interrupt();
    } catch (...) {
      publish();
      throw;
    }
    publish();
    require_one_kept();
    return std::move(history_);
  }

 private:
  /// One set of weights on its way through the epochs, and the rows that it sees.
  struct Run {
    explicit Run(const FitRows& its_rows) : rows(its_rows) {}
    FitRows rows;
    std::int64_t batch = 0, steps = 0, adam_steps = 0;
    double weight_decay = 0;
    std::vector<double> own_weights;  // of all rows, of mean 1 over those trained on; empty: those of the trainer are
    double weight_factor = 1;         // own_weights are so many times those of the trainer
    std::vector<T> start, average;    // average: empty where there is none
    std::unique_ptr<Training> training;
  };

  void prepare() {
    check_checkpoint_folder(options_.checkpoint);
    check_finite("x", given_x_, features_, [this] { poll(); });
    check_finite("validation", given_validation_, features_, [this] { poll(); });
    if (context_size() > 0) {
      check_finite("context", context_, context_size(), [this] { poll(); });
      check_finite("the context of validation", validation_context_, context_size(), [this] { poll(); });
    }
    best_.resize(static_cast<std::size_t>(flow_.num_parameters()));
    flow_.template copy_parameters<T>(best_, &standardized_.mean_low);
    map_bounds();
    standardize_from_data();
    standardize_context();
    take_rows();
    leave_out_far_rows();
    find_log_dets();
    const TrainingData data = {x_.data(),
                               total_rows(),
                               validation_.data(),
                               validation_rows(),
                               context_.data(),
                               validation_context_.data(),
                               values_or_null(weights_),
                               values_or_null(validation_weights_)};
    std::vector<T> start = best_;
    if (standardized_.on) std::fill_n(start.begin(), 2 * features_, T(0));
    for (Run& fold : folds_) begin(fold, start, data);
    begin(main_, std::move(start), data);
    const std::int64_t kept = own_begin();
    std::copy(main_.start.begin() + kept, main_.start.end(), best_.begin() + kept);
    refuse_rows_outside(main_.start);
    go_on_from_adam();
    if (options_.max_round_trip > 0 || starts_as_candidate()) {
      probe_.emplace(without_bounds());
      probe_->set_num_threads(threads_);
    }
    judge_start();
    for (Run& fold : folds_) change_start_for_average(fold);
    change_start_for_average(main_);
  }

  /// Neither array of the parameters' size is needed beside the other.
  void change_start_for_average(Run& run) {
    release(run.start);
    if (options_.averaging > 0) run.average.resize(best_.size());
  }

  /// What the run trains, as a flow.
  Flow without_bounds() const {
    if (!has_bounds()) return Flow(flow_);
    return Flow(spec_, /*seed=*/0, flow_.device(), flow_.precision(), flow_.weights());
  }

  /// start: what training starts from but for the layers that are set from the run's own rows.
  void begin(Run& run, std::vector<T> start, TrainingData data) {
    run.start = std::move(start);
    if (!run.own_weights.empty()) data.weights = run.own_weights.data();
    start_from_rows(run);
    start_mixture_base(run);
    const std::int64_t most = std::min(slice_, run.batch);
    run.training = FlowAccess::backend(flow_).begin_training(data, run.start.data(), most, Execution(threads_));
  }

  // ---- Adam's state from one run to the next ---------------------------------------------------------------------

  void check_restandardize() const {
    const bool standardizes_any = standardizes() || flow_.spec().standardize_context || flow_.spec().whitens();
    if (!options_.restandardize || standardizes_any) return;
    fail(
        "restandardize is true, but the flow standardizes neither its rows nor a context; expected false, or a flow "
        "that does");
  }

  void check_adam() const {
    if (adam_ == nullptr) return;
    const auto refuse = [](bool asked, const std::string& what, const char* because) {
      if (asked) fail(what + " beside adam, " + because);
    };
    constexpr const char* kLast = "expected 0: the flow ends with the weights of the last epoch, which adam belongs to";
    refuse(options_.averaging > 0, "averaging is " + short_text(options_.averaging), kLast);
    refuse(options_.max_round_trip > 0, "max_round_trip is " + short_text(options_.max_round_trip), kLast);
    refuse(options_.patience > 0, "patience is " + std::to_string(options_.patience), kLast);
    refuse(!options_.checkpoint.empty(), "checkpoint is " + options_.checkpoint,
           "expected none: a checkpoint keeps Adam's state itself");
    const auto size = static_cast<std::size_t>(flow_.num_parameters());
    const bool fits = adam_->first_moment.size() == size && adam_->second_moment.size() == size;
    if (adam_->steps < 0 || adam_->epochs < 0 || (adam_->steps > 0 && !fits)) {
      fail("adam has made " + std::to_string(adam_->steps) + " steps with moments of " +
           std::to_string(adam_->first_moment.size()) + " and " + std::to_string(adam_->second_moment.size()) +
           " parameters, expected " + std::to_string(size) + " as the flow has; give that of this flow, or a new one");
    }
  }

  void go_on_from_adam() {
    if (adam_ == nullptr) return;
    main_.adam_steps = earlier_steps_ = adam_->steps;
    earlier_epochs_ = adam_->epochs;
    if (adam_->steps == 0) return;
    const Training::Arrays own = main_.training->read(true);
    const auto copy = [](const std::vector<double>& from, void* to) {
      std::transform(from.begin(), from.end(), static_cast<T*>(to), [](double v) { return static_cast<T>(v); });
    };
    copy(adam_->first_moment, own.first_moment);
    copy(adam_->second_moment, own.second_moment);
    main_.training->write();
  }

  void keep_adam() {
    if (adam_ == nullptr) return;
    const Training::Arrays own = main_.training->read(true);
    const auto size = static_cast<std::size_t>(flow_.num_parameters());
    const auto copy = [size](const void* from, std::vector<double>& to) {
      to.assign(static_cast<const T*>(from), static_cast<const T*>(from) + size);
    };
    copy(own.first_moment, adam_->first_moment);
    copy(own.second_moment, adam_->second_moment);
    adam_->steps = main_.adam_steps;
    ++adam_->epochs;
  }

  /// A run that has not finished an epoch leaves the flow as it was.
  bool keeps_one() const { return history_.best_epoch > 0 || (!start_log_prob_.empty() && !history_.epochs.empty()); }

  void publish() {
    folds_.clear();  // their memory first: the flow may need room for a second copy
    main_.training.reset();
    probe_.reset();
    if (keeps_one()) flow_.template set_parameters<T>(best_, standardized_.mean_low);
  }

  void require_one_kept() const {
    if (options_.max_round_trip == 0 || keeps_one() || history_.epochs.empty()) return;
    if (history_.stop_reason == "interrupted") return;
    const auto closest = std::min_element(history_.epochs.begin(), history_.epochs.end(),
                                          [](const auto& a, const auto& b) { return a.round_trip < b.round_trip; });
    throw Error(ErrorCode::none_kept,
                "no epoch was inside max_round_trip " + short_text(options_.max_round_trip) +
                    ": the smallest error of " + std::to_string(history_.epochs.size()) + " epochs was " +
                    short_text(closest->round_trip) + ", after epoch " + std::to_string(closest->epoch) +
                    "; the flow is left as it was; try float64, a lower scale_bound or learning_rate, weight_decay, " +
                    "fewer couplings or a larger max_round_trip");
  }

  void poll() {
    if (!observer_.on_progress(0, 0, steps_)) throw Stopped();
  }

  // ---- data ------------------------------------------------------------------------------------------------------

  bool has_array() const { return validation_rows() > 0; }
  std::int64_t total_rows() const { return rows_in(taken_ ? x_.size() : given_x_.size()); }
  std::int64_t validation_rows() const { return rows_in(taken_ ? validation_.size() : given_validation_.size()); }
  std::int64_t rows_in(std::size_t elements) const { return static_cast<std::int64_t>(elements) / features_; }

  std::int64_t context_size() const { return flow_.spec().context_size; }

  std::int64_t checked_rows() const {
    options_.validate();
    check_restandardize();
    check_adam();
    for (const auto& [name, span] : {std::pair{"x", given_x_}, std::pair{"validation", given_validation_}}) {
      if (static_cast<std::int64_t>(span.size()) % features_ != 0) {
        fail(std::string(name) + " holds " + std::to_string(span.size()) +
             " elements, expected a multiple of input_size " + std::to_string(features_));
      }
    }
    return total_rows();
  }

  std::int64_t held_out_rows() const {
    if (has_array() || num_folds() > 0) return 0;
    return FitRows::held_out_of(total_rows(), options_.validation_fraction);
  }

  /// Folds of cross-validation; 0: none.
  std::int64_t num_folds() const {
    const bool share = !has_array() && options_.validation_fraction > 0;
    if (options_.folds != 0) return options_.folds > 1 ? options_.folds : 0;
    if (!share || adam_ != nullptr || !options_.checkpoint.empty() || total_rows() < 2) return 0;
    const std::int64_t held_out = FitRows::held_out_of(total_rows(), options_.validation_fraction);
    if (held_out >= (flow_.spec().whitens() ? kFewValidationRows : 1)) return 0;
    return total_rows() < kLeaveOneOutRows ? total_rows() : std::min(kFolds, total_rows());
  }

  void check_folds() const {
    if (options_.folds < 2) return;
    const auto refuse = [&](bool asked, const std::string& what) {
      if (asked) fail("folds is " + std::to_string(options_.folds) + " beside " + what);
    };
    refuse(has_array(), "rows for validation, expected 0 or 1: these rows are what epochs are compared by");
    refuse(options_.validation_fraction == 0, "validation 0, expected a share above 0, or folds 0 or 1");
    refuse(adam_ != nullptr, "adam, expected 0 or 1: Adam's state is that of one run");
    refuse(!options_.checkpoint.empty(), "a checkpoint, expected 0 or 1: a checkpoint holds one run");
    refuse(options_.folds > total_rows(), std::to_string(total_rows()) + " rows, expected at most one for each row");
  }

  void check_sizes() const {
    if (total_rows() == 0) fail("x has no rows, expected at least one");
    const bool split = !has_array() && options_.validation_fraction > 0;
    if (split && total_rows() == 1) {
      fail("x has 1 row to train on, expected at least 2: one to train on and one to compare epochs by");
    }
    if (split && folds_.empty() && main_.rows.held_out() == 0) {
      fail("validation is " + short_text(options_.validation_fraction) + " of " + std::to_string(total_rows()) +
           " rows, which is less than one row; give more rows, a larger share or 0");
    }
    if (options_.patience > 0 && !has_array() && folds_.empty() && main_.rows.held_out() == 0) {
      fail("patience is " + std::to_string(options_.patience) +
           ", which needs validation data; give validation or set patience to 0");
    }
  }

  /// The automatic size keeps several steps an epoch where rows are few, and each step's gradient from being noise
  /// only.
  std::int64_t rows_in_a_step(std::int64_t train) const {
    constexpr std::int64_t kFewest = 16, kMost = 256, kSteps = 8;
    const std::int64_t most =
        options_.batch_size > 0 ? options_.batch_size : std::clamp((train + kSteps - 1) / kSteps, kFewest, kMost);
    return std::min(most, train);
  }

  bool standardizes() const { return flow_.spec().begins_with_standardize(); }

  bool is_standardized() const {
    const auto layer = std::span<const T>(best_).first(static_cast<std::size_t>(2 * features_));
    return std::any_of(layer.begin(), layer.end(), [](T v) { return v != T(0); });
  }

  bool has_bounds() const { return flow_.spec().bounds() != nullptr; }

  void map_bounds() {
    if (!has_bounds()) return;
    const auto through = [this](const char* name, std::span<const X> rows, std::uint32_t stream) {
      const Dither dither = {options_.seed, stream};
      return through_bounds<X>(name, rows, flow_.spec(), flow_.column_names(), dither, [this] { poll(); });
    };
    bounded_x_ = through("x", given_x_, kStreamDither);
    bounded_validation_ = through("validation", given_validation_, kStreamDitherValidation);
  }

  /// A constant column has no density, whether the flow standardizes or not.
  void standardize_from_data() {
    if (has_bounds()) return standardize_from(std::span<const double>(bounded_x_.rows));
    standardize_from(given_x_);
  }

  template <class Row>
  void standardize_from(std::span<const Row> rows) {
    const RowOrder order = main_.rows.training();
    const auto look = [this] { poll(); };
    ColumnScales scales(flow_.spec().dtype, rows, weights_, flow_.column_names(), features_, order, main_.rows.train(),
                        look);
    if (!standardizes() || (is_standardized() && !options_.restandardize)) {
      if (main_.rows.train() > 1) scales.require_variation();  // one row tells nothing of a column
      return;
    }
    const auto layer = std::span<T>(best_).first(static_cast<std::size_t>(2 * features_));
    std::vector<ColumnScale> found = scales.take(statistics_for(flow_.spec().base, options_.standardize));
    if constexpr (sizeof(Row) > sizeof(T)) standardized_.mean_low = mean_low_of(found);
    history_.standardized = set_layer(layer, found);
  }

  /// Where they are still zeros.
  void standardize_context() {
    if (!flow_.spec().standardize_context) return;
    const std::span<T> statistics = context_statistics(flow_.spec(), flow_.layout(), std::span<T>(best_));
    const bool is_set = std::any_of(statistics.begin(), statistics.end(), [](T v) { return v != T(0); });
    if (is_set && !options_.restandardize) return;
    set_context_statistics(statistics, context_, std::span<const double>(weights_), main_.rows.training(),
                           main_.rows.train(), [this] { poll(); });
  }

  /// The layers that are set from the training rows, as the run's first layer sees them.
  void start_from_rows(Run& run) {
    if (!has_started_layers(spec_)) return;
    StartRows<T> rows;
    rows.count = run.rows.train();
    rows.read = [&](std::int64_t first, std::int64_t count, T* x, T* context, double* weights) {
      run.rows.shuffled(0).each(first, count, [&](std::int64_t i, std::int64_t row) {
        std::copy_n(x_.data() + row * features_, features_, x + i * features_);
        std::copy_n(context_.data() + row * context_size(), context_size(), context + i * context_size());
        weights[i] = weight_at(weights_, row);
      });
    };
    StartOptions how;
    how.slice_rows = slice_;
    how.threads = threads_;
    how.anew = options_.restandardize;
    how.keep_dependent = options_.allow_degenerate || &run != &main_;  // of some rows
    if (standardizes()) how.units = units_of(std::span<const T>(best_).first(static_cast<std::size_t>(2 * features_)));
    how.column_names = flow_.column_names();
    how.poll = [this] { poll(); };
    start_layers<T>(spec_, run.start, rows, how);
  }

  /// From some of the training rows, as the run's layers make latents of them.
  void start_mixture_base(Run& run) {
    if (!wants_mixture_start<T>(flow_.spec(), flow_.layout(), run.start)) return;
    const std::int64_t count = std::min(run.rows.train(), kMixtureRows);
    std::vector<T> rows(static_cast<std::size_t>(count * features_)), latents(rows.size());
    std::vector<T> context(static_cast<std::size_t>(count * context_size()));
    std::vector<double> weights;
    run.rows.shuffled(0).each(0, count, [&](std::int64_t i, std::int64_t row) {
      std::copy_n(x_.data() + row * features_, features_, rows.data() + i * features_);
      std::copy_n(context_.data() + row * context_size(), context_size(), context.data() + i * context_size());
      weights.push_back(weight_at(weights_, row));
    });
    Flow flow = without_bounds();
    flow.set_num_threads(threads_);
    flow.template set_parameters<T>(run.start);
    flow.template forward<T>(rows, std::span<T>(latents), {},
                             context.empty() ? Context() : Context(std::span<const T>(context)));
    start_mixture<T>(flow_.spec(), flow_.layout(), run.start, latents, weights, options_.seed);
  }

  /// By the weights that training starts from.
  void refuse_rows_outside(const std::vector<T>& start) {
    if (!is_bounded(flow_.spec().base)) return;
    Flow flow = without_bounds();
    flow.set_num_threads(threads_);
    flow.template set_parameters<T>(start);
    const auto refuse = [&](const char* name, std::span<const T> rows, std::span<const X> given,
                            std::span<const T> context) {
      const auto which = [&](std::size_t row) { return name_of_row(given, row); };
      nvpflow::refuse_rows_outside<T>(flow, name, rows, context, slice_, which, [this] { poll(); });
    };
    refuse("x", x_, given_x_, context_);
    refuse("validation", validation_, given_validation_, validation_context_);
  }

  /// "row 7, counted from 0, is [0.5, 1.25]".
  std::string name_of_row(std::span<const X> given, std::size_t row) const {
    if (history_.rows_left_out > 0) return "one of those within max_deviation";
    if (!weights_.empty()) return "one of those of weight above 0";
    constexpr std::int64_t kShown = 4;
    std::string values;
    for (std::int64_t j = 0; j < std::min(features_, kShown); ++j) {
      const std::size_t at = row * static_cast<std::size_t>(features_) + static_cast<std::size_t>(j);
      values += (j == 0 ? "" : ", ") + short_text(static_cast<double>(given[at]));
    }
    return "row " + std::to_string(row) + ", counted from 0, is [" + values + (features_ > kShown ? ", ..." : "") + "]";
  }

  /// Behind the standardize layer that the run does not have.
  std::int64_t own_begin() const { return standardized_.on ? 2 * features_ : 0; }

  /// The rows that the run is given: the caller's, or what comes out of bounds and a standardize layer.
  void take_rows() {
    taken_ = true;
    if constexpr (sizeof(T) == 4) {
      std::vector<float>& low = standardized_.mean_low;
      standardized_.on = standardizes() && (!low.empty() || sizeof(X) > sizeof(T) || has_bounds());
      if (standardized_.on) {
        standardized_.layer.set(features_, best_.data(), best_.data() + features_, low.empty() ? nullptr : low.data());
        standardized_.log_det = standardized_.layer.log_det();
        own_x_ = has_bounds() ? standardize<double>(bounded_x_.rows) : standardize(given_x_);
        own_validation_ = has_bounds() ? standardize<double>(bounded_validation_.rows) : standardize(given_validation_);
      } else if (has_bounds()) {
        own_x_.assign(bounded_x_.rows.begin(), bounded_x_.rows.end());
        own_validation_.assign(bounded_validation_.rows.begin(), bounded_validation_.rows.end());
      }
      release(bounded_x_.rows), release(bounded_validation_.rows);
    } else {
      own_x_ = std::move(bounded_x_.rows), own_validation_ = std::move(bounded_validation_.rows);
    }
    x_ = own_x_, validation_ = own_validation_;
    if constexpr (std::is_same_v<T, X>) {
      if (!standardized_.on && !has_bounds()) x_ = given_x_, validation_ = given_validation_;
    }
  }

  template <class Row>
  std::vector<float> standardize(std::span<const Row> rows) {
    std::vector<float> out(rows.size());
    const std::int64_t count = static_cast<std::int64_t>(rows.size()) / features_;
    for (std::int64_t first = 0; first < count; first += kPollRows) {
      poll();
      standardized_.layer.standardize(rows.data(), sizeof(Row) == 8, nullptr, first, std::min(kPollRows, count - first),
                                      out.data() + first * features_);
    }
    return out;
  }

  /// What the losses of the rows as they are differ by from those of the run's.
  void find_log_dets() {
    train_log_det_ = compared_log_det_ = standardized_.log_det;
    if (!has_bounds()) return;
    struct Sums {
      double log_det = 0, weight = 0;
    };
    const auto add = [](const std::vector<double>& log_det, const std::vector<double>& weights, const RowOrder& order,
                        std::int64_t count, Sums& to) {
      order.each(0, count, [&](std::int64_t, std::int64_t row) {
        const double weight = weight_at(weights, row);
        to.log_det += weight * log_det[static_cast<std::size_t>(row)];
        to.weight += weight;
      });
    };
    Sums train, compared;
    add(bounded_x_.log_det, weights_, main_.rows.training(), main_.rows.train(), train);
    for (const Run& run : compared_runs()) {
      const Selection of = selection(run);
      add(has_array() ? bounded_validation_.log_det : bounded_x_.log_det, weights_of_compared(), of.order, of.rows,
          compared);
    }
    train_log_det_ += train.log_det / train.weight;
    compared_log_det_ += compared.log_det / compared.weight;
  }

  /// Whether a row is within max_deviation of the standardize layer's mean. `most` is that in each column's unit, which
  /// is that of the standardized rows where there are such.
  bool is_near(const T* row, const std::vector<double>& most) const {
    bool near = true;
    for (std::size_t j = 0; j < most.size(); ++j) {
      const double mean = standardized_.on ? 0.0 : static_cast<double>(best_[j]);
      near &= std::abs(static_cast<double>(row[j]) - mean) <= most[j];
    }
    return near;
  }

  /// f(row, its index) for those of the rows order(0) .. order(count - 1) of x that are near, or that are not.
  template <class F>
  void each_row_that_is(bool near, std::span<const T> x, const RowOrder& order, std::int64_t count, F&& f) {
    std::vector<double> most(static_cast<std::size_t>(features_));
    for (std::size_t j = 0; j < most.size(); ++j) {
      const double log_std = standardized_.on ? 0.0 : static_cast<double>(best_[most.size() + j]);
      most[j] = max_deviation_ * std::exp(log_std);
    }
    order.each(0, count, [&](std::int64_t i, std::int64_t at) {
      if (i % kPollRows == 0) poll();
      const T* row = x.data() + at * features_;
      if (is_near(row, most) == near) f(row, at);
    });
  }

  void leave_out_far_rows() {
    if (!standardizes() || max_deviation_ == 0) return;
    const auto count = [this](const T*, std::int64_t) { ++history_.rows_left_out; };
    each_row_that_is(false, x_, RowOrder(), total_rows(), count);
    each_row_that_is(false, validation_, RowOrder(), validation_rows(), count);
    if (history_.rows_left_out == 0) return;
    const auto near_rows = [this](std::span<const T> x, std::span<const T> context, const std::vector<double>& log_det,
                                  const std::vector<double>& weights, const RowOrder& order, std::int64_t rows) {
      Kept kept;
      each_row_that_is(true, x, order, rows, [&](const T* row, std::int64_t at) {
        kept.rows.insert(kept.rows.end(), row, row + features_);
        const T* given = context.data() + at * context_size();
        kept.context.insert(kept.context.end(), given, given + context_size());
        if (has_bounds()) kept.log_det.push_back(log_det[static_cast<std::size_t>(at)]);
        if (!weights.empty()) kept.weights.push_back(weights[static_cast<std::size_t>(at)]);
      });
      return kept;
    };
    // Those set aside become an array of their own, so that no row changes sides.
    std::vector<double>&log_det = bounded_x_.log_det, &of_validation = bounded_validation_.log_det;
    kept_validation_ = has_array()
                           ? near_rows(validation_, validation_context_, of_validation, validation_weights_, RowOrder(),
                                       validation_rows())
                           : near_rows(x_, context_, log_det, weights_, main_.rows.validating(), main_.rows.held_out());
    kept_ = near_rows(x_, context_, log_det, weights_, main_.rows.training(), main_.rows.train());
    x_ = kept_.rows, validation_ = kept_validation_.rows;
    context_ = kept_.context, validation_context_ = kept_validation_.context;
    log_det.swap(kept_.log_det), of_validation.swap(kept_validation_.log_det);
    weights_.swap(kept_.weights), validation_weights_.swap(kept_validation_.weights);
    const bool lacks_validation = history_.validation_rows > 0 && folds_.empty() && validation_.empty();
    if (x_.empty() || lacks_validation) {
      fail(std::string(x_.empty() ? "x" : "validation") + " has no row within max_deviation " +
           short_text(max_deviation_) +
           " standard deviations of the standardize layer's mean, expected at least one; give other rows, or set "
           "max_deviation to 0");
    }
    main_.rows = FitRows(total_rows(), 0, options_.seed);
    count_rows();
  }

  void count_rows() {
    scale_weights();
    check_folds();
    folds_.clear();
    const std::int64_t folds = std::min(num_folds(), total_rows());
    for (std::int64_t k = 0; k < folds; ++k) {
      folds_.emplace_back(FitRows::fold(total_rows(), k, folds, options_.seed));
      scale_weights(folds_.back());
      count_steps(folds_.back());
    }
    check_sizes();
    count_steps(main_);
    steps_ = main_.steps;
    for (const Run& fold : folds_) steps_ += fold.steps;
    history_.folds = folds;
    history_.train_rows = main_.rows.train();
    history_.effective_rows = effective_rows(main_.rows);
    history_.validation_rows = folds > 0 ? total_rows() : has_array() ? validation_rows() : main_.rows.held_out();
  }

  void count_steps(Run& run) const {
    const std::int64_t train = run.rows.train();
    run.batch = rows_in_a_step(train);
    run.weight_decay = options_.weight_decay.value_or(decay_of(features_, effective_rows(run.rows)));
    run.steps = (train + run.batch - 1) / run.batch;
  }

  // ---- weights of rows -------------------------------------------------------------------------------------------

  static double weight_at(const std::vector<double>& weights, std::int64_t row) {
    return weights.empty() ? 1.0 : weights[static_cast<std::size_t>(row)];
  }

  /// Sum of term(weight) over the rows order(0) .. order(count - 1).
  template <class Term>
  static double sum_over(const std::vector<double>& weights, const RowOrder& order, std::int64_t count, Term term) {
    double sum = 0;
    order.each(0, count, [&](std::int64_t, std::int64_t row) { sum += term(weight_at(weights, row)); });
    return sum;
  }

  /// To mean 1 over the training rows, or over those of the validation array.
  void scale_weights() {
    if (weights_.empty()) return;
    const auto itself = [](double weight) { return weight; };
    const double of_training = sum_over(weights_, main_.rows.training(), main_.rows.train(), itself);
    scale(weights_, static_cast<double>(main_.rows.train()) / of_training);
    scale(validation_weights_, static_cast<double>(validation_weights_.size()) / sum_of(validation_weights_));
  }

  /// Of a fold, whose rows may weigh more or less than all. Its gradient is then that of a training on them alone.
  void scale_weights(Run& fold) const {
    if (weights_.empty()) return;
    const auto itself = [](double weight) { return weight; };
    const double sum = sum_over(weights_, fold.rows.training(), fold.rows.train(), itself);
    fold.weight_factor = static_cast<double>(fold.rows.train()) / sum;
    fold.own_weights = weights_;
    scale(fold.own_weights, fold.weight_factor);
  }

  static void scale(std::vector<double>& weights, double factor) {
    for (double& weight : weights) weight *= factor;
  }

  /// Training rows without weights that tell as much as these.
  double effective_rows(const FitRows& rows) const {
    if (weights_.empty()) return static_cast<double>(rows.train());
    const RowOrder order = rows.training();
    const double sum = sum_over(weights_, order, rows.train(), [](double weight) { return weight; });
    return sum * sum / sum_over(weights_, order, rows.train(), [](double weight) { return weight * weight; });
  }

  // ---- one epoch -------------------------------------------------------------------------------------------------

  double learning_rate(const Run& run) const {
    if (options_.schedule == Schedule::constant) return options_.learning_rate;
    const auto step = static_cast<double>(run.adam_steps - 1 - earlier_steps_);
    const double steps = static_cast<double>(options_.epochs) * static_cast<double>(run.steps);
    return cosine(options_.learning_rate, step / steps);
  }

  void epoch() {
    const auto start = Clock::now();
    EpochRecord record;
    record.epoch = static_cast<std::int64_t>(history_.epochs.size()) + 1;
    done_steps_ = 0;
    for (Run& fold : folds_) {
      pass(fold, record);
      if (is_interrupted()) return;
    }
    const double sum = pass(main_, record);
    if (is_interrupted()) return;
    record.train_loss = -sum / static_cast<double>(main_.rows.train()) - train_log_det_;
    const double loss = compared_loss(record.epoch);
    if (is_interrupted()) return;
    record.validation_loss = history_.validation_rows > 0 ? loss : std::numeric_limits<double>::quiet_NaN();
    record.round_trip = options_.max_round_trip > 0 ? round_trip(candidate(main_), record.epoch)
                                                    : std::numeric_limits<double>::quiet_NaN();
    if (is_interrupted()) return;
    record.seconds = seconds_since(start);
    finish_epoch(record, loss);
  }

  /// Once over the training rows of a run; the sum of log p.
  double pass(Run& run, EpochRecord& record) {
    const RowOrder order = run.rows.shuffled(earlier_epochs_ + record.epoch);
    double sum = 0;
    for (std::int64_t step = 0; step < run.steps; ++step) {
      const std::int64_t first = step * run.batch;
      batch_gradient(run, order, first, std::min(run.batch, run.rows.train() - first), record.epoch);
      if (is_interrupted()) return sum;
      update(run, record);
      if ((step + 1) % run.training->steps_per_report() == 0 || step + 1 == run.steps) sum += collect(run, record);
      if (!observer_.on_progress(record.epoch, ++done_steps_, steps_)) interrupt();
      if (is_interrupted()) return sum;
    }
    return sum;
  }

  void interrupt() { history_.stop_reason = "interrupted"; }
  bool is_interrupted() const { return history_.stop_reason == "interrupted"; }

  /// The gradient of the batch's mean NLL. In slices, so that a stop comes through.
  void batch_gradient(Run& run, const RowOrder& order, std::int64_t first, std::int64_t count, std::int64_t epoch) {
    for (std::int64_t done = 0; done < count; done += slice_) {
      if (done > 0 && !observer_.on_progress(epoch, done_steps_, steps_)) return interrupt();
      run.training->gradient(order, first + done, std::min(slice_, count - done), count, done > 0);
    }
  }

  void update(Run& run, EpochRecord& record) {
    AdamStep adam;
    adam.step = ++run.adam_steps;
    adam.learning_rate = record.learning_rate = learning_rate(run);
    adam.weight_decay = run.weight_decay;
    run.training->update(adam, options_.clip_norm);
  }

  /// Sum of log p over the batches since the last call.
  double collect(const Run& run, EpochRecord& record) {
    const TrainingReport done = run.training->report();
    record.gradient_norm = done.gradient_norm;
    if (done.bad_step != 0) {
      diverged(done.bad_loss ? "loss" : "gradient norm", done.bad_value, record.epoch,
               (done.bad_step - 1 - earlier_steps_) % run.steps);
    }
    return done.sum_log_prob;
  }

  [[noreturn]] void diverged(const char* what, double value, std::int64_t epoch, std::int64_t step) const {
    const std::string kept = !keeps_one()
                                 ? "the flow is left as it was"
                                 : "the flow keeps the weights of epoch " + std::to_string(history_.best_epoch);
    const bool left = std::isinf(value) && is_bounded(flow_.spec().base);
    throw Error(ErrorCode::not_finite,
                std::string(what) + " became " + (std::isnan(value) ? "NaN" : "infinite") + " at step " +
                    std::to_string(step + 1) + " of epoch " + std::to_string(epoch) + "; " + kept +
                    (left ? "; rows have left the interval of the uniform base: take layers that keep it, such as "
                            "splines on it"
                          : "; try a lower learning_rate, clip_norm or a standardize layer"));
  }

  /// The rows that epochs are compared by: of the validation array where there is one, else of x.
  struct Selection {
    std::int64_t rows;
    RowOrder order;
  };
  /// The validation rows; without them the same training rows each time. (The epoch's own mean will not do: it is that
  /// of the weights before each step, not of those at the end.)
  Selection selection(const Run& run) const {
    if (has_array()) return {validation_rows(), RowOrder()};
    if (run.rows.held_out() > 0) return {run.rows.held_out(), run.rows.validating()};
    return {std::min(run.rows.train(), kSelectionRows), run.rows.shuffled(0)};
  }

  const std::vector<double>& weights_of_compared() const { return has_array() ? validation_weights_ : weights_; }

  /// Of the rows of a selection.
  double weight_of(const Selection& of) const {
    if (weights_of_compared().empty()) return static_cast<double>(of.rows);
    return sum_over(weights_of_compared(), of.order, of.rows, [](double weight) { return weight; });
  }

  /// Calls f(first, count) for the rows of a selection in slices, until the observer asks to stop.
  template <class F>
  void each_slice(std::int64_t epoch, std::int64_t rows, F&& f) {
    for (std::int64_t done = 0; done < rows; done += slice_) {
      if (!observer_.on_progress(epoch, steps_, steps_)) return interrupt();
      f(done, std::min(slice_, rows - done));
    }
  }

  /// The runs whose rows epochs are compared by.
  std::span<Run> compared_runs() { return folds_.empty() ? std::span<Run>(&main_, 1) : std::span<Run>(folds_); }

  /// The mean loss over the selections of the runs: of the weights of now, or of their averages where those are better.
  double compared_loss(std::int64_t epoch) {
    const double loss = selection_loss(epoch);
    average_is_better_ = false;
    if (options_.averaging == 0 || !std::isfinite(loss)) return loss;
    for (Run& fold : folds_) enter_average(fold, epoch);
    enter_average(main_, epoch);
    for (Run& run : compared_runs()) swap_average(run);
    const double of_average = selection_loss(epoch);
    for (Run& run : compared_runs()) swap_average(run);
    average_is_better_ = of_average < loss;
    return average_is_better_ ? of_average : loss;
  }

  double selection_loss(std::int64_t epoch) {
    double sum = 0, weight = 0;
    for (Run& run : compared_runs()) {
      const Selection of = selection(run);
      each_slice(epoch, of.rows, [&](std::int64_t first, std::int64_t count) {
        run.training->add_log_prob(has_array(), of.order, first, count);
      });
      sum += run.training->report().sum_log_prob / run.weight_factor;
      weight += weight_of(of);
    }
    return -sum / weight - compared_log_det_;
  }

  /// Takes the weights of now into their average.
  void enter_average(Run& run, std::int64_t epoch) {
    const double kept = options_.averaging;
    // 1 at the first epoch; afterwards weights that do not change are their own average, bit for bit.
    const auto share = static_cast<T>((1 - kept) / (1 - std::pow(kept, static_cast<double>(epoch))));
    const T* parameters = static_cast<const T*>(run.training->read(false).parameters);
    for (std::size_t i = 0; i < run.average.size(); ++i) run.average[i] += share * (parameters[i] - run.average[i]);
  }

  /// The weights that training goes on from, and their average, change places.
  void swap_average(Run& run) {
    T* parameters = static_cast<T*>(run.training->read(true).parameters);
    std::swap_ranges(run.average.begin(), run.average.end(), parameters);
    run.training->write();
  }

  /// What an epoch that is the best one leaves to the flow.
  const T* candidate(Run& run) {
    return average_is_better_ ? run.average.data() : static_cast<const T*>(run.training->read(false).parameters);
  }

  // ---- the flow as it starts, where that is a Gaussian ---------------------------------------------------------

  /// It is as good as many a flow that was trained on few rows.
  bool starts_as_candidate() const {
    return flow_.spec().whitens() && history_.validation_rows > 0 && adam_ == nullptr;
  }

  void judge_start() {
    if (!starts_as_candidate()) return;
    const bool exact = options_.max_round_trip == 0 || round_trip(main_.start.data(), 0) <= options_.max_round_trip;
    if (is_interrupted()) throw Stopped();
    if (!exact) return;
    for (Run& run : compared_runs()) {
      append_log_prob(run, run.start.data(), start_log_prob_);
      const Selection of = selection(run);
      of.order.each(0, of.rows, [this](std::int64_t, std::int64_t row) {
        start_weights_.push_back(weight_at(weights_of_compared(), row));
      });
    }
    double sum = 0, weight = 0;
    for (std::size_t i = 0; i < start_log_prob_.size(); ++i) {
      sum += start_weights_[i] * start_log_prob_[i];
      weight += start_weights_[i];
    }
    const double loss = -sum / weight - compared_log_det_;
    if (!std::isfinite(loss)) return start_log_prob_.clear();
    history_.best_loss = history_.initial_loss = loss;
  }

  /// log p of the run's selection with these weights.
  void append_log_prob(const Run& run, const T* parameters, std::vector<double>& to) {
    probe_->template set_parameters<T>({parameters, static_cast<std::size_t>(flow_.num_parameters())});
    const Selection of = selection(run);
    std::vector<T> found;
    for (std::int64_t first = 0; first < of.rows; first += slice_) {
      poll();
      const std::int64_t count = std::min(slice_, of.rows - first);
      const Context context = gather(of, first, count);
      found.resize(static_cast<std::size_t>(count));
      probe_->template log_prob<T>(probe_rows_, found, context);
      to.insert(to.end(), found.begin(), found.end());
    }
  }

  /// Puts rows of a selection into probe_rows_; their context.
  Context gather(const Selection& of, std::int64_t first, std::int64_t count) {
    const std::span<const T> x = has_array() ? validation_ : x_;
    const std::span<const T> given = has_array() ? validation_context_ : context_;
    probe_rows_.resize(static_cast<std::size_t>(count * features_));
    probe_context_.resize(static_cast<std::size_t>(count * context_size()));
    of.order.each(first, count, [&](std::int64_t i, std::int64_t row) {
      std::copy_n(x.data() + row * features_, features_, probe_rows_.data() + i * features_);
      std::copy_n(given.data() + row * context_size(), context_size(), probe_context_.data() + i * context_size());
    });
    return context_size() > 0 ? Context(probe_context_) : Context();
  }

  /// Whether the weights of now, or their average, are better than the start by more than chance explains: than two or
  /// three standard errors of the difference, row by row. With fewer, 60 rows took epochs that lost 0.2 nats, and 30
  /// one that lost 3.8.
  bool beats_start() {
    std::vector<double> now;
    for (Run& run : compared_runs()) append_log_prob(run, candidate(run), now);
    double sum = 0, squares = 0, weight = 0, weight_squares = 0;
    for (std::size_t i = 0; i < now.size(); ++i) {
      const double gain = now[i] - start_log_prob_[i], own = start_weights_[i];
      sum += own * gain, squares += own * gain * gain;
      weight += own, weight_squares += own * own;
    }
    const double rows = weight * weight / weight_squares;  // without weights that tell as much
    const double mean = sum / weight;
    const double errors = rows < kFewCompared ? 3 : 2;
    if (rows < kFewCompared && sum * (rows / weight) < kLeastGain) return false;
    return rows > 1 && mean > errors * std::sqrt(std::max(squares / weight - mean * mean, 0.0) / (rows - 1));
  }

  /// Flow::round_trip_error of the selection, by the flow as it would compute with these weights; of the rows that the
  /// run has.
  double round_trip(const T* parameters, std::int64_t epoch) {
    probe_->template set_parameters<T>({parameters, static_cast<std::size_t>(flow_.num_parameters())});
    const Selection of = selection(main_);
    double largest = 0;
    each_slice(epoch, of.rows, [&](std::int64_t first, std::int64_t count) {
      const Context context = gather(of, first, count);
      largest = std::max(largest, probe_->template round_trip_error<T>(probe_rows_, context));
    });
    return largest;
  }

  bool is_better(const EpochRecord& record, double loss) {
    if (!(loss < history_.best_loss)) return false;
    if (options_.max_round_trip > 0 && !(record.round_trip <= options_.max_round_trip)) return false;
    return history_.best_epoch > 0 || start_log_prob_.empty() || beats_start();
  }

  void finish_epoch(const EpochRecord& record, double loss) {
    if (!std::isfinite(loss))
      diverged(history_.validation_rows > 0 ? "validation loss" : "loss", loss, record.epoch, main_.steps - 1);
    history_.epochs.push_back(record);
    if (adam_ != nullptr || is_better(record, loss)) {
      history_.best_loss = loss;
      history_.best_epoch = record.epoch;
      const std::int64_t kept = own_begin();
      std::copy_n(candidate(main_) + kept, best_.size() - static_cast<std::size_t>(kept), best_.data() + kept);
    }
    keep_adam();
    if (options_.patience > 0 && record.epoch - history_.best_epoch >= options_.patience) {
      history_.stop_reason = "patience";
    }
    if (record.epoch >= options_.epochs) history_.stop_reason = "epochs";
    // Written before the observer is asked: a stop that it asks for is not the training's own end.
    write_checkpoint();
    if (!observer_.on_epoch(record) && history_.stop_reason.empty()) history_.stop_reason = "callback";
  }

  // ---- checkpoint ------------------------------------------------------------------------------------------------

  CheckpointKey key() {
    const auto look = [this] { poll(); };
    const auto of = [&](std::span<const X> rows) { return fingerprint(rows.data(), rows.size_bytes(), look); };
    std::uint64_t of_contexts = 0;
    if (context_size() > 0) {
      of_contexts = fingerprint(context_.data(), context_.size_bytes(), look);
      of_contexts ^= fingerprint(validation_context_.data(), validation_context_.size_bytes(), look) << 1;
    }
    std::uint64_t of_weights = 0;
    if (!weights_.empty()) {
      of_weights = fingerprint(given_weights_.x.data(), given_weights_.x.size_bytes(), look);
      of_weights ^= fingerprint(given_weights_.validation.data(), given_weights_.validation.size_bytes(), look) << 1;
    }
    FitOptions taken = options_;
    taken.batch_size = main_.batch;
    taken.weight_decay = main_.weight_decay;
    return {flow_.spec(),
            taken,
            of(given_x_) ^ (of(given_validation_) << 1),
            of_contexts,
            of_weights,
            rows_in(given_x_.size()),
            rows_in(given_validation_.size()),
            main_.steps};
  }

  CheckpointArrays arrays() {
    const Training::Arrays own = main_.training->read(true);
    T* average = main_.average.empty() ? nullptr : main_.average.data();
    return {own.parameters, best_.data(), own.first_moment, own.second_moment, average, flow_.num_parameters()};
  }

  void write_checkpoint() {
    if (!key_.has_value()) return;  // no checkpoint was asked for
    save_checkpoint(options_.checkpoint, *key_, history_, main_.adam_steps, arrays());
  }

  void resume() {
    if (options_.checkpoint.empty()) return;
    key_ = key();
    if (!checkpoint_exists(options_.checkpoint)) return;
    const std::vector<T> before = best_;
    load_checkpoint(options_.checkpoint, *key_, history_, main_.adam_steps, arrays());
    if (standardized_.on && !std::equal(before.begin(), before.begin() + 2 * features_, best_.begin())) {
      fail("checkpoint " + options_.checkpoint +
           " is of a run that standardized its rows otherwise than this flow does; go on with that run's flow or a new "
           "one");
    }
    main_.training->write();
  }

  inline static FitObserver silent_;

  Flow& flow_;
  const FlowSpec spec_;  // without bounds
  FitOptions options_;
  AdamState* adam_;  // null: the run's own
  FitObserver& observer_;
  std::int64_t features_;
  std::span<const X> given_x_, given_validation_;  // as the caller gave them
  FitWeights given_weights_;                       // the same
  // Scaled; empty: all rows count alike.
  std::vector<double> weights_, validation_weights_;
  bool taken_ = false;                          // x_ and validation_ are there
  std::span<const T> x_, validation_;           // what is trained on and compared by: those, or
  BoundedRows bounded_x_, bounded_validation_;  // without rows from take_rows() on; empty where there are no bounds
  Standardized standardized_;
  std::vector<T> own_x_, own_validation_;            // these, or
  double train_log_det_ = 0, compared_log_det_ = 0;  // mean of what the rows have been through before the run
  /// Rows that are not left out, their context and what belongs to them.
  struct Kept {
    std::vector<T> rows, context;
    std::vector<double> log_det, weights;
  };
  Kept kept_, kept_validation_;                      // these, where rows are left out
  std::span<const T> context_, validation_context_;  // of x_ and validation_
  Run main_;
  std::vector<Run> folds_;  // beside it, each without some of its rows
  int threads_;
  std::optional<Flow> probe_;  // for what Training does not tell
  std::vector<T> probe_rows_, probe_context_;
  std::vector<T> best_;                 // before the first epoch is done, the parameters that training starts from
  std::vector<double> start_log_prob_;  // of the rows that epochs are compared by; empty: the start is no candidate
  std::vector<double> start_weights_;   // of these rows
  bool average_is_better_ = false;
  double max_deviation_ = 0;                             // 0: no row is left out
  std::int64_t slice_ = 0, steps_ = 0, done_steps_ = 0;  // steps of all runs in an epoch
  std::int64_t earlier_steps_ = 0, earlier_epochs_ = 0;  // of adam_, before this run
  History history_;
  std::optional<CheckpointKey> key_;
};

}  // namespace

void FitOptions::validate() const { options::check_all(*this); }

FitSplit split_rows(std::int64_t total, double share, std::uint64_t seed, std::int64_t most) {
  const FitRows rows(total, FitRows::held_out_of(total, share), seed);
  const auto first_of = [most](const RowOrder& order, std::int64_t count) {
    std::vector<std::int64_t> first(static_cast<std::size_t>(std::min(most, count)));
    order.each(0, static_cast<std::int64_t>(first.size()),
               [&](std::int64_t i, std::int64_t row) { first[static_cast<std::size_t>(i)] = row; });
    return first;
  };
  return {first_of(rows.validating(), rows.held_out()), first_of(rows.training(), rows.train())};
}

std::string_view name_of(Schedule schedule) {
  switch (schedule) {
    case Schedule::constant:
      return "constant";
    case Schedule::cosine:
      return "cosine";
  }
  fail("schedule is the enumerator " + std::to_string(static_cast<int>(schedule)) +
       ", expected 'constant' or 'cosine'");
}

Schedule parse_schedule(std::string_view name) {
  for (const Schedule known : {Schedule::constant, Schedule::cosine}) {
    if (name == name_of(known)) return known;
  }
  fail("schedule is '" + std::string(name) + "', expected 'constant' or 'cosine'");
}

std::string_view name_of(Statistics statistics) {
  switch (statistics) {
    case Statistics::automatic:
      return "auto";
    case Statistics::mean:
      return "mean";
    case Statistics::robust:
      return "robust";
  }
  fail("standardize is the enumerator " + std::to_string(static_cast<int>(statistics)) +
       ", expected one of auto, mean, robust");
}

Statistics parse_statistics(std::string_view name) {
  for (const Statistics known : {Statistics::automatic, Statistics::mean, Statistics::robust}) {
    if (name == name_of(known)) return known;
  }
  fail("standardize is '" + std::string(name) + "', expected one of auto, mean, robust" +
       (name == "covariance" ? "; a flow has it from build(standardize=\"covariance\") on" : ""));
}

namespace {

/// T: of the flow. Rows of X: as those of a Trainer.
template <class T, class X>
History train(Flow& flow, std::span<const X> x, std::span<const X> validation, const FitWeights& weights,
              const FitOptions& options, FitObserver* observer, const Context& context,
              const Context& validation_context, AdamState* adam) {
  if (!validation.empty() && weights.x.empty() != weights.validation.empty()) {
    fail(std::string("the weights of ") + (weights.x.empty() ? "x" : "validation") +
         " are missing, expected weights of both or of none; ones count rows alike");
  }
  const WeightedTable<T, X> trained(flow.spec(), {"x", "context", "sample_weight"}, x, context, weights.x);
  const WeightedTable<T, X> held_out(flow.spec(),
                                     {"validation", "the context of validation", "the weights of validation"},
                                     validation, validation_context, weights.validation);
  return Trainer<T, X>(flow, trained.rows(), held_out.rows(), FitWeights(trained.weights(), held_out.weights()),
                       options, observer, trained.context(), held_out.context(), adam)
      .run();
}

}  // namespace

template <class T>
History fit(Flow& flow, std::span<const T> x, std::span<const T> validation, const FitOptions& options,
            FitObserver* observer, const Context& context, const Context& validation_context, AdamState* adam) {
  return fit(flow, x, validation, FitWeights({}), options, observer, context, validation_context, adam);
}

template <class T>
History fit(Flow& flow, std::span<const T> x, std::span<const T> validation, const FitWeights& weights,
            const FitOptions& options, FitObserver* observer, const Context& context, const Context& validation_context,
            AdamState* adam) {
  const FloatMode mode;  // also for what the training itself computes; the observer is called in it
  if constexpr (std::is_same_v<T, double>) {
    if (takes_float64_rows(flow.spec())) {
      return train<float, T>(flow, x, validation, weights, options, observer, context, validation_context, adam);
    }
  }
  if (flow.spec().dtype != (sizeof(T) == 4 ? DType::float32 : DType::float64)) {
    options.validate();
    throw Error(ErrorCode::type_mismatch, "x is not " + std::string(name_of(flow.spec().dtype)) + " as the flow is" +
                                              (sizeof(T) == 8 ? "; a float32 flow takes float64 rows where it begins "
                                                                "with a standardize layer"
                                                              : ""));
  }
  return train<T, T>(flow, x, validation, weights, options, observer, context, validation_context, adam);
}

template History fit(Flow&, std::span<const float>, std::span<const float>, const FitOptions&, FitObserver*,
                     const Context&, const Context&, AdamState*);
template History fit(Flow&, std::span<const double>, std::span<const double>, const FitOptions&, FitObserver*,
                     const Context&, const Context&, AdamState*);
template History fit(Flow&, std::span<const float>, std::span<const float>, const FitWeights&, const FitOptions&,
                     FitObserver*, const Context&, const Context&, AdamState*);
template History fit(Flow&, std::span<const double>, std::span<const double>, const FitWeights&, const FitOptions&,
                     FitObserver*, const Context&, const Context&, AdamState*);

}  // namespace nvpflow
