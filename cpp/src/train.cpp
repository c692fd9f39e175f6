// The training loop: independent of the backend, which forms the gradients and the updates.

#include <nvpflow/train.hpp>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/communicator.hpp>
#include <nvpflow/device.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>
#include <nvpflow/version.hpp>

#include "backend.hpp"
#include "bounded_rows.hpp"
#include "checkpoint.hpp"
#include "checkpoint_file.hpp"
#include "column_statistics.hpp"
#include "exact_gradient.hpp"
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
#include "shards.hpp"
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

/// Rows that a sharded run is started from, and numbers of them and of their contexts and weights: 64 MB.
constexpr std::int64_t kStartRows = 1 << 18, kStartNumbers = 1 << 23;

/// Rows of a sharded run: where those of this process's shards begin in its arrays, and the end.
struct ShardBounds {
  std::vector<std::int64_t> x, validation;
};

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
          AdamState* adam, Shards& shards, ShardBounds bounds)
      : shards_(shards),
        bounds_(std::move(bounds)),
        flow_(flow),
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
        threads_(options.num_threads > 0 ? options.num_threads : FlowAccess::threads(flow)) {
    check_options();
    // Forward and back.
    const double per_row = 3 * flow.layout().flops_per_row();
    const double most = kSliceFlops * sizeof(float) / sizeof(T);
    slice_ = std::clamp<std::int64_t>(static_cast<std::int64_t>(most / per_row), 64, 1 << 16);
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
    /// Of each shard of this process; one where there are no shards.
    std::vector<FitRows> parts;
    std::int64_t train = 0, held_out = 0;  // rows, of all processes
    std::vector<std::int64_t> train_of;    // of every shard
    std::int64_t batch = 0, steps = 0, adam_steps = 0;
    double weight_decay = 0;
    std::vector<double> own_weights;  // of all rows, of mean 1 over those trained on; empty: those of the trainer are
    double weight_factor = 1;         // own_weights are so many times those of the trainer
    std::vector<T> start, average;    // average: empty where there is none
    std::unique_ptr<Training> training;
  };

  /// What training starts from.
  struct Start {
    std::vector<T> best, parameters;
    std::vector<float> mean_low;
    std::vector<std::string> standardized;
  };

  /// That of these rows. Nothing is trained.
  Start start() {
    agree();
    count_rows();
    map_bounds();
    prepare_rows();
    leave_out_far_rows();
    main_.start = start_values();
    start_from_rows(main_);
    start_mixture_base(main_);
    return {std::move(best_), std::move(main_.start), std::move(standardized_.mean_low), history_.standardized};
  }

  void prepare() {
    agree();
    count_rows();
    shards_.all([this] { check_data(); });
    map_bounds();
    std::optional<Start> sampled;
    if (shards_.on()) sampled = start_of_sample();
    Start* const common = sampled ? &*sampled : nullptr;
    prepare_rows(common);
    leave_out_far_rows();
    find_log_dets();
    const TrainingData data = {
        x_.data(),       rows_in(x_.size()),         validation_.data(),       rows_in(validation_.size()),
        context_.data(), validation_context_.data(), values_or_null(weights_), values_or_null(validation_weights_)};
    shards_.all([&] {
      std::vector<T> start = common != nullptr ? std::move(common->parameters) : start_values();
      for (Run& fold : folds_) begin(fold, start, data);
      begin(main_, std::move(start), data);
      const std::int64_t kept = own_begin();
      std::copy(main_.start.begin() + kept, main_.start.end(), best_.begin() + kept);
      refuse_rows_outside(main_.start);
      go_on_from_adam();
    });
    if (shards_.on()) exact_.emplace(flow_.layout(), shards_.count(), threads_);
    if (options_.max_round_trip > 0 || starts_as_candidate()) {
      probe_.emplace(without_bounds());
      probe_->set_num_threads(threads_);
    }
    judge_start();
    for (Run& fold : folds_) change_start_for_average(fold);
    change_start_for_average(main_);
  }

  void check_data() {
    check_checkpoint_folder(options_.checkpoint);
    check_finite("x", given_x_, features_, [this] { poll(); });
    check_finite("validation", given_validation_, features_, [this] { poll(); });
    if (context_size() > 0) {
      check_finite("context", context_, context_size(), [this] { poll(); });
      check_finite("the context of validation", validation_context_, context_size(), [this] { poll(); });
    }
  }

  /// The rows that the run is given, by statistics of them, or by those that are common to all processes.
  void prepare_rows(const Start* common = nullptr) {
    best_.resize(static_cast<std::size_t>(flow_.num_parameters()));
    flow_.template copy_parameters<T>(best_, &standardized_.mean_low);
    shards_.all([&] {
      if (common != nullptr) {
        best_ = common->best, standardized_.mean_low = common->mean_low, history_.standardized = common->standardized;
      } else {
        standardize_from_data();
        standardize_context();
      }
      take_rows();
    });
  }

  /// Of all processes' rows, the number of the first of this one's, of x and of validation.
  std::vector<std::uint64_t> numbers_of_first_rows() {
    std::vector<std::uint64_t> first;
    for (const std::vector<std::int64_t>* bounds : {&bounds_.x, &bounds_.validation}) {
      const std::vector<std::int64_t> lengths = shards_.of_all(lengths_of(*bounds));
      first.push_back(static_cast<std::uint64_t>(
          std::accumulate(lengths.begin(), lengths.begin() + shards_.own().first, std::int64_t{0})));
    }
    return first;
  }

  static std::vector<std::int64_t> lengths_of(const std::vector<std::int64_t>& bounds) {
    std::vector<std::int64_t> lengths(bounds.size() - 1);
    for (std::size_t i = 0; i < lengths.size(); ++i) lengths[i] = bounds[i + 1] - bounds[i];
    return lengths;
  }

  std::vector<T> start_values() const {
    std::vector<T> start = best_;
    if (standardized_.on) std::fill_n(start.begin(), 2 * features_, T(0));
    return start;
  }

  /// From training rows of all shards, which every process gets.
  Start start_of_sample() {
    const std::int64_t numbers = features_ + context_size() + 1;
    const std::int64_t most = std::clamp<std::int64_t>(kStartNumbers / numbers, 1, kStartRows);
    const auto taken_of = [&](std::int64_t train) {
      return main_.train <= most ? train : std::min(train, train * most / main_.train + 1);
    };
    std::vector<double> own;
    for (const FitRows& part : main_.parts) {
      part.shuffled(0).each(0, taken_of(part.train()), [&](std::int64_t, std::int64_t row) {
        const X* x = given_x_.data() + row * features_;
        const T* context = context_.data() + row * context_size();
        own.insert(own.end(), x, x + features_);
        own.insert(own.end(), context, context + context_size());
        own.push_back(weight_at(weights_, row));
      });
    }
    std::vector<std::int64_t> lengths;
    for (const std::int64_t train : main_.train_of) lengths.push_back(taken_of(train) * numbers);
    const std::vector<double> all = shards_.gather(own, lengths);
    std::vector<X> x;
    std::vector<T> context;
    std::vector<double> weights;
    for (auto row = all.begin(); row != all.end(); row += numbers) {
      std::transform(row, row + features_, std::back_inserter(x), [](double v) { return static_cast<X>(v); });
      std::transform(row + features_, row + numbers - 1, std::back_inserter(context),
                     [](double v) { return static_cast<T>(v); });
      if (weighted()) weights.push_back(row[numbers - 1]);
    }
    FitOptions options = options_;
    options.validation_fraction = 0, options.patience = 0, options.folds = 1, options.shards = 0;
    options.max_round_trip = 0, options.checkpoint.clear(), options.checkpoint_every = 0;
    Start found;
    shards_.all([&] {
      Shards none(nullptr, 0);
      const Context given = context.empty() ? Context() : Context(std::span<const T>(context));
      found = Trainer(flow_, x, {}, FitWeights(weights), options, &observer_, given, {}, nullptr, none,
                      {{0, static_cast<std::int64_t>(x.size()) / features_}, {0, 0}})
                  .start();
    });
    return found;
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
    if (!shards_.on()) start_from_rows(run);
    if (!shards_.on()) start_mixture_base(run);
    const std::int64_t most = std::min(slice_, run.batch / shards_.count());
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
  bool keeps_one() const { return history_.best_epoch > 0 || (start_counts_ && !history_.epochs.empty()); }

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

  /// Asks the observer. Of a sharded run, what it says, or throws, counts where all processes meet next.
  bool goes_on(std::int64_t epoch, std::int64_t step) {
    if (!shards_.on()) return observer_.on_progress(epoch, step, steps_);
    if (error_ || stop_asked_) return true;
    try {
      stop_asked_ = !observer_.on_progress(epoch, step, steps_);
    } catch (...) {
      error_ = std::current_exception();
    }
    return true;
  }

  /// f(), whose error in a sharded run counts where all processes meet next. Until then nothing more is done.
  template <class F>
  void guarded(F&& f) {
    if (!shards_.on()) return f();
    if (error_) return;
    try {
      f();
    } catch (...) {
      error_ = std::current_exception();
    }
  }

  /// Whether this process was asked to stop, or another one.
  bool is_stopped() {
    try {
      if (shards_.on()) shards_.agree(error_, stop_asked_);
    } catch (const Stopped&) {
      interrupt();
    }
    return is_interrupted();
  }

  // ---- what processes agree on -----------------------------------------------------------------------------------

  void agree() {
    weighted_ = shards_.any(!given_weights_.x.empty());
    if (!shards_.on()) return;
    std::vector<Shards::Agreement> same;
    shards_.all([&] {
      if (weighted_ && given_weights_.x.empty() && !given_x_.empty()) {
        fail("sample_weight is missing, but another process has it; expected one of x in all processes or in none");
      }
      if (weighted_ && given_weights_.validation.empty() && !given_validation_.empty()) {
        fail("the weights of validation are missing, but sample_weight is given; expected those of both or none");
      }
      same = to_agree_on();
    });
    shards_.require_same(same);
  }

  std::vector<Shards::Agreement> to_agree_on() const {
    const auto hash = [](const std::string& text) { return fingerprint(text.data(), text.size(), [] {}); };
    std::vector<Shards::Agreement> same;
    const auto add = [&](const std::string& what, std::uint64_t value, const std::string& rest = "") {
      same.push_back({what + " differs among the processes, expected the same in all" + rest, value});
    };
    const std::string isa = cpu_isa();
    add("the version of the library", hash(version()));
    add("the instruction set", hash(isa),
        ": here it is " + isa + "; give all of them NVPFLOW_ISA, such as avx2, and the same bits come from each");
    add("the flow's architecture", hash(to_json(flow_.spec())));
    std::vector<T> parameters(static_cast<std::size_t>(flow_.num_parameters()));
    std::vector<float> low;
    flow_.template copy_parameters<T>(parameters, &low);
    add("the weights of the flow", fingerprint(parameters.data(), parameters.size() * sizeof(T), [] {}) ^
                                       (fingerprint(low.data(), low.size() * sizeof(float), [] {}) << 1));
    add("the device or the precision of the flow",
        hash(flow_.device().kind == DeviceKind::cuda ? "cuda" : "cpu") ^
            static_cast<std::uint64_t>(8 * static_cast<int>(flow_.precision()) + static_cast<int>(flow_.weights())));
    add("the names of the columns", hash(joined(flow_.column_names())), ", and in the same order");
    add("the names of the context", hash(joined(flow_.context_names())), ", and in the same order");
    add("the dtype of x", sizeof(X));
    add("the state of adam", fingerprint_of_adam());
    FitOptions::fields([&](const char* name, auto member, const OptionRange*) {
      const std::string_view of = name;
      if (of != "num_threads") add(name, hash(option_text(options_.*member)));
    });
    return same;
  }

  std::uint64_t fingerprint_of_adam() const {
    if (adam_ == nullptr) return 0;
    const auto of = [](const std::vector<double>& values) {
      return fingerprint(values.data(), values.size() * sizeof(double), [] {});
    };
    const std::uint64_t all[] = {static_cast<std::uint64_t>(adam_->steps), static_cast<std::uint64_t>(adam_->epochs),
                                 of(adam_->first_moment), of(adam_->second_moment)};
    return fingerprint(all, sizeof all, [] {});
  }

  static std::string joined(const std::vector<std::string>& names) {
    std::string all;
    for (const std::string& name : names) all += std::to_string(name.size()) + ":" + name;
    return all;
  }
  static std::string option_text(const std::string& value) { return value; }
  static std::string option_text(Schedule value) { return std::string(name_of(value)); }
  static std::string option_text(Statistics value) { return std::string(name_of(value)); }
  static std::string option_text(const std::optional<double>& value) { return value ? option_text(*value) : "none"; }
  template <class V>
  static std::string option_text(V value) {
    return std::to_string(std::bit_cast<std::int64_t>(static_cast<double>(value)));
  }

  // ---- data ------------------------------------------------------------------------------------------------------

  bool has_array() const { return validation_rows() > 0; }
  /// Of all processes.
  std::int64_t total_rows() const { return total_rows_; }
  std::int64_t validation_rows() const { return total_validation_rows_; }
  std::int64_t rows_in(std::size_t elements) const { return static_cast<std::int64_t>(elements) / features_; }

  std::int64_t context_size() const { return flow_.spec().context_size; }

  void check_options() const {
    options_.validate();
    check_restandardize();
    check_adam();
    for (const auto& [name, span] : {std::pair{"x", given_x_}, std::pair{"validation", given_validation_}}) {
      if (static_cast<std::int64_t>(span.size()) % features_ != 0) {
        fail(std::string(name) + " holds " + std::to_string(span.size()) +
             " elements, expected a multiple of input_size " + std::to_string(features_));
      }
    }
    if (options_.checkpoint_every > 0 && options_.checkpoint.empty()) {
      fail("checkpoint_every is " + std::to_string(options_.checkpoint_every) +
           " without a checkpoint, expected 0, or the checkpoint's file");
    }
  }

  /// Of each of this process's shards, or of all rows.
  std::vector<FitRows> cut() {
    const std::vector<std::int64_t> lengths = shards_.of_all(lengths_of(bounds_.x));
    const double share = has_array() || num_folds() > 0 ? 0 : options_.validation_fraction;
    std::vector<FitRows> parts;
    std::int64_t before = 0;
    const auto [first, last] = shards_.own();
    for (std::int64_t shard = 0; shard < last; ++shard) {
      const std::int64_t after = before + lengths[static_cast<std::size_t>(shard)];
      const std::int64_t held_out = FitRows::held_out_of(after, share) - FitRows::held_out_of(before, share);
      if (shard >= first) {
        const Shard of = {shard, bounds_.x[static_cast<std::size_t>(shard - first)]};
        parts.emplace_back(after - before, held_out, options_.seed, of);
      }
      before = after;
    }
    return parts;
  }

  /// Folds of cross-validation; 0: none.
  std::int64_t num_folds() const {
    const bool share = !has_array() && options_.validation_fraction > 0;
    if (options_.folds != 0) return options_.folds > 1 ? options_.folds : 0;
    if (!share || adam_ != nullptr || !options_.checkpoint.empty() || total_rows() < 2 || shards_.on()) return 0;
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
    refuse(shards_.on(), "shards, expected 0 or 1: give a share of the rows, or rows, for validation");
    refuse(options_.folds > total_rows(), std::to_string(total_rows()) + " rows, expected at most one for each row");
  }

  void check_sizes() const {
    if (total_rows() == 0) fail("x has no rows, expected at least one");
    const bool split = !has_array() && options_.validation_fraction > 0;
    if (split && total_rows() == 1) {
      fail("x has 1 row to train on, expected at least 2: one to train on and one to compare epochs by");
    }
    if (split && folds_.empty() && main_.held_out == 0) {
      fail("validation is " + short_text(options_.validation_fraction) + " of " + std::to_string(total_rows()) +
           " rows, which is less than one row; give more rows, a larger share or 0");
    }
    if (options_.patience > 0 && !has_array() && folds_.empty() && main_.held_out == 0) {
      fail("patience is " + std::to_string(options_.patience) +
           ", which needs validation data; give validation or set patience to 0");
    }
  }

  /// The automatic size keeps several steps an epoch where rows are few, and each step's gradient from being noise
  /// only.
  ///
  /// Of every shard it takes the same number; the automatic one is at most 32, which keep the kernels busy.
  std::int64_t rows_in_a_step(std::int64_t train) const {
    constexpr std::int64_t kFewest = 16, kMost = 256, kSteps = 8, kMostOfShard = 32;
    const std::int64_t shards = shards_.count();
    if (options_.batch_size % shards != 0) {
      fail("batch_size is " + std::to_string(options_.batch_size) + ", expected a multiple of the " +
           std::to_string(shards) + " shards, each of which gives the same number of rows to a step");
    }
    const std::int64_t bound = shards_.on() ? std::max(kMost, kMostOfShard * shards) : kMost;
    const std::int64_t most =
        options_.batch_size > 0 ? options_.batch_size : std::clamp((train + kSteps - 1) / kSteps, kFewest, bound);
    return (std::min(most, train) + shards - 1) / shards * shards;
  }

  bool standardizes() const { return flow_.spec().begins_with_standardize(); }

  bool is_standardized() const {
    const auto layer = std::span<const T>(best_).first(static_cast<std::size_t>(2 * features_));
    return std::any_of(layer.begin(), layer.end(), [](T v) { return v != T(0); });
  }

  bool has_bounds() const { return flow_.spec().bounds() != nullptr; }

  void map_bounds() {
    if (!has_bounds()) return;
    const std::vector<std::uint64_t> first_rows =
        shards_.on() ? numbers_of_first_rows() : std::vector<std::uint64_t>(2);
    const auto through = [&](const char* name, std::span<const X> rows, std::uint32_t stream) {
      const Dither dither = {options_.seed, stream, first_rows[stream == kStreamDither ? 0 : 1]};
      return through_bounds<X>(name, rows, flow_.spec(), flow_.column_names(), dither, [this] { poll(); });
    };
    shards_.all([&] {
      bounded_x_ = through("x", given_x_, kStreamDither);
      bounded_validation_ = through("validation", given_validation_, kStreamDitherValidation);
    });
  }

  /// A constant column has no density, whether the flow standardizes or not.
  void standardize_from_data() {
    if (has_bounds()) return standardize_from(std::span<const double>(bounded_x_.rows));
    standardize_from(given_x_);
  }

  template <class Row>
  void standardize_from(std::span<const Row> rows) {
    const FitRows& own = main_.parts.front();
    const RowOrder order = own.training();
    const auto look = [this] { poll(); };
    ColumnScales scales(flow_.spec().dtype, rows, weights_, flow_.column_names(), features_, order, own.train(), look);
    if (!standardizes() || (is_standardized() && !options_.restandardize)) {
      if (own.train() > 1) scales.require_variation();  // one row tells nothing of a column
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
    const FitRows& own = main_.parts.front();
    set_context_statistics(statistics, context_, std::span<const double>(weights_), own.training(), own.train(),
                           [this] { poll(); });
  }

  /// The layers that are set from the training rows, as the run's first layer sees them.
  void start_from_rows(Run& run) {
    if (!has_started_layers(spec_)) return;
    StartRows<T> rows;
    rows.count = run.train;
    rows.read = [&](std::int64_t first, std::int64_t count, T* x, T* context, double* weights) {
      run.parts.front().shuffled(0).each(first, count, [&](std::int64_t i, std::int64_t row) {
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
    const std::int64_t count = std::min(run.train, kMixtureRows);
    std::vector<T> rows(static_cast<std::size_t>(count * features_)), latents(rows.size());
    std::vector<T> context(static_cast<std::size_t>(count * context_size()));
    std::vector<double> weights;
    run.parts.front().shuffled(0).each(0, count, [&](std::int64_t i, std::int64_t row) {
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
    // Of each part {sum of weight * log_det, sum of weight}.
    std::vector<double> train(2 * main_.parts.size()), compared(train.size());
    const auto add = [](const std::vector<double>& log_det, const std::vector<double>& weights, const RowOrder& order,
                        std::int64_t count, double* to) {
      order.each(0, count, [&](std::int64_t, std::int64_t row) {
        const double weight = weight_at(weights, row);
        to[0] += weight * log_det[static_cast<std::size_t>(row)];
        to[1] += weight;
      });
    };
    for (std::size_t p = 0; p < main_.parts.size(); ++p) {
      add(bounded_x_.log_det, weights_, main_.parts[p].training(), main_.parts[p].train(), &train[2 * p]);
    }
    for (const Run& run : compared_runs()) {
      const std::vector<Selection> selected = selection(run);
      for (std::size_t p = 0; p < selected.size(); ++p) {
        add(has_array() ? bounded_validation_.log_det : bounded_x_.log_det, weights_of_compared(), selected[p].order,
            selected[p].rows, &compared[2 * p]);
      }
    }
    const std::vector<double> of_train = shards_.sums(train, 2), of_compared = shards_.sums(compared, 2);
    train_log_det_ += of_train[0] / of_train[1];
    compared_log_det_ += of_compared[0] / of_compared[1];
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

  /// Rows that are not left out, their context and what belongs to them.
  struct Kept {
    std::vector<T> rows, context;
    std::vector<double> log_det, weights;
  };
  /// Rows of one part.
  struct Part {
    RowOrder order;
    std::int64_t rows;
  };

  /// Copies of the rows of x that are near, part by part, with what belongs to them; `bounds` becomes theirs.
  Kept near_rows(bool of_validation, const std::vector<Part>& parts, std::vector<std::int64_t>& bounds) {
    const std::vector<double>& log_det = of_validation ? bounded_validation_.log_det : bounded_x_.log_det;
    const std::vector<double>& weights = of_validation ? validation_weights_ : weights_;
    const std::span<const T> contexts = of_validation ? validation_context_ : context_;
    Kept kept;
    bounds.assign(1, 0);
    for (const Part& part : parts) {
      each_row_that_is(true, of_validation ? validation_ : x_, part.order, part.rows,
                       [&](const T* row, std::int64_t at) {
                         kept.rows.insert(kept.rows.end(), row, row + features_);
                         const T* given = contexts.data() + at * context_size();
                         kept.context.insert(kept.context.end(), given, given + context_size());
                         if (has_bounds()) kept.log_det.push_back(log_det[static_cast<std::size_t>(at)]);
                         if (!weights.empty()) kept.weights.push_back(weights[static_cast<std::size_t>(at)]);
                       });
      bounds.push_back(rows_in(kept.rows.size()));
    }
    return kept;
  }

  void leave_out_far_rows() {
    if (!standardizes() || max_deviation_ == 0) return;
    shards_.all([this] {
      const auto count = [this](const T*, std::int64_t) { ++history_.rows_left_out; };
      each_row_that_is(false, x_, RowOrder(), rows_in(x_.size()), count);
      each_row_that_is(false, validation_, RowOrder(), rows_in(validation_.size()), count);
    });
    history_.rows_left_out = shards_.sum(history_.rows_left_out);
    if (history_.rows_left_out == 0) return;
    shards_.all([this] { keep_near_rows(); });
    total_rows_ = shards_.sum(rows_in(x_.size()));
    total_validation_rows_ = shards_.sum(rows_in(validation_.size()));
    const bool lacks_validation = history_.validation_rows > 0 && folds_.empty() && total_validation_rows_ == 0;
    if (total_rows_ == 0 || lacks_validation) {
      fail(std::string(total_rows_ == 0 ? "x" : "validation") + " has no row within max_deviation " +
           short_text(max_deviation_) +
           " standard deviations of the standardize layer's mean, expected at least one; give other rows, or set "
           "max_deviation to 0");
    }
    count_rows();
  }

  /// Those set aside become an array of their own, so that no row changes sides.
  void keep_near_rows() {
    std::vector<Part> trained, compared;
    for (const FitRows& part : main_.parts) {
      trained.push_back({part.training(), part.train()});
      if (!has_array()) compared.push_back({part.validating(), part.held_out()});
    }
    for (std::size_t p = 0; has_array() && p + 1 < bounds_.validation.size(); ++p) {
      RowOrder order;
      order.base = static_cast<std::uint64_t>(bounds_.validation[p]);
      compared.push_back({order, bounds_.validation[p + 1] - bounds_.validation[p]});
    }
    kept_validation_ = near_rows(has_array(), compared, bounds_.validation);
    kept_ = near_rows(false, trained, bounds_.x);
    x_ = kept_.rows, validation_ = kept_validation_.rows;
    context_ = kept_.context, validation_context_ = kept_validation_.context;
    bounded_x_.log_det.swap(kept_.log_det), bounded_validation_.log_det.swap(kept_validation_.log_det);
    weights_.swap(kept_.weights), validation_weights_.swap(kept_validation_.weights);
  }

  void count_rows() {
    const bool first = total_rows_ == 0;
    if (first) {
      total_rows_ = shards_.sum(rows_in(given_x_.size()));
      total_validation_rows_ = shards_.sum(rows_in(given_validation_.size()));
    }
    check_folds();
    main_.parts = cut();
    count(main_);
    scale_weights();
    folds_.clear();
    const std::int64_t folds = std::min(num_folds(), total_rows());
    for (std::int64_t k = 0; k < folds; ++k) {
      folds_.emplace_back();
      folds_.back().parts = {FitRows::fold(total_rows(), k, folds, options_.seed)};
      count(folds_.back());
      scale_weights(folds_.back());
      count_steps(folds_.back());
    }
    check_sizes();
    count_steps(main_);
    steps_ = main_.steps;
    for (const Run& fold : folds_) steps_ += fold.steps;
    history_.folds = folds;
    history_.train_rows = main_.train;
    history_.effective_rows = effective_rows(main_);
    history_.validation_rows = folds > 0 ? total_rows() : has_array() ? validation_rows() : main_.held_out;
  }

  /// The rows of all processes that a run trains on, and those that it does not.
  void count(Run& run) {
    std::vector<std::int64_t> train, held_out;
    for (const FitRows& part : run.parts) train.push_back(part.train()), held_out.push_back(part.held_out());
    run.train_of = shards_.of_all(train);
    const std::vector<std::int64_t> held_out_of = shards_.of_all(held_out);
    run.train = std::accumulate(run.train_of.begin(), run.train_of.end(), std::int64_t{0});
    run.held_out = std::accumulate(held_out_of.begin(), held_out_of.end(), std::int64_t{0});
  }

  void count_steps(Run& run) const {
    run.batch = rows_in_a_step(run.train);
    run.weight_decay = options_.weight_decay.value_or(decay_of(features_, effective_rows(run)));
    const std::int64_t longest = *std::max_element(run.train_of.begin(), run.train_of.end());
    const std::int64_t of_shard = std::max<std::int64_t>(1, run.batch / shards_.count());
    run.steps = (longest + of_shard - 1) / of_shard;
  }

  // ---- weights of rows -------------------------------------------------------------------------------------------

  bool weighted() const { return weighted_; }  // this process may have no row and no weight

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

  /// The sum of term(weight) over all training rows of a run.
  template <class Term>
  double sum_over(const Run& run, Term term) const {
    std::vector<double> of_parts;
    for (const FitRows& part : run.parts) of_parts.push_back(sum_over(weights_, part.training(), part.train(), term));
    return shards_.sum(of_parts);
  }
  static double itself(double weight) { return weight; }

  /// To mean 1 over the training rows, or over those of the validation array.
  void scale_weights() {
    if (!weighted()) return;
    scale(weights_, static_cast<double>(main_.train) / sum_over(main_, itself));
    std::vector<double> of_parts;
    for (std::size_t p = 0; has_array() && p + 1 < bounds_.validation.size(); ++p) {
      const auto begin = static_cast<std::size_t>(bounds_.validation[p]);
      const auto end = static_cast<std::size_t>(bounds_.validation[p + 1]);
      of_parts.push_back(sum_of(std::span<const double>(validation_weights_).subspan(begin, end - begin)));
    }
    if (has_array()) scale(validation_weights_, static_cast<double>(validation_rows()) / shards_.sum(of_parts));
  }

  /// Of a fold, whose rows may weigh more or less than all. Its gradient is then that of a training on them alone.
  void scale_weights(Run& fold) const {
    if (!weighted()) return;
    fold.weight_factor = static_cast<double>(fold.train) / sum_over(fold, itself);
    fold.own_weights = weights_;
    scale(fold.own_weights, fold.weight_factor);
  }

  static void scale(std::vector<double>& weights, double factor) {
    for (double& weight : weights) weight *= factor;
  }

  /// Training rows without weights that tell as much as these.
  double effective_rows(const Run& run) const {
    if (!weighted()) return static_cast<double>(run.train);
    const double sum = sum_over(run, itself);
    return sum * sum / sum_over(run, [](double weight) { return weight * weight; });
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
    done_steps_ = part_of_epoch_.steps;
    for (Run& fold : folds_) {
      pass(fold, record);
      if (is_interrupted()) return;
    }
    const double sum = pass(main_, record);
    if (is_stopped()) return;
    record.train_loss = -sum / static_cast<double>(main_.train) - train_log_det_;
    const double loss = compared_loss(record.epoch);
    if (is_stopped()) return;
    record.validation_loss = history_.validation_rows > 0 ? loss : std::numeric_limits<double>::quiet_NaN();
    record.round_trip = options_.max_round_trip > 0 ? round_trip(candidate(main_), record.epoch)
                                                    : std::numeric_limits<double>::quiet_NaN();
    if (is_stopped()) return;
    record.seconds = seconds_since(start);
    finish_epoch(record, loss);
  }

  /// Once over the training rows of a run, or over those that a checkpoint left; the sum of log p.
  double pass(Run& run, EpochRecord& record) {
    std::vector<RowOrder> orders;
    for (const FitRows& part : run.parts) orders.push_back(part.shuffled(earlier_epochs_ + record.epoch));
    double sum = std::exchange(part_of_epoch_.sum_log_prob, 0.0);
    for (std::int64_t step = std::exchange(part_of_epoch_.steps, 0); step < run.steps; ++step) {
      gradient(run, orders, step, record.epoch);
      if (is_interrupted()) return sum;
      guarded([&] { update(run, record); });
      const bool kept = options_.checkpoint_every > 0 && (step + 1) % options_.checkpoint_every == 0;
      const bool last = step + 1 == run.steps;
      if (kept || last || (step + 1) % run.training->steps_per_report() == 0) {
        guarded([&] { sum += collect(run, record); });
      }
      if (kept && !last) {
        if (is_stopped()) return sum;  // or throws: a step that cannot be gone on from is not kept
        write_checkpoint({step + 1, sum});
      }
      if (!goes_on(record.epoch, ++done_steps_)) interrupt();
      if (is_interrupted()) return sum;
    }
    return sum;
  }

  void interrupt() { history_.stop_reason = "interrupted"; }
  bool is_interrupted() const { return history_.stop_reason == "interrupted"; }

  /// Of a step's mean NLL.
  void gradient(Run& run, const std::vector<RowOrder>& orders, std::int64_t step, std::int64_t epoch) {
    if (shards_.on()) return shared_gradient(run, orders, step, epoch);
    const std::int64_t first = step * run.batch, count = std::min(run.batch, run.train - first);
    batch_gradient(run, orders.front(), first, count, count, epoch);
  }

  /// In slices, so that a stop comes through. total: rows of the step.
  void batch_gradient(Run& run, const RowOrder& order, std::int64_t first, std::int64_t count, std::int64_t total,
                      std::int64_t epoch) {
    for (std::int64_t done = 0; done < count; done += slice_) {
      if (done > 0 && !goes_on(epoch, done_steps_)) return interrupt();
      run.training->gradient(order, first + done, std::min(slice_, count - done), total, done > 0);
    }
  }

  /// That of all shards of all processes, on grids on which the sum is exact. They follow from the step before, but
  /// where a run can go on from a checkpoint from what that holds.
  void shared_gradient(Run& run, const std::vector<RowOrder>& orders, std::int64_t step, std::int64_t epoch) {
    const std::int64_t every = options_.checkpoint_every;
    if (step == 0 || (every > 0 && step % every == 0)) expect_gradient(run);
    do {
      add_shares(run, orders, step, epoch);
      shards_.together().sum(exact_->words());
      if (exact_->failures() > 0 || exact_->stops() > 0) {
        (void)is_stopped();  // throws where a process failed
        return;
      }
    } while (exact_->is_finite() && is_widened());
    take_gradient(run, rows_of_step(run, step));
  }

  /// From Adam's mean squares; before the first step they tell nothing.
  void expect_gradient(Run& run) {
    const double decay = AdamStep().beta2;
    const double factor = run.adam_steps > 0 ? 1 / (1 - std::pow(decay, static_cast<double>(run.adam_steps))) : 0;
    exact_->expect(static_cast<const T*>(run.training->read(true).second_moment), factor);
  }

  bool is_widened() {
    if (!exact_->is_outside()) return false;
    shards_.together().max(exact_->needed());
    exact_->widen();
    return true;
  }

  /// Adds up the gradients of this process's shards. What goes wrong is counted, for all to know.
  void add_shares(Run& run, const std::vector<RowOrder>& orders, std::int64_t step, std::int64_t epoch) {
    exact_->clear();
    const std::int64_t of_shard = run.batch / shards_.count(), first = step * of_shard;
    const std::int64_t total = rows_of_step(run, step);
    guarded([&] {
      for (std::size_t p = 0; p < run.parts.size(); ++p) {
        const std::int64_t count = std::clamp<std::int64_t>(run.parts[p].train() - first, 0, of_shard);
        if (count == 0) continue;
        batch_gradient(run, orders[p], first, count, total, epoch);
        const Training::HostGradient found = run.training->read_gradient();
        exact_->add(static_cast<const T*>(found.values), found.sum_log_prob);
      }
    });
    exact_->stops() += stop_asked_ ? 1 : 0;
    exact_->failures() += error_ ? 1 : 0;
  }

  void take_gradient(Run& run, std::int64_t total) {
    const Training::HostGradient to = run.training->read_gradient();
    exact_->take(static_cast<T*>(to.values));
    const double sum = exact_->is_finite() ? exact_->sum_log_prob() : std::numeric_limits<double>::quiet_NaN();
    run.training->write_gradient(sum, total);
  }

  /// Of all processes.
  std::int64_t rows_of_step(const Run& run, std::int64_t step) const {
    const std::int64_t of_shard = run.batch / shards_.count();
    std::int64_t rows = 0;
    for (const std::int64_t train : run.train_of)
      rows += std::clamp<std::int64_t>(train - step * of_shard, 0, of_shard);
    return rows;
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

  /// Rows of a part that epochs are compared by: of the validation array where there is one, else of x.
  struct Selection {
    std::int64_t rows;
    RowOrder order;
  };
  /// The validation rows; without them the same training rows each time. (The epoch's own mean will not do: it is that
  /// of the weights before each step, not of those at the end.)
  std::vector<Selection> selection(const Run& run) const {
    std::vector<Selection> selected;
    for (std::size_t p = 0; has_array() && p + 1 < bounds_.validation.size(); ++p) {
      RowOrder order;
      order.base = static_cast<std::uint64_t>(bounds_.validation[p]);
      selected.push_back({bounds_.validation[p + 1] - bounds_.validation[p], order});
    }
    if (has_array()) return selected;
    const std::int64_t most = std::max<std::int64_t>(1, kSelectionRows / shards_.count());
    for (const FitRows& part : run.parts) {
      if (run.held_out > 0) selected.push_back({part.held_out(), part.validating()});
      if (run.held_out == 0) selected.push_back({std::min(part.train(), most), part.shuffled(0)});
    }
    return selected;
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
      if (!goes_on(epoch, steps_)) return interrupt();
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
    std::vector<double> sums;  // of each part {log p, weight}
    for (Run& run : compared_runs()) {
      const std::vector<Selection> selected = selection(run);
      sums.resize(2 * selected.size());
      for (std::size_t p = 0; p < selected.size(); ++p) {
        const Selection& of = selected[p];
        guarded([&] {
          each_slice(epoch, of.rows, [&](std::int64_t first, std::int64_t count) {
            run.training->add_log_prob(has_array(), of.order, first, count);
          });
          sums[2 * p] += run.training->report().sum_log_prob / run.weight_factor;
        });
        sums[2 * p + 1] += weight_of(of);
      }
    }
    const std::vector<double> all = shards_.sums(sums, 2);
    return -all[0] / all[1] - compared_log_det_;
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
    if (is_stopped()) throw Stopped();
    if (!exact) return;
    for (Run& run : compared_runs()) {
      append_log_prob(run, run.start.data(), start_log_prob_, &start_parts_);
      for (const Selection& of : selection(run)) {
        of.order.each(0, of.rows, [this](std::int64_t, std::int64_t row) {
          start_weights_.push_back(weight_at(weights_of_compared(), row));
        });
      }
    }
    const std::vector<double> all = sums_of_compared<2>([this](std::size_t i, double* to) {
      to[0] += start_weights_[i] * start_log_prob_[i];
      to[1] += start_weights_[i];
    });
    const double loss = -all[0] / all[1] - compared_log_det_;
    start_counts_ = std::isfinite(loss);
    if (!start_counts_) return start_log_prob_.clear();
    history_.best_loss = history_.initial_loss = loss;
  }

  /// Sums over the rows that epochs are compared by, of which add(i, sums) takes number i.
  template <std::size_t kWidth, class Add>
  std::vector<double> sums_of_compared(Add add) {
    std::vector<double> sums(kWidth * std::max<std::size_t>(1, bounds_.x.size() - 1));
    for (std::size_t i = 0; i < start_parts_.size(); ++i) add(i, &sums[kWidth * start_parts_[i]]);
    return shards_.sums(sums, kWidth);
  }

  /// log p of the run's selection with these weights, and the part that each row is of.
  void append_log_prob(const Run& run, const T* parameters, std::vector<double>& to,
                       std::vector<std::uint32_t>* parts = nullptr) {
    probe_->template set_parameters<T>({parameters, static_cast<std::size_t>(flow_.num_parameters())});
    const std::vector<Selection> selected = selection(run);
    std::vector<T> found;
    shards_.all([&] {
      for (std::size_t p = 0; p < selected.size(); ++p) {
        const Selection& of = selected[p];
        for (std::int64_t first = 0; first < of.rows; first += slice_) {
          poll();
          const std::int64_t count = std::min(slice_, of.rows - first);
          const Context context = gather(of, first, count);
          found.resize(static_cast<std::size_t>(count));
          probe_->template log_prob<T>(probe_rows_, found, context);
          to.insert(to.end(), found.begin(), found.end());
          if (parts != nullptr) parts->resize(to.size(), static_cast<std::uint32_t>(p));
        }
      }
    });
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
    const std::vector<double> all = sums_of_compared<4>([&](std::size_t i, double* to) {
      const double gain = now[i] - start_log_prob_[i], own = start_weights_[i];
      to[0] += own * gain, to[1] += own * gain * gain;
      to[2] += own, to[3] += own * own;
    });
    const double sum = all[0], squares = all[1], weight = all[2], weight_squares = all[3];
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
    double largest = 0;
    for (const Selection& of : selection(main_)) {
      guarded([&] {
        each_slice(epoch, of.rows, [&](std::int64_t first, std::int64_t count) {
          const Context context = gather(of, first, count);
          largest = std::max(largest, probe_->template round_trip_error<T>(probe_rows_, context));
        });
      });
    }
    return shards_.max(largest);
  }

  bool is_better(const EpochRecord& record, double loss) {
    if (!(loss < history_.best_loss)) return false;
    if (options_.max_round_trip > 0 && !(record.round_trip <= options_.max_round_trip)) return false;
    return history_.best_epoch > 0 || !start_counts_ || beats_start();
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
    write_checkpoint({});
    bool goes_on = true;
    shards_.all([&] { goes_on = observer_.on_epoch(record); });
    if (shards_.any(!goes_on) && history_.stop_reason.empty()) history_.stop_reason = "callback";
  }

  // ---- checkpoint ------------------------------------------------------------------------------------------------

  CheckpointKey key() {
    const ShardBounds& given = given_bounds_;
    std::uint64_t of_x = 0, of_contexts = 0, of_weights_given = 0;
    of_x = fingerprint_of(given_x_, features_, given.x) ^
           (fingerprint_of(given_validation_, features_, given.validation) << 1);
    if (context_size() > 0) {
      of_contexts = fingerprint_of(context_, context_size(), bounds_.x);
      of_contexts ^= fingerprint_of(validation_context_, context_size(), bounds_.validation) << 1;
    }
    if (weighted()) {
      of_weights_given = fingerprint_of(given_weights_.x, 1, given.x);
      of_weights_given ^= fingerprint_of(given_weights_.validation, 1, given.validation) << 1;
    }
    FitOptions taken = options_;
    taken.batch_size = main_.batch;
    taken.weight_decay = main_.weight_decay;
    return {flow_.spec(),
            taken,
            of_x,
            of_contexts,
            of_weights_given,
            shards_.sum(rows_in(given_x_.size())),
            shards_.sum(rows_in(given_validation_.size())),
            main_.steps};
  }

  /// Of an array, or of the shards of all processes' arrays.
  template <class V>
  std::uint64_t fingerprint_of(std::span<const V> rows, std::int64_t width, const std::vector<std::int64_t>& bounds) {
    const auto look = [this] { poll(); };
    if (!shards_.on()) return fingerprint(rows.data(), rows.size_bytes(), look);
    std::int64_t sum = 0;
    shards_.all([&] {
      for (std::size_t p = 0; !rows.empty() && p + 1 < bounds.size(); ++p) {
        const auto begin = static_cast<std::size_t>(bounds[p] * width),
                   end = static_cast<std::size_t>(bounds[p + 1] * width);
        const std::span<const V> part = rows.subspan(begin, end - begin);
        const std::uint64_t own[] = {fingerprint(part.data(), part.size_bytes(), look),
                                     static_cast<std::uint64_t>(shards_.own().first) + p};
        sum += static_cast<std::int64_t>(fingerprint(own, sizeof own, look) >> 24);  // 2^20 of them can be added up
      }
    });
    return static_cast<std::uint64_t>(shards_.sum(sum));
  }

  CheckpointArrays arrays() {
    const Training::Arrays own = main_.training->read(true);
    T* average = main_.average.empty() ? nullptr : main_.average.data();
    return {own.parameters, best_.data(), own.first_moment, own.second_moment, average, flow_.num_parameters()};
  }

  static bool is_finite(const CheckpointArrays& arrays) {
    bool finite = true;
    for (const void* array : {arrays.parameters, arrays.best, arrays.first_moment, arrays.second_moment}) {
      const T* values = static_cast<const T*>(array);
      finite = finite && std::all_of(values, values + arrays.count, [](T v) { return std::isfinite(v); });
    }
    return finite;
  }

  /// By process 0. `begun`: of the epoch that is under way.
  void write_checkpoint(const PartOfEpoch& begun) {
    if (!key_.has_value()) return;  // no checkpoint was asked for
    shards_.all([&] {
      // Of a run that is about to diverge the last state stays that can be gone on from.
      if (shards_.rank() != 0 || !is_finite(arrays())) return;
      save_checkpoint(options_.checkpoint, *key_, history_, main_.adam_steps, begun, arrays());
    });
  }

  void resume() {
    if (options_.checkpoint.empty()) return;
    key_ = key();
    bool exists = false;
    shards_.all([&] { exists = checkpoint_exists(options_.checkpoint); });
    const std::int64_t seen = shards_.sum(exists ? 1 : 0);
    if (seen == 0) return;
    if (seen < shards_.size()) {
      fail("checkpoint " + options_.checkpoint + " is seen by " + std::to_string(seen) + " of " +
           std::to_string(shards_.size()) + " processes, expected a path that is the same file for all");
    }
    shards_.all([this] { load(); });
    if (!shards_.on()) return;
    const CheckpointArrays loaded = arrays();
    const auto of = [this](const void* values) { return fingerprint(values, best_.size() * sizeof(T), [] {}); };
    const std::string text = "the state in checkpoint " + options_.checkpoint +
                             " differs among the processes, expected a path that is the same file for all";
    shards_.require_same({{text, static_cast<std::uint64_t>(main_.adam_steps)},
                          {text, of(loaded.parameters)},
                          {text, of(loaded.best)},
                          {text, of(loaded.second_moment)}});
  }

  void load() {
    const std::vector<T> before = best_;
    load_checkpoint(options_.checkpoint, *key_, history_, main_.adam_steps, part_of_epoch_, arrays());
    if (standardized_.on && !std::equal(before.begin(), before.begin() + 2 * features_, best_.begin())) {
      fail("checkpoint " + options_.checkpoint +
           " is of a run that standardized its rows otherwise than this flow does; go on with that run's flow or a new "
           "one");
    }
    main_.training->write();
  }

  inline static FitObserver silent_;

  Shards& shards_;
  ShardBounds bounds_, given_bounds_ = bounds_;  // of the rows as they are now, and as they were given
  bool weighted_ = false;                        // the rows of some process have weights
  bool stop_asked_ = false;                      // of a sharded run, by this process's observer
  std::exception_ptr error_;                     // of a sharded run, in this process
  std::optional<ExactGradient<T>> exact_;        // of a sharded run
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
  std::vector<std::uint32_t> start_parts_;
  bool start_counts_ = false;
  bool average_is_better_ = false;
  double max_deviation_ = 0;                                 // 0: no row is left out
  std::int64_t slice_ = 0, steps_ = 0, done_steps_ = 0;      // steps of all runs in an epoch
  std::int64_t earlier_steps_ = 0, earlier_epochs_ = 0;      // of adam_, before this run
  std::int64_t total_rows_ = 0, total_validation_rows_ = 0;  // of all processes
  PartOfEpoch part_of_epoch_;                                // that a checkpoint left
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

/// Of the rows of all processes.
void require_some_that_count(Shards& shards, const char* name, std::size_t given, std::size_t left) {
  if (!shards.on()) return;
  const std::int64_t all = shards.sum(static_cast<std::int64_t>(given));
  if (shards.sum(static_cast<std::int64_t>(left)) > 0 || all == 0) return;
  fail(std::string(name) + " is zero for all rows of all processes, expected a weight above 0");
}

/// T: of the flow. Rows of X: as those of a Trainer.
template <class T, class X>
History train(Flow& flow, std::span<const X> x, std::span<const X> validation, const FitWeights& weights,
              const FitOptions& options, FitObserver* observer, const Context& context,
              const Context& validation_context, AdamState* adam, Communicator* communicator) {
  Shards shards(communicator, options.shards);
  std::optional<WeightedTable<T, X>> trained, held_out;
  shards.all([&] {
    if (!validation.empty() && !x.empty() && weights.x.empty() != weights.validation.empty()) {
      fail(std::string("the weights of ") + (weights.x.empty() ? "x" : "validation") +
           " are missing, expected weights of both or of none; ones count rows alike");
    }
    using Names = typename WeightedTable<T, X>::Names;
    trained.emplace(flow.spec(), Names{"x", "context", "sample_weight"}, x, context, weights.x, shards.on());
    held_out.emplace(flow.spec(), Names{"validation", "the context of validation", "the weights of validation"},
                     validation, validation_context, weights.validation, shards.on());
  });
  const auto bounds_of = [&](const char* name, std::size_t elements, const WeightedTable<T, X>& table) {
    const std::int64_t rows = static_cast<std::int64_t>(elements) / flow.spec().input_size;
    std::vector<std::int64_t> bounds = shards.bounds(shards.total_rows(name, rows));
    for (std::int64_t& bound : bounds) bound = table.left_of_first(bound);
    return bounds;
  };
  ShardBounds bounds;
  bounds.x = bounds_of("x", x.size(), *trained);
  bounds.validation = bounds_of("validation", validation.size(), *held_out);
  require_some_that_count(shards, "sample_weight", x.size(), trained->rows().size());
  require_some_that_count(shards, "the weights of validation", validation.size(), held_out->rows().size());
  std::optional<Trainer<T, X>> trainer;
  shards.all([&] {
    trainer.emplace(flow, trained->rows(), held_out->rows(), FitWeights(trained->weights(), held_out->weights()),
                    options, observer, trained->context(), held_out->context(), adam, shards, std::move(bounds));
  });
  return trainer->run();
}

}  // namespace

template <class T>
History fit(Flow& flow, std::span<const T> x, std::span<const T> validation, const FitOptions& options,
            FitObserver* observer, const Context& context, const Context& validation_context, AdamState* adam,
            Communicator* communicator) {
  return fit(flow, x, validation, FitWeights({}), options, observer, context, validation_context, adam, communicator);
}

template <class T>
History fit(Flow& flow, std::span<const T> x, std::span<const T> validation, const FitWeights& weights,
            const FitOptions& options, FitObserver* observer, const Context& context, const Context& validation_context,
            AdamState* adam, Communicator* communicator) {
  const FloatMode mode;  // also for what the training itself computes; the observer is called in it
  if constexpr (std::is_same_v<T, double>) {
    if (takes_float64_rows(flow.spec())) {
      return train<float, T>(flow, x, validation, weights, options, observer, context, validation_context, adam,
                             communicator);
    }
  }
  if (flow.spec().dtype != (sizeof(T) == 4 ? DType::float32 : DType::float64)) {
    options.validate();
    const Error mismatch(ErrorCode::type_mismatch,
                         "x is not " + std::string(name_of(flow.spec().dtype)) + " as the flow is" +
                             (sizeof(T) == 8 ? "; a float32 flow takes float64 rows where it begins "
                                               "with a standardize layer"
                                             : ""));
    if (communicator != nullptr) fail_together(*communicator, mismatch);
    throw mismatch;
  }
  return train<T, T>(flow, x, validation, weights, options, observer, context, validation_context, adam, communicator);
}

template History fit(Flow&, std::span<const float>, std::span<const float>, const FitOptions&, FitObserver*,
                     const Context&, const Context&, AdamState*, Communicator*);
template History fit(Flow&, std::span<const double>, std::span<const double>, const FitOptions&, FitObserver*,
                     const Context&, const Context&, AdamState*, Communicator*);
template History fit(Flow&, std::span<const float>, std::span<const float>, const FitWeights&, const FitOptions&,
                     FitObserver*, const Context&, const Context&, AdamState*, Communicator*);
template History fit(Flow&, std::span<const double>, std::span<const double>, const FitWeights&, const FitOptions&,
                     FitObserver*, const Context&, const Context&, AdamState*, Communicator*);

}  // namespace nvpflow
