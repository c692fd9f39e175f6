#include "checkpoint.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>
#include <nvpflow/train.hpp>

#include "io/metadata_json.hpp"
#include "io/safetensors.hpp"

namespace nvpflow {
namespace {

using nlohmann::json;

constexpr const char* kTrainingKey = "nvpflow.training";
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
  if (key.spec.context_size > 0) text["context"] = "rows with fingerprint " + hex(key.contexts);
  FitOptions::fields([&](const char* name, auto member, const OptionRange*) { text[name] = as_json(o.*member); });
  for (const char* name : {"num_threads", "checkpoint"}) text.erase(name);  // decide nothing
  if (o.averaging == 0) text.erase("averaging");                            // as checkpoints were before there was one
  // The cosine's length is part of the schedule; a constant rate may go on for longer.
  if (o.schedule == Schedule::constant) text.erase("epochs");
  return text;
}

[[noreturn]] void damaged(const std::string& path, const std::string& what) {
  throw Error(ErrorCode::file_format, "checkpoint " + path + ": " + what);
}

const FileTensor& find(const std::string& path, const TensorFile& file, const char* name, DType dtype,
                       std::int64_t size) {
  for (const FileTensor& t : file.tensors) {
    if (t.name != name) continue;
    std::int64_t count = 1;
    for (const std::int64_t n : t.shape) count *= n;
    if (t.dtype != dtype || (size >= 0 && count != size)) {
      damaged(path, "tensor " + t.name + " holds " + std::to_string(count) + " " + std::string(name_of(t.dtype)) +
                        ", expected " + std::to_string(size) + " " + std::string(name_of(dtype)));
    }
    return t;
  }
  damaged(path, std::string("tensor ") + name + " is missing");
}

json training_of(const std::string& path, const TensorFile& file) {
  const auto text = file.metadata.find(kTrainingKey);
  if (text == file.metadata.end()) damaged(path, "not a checkpoint: it has no " + std::string(kTrainingKey));
  json training;
  try {
    training = io::parse_metadata_json(text->second);
  } catch (const Error& error) {
    damaged(path, std::string(kTrainingKey) + ": " + error.what());
  }
  const bool good = training.is_object() && training.contains("key") && training["key"].is_object() &&
                    training.contains("adam_steps") && training["adam_steps"].is_number_integer() &&
                    training.contains("best_epoch") && training["best_epoch"].is_number_integer();
  if (!good) damaged(path, std::string(kTrainingKey) + " is not the JSON object that this version writes");
  return training;
}

/// A value for a message: ASCII, one line, not endless.
std::string shown(const json& value) {
  constexpr std::size_t kLongest = 400;
  const std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  return text.size() > kLongest ? text.substr(0, kLongest) + ".." : text;
}

std::string text_of(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

void check_key(const std::string& path, const json& came, const json& expected) {
  const auto check = [&](const std::string& name, const json& value) {
    const json other = came.contains(name) ? came[name] : json();
    if (other == value) return;
    throw Error(ErrorCode::invalid_argument, "checkpoint " + path + " belongs to another run: its " + name + " is " +
                                                 shown(other) + ", this run's is " + shown(value) +
                                                 "; give another file, or delete this one to start over");
  };
  // Model and rows first: the defaults of batch_size and weight_decay follow from them.
  for (const char* name : {"flow", "x", "validation rows"}) check(name, expected.at(name));
  for (const auto& [name, value] : expected.items()) check(name, value);
}

template <class N>
void assign(N& to, double value) {
  to = static_cast<N>(value);
}

std::vector<EpochRecord> records_of(const std::string& path, const TensorFile& file) {
  const FileTensor& tensor = find(path, file, "history", DType::float64, -1);
  if (tensor.shape.size() != 2 || tensor.shape[1] != kRecordFields) damaged(path, "tensor history has another shape");
  std::vector<EpochRecord> records;
  for (std::int64_t i = 0; i < tensor.shape[0]; ++i) {
    double r[kRecordFields];
    std::memcpy(r, static_cast<const unsigned char*>(tensor.data) + static_cast<std::size_t>(i) * sizeof r, sizeof r);
    if (r[0] != static_cast<double>(i + 1)) damaged(path, "the epochs of its history do not count from 1");
    EpochRecord record;
    const double* value = r;
    EpochRecord::fields([&](const char*, auto member) { assign(record.*member, *value++); });
    records.push_back(record);
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
                    bool validated, std::int64_t best_epoch, double best_loss, const json& adam_steps) {
  const auto last = static_cast<std::int64_t>(records.size());
  std::int64_t steps = 0;
  if (__builtin_mul_overflow(last, key.steps_per_epoch, &steps) || adam_steps != json(steps)) {
    damaged(path, "its adam_steps is " + shown(adam_steps) + ", expected " + std::to_string(last) + " epochs of " +
                      std::to_string(key.steps_per_epoch) + " steps");
  }
  if (best_epoch < 0 || best_epoch > last) {
    damaged(path, "its best_epoch is " + std::to_string(best_epoch) + ", expected 0 to " + std::to_string(last));
  }
  const bool none = best_epoch == 0;
  const double expected = none        ? std::numeric_limits<double>::infinity()
                          : validated ? records[static_cast<std::size_t>(best_epoch) - 1].validation_loss
                                      : best_loss;
  if (best_loss != expected || (!none && !std::isfinite(best_loss))) {
    damaged(path, "its best_loss is " + text_of(best_loss) + ", expected " +
                      (std::isfinite(expected) || none ? text_of(expected) : "a finite number") +
                      ", that of best_epoch " + std::to_string(best_epoch));
  }
}

/// Whether all elements are finite, and none is below `least`.
template <class T>
bool all_within(const FileTensor& tensor, std::int64_t count, double least) {
  for (std::int64_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, static_cast<const unsigned char*>(tensor.data) + static_cast<std::size_t>(i) * sizeof(T),
                sizeof(T));
    if (!std::isfinite(value) || static_cast<double>(value) < least) return false;
  }
  return true;
}

/// The arrays by the names of their tensors.
std::vector<std::pair<const char*, void*>> named(const CheckpointArrays& arrays) {
  std::vector<std::pair<const char*, void*>> all = {{"parameters", arrays.parameters},
                                                    {"best_parameters", arrays.best},
                                                    {"first_moment", arrays.first_moment},
                                                    {"second_moment", arrays.second_moment}};
  if (arrays.average != nullptr) all.emplace_back("average", arrays.average);
  return all;
}

/// The named array; second moments, which are means of squares, are 0 or more.
const FileTensor& checked_array(const std::string& path, const TensorFile& file, const char* name, DType dtype,
                                std::int64_t count) {
  const FileTensor& tensor = find(path, file, name, dtype, count);
  const bool squares = tensor.name == "second_moment";
  const double least = squares ? 0 : std::numeric_limits<double>::lowest();
  const bool good =
      dtype == DType::float32 ? all_within<float>(tensor, count, least) : all_within<double>(tensor, count, least);
  if (good) return tensor;
  damaged(path, "tensor " + tensor.name + " holds NaN" + (squares ? ", negative" : "") + " or infinite values");
}

}  // namespace

void save_checkpoint(const std::string& path, const CheckpointKey& key, const History& history, std::int64_t adam_steps,
                     const CheckpointArrays& arrays) {
  std::vector<double> records;
  for (const EpochRecord& r : history.epochs) {
    EpochRecord::fields([&](const char*, auto member) { records.push_back(static_cast<double>(r.*member)); });
  }
  const json training = {{"key", describe(key)}, {"adam_steps", adam_steps}, {"best_epoch", history.best_epoch}};
  const DType dtype = key.spec.dtype;
  const std::vector<std::int64_t> flat = {arrays.count};
  const auto epochs = static_cast<std::int64_t>(history.epochs.size());
  std::vector<FileTensor> tensors = {{"history", DType::float64, {epochs, kRecordFields}, records.data()},
                                     {"best_loss", DType::float64, {1}, &history.best_loss}};
  for (const auto& [name, values] : named(arrays)) tensors.push_back({name, dtype, flat, values});
  write_tensor_file(path, {{kTrainingKey, training.dump()}}, tensors);
}

void load_checkpoint(const std::string& path, const CheckpointKey& key, History& history, std::int64_t& adam_steps,
                     const CheckpointArrays& arrays) {
  const TensorFile file = read_tensor_file(path);
  const json training = training_of(path, file);
  check_key(path, training["key"], describe(key));

  const std::vector<EpochRecord> epochs = records_of(path, file);
  double best_loss = 0;
  std::memcpy(&best_loss, find(path, file, "best_loss", DType::float64, 1).data, sizeof best_loss);
  const std::int64_t best_epoch = training["best_epoch"];
  const bool validated = key.validation_rows > 0 || key.options.validation_fraction > 0;
  check_records(path, epochs, key.options, validated);
  check_progress(path, epochs, key, validated, best_epoch, best_loss, training["adam_steps"]);

  // Everything is checked before anything of the run is touched.
  const DType dtype = key.spec.dtype;
  const auto targets = named(arrays);
  for (const auto& [name, target] : targets) checked_array(path, file, name, dtype, arrays.count);
  for (const auto& [name, target] : targets) {
    const FileTensor& tensor = find(path, file, name, dtype, arrays.count);
    std::memcpy(target, tensor.data, static_cast<std::size_t>(arrays.count * size_of(dtype)));
  }
  history.epochs = epochs;
  history.best_loss = best_loss;
  history.best_epoch = best_epoch;
  adam_steps = training["adam_steps"];

  const auto done = static_cast<std::int64_t>(history.epochs.size());
  const FitOptions& options = key.options;
  history.stop_reason.clear();
  if (options.patience > 0 && done - history.best_epoch >= options.patience) history.stop_reason = "patience";
  if (done >= options.epochs) history.stop_reason = "epochs";
}

}  // namespace nvpflow
