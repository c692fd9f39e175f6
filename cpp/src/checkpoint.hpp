// Checkpoints of fit(): a checkpoint_file.hpp with its options and its history.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <nvpflow/train.hpp>

#include "checkpoint_file.hpp"

namespace nvpflow {

/// A run continues from a checkpoint only if they share all of this.
struct CheckpointKey {
  FlowSpec spec;
  FitOptions options;  // threads and checkpoint do not count
  std::uint64_t data = 0;
  std::uint64_t contexts;  // of the contexts of both; 0 where the flow has none
  std::uint64_t weights;   // of those of both; 0 where there are none
  std::int64_t rows = 0;
  std::int64_t validation_rows = 0;
  std::int64_t steps_per_epoch = 1;
};

/// Steps of an epoch that was not finished, and their sum of log p.
struct PartOfEpoch {
  std::int64_t steps = 0;
  double sum_log_prob = 0;
};

void save_checkpoint(const std::string& path, const CheckpointKey& key, const History& history, std::int64_t adam_steps,
                     const PartOfEpoch& begun, const CheckpointArrays& arrays);

/// Throws Error(invalid_argument) where the checkpoint belongs to another model, data set or set of options, naming
/// the difference, and Error(file_format) where it is damaged. History::best_loss comes in as that of the flow as
/// training starts from it, infinite where that is no candidate. History::stop_reason comes back as the run's own end,
/// or empty.
void load_checkpoint(const std::string& path, const CheckpointKey& key, History& history, std::int64_t& adam_steps,
                     PartOfEpoch& begun, const CheckpointArrays& arrays);

}  // namespace nvpflow
