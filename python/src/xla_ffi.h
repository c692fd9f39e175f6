// What a handler on the host sees of XLA's foreign-function interface (https://openxla.org/xla/custom_call). Declared
// here from its description, because the layout is the interface: building needs no JAX. Versions 0.1 (jaxlib 0.5) to
// 0.3 (jaxlib 0.10) agree in all of it; a minor version adds fields at the ends of structures, a major one may change
// anything. tests/python/test_jax.py holds every offset and number against the header of the installed jaxlib.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nvpflow::python::xla {

inline constexpr int kMajor = 0, kOldestMinor = 1, kNewestMinor = 3;

struct Error;
struct Context;
struct Future;
struct Internal;

enum class ExtensionType : std::uint32_t { metadata = 1 };
enum class DataType : std::uint32_t { f32 = 11, f64 = 12, s64 = 5 };
enum class ArgumentType : std::uint32_t { buffer = 1 };
enum class ResultType : std::uint32_t { buffer = 1 };
enum class AttributeType : std::uint32_t { scalar = 3, string = 4 };
enum class Stage : std::uint32_t { execute = 3 };
enum class ErrorCode : std::uint32_t { invalid_argument = 3, resource_exhausted = 8, internal = 13 };

struct Extension {
  std::size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct ApiVersion {
  std::size_t struct_size;
  Extension* extension_start;
  int major_version;
  int minor_version;
};

struct ErrorCreateArgs {
  std::size_t struct_size;
  Extension* extension_start;
  const char* message;
  ErrorCode errc;
};

/// The functions of XLA; more of them follow.
struct Api {
  std::size_t struct_size;
  Extension* extension_start;
  ApiVersion api_version;
  const Internal* internal_api;
  Error* (*error_create)(ErrorCreateArgs*);
};

/// Dense and row-major.
struct Buffer {
  std::size_t struct_size;
  Extension* extension_start;
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

struct ByteSpan {
  const char* ptr;
  std::size_t len;
};

struct Scalar {
  DataType dtype;
  void* value;
};

struct Arguments {
  std::size_t struct_size;
  Extension* extension_start;
  std::int64_t size;
  ArgumentType* types;
  void** args;
};

struct Results {
  std::size_t struct_size;
  Extension* extension_start;
  std::int64_t size;
  ResultType* types;
  void** rets;
};

struct Attributes {
  std::size_t struct_size;
  Extension* extension_start;
  std::int64_t size;
  AttributeType* types;
  ByteSpan** names;
  void** attrs;
};

struct CallFrame {
  std::size_t struct_size;
  Extension* extension_start;
  const Api* api;
  Context* ctx;
  Stage stage;
  Arguments args;
  Results rets;
  Attributes attrs;
  Future* future;  // set by handlers that return before their work is done
};

struct Metadata {
  std::size_t struct_size;
  ApiVersion api_version;
  std::uint32_t traits;
};

struct MetadataExtension {
  Extension extension_base;
  Metadata* metadata;
};

/// Null: it went well; else an error that XLA takes over.
using Handler = Error*(CallFrame*);

}  // namespace nvpflow::python::xla
