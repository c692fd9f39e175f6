/// @file
/// Maximum-likelihood training: minibatches, Adam, schedule, validation, early stopping, checkpoints.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nvpflow/communicator.hpp>
#include <nvpflow/flow.hpp>

namespace nvpflow {

/// How the learning rate changes during training; FitOptions::schedule.
enum class Schedule { constant, cosine };

/// @{
/// "constant" or "cosine". Throws Error(invalid_argument) for another one.
NVPFLOW_API std::string_view name_of(Schedule schedule);
NVPFLOW_API Schedule parse_schedule(std::string_view name);
/// @}

/// What a numeric option may be: finite, and within bounds.
struct OptionRange {
  double least = 0;           ///< the smallest value
  bool above = false;         ///< larger than `least`, not equal to it
  double below = HUGE_VAL;    ///< smaller than this
  const char* expected = "";  ///< the same in words, for messages

  /// Whether it is such a value.
  bool holds(double value) const {
    return std::isfinite(value) && (above ? value > least : value >= least) && value < below;
  }
};

/// Of the options that fit() and fit_density() share.
struct SharedRanges {
  /// @{
  /// Of the option of that name.
  static constexpr OptionRange learning_rate{.above = true, .expected = "a finite number above 0"};
  static constexpr OptionRange weight_decay{.expected = "a finite number, at least 0"};
  static constexpr OptionRange clip_norm{.expected = "a finite number, at least 0 (0: none)"};
  static constexpr OptionRange averaging{.below = 1, .expected = "at least 0 (0: none) and below 1"};
  static constexpr OptionRange patience{.expected = "at least 0 (0: never stop early)"};
  static constexpr OptionRange num_threads{.below = 4097, .expected = "0 (automatic) to 4096"};
  /// @}
};

/// How to train.
struct NVPFLOW_API FitOptions {
  /// Passes over the training rows.
  std::int64_t epochs = 100;
  /// Most rows of a step; the last step of an epoch takes the rest. A step takes all training rows if they are fewer.
  /// 0: an eighth of the training rows, but at least 16 and at most 256.
  std::int64_t batch_size = 0;
  /// Adam's, at the start of the schedule.
  double learning_rate = 3e-3;
  /// cosine: learning_rate * (1 + cos(pi step / total_steps)) / 2, from the first step to the last of all epochs.
  Schedule schedule = Schedule::cosine;
  /// Decoupled (AdamW), on kernels only. Without a value the square of 225 columns / training rows, at most 1: a prior
  /// weighs less the more rows there are.
  std::optional<double> weight_decay;
  /// Largest Euclidean norm of the whole gradient; a longer one is scaled down to it. 0: no clipping.
  double clip_norm = 5.0;
  /// In [0, 1): the weights after each epoch also enter a moving average, of which each epoch keeps this share. The
  /// epoch counts by the better of the two. 0: no average. (Polyak and Juditsky 1992; Izmailov et al. 2018)
  double averaging = 0.8;
  /// Stop after this many epochs without a better validation loss. 0: never. Needs validation data.
  std::int64_t patience = 0;
  /// Share of the rows set aside for validation where no validation array is given, in [0, 1).
  double validation_fraction = 0.1;
  /// Cross-validation in place of a share of the rows that is too small to compare epochs by. So many further sets of
  /// weights are trained, each without one part of the rows. An epoch's validation loss is then that of all rows, each
  /// by the weights that have not seen it. The flow itself is trained on all rows. 1: none.
  ///
  /// 0: folds where the share would hold no row, or, of a flow that whitens, fewer than 200. They are 5, and one for
  /// each row where there are fewer than 10. None beside a validation array, a checkpoint or an AdamState.
  std::int64_t folds = 0;
  /// An epoch after which Flow::round_trip_error exceeds this, over the rows that epochs are compared by, is never the
  /// best one. 0: not measured. It says nothing of other rows.
  double max_round_trip = 0.0;
  /// How fit() sets a first layer of kind standardize that is still the identity.
  Statistics standardize = Statistics::automatic;
  /// Rows further from the mean than so many standard deviations, in any column, are left out of training and
  /// validation. Both numbers are those of a first layer of kind standardize. One row that far out has more weight than
  /// a million ordinary ones, and no flow reaches it. History counts them. 0: none is left out. Without a value 1000,
  /// but 0 with the base student_t, under which a far row costs the logarithm of its distance.
  std::optional<double> max_deviation;
  /// Sets a first layer of kind standardize, and the statistics of a context, from the training rows even if they have
  /// been set before. For rows that have moved since. The layers behind them stay, and see rows of the same scale.
  bool restandardize = false;
  /// A layer that whitens keeps columns that follow from others: each variance then gets a millionth of it on top.
  bool allow_degenerate = false;
  /// Fixes the order of rows and the validation split.
  std::uint64_t seed = 0;
  /// 0: the flow's own setting.
  int num_threads = 0;
  /// If not empty, the file that is written after every epoch. If it exists already, training continues from it.
  std::string checkpoint;
  /// If above 0, the checkpoint is also written after so many steps of an epoch.
  std::int64_t checkpoint_every = 0;
  /// Above 1: the rows of all processes, in the order of their ranks, are cut into so many consecutive shards. A step
  /// takes an equal share of each, in an order of its own, and the shards' gradients are added up exactly. The weights
  /// depend on the number of shards, and not on how many processes share them. 0 or 1: none.
  std::int64_t shards = 0;

  /// Calls visit(name, member, range) for every option, by the name that messages and Python use: the one list of them.
  /// range: of numbers; nullptr for all else.
  template <class Visit>
  static void fields(Visit&& visit) {
    const auto number = [&](const char* name, auto member, const OptionRange& range) { visit(name, member, &range); };
    const auto other = [&](const char* name, auto member) { visit(name, member, nullptr); };
    number("epochs", &FitOptions::epochs, {.least = 1, .expected = "at least 1"});
    number("batch_size", &FitOptions::batch_size, {.expected = "at least 1 (0: automatic)"});
    number("learning_rate", &FitOptions::learning_rate, SharedRanges::learning_rate);
    other("schedule", &FitOptions::schedule);
    number("weight_decay", &FitOptions::weight_decay, SharedRanges::weight_decay);
    number("clip_norm", &FitOptions::clip_norm, SharedRanges::clip_norm);
    number("averaging", &FitOptions::averaging, SharedRanges::averaging);
    number("patience", &FitOptions::patience, SharedRanges::patience);
    number("validation", &FitOptions::validation_fraction,
           {.below = 1, .expected = "a share of the rows, at least 0 and below 1"});
    number("folds", &FitOptions::folds, {.expected = "at least 0 (0: automatic, 1: none)"});
    number("max_round_trip", &FitOptions::max_round_trip, {.expected = "a finite number, at least 0 (0: no bound)"});
    other("standardize", &FitOptions::standardize);
    number("max_deviation", &FitOptions::max_deviation,
           {.expected = "a finite number, at least 0 (0: no row is left out)"});
    other("restandardize", &FitOptions::restandardize);
    other("allow_degenerate", &FitOptions::allow_degenerate);
    other("seed", &FitOptions::seed);
    number("num_threads", &FitOptions::num_threads, SharedRanges::num_threads);
    other("checkpoint", &FitOptions::checkpoint);
    number("checkpoint_every", &FitOptions::checkpoint_every, {.expected = "at least 0 (0: after epochs only)"});
    number("shards", &FitOptions::shards, {.below = (1 << 20) + 1, .expected = "0 (none) to 1048576"});
  }

  /// Throws Error(invalid_argument) naming the field.
  void validate() const;
};

/// What Adam keeps from one call of fit() to the next, for rows that come in parts. A new one has made no step.
struct AdamState {
  std::int64_t steps = 0;   ///< updates that were made
  std::int64_t epochs = 0;  ///< passes that were made, which the order of rows goes by
  /// Running means of each parameter's gradient, in the order of ParamLayout; empty before the first step.
  std::vector<double> first_moment;
  /// Those of its square, which are at least 0. float64 holds the numbers of either dtype.
  std::vector<double> second_moment;
};

/// The result of one epoch.
struct EpochRecord {
  std::int64_t epoch = 0;      ///< 1 for the first
  double train_loss = 0;       ///< mean NLL over the epoch's steps, nats per row
  double validation_loss = 0;  ///< of the weights or their average, the better; NaN without validation data
  double learning_rate = 0;    ///< of the epoch's last step
  double gradient_norm = 0;    ///< of the epoch's last step, before clipping
  double seconds = 0;          ///< wall time of this epoch, validation included
  double round_trip = 0;       ///< Flow::round_trip_error after the epoch; NaN where max_round_trip is 0

  /// Calls visit(name, member) for every field: the one list of them, in the order of checkpoints.
  template <class Visit>
  static constexpr void fields(Visit&& visit) {
    visit("epoch", &EpochRecord::epoch);
    visit("train_loss", &EpochRecord::train_loss);
    visit("validation_loss", &EpochRecord::validation_loss);
    visit("learning_rate", &EpochRecord::learning_rate);
    visit("gradient_norm", &EpochRecord::gradient_norm);
    visit("seconds", &EpochRecord::seconds);
    visit("round_trip", &EpochRecord::round_trip);
  }

  /// Every field is equal.
  bool operator==(const EpochRecord&) const = default;
};

/// The result of a run.
struct History {
  std::vector<EpochRecord> epochs;  ///< in order
  std::int64_t best_epoch = 0;      ///< whose weights the flow holds now; 0: those that training started from
  double best_loss = 0;             ///< its validation loss; without validation data, of up to 65,536 training rows
  std::string stop_reason;          ///< "epochs", "patience", "callback" or "interrupted"
  /// For each column, what the standardize layer was set from, as of Flow::initialize_from; empty where it was not set.
  std::vector<std::string> standardized;
  std::int64_t rows_left_out = 0;    ///< by max_deviation, from training and validation
  std::int64_t train_rows = 0;       ///< rows of x that were trained on
  std::int64_t validation_rows = 0;  ///< rows of the validation array, or set aside from x; all of x with folds
  std::int64_t folds = 0;            ///< of cross-validation; 0: none
  double initial_loss = 0;           ///< validation loss before the first epoch, of a flow that whitens; else infinite
  /// (sum w)^2 / sum w^2 of the weights w of the training rows (Kish 1965): of so many rows without weights a mean is
  /// as certain. train_rows without weights.
  double effective_rows = 0;
};

/// The rows of x that fit() sets aside for validation, and those that it trains on.
struct FitSplit {
  std::vector<std::int64_t> set_aside;   ///< in no order
  std::vector<std::int64_t> trained_on;  ///< the same
};

/// How fit() splits `total` rows by the share validation_fraction and the seed, without folds; at most so many of each.
NVPFLOW_API FitSplit split_rows(std::int64_t total, double share, std::uint64_t seed, std::int64_t most);

/// Weights of a fit's rows, as SampleWeights, in a type of their own: what options are not.
struct FitWeights {
  /// Of x, one for each row. Of validation likewise, or none where there is no validation array.
  explicit FitWeights(std::span<const double> of_x, std::span<const double> of_validation = {})
      : x(of_x), validation(of_validation) {}

  std::span<const double> x;           ///< [N]
  std::span<const double> validation;  ///< [M]
};

/// Receives progress on the thread that called fit(). Every member may return false to stop; the flow then keeps
/// the best weights so far. An exception passes through fit() after the same restoration.
class NVPFLOW_API FitObserver {
 public:
  virtual ~FitObserver() = default;
  /// After every slice of work of well under a second. `step` of `steps` minibatches of epoch `epoch` are done; epoch 0
  /// is the preparation: data are checked and measured. False: stop at once, stop_reason "interrupted".
  virtual bool on_progress(std::int64_t epoch, std::int64_t step, std::int64_t steps) {
    (void)epoch, (void)step, (void)steps;
    return true;
  }
  /// False: stop, stop_reason "callback".
  virtual bool on_epoch(const EpochRecord& record) {
    (void)record;
    return true;
  }
};

/// Fits `flow` to x [N, D] by minimising -mean log p. A first layer of kind standardize that is still the identity is
/// set from the training rows beforehand (FitOptions::standardize), and is not trained. Rows that are extremely far out
/// are then left out (FitOptions::max_deviation).
///
/// Every lu_linear layer that whitens and is still the identity is then set from all training rows. What comes out has
/// mean 0 and, as the shrunk covariance, the identity. Columns that follow from others are refused there.
///
/// Every actnorm layer that is still all zeros is then set from up to 65,536 training rows. One behind a layer that
/// whitens stays the identity. Its outputs, from data to
/// latent, then have mean 0 and standard deviation 1. A constant output is only brought to 0.
///
/// A mixture base as a new flow has it is then set to groups of the training rows' latents.
///
/// T: the flow's dtype, or double for a float32 flow with takes_float64_rows. Such rows are standardized in float64,
/// once, into a float32 copy that is trained on. Losses are the same; max_round_trip is measured on that copy.
///
/// Of a flow with a context: minimises -mean log p(x | c). context [N, C] and validation_context hold a row for each
/// row of x and of validation, of the flow's dtype. Where the flow standardizes its context, its mean and standard
/// deviation are set from the training rows where they are still zeros.
///
/// Rows are visited in a new order each epoch, given only by `seed`. The same data, options and seed give the same
/// weights bit for bit on one instruction set, for any number of threads. So they do across a stop and a resume from a
/// checkpoint. The flow ends with the weights of its best epoch, that of the lowest validation loss. Without validation
/// data it is the lowest loss of up to 65,536 training rows. With FitOptions::averaging these may be the average until
/// that epoch. With max_round_trip, only epochs whose round trip error is within it count; for patience, too, the
/// others are no better.
///
/// adam: null, or the state to go on from, which is then that after the last epoch. The flow ends with the weights of
/// that epoch, which the state belongs to, and not with those of the best one. So averaging, max_round_trip, patience
/// and a checkpoint are refused. Two calls of one epoch each, on the same rows and without validation rows, end as one
/// of two epochs, bit for bit. Only Schedule::cosine falls to zero in each call.
///
/// communicator: the processes that train together, with FitOptions::shards above 1. All call fit() with the same flow,
/// options and instruction set, and x, context and weights hold the rows of this process, which rows_of_process()
/// names; so do those of validation. All end with the same weights and the same history, bit for bit, for any number of
/// processes. A shard is split for validation on its own. What layers start from is set from up to 262,144 training
/// rows of all shards, which every process sees. A stop, or an error of one process, becomes that of all at the next
/// step. A checkpoint is written by process 0 and read by all; another number of processes may go on from it.
///
/// Throws Error(invalid_argument) for data or options that cannot be used; it counts and names rows with NaN or inf,
/// and names constant columns. Throws Error(not_finite), naming the step, where the loss or gradient stops being
/// finite; the flow then holds the best weights. Throws Error(none_kept) where training was not interrupted and no
/// epoch was inside max_round_trip; the flow is then as it was.
template <class T>
NVPFLOW_API History fit(Flow& flow, std::span<const T> x, std::span<const T> validation, const FitOptions& options,
                        FitObserver* observer = nullptr, const Context& context = {},
                        const Context& validation_context = {}, AdamState* adam = nullptr,
                        Communicator* communicator = nullptr);

/// fit() of rows that count for more or less: minimises -sum w log p / sum w. The weights w are scaled to mean 1 over
/// the training rows, once. A step's loss is -(1 / B) sum w log p over its B rows. Epochs are compared by the weighted
/// mean, to which rows that are set aside take their weights along. What is set from the rows before training, such as
/// the standardize layer, is set from weighted moments and quantiles. The automatic weight_decay goes by
/// History::effective_rows. A row of weight 0 counts as absent, but must be finite. Weights that are all 1 give the
/// bits of no weights. A checkpoint knows the weights.
///
/// Throws Error(invalid_argument) also for weights that are negative, not finite, all 0, or not one for each row. With
/// a negative weight the loss has no minimum.
template <class T>
NVPFLOW_API History fit(Flow& flow, std::span<const T> x, std::span<const T> validation, const FitWeights& weights,
                        const FitOptions& options, FitObserver* observer = nullptr, const Context& context = {},
                        const Context& validation_context = {}, AdamState* adam = nullptr,
                        Communicator* communicator = nullptr);

}  // namespace nvpflow
