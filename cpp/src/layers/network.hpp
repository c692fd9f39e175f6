// The networks of couplings: what Network says, in tensors and lowered.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../lower.hpp"
#include "layer.hpp"

namespace nvpflow::layers {

/// Outputs of a network that become one raw number for each transformed feature.
struct NetworkHead {
  const char* name;
  std::int64_t columns;
};

/// How a network's tensors are named: prefix + network + "dense_0.kernel", prefix + head.name + ".kernel".
struct NetworkNames {
  std::string prefix;   // "flow_0_"
  std::string network;  // "coupling_"; residual: ""
  std::vector<NetworkHead> heads;
};

void check(const Network& network, const FlowSpec& spec, const std::string& prefix);
/// inputs: conditioning features; the context follows them.
void tensors(const Network& network, const FlowSpec& spec, std::int64_t inputs, const NetworkNames& names,
             const Site& site, const TensorSink& sink);
/// Tensors without those of the heads.
std::int64_t num_tensors(const Network& network);
/// heads: columns of each. next: the network's first tensor in the layout; moves on behind its last.
LoweredNetwork lower(const Network& network, std::int64_t inputs, std::int64_t context_size,
                     const std::vector<std::int64_t>& heads, const TensorInfo*& next);

}  // namespace nvpflow::layers
