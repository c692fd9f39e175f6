// Fuzz target: everything that reads a file from somebody else. Any bytes load or are refused with the right error, in
// memory that the file's size bounds, and what loads saves and loads the same.
//
// The mutator takes a container apart (length, header, description, data), changes one part, and puts it together
// again, so that most inputs get past the checks of the parts it did not change.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec_json.hpp>

#include "allocations.hpp"
#include "checkpoint.hpp"
#include "fuzz.hpp"
#include "io/model_file.hpp"
#include "io/safetensors.hpp"

using namespace nvpflow;

namespace {

using json = nlohmann::ordered_json;

// SECURITY.md promises these: bytes that loading takes, for each byte of the file and in all.
constexpr std::size_t kPerByte = 64;
constexpr std::size_t kInAll = std::size_t{64} << 10;
constexpr std::size_t kLongestMessage = 4096;

// ---- the file ------------------------------------------------------------------------------------------------------

/// A file in memory, and a folder in memory for what is saved.
struct Place {
  int file = memfd_create("nvpflow-fuzz", MFD_CLOEXEC);
  std::string path = "/proc/self/fd/" + std::to_string(file);
  std::string folder, saved;

  Place() {
    std::string name = "/dev/shm/nvpflow-fuzz-XXXXXX";
    require(file >= 0 && mkdtemp(name.data()) != nullptr, "a memory file and a folder in /dev/shm can be made");
    folder = name;
    saved = folder + "/saved";
  }
  ~Place() {
    ::unlink(saved.c_str());
    ::rmdir(folder.c_str());
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  void fill(const std::uint8_t* data, std::size_t size) const {
    require(ftruncate(file, 0) == 0 && pwrite(file, data, size, 0) == static_cast<ssize_t>(size),
            "the input can be written");
  }
};

/// Whether `load` accepts the file. It throws nothing else, and takes no more memory, than is promised.
template <class Load>
bool loads(std::size_t size, const char* what, Load load) {
  static const bool told = std::getenv("NVPFLOW_FUZZ_TELL") != nullptr;
  bool loaded = true;
  std::string message = "loads";
  allocations::start();
  try {
    load();
  } catch (const Error& error) {
    loaded = false;
    require(error.code() == ErrorCode::file_format || error.code() == ErrorCode::invalid_argument,
            "the error is about the file");
    require(std::strlen(error.what()) <= kLongestMessage, "the message is one that can be read");
    if (told) message = error.what();
  }
  if (allocations::peak > kPerByte * size + kInAll) {
    std::fprintf(stderr, "%s took %zu bytes for a file of %zu\n", what, allocations::peak, size);
    std::abort();
  }
  if (told) std::fprintf(stderr, "%s, %zu bytes for %zu: %s\n", what, allocations::peak, size, message.c_str());
  return loaded;
}

// ---- what is checked -----------------------------------------------------------------------------------------------

void check_same(const TensorFile& a, const TensorFile& b) {
  require(a.metadata == b.metadata && a.tensors.size() == b.tensors.size(), "metadata and tensors come back");
  for (std::size_t i = 0; i < a.tensors.size(); ++i) {
    const FileTensor &left = a.tensors[i], &right = b.tensors[i];
    require(left.name == right.name && left.dtype == right.dtype && left.shape == right.shape, "tensors come back");
    auto bytes = static_cast<std::size_t>(size_of(left.dtype));
    for (const std::int64_t extent : left.shape) bytes *= static_cast<std::size_t>(extent);
    require(bytes == 0 || std::memcmp(left.data, right.data, bytes) == 0, "elements come back");
  }
}

/// What a file is, as far as that tells which loaders could accept it.
struct Kind {
  bool container = false, checkpoint = false;
};

Kind check_container(const Place& place, std::size_t size, bool thorough) {
  TensorFile file;
  if (!loads(size, "read_tensor_file", [&] { file = read_tensor_file(place.path); })) return {};
  if (thorough) {
    write_tensor_file(place.saved, file.metadata, file.tensors);
    check_same(file, read_tensor_file(place.saved));
  }
  return {true, file.metadata.contains("nvpflow.training")};
}

void check_model(const Place& place, std::size_t size, bool container, bool thorough) {
  const bool built = loads(size, "Flow::load", [&] { (void)Flow::load(place.path); });
  require(container || !built, "a model is a container");
  if (!thorough) return;
  LoadedModel model;
  const bool loaded = loads(size, "load_model", [&] { model = load_model(place.path, nullptr); });
  require(loaded == built, "what load_model reads makes a flow");
  if (!loaded) return;
  save_model(place.saved, model.spec, ParamLayout(model.spec), model.parameters.data(), model);
  const LoadedModel again = load_model(place.saved, &model.spec);
  require(again.spec == model.spec && again.parameters == model.parameters && again.mean_low == model.mean_low,
          "a model comes back");
  require(again.column_names == model.column_names && again.context_names == model.context_names,
          "and so do its names");
  const auto limit = [](const LoadedModel& of) { return of.threshold.value_or(Threshold{}).log_prob; };
  require(again.threshold.has_value() == model.threshold.has_value() && limit(again) == limit(model),
          "and so does its threshold");
  require(again.import_report == model.import_report, "and so does its import report");
}

/// The run that a checkpoint is read for. The corpus holds one that belongs to it.
struct Run {
  static constexpr std::int64_t kCount = 10;  // parameters of the spec
  CheckpointKey key{
      FlowSpec::real_nvp(2, 1, {2}, Activation::relu, 1.0, false, DType::float32), options(), 7, 100, 10, 3};
  std::vector<float> parameters = std::vector<float>(kCount), best = parameters, first = parameters,
                     second = parameters;
  History history;
  std::int64_t steps = 0;
  PartOfEpoch begun;

  /// Each that fit's defaults have changed, or may.
  static FitOptions options() {
    FitOptions o;
    o.batch_size = 256;
    o.learning_rate = 1e-3;
    o.weight_decay = 0.0;
    o.clip_norm = 0.0;
    o.averaging = 0.0;
    return o;
  }
  CheckpointArrays arrays() { return {parameters.data(), best.data(), first.data(), second.data(), nullptr, kCount}; }
  void load(const std::string& path) { load_checkpoint(path, key, history, steps, begun, arrays()); }
  void save(const std::string& path) { save_checkpoint(path, key, history, steps, begun, arrays()); }
};

/// A number as JSON text keeps it: what is not finite has the same bits after all.
bool same(double a, double b) { return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b); }

void check_checkpoint(const Place& place, std::size_t size, Kind kind, bool thorough) {
  Run run;
  const bool loaded = loads(size, "load_checkpoint", [&] { run.load(place.path); });
  require(kind.checkpoint || !loaded, "a checkpoint is a container that says so");
  if (!loaded || !thorough) return;
  run.save(place.saved);
  Run again;
  again.load(place.saved);
  require(again.steps == run.steps && again.parameters == run.parameters && again.best == run.best &&
              again.first == run.first && again.second == run.second,
          "a checkpoint's arrays come back");
  require(same(again.history.best_loss, run.history.best_loss) && again.history.best_epoch == run.history.best_epoch &&
              again.history.epochs.size() == run.history.epochs.size(),
          "a checkpoint's history comes back");
}

// ---- the mutator ---------------------------------------------------------------------------------------------------

using Random = std::minstd_rand;

std::size_t below(Random& random, std::size_t n) { return n == 0 ? 0 : random() % n; }

struct Container {
  json header;
  std::string data;
};

bool take_apart(const std::uint8_t* bytes, std::size_t size, Container& out) {
  std::uint64_t length = 0;
  if (size < sizeof length) return false;
  std::memcpy(&length, bytes, sizeof length);
  if (length > size - sizeof length) return false;
  const char* const text = reinterpret_cast<const char*>(bytes) + sizeof length;
  out.header = json::parse(text, text + length, nullptr, /*allow_exceptions=*/false);
  if (!out.header.is_object()) return false;
  out.data.assign(text + length, size - sizeof length - length);
  return true;
}

std::string put_together(const Container& in, std::int64_t lie = 0) {
  const std::string text = in.header.dump(-1, ' ', false, json::error_handler_t::replace);
  const std::uint64_t length = text.size() + static_cast<std::uint64_t>(lie);
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes + text + in.data;
}

/// Offsets that follow from the shapes, and data of that length: a header that holds together again.
void repair(Container& file, std::size_t most) {
  std::uint64_t at = 0;
  for (auto& [name, entry] : file.header.items()) {
    if (name == "__metadata__" || !entry.is_object() || !entry.contains("shape") || !entry["shape"].is_array())
      continue;
    std::uint64_t bytes = entry.contains("dtype") && entry["dtype"] == "F64" ? 8 : 4;
    for (const json& extent : entry["shape"]) {
      bytes *= extent.is_number_unsigned() ? extent.get<std::uint64_t>() : 1;
      bytes = std::min<std::uint64_t>(bytes, most);
    }
    entry["data_offsets"] = {at, at + bytes};
    at += bytes;
  }
  if (at <= most) file.data.resize(at);
}

/// Every value of the document, the document itself first.
void collect(json& at, std::vector<json*>& nodes) {
  nodes.push_back(&at);
  if (at.is_structured()) {
    for (json& value : at) collect(value, nodes);
  }
}

json interesting(Random& random) {
  constexpr std::int64_t kNumbers[] = {0,         1,         2,         3,         4,         7,
                                       8,         16,        -1,        1 << 20,   1LL << 31, 1LL << 32,
                                       1LL << 53, 1LL << 61, 1LL << 62, INT64_MAX, INT64_MIN};
  const json others[] = {nullptr,
                         true,
                         false,
                         1.5,
                         -0.0,
                         1e308,
                         5e-324,
                         UINT64_MAX,
                         "",
                         "F32",
                         "F64",
                         "BF16",
                         "relu",
                         "tanh",
                         "standardize",
                         "coupling",
                         "float32",
                         "1.0",
                         "1.9",
                         "2.0",
                         "float64",
                         json::array(),
                         json::object(),
                         {1, 2},
                         {{"a", 1}},
                         std::string(100, 'x'),
                         "\xc3\xbc\"\\"};
  const std::size_t numbers = std::size(kNumbers), all = numbers + std::size(others);
  const std::size_t i = below(random, all);
  return i < numbers ? json(kNumbers[i]) : others[i - numbers];
}

void change_object(json& object, Random& random) {
  const std::size_t n = object.size();
  if (n == 0 || below(random, 4) == 0) {
    object["key" + std::to_string(below(random, 3))] = interesting(random);
    return;
  }
  auto at = object.begin();
  for (std::size_t i = below(random, n); i > 0; --i) ++at;
  const std::string name = at.key();
  json value = at.value();
  if (below(random, 2) == 0) object.erase(name);
  constexpr const char* kNames[] = {"flow_0_scale.kernel",
                                    "flow_1_scale.kernel",
                                    "flow_0_coupling_dense_0.kernel",
                                    "__metadata__",
                                    "nvpflow.spec",
                                    "nvpflow.training",
                                    "shape",
                                    "kind",
                                    ""};
  const std::size_t i = below(random, std::size(kNames) + 2);
  object[i < std::size(kNames) ? kNames[i] : name + "'"] = std::move(value);
}

void change_array(json& array, Random& random) {
  const std::size_t n = array.size();
  const std::size_t i = below(random, n);
  switch (below(random, 5)) {
    case 0:
      array.push_back(n > 0 ? array[i] : interesting(random));
      break;
    case 1:
      if (n > 0) array.erase(i);
      break;
    case 2:
      if (n > 1) std::swap(array[i], array[below(random, n)]);
      break;
    case 3: {  // many of a kind
      const json value = n > 0 ? json(array[i]) : interesting(random);
      for (std::size_t k = std::size_t{1} << below(random, 9); k > 0; --k) array.push_back(value);
      break;
    }
    default:
      array.push_back(interesting(random));
  }
}

void change_value(json& value, Random& random) {
  const std::size_t way = below(random, 4);
  if (way == 0 || value.is_null() || value.is_boolean()) {
    value = interesting(random);
  } else if (value.is_object()) {
    change_object(value, random);
  } else if (value.is_array()) {
    change_array(value, random);
  } else if (value.is_number_integer()) {
    const std::int64_t delta = static_cast<std::int64_t>(below(random, 9)) - 4;
    value = static_cast<std::int64_t>(value.get<std::uint64_t>() + static_cast<std::uint64_t>(delta));
  } else if (value.is_number()) {
    value = value.get<double>() * (below(random, 2) == 0 ? -1.0 : 1e200);
  } else {
    auto text = value.get<std::string>();
    text.resize(text.size() + 16);
    const std::size_t size = text.size() - 16;
    text.resize(fuzz_mutate(reinterpret_cast<std::uint8_t*>(text.data()), size, text.size()));
    value = std::move(text);
  }
}

/// One of the document's values, changed; texts that are JSON themselves are gone into.
void change_document(json& document, Random& random) {
  std::vector<json*> nodes;
  collect(document, nodes);
  json& chosen = *nodes[below(random, nodes.size())];
  if (chosen.is_string()) {
    const auto& text = chosen.get_ref<const std::string&>();
    json inner = text.starts_with('{') ? json::parse(text, nullptr, /*allow_exceptions=*/false) : json();
    if (inner.is_object() && below(random, 8) != 0) {
      change_document(inner, random);
      chosen = inner.dump(-1, ' ', false, json::error_handler_t::replace);
      return;
    }
  }
  if (below(random, 6) == 0) {
    const json copy = *nodes[below(random, nodes.size())];
    chosen = copy;
  } else {
    change_value(chosen, random);
  }
}

/// A key of the header's text once more: what a document cannot hold.
std::string repeat_text(const Container& file, Random& random) {
  std::string bytes = put_together(file);
  const std::size_t end = bytes.size() - file.data.size();
  const std::size_t a = 8 + below(random, end - 8), b = a + 1 + below(random, std::min<std::size_t>(end - a, 200));
  const std::string piece = bytes.substr(a, std::min(b, end) - a);
  bytes.insert(below(random, 2) == 0 ? std::min(b, end) : a, piece);
  const std::uint64_t length = end - 8 + piece.size();
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes;
}

/// A model that is right, small, and new.
std::string some_model(Random& random) {
  std::vector<std::int64_t> hidden(below(random, 3));
  for (std::int64_t& size : hidden) size = 1 + static_cast<std::int64_t>(below(random, 6));
  const DType dtype = below(random, 2) == 0 ? DType::float32 : DType::float64;
  const auto spec = FlowSpec::real_nvp(2 + static_cast<std::int64_t>(below(random, 5)),
                                       1 + static_cast<std::int64_t>(below(random, 3)), hidden,
                                       static_cast<Activation>(below(random, 8)), 1.0, below(random, 2) == 0, dtype);
  Container file;
  if (below(random, 4) != 0) {
    file.header["__metadata__"] = {{"nvpflow.format_version", "1.0"},
                                   {"nvpflow.dtype", std::string(name_of(dtype))},
                                   {"nvpflow.spec", to_json(spec)}};
  }
  const ParamLayout layout(spec);
  for (const TensorInfo& tensor : layout.tensors()) {
    file.header[tensor.name] = {{"dtype", dtype == DType::float32 ? "F32" : "F64"}, {"shape", tensor.shape}};
  }
  repair(file, std::size_t{1} << 20);
  return put_together(file);
}

void change_data(std::string& data, Random& random) {
  const std::size_t size = data.size();
  switch (below(random, 3)) {
    case 0: {
      const float values[] = {NAN, INFINITY, -0.0f, 1e38f, 1e-42f, 3.0f};
      if (size >= 4) std::memcpy(&data[below(random, size / 4) * 4], &values[below(random, 6)], 4);
      break;
    }
    case 1:
      data.resize(size + below(random, 17) - std::min<std::size_t>(size, 8));
      break;
    default:
      data.resize(size + 16);
      data.resize(fuzz_mutate(reinterpret_cast<std::uint8_t*>(data.data()), size, size + 16));
  }
}

/// `whole`: whether the text is that of `file`, no more and no less.
std::string changed(Container& file, Random& random, std::size_t most, bool& whole) {
  for (std::size_t changes = 1 + below(random, 3); changes > 0; --changes) {
    if (below(random, 5) == 0) {
      change_data(file.data, random);
    } else {
      change_document(file.header, random);
    }
  }
  whole = false;
  if (!file.header.is_object()) return put_together(file);
  if (below(random, 2) == 0) repair(file, most);
  if (below(random, 12) == 0) return repeat_text(file, random);
  if (below(random, 20) == 0) return put_together(file, static_cast<std::int64_t>(below(random, 64)) - 32);
  whole = true;
  return put_together(file);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Place place;
  place.fill(data, size);
  // All loaders begin by reading the container, and saving takes many times as long as loading. So what cannot be a
  // model or a checkpoint is offered as one, and what loads is saved, for one input in 64, chosen by its bytes, and for
  // all when a corpus is replayed.
  const bool thorough = kReplay || hash_of(data, size) % 64 == 0;
  const Kind kind = check_container(place, size, thorough);
  if (kind.container || thorough) check_model(place, size, kind.container, thorough);
  if (kind.checkpoint || thorough) check_checkpoint(place, size, kind, thorough);
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  Random random(seed);
  random.discard(4);
  // libFuzzer changes an input several times in a row: what was put together last is mostly what comes next.
  static Container file;
  static std::string bytes;
  static bool whole = false;
  const bool known = whole && bytes.size() == size && std::memcmp(bytes.data(), data, size) == 0;
  whole = false;
  if (below(random, 50) == 0) {
    bytes = some_model(random);
  } else if (below(random, 20) == 0 || (!known && !take_apart(data, size, file))) {
    return fuzz_mutate(data, size, most);
  } else {
    bytes = changed(file, random, most, whole);
  }
  if (bytes.size() > most) return fuzz_mutate(data, size, most);
  std::memcpy(data, bytes.data(), bytes.size());
  return bytes.size();
}
