// What the library knows of a kind of layer: its fields, its tensors and how it is lowered. Each kind has a file here
// that defines the three functions; std::visit calls them, so a kind that lacks one does not compile or does not link.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../lower.hpp"

namespace nvpflow::layers {

/// One field of a layer: its name in JSON, Python and messages, and where its value is. The value's type decides what
/// is valid: sizes are positive, a double is positive and finite in the flow's dtype.
struct Field {
  const char* name;
  std::variant<bool*, std::vector<std::int64_t>*, Activation*, double*> value;
};

/// Where a layer stands in its flow.
struct Site {
  std::int64_t layer = 0;     // its index
  std::int64_t coupling = 0;  // coupling layers before it
};

using TensorSink = std::function<void(TensorInfo)>;

// ---- one function of each per kind ---------------------------------------------------------------------------------

/// The one list of a kind's fields, in the order of the JSON text.
std::vector<Field> fields(Coupling& layer);
std::vector<Field> fields(Standardize& layer);

/// The layer's tensors in the order of the flat buffer, without their offsets.
void tensors(const Coupling& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink);
void tensors(const Standardize& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink);

/// Appends what the kernels do at the layer; first: its first tensor in the layout.
void lower(const Coupling& layer, const FlowSpec& spec, const TensorInfo* first, Lowered& to);
void lower(const Standardize& layer, const FlowSpec& spec, const TensorInfo* first, Lowered& to);

// ---- any kind
// --------------------------------------------------------------------------------------------------------

std::vector<Field> fields(LayerSpec& layer);
/// A layer of the kind with all fields at their defaults.
LayerSpec make_layer(LayerKind kind);
/// Every tensor of the flow in order, without offsets. Sizes of the spec's fields must be valid, their sums need not
/// be.
void each_tensor(const FlowSpec& spec, const TensorSink& sink);
/// Tensors of a coupling layer.
std::int64_t num_tensors(const Coupling& layer);
/// Tensors of the flow.
std::int64_t num_tensors(const FlowSpec& spec);

}  // namespace nvpflow::layers
