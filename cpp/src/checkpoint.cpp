#include "checkpoint.hpp"

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>
#include <nvpflow/train.hpp>

#include "checkpoint_file.hpp"

namespace nvpflow {
namespace {

using nlohmann::json;

constexpr std::int64_t kRecordFields = [] {
  std::int64_t count = 0;
  EpochRecord::fields([&](const char*, auto) { ++count; });
  return count;
}();

std::string hex(std::uint64_t value) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text(16, '0');
  for (std::size_t i = 16; i-- > 0; value >>= 4) text[i] = kDigits[value & 15];
  return text;
}

template <class V>
json as_json(const V& value) {
  return value;
}
json as_json(const std::optional<double>& value) { return value.value_or(0); }
json as_json(Schedule schedule) { return name_of(schedule); }
json as_json(Statistics statistics) { return name_of(statistics); }

/// Everything that decides what the next step does, by the names users know.
json describe(const CheckpointKey& key) {
  const FitOptions& o = key.options;
  json text = {{"flow", json::parse(to_json(key.spec))},
               {"x", std::to_string(key.rows) + " rows with fingerprint " + hex(key.data)},
               {"validation rows", key.validation_rows}};
  // Also where there are none: a checkpoint that knows of some is of another run.
  text["sample_weight"] = key.weights == 0 ? json() : json("weights with fingerprint " + hex(key.weights));
  if (key.spec.context_size > 0) text["context"] = "rows with fingerprint " + hex(key.contexts);
  FitOptions::fields([&](const char* name, auto member, const OptionRange*) { text[name] = as_json(o.*member); });
  for (const char* name : {"num_threads", "checkpoint"}) text.erase(name);  // decide nothing
  if (o.averaging == 0) text.erase("averaging");                            // as checkpoints were before there was one
  text.erase("folds");                                                      // a run with a checkpoint has none
  text["shards"] = o.shards < 2 ? json() : json(o.shards);  // as checkpoints were before there were shards
  if (o.checkpoint_every == 0 || o.shards < 2) text.erase("checkpoint_every");  // shards' grids follow from it
  // The cosine's length is part of the schedule; a constant rate may go on for longer.
  if (o.schedule == Schedule::constant) text.erase("epochs");
  return text;
}

[[noreturn]] void damaged(const std::string& path, const std::string& what) { checkpoint_damaged(path, what); }

std::string text_of(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

template <class N>
void assign(N& to, double value) {
  to = static_cast<N>(value);
}

std::vector<EpochRecord> records_of(const std::string& path, const std::vector<double>& values) {
  std::vector<EpochRecord> records;
  for (std::size_t at = 0; at < values.size(); at += static_cast<std::size_t>(kRecordFields)) {
    const double* value = values.data() + at;
    EpochRecord record;
    EpochRecord::fields([&](const char*, auto member) { assign(record.*member, *value++); });
    records.push_back(record);
    if (record.epoch != static_cast<std::int64_t>(records.size())) {
      damaged(path, "the epochs of its history do not count from 1");
    }
  }
  return records;
}

/// Every value is one that training writes: it stops where a loss or a norm is not finite.
void check_records(const std::string& path, const std::vector<EpochRecord>& records, const FitOptions& options,
                   bool validated) {
  const auto refuse = [&](const EpochRecord& r, const char* field, double value, const char* expected) {
    damaged(path, "epoch " + std::to_string(r.epoch) + " of its history has " + field + " " + text_of(value) +
                      ", expected " + expected);
  };
  const bool measured = options.max_round_trip > 0;
  for (const EpochRecord& r : records) {
    const std::pair<const char*, double> finite[] = {{"train_loss", r.train_loss},
                                                     {"learning_rate", r.learning_rate},
                                                     {"gradient_norm", r.gradient_norm},
                                                     {"seconds", r.seconds}};
    for (const auto& [field, value] : finite) {
      if (!std::isfinite(value)) refuse(r, field, value, "a finite number");
    }
    if (validated ? !std::isfinite(r.validation_loss) : !std::isnan(r.validation_loss)) {
      refuse(r, "validation_loss", r.validation_loss, validated ? "a finite number" : "NaN: nothing is validated");
    }
    // Infinite where a row does not come back finite.
    if (measured ? std::isnan(r.round_trip) : !std::isnan(r.round_trip)) {
      refuse(r, "round_trip", r.round_trip, measured ? "a number" : "NaN: there is no max_round_trip");
    }
  }
}

/// The counters and the best loss are those that training leaves after these epochs.
void check_progress(const std::string& path, const std::vector<EpochRecord>& records, const CheckpointKey& key,
                    bool validated, double initial_loss, const CheckpointState& state) {
  const auto& [adam_steps, best_epoch, best_loss, begun, values] = state;
  const auto last = static_cast<std::int64_t>(records.size());
  std::int64_t steps = 0;
  const bool too_many = __builtin_mul_overflow(last, key.steps_per_epoch, &steps);
  const std::int64_t most = begun ? steps + key.steps_per_epoch - 1 : steps, least = begun ? steps + 1 : steps;
  if (too_many || adam_steps < least || adam_steps > most || (begun && !std::isfinite(*begun))) {
    damaged(path, "its adam_steps is " + std::to_string(adam_steps) + ", expected " + std::to_string(last) +
                      " epochs of " + std::to_string(key.steps_per_epoch) + " steps" +
                      (begun ? ", and some of the next one with a finite sum of log p" : ""));
  }
  if (best_epoch < 0 || best_epoch > last) {
    damaged(path, "its best_epoch is " + std::to_string(best_epoch) + ", expected 0 to " + std::to_string(last));
  }
  const bool none = best_epoch == 0;
  const double expected = none        ? initial_loss
                          : validated ? records[static_cast<std::size_t>(best_epoch) - 1].validation_loss
                                      : best_loss;
  if (best_loss != expected || (!none && !std::isfinite(best_loss))) {
    damaged(path, "its best_loss is " + text_of(best_loss) + ", expected " +
                      (std::isfinite(expected) || none ? text_of(expected) : "a finite number") +
                      ", that of best_epoch " + std::to_string(best_epoch));
  }
}

}  // namespace

void save_checkpoint(const std::string& path, const CheckpointKey& key, const History& history, std::int64_t adam_steps,
                     const PartOfEpoch& begun, const CheckpointArrays& arrays) {
  std::vector<double> records;
  for (const EpochRecord& r : history.epochs) {
    EpochRecord::fields([&](const char*, auto member) { records.push_back(static_cast<double>(r.*member)); });
  }
  CheckpointState state = {adam_steps, history.best_epoch, history.best_loss, std::nullopt, std::move(records)};
  if (begun.steps > 0) state.begun = begun.sum_log_prob;
  write_checkpoint(path, describe(key), key.spec.dtype, state, kRecordFields, arrays);
}

void load_checkpoint(const std::string& path, const CheckpointKey& key, History& history, std::int64_t& adam_steps,
                     PartOfEpoch& begun, const CheckpointArrays& arrays) {
  // Model and rows first: the defaults of batch_size and weight_decay follow from them.
  static constexpr std::array<const char*, 4> kFirst = {"flow", "shards", "x", "validation rows"};
  const ReadCheckpoint read = read_checkpoint(path, describe(key), kFirst, key.spec.dtype, kRecordFields);
  const std::vector<EpochRecord> epochs = records_of(path, read.state.records);
  const bool validated = key.validation_rows > 0 || key.options.validation_fraction > 0;
  check_records(path, epochs, key.options, validated);
  check_progress(path, epochs, key, validated, history.best_loss, read.state);

  // Everything is checked before anything of the run is touched.
  read.take(arrays);
  history.epochs = epochs;
  history.best_loss = read.state.best_loss;
  history.best_epoch = read.state.best;
  adam_steps = read.state.adam_steps;
  begun = {adam_steps - static_cast<std::int64_t>(epochs.size()) * key.steps_per_epoch, read.state.begun.value_or(0)};

  const auto done = static_cast<std::int64_t>(history.epochs.size());
  const FitOptions& options = key.options;
  history.stop_reason.clear();
  if (options.patience > 0 && done - history.best_epoch >= options.patience) history.stop_reason = "patience";
  if (done >= options.epochs) history.stop_reason = "epochs";
}

}  // namespace nvpflow
