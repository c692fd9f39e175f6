/// @file
/// The one exception type of nvpflow and the codes it carries.
#pragma once

#include <stdexcept>
#include <string>

#include <nvpflow/export.h>

namespace nvpflow {

/// The kinds of failure that an Error reports.
enum class ErrorCode {
  invalid_argument,  ///< a value or a size is not acceptable
  type_mismatch,     ///< the dtype of an array is not the model's
  out_of_memory,     ///< the message states the size that was asked for
  io,                ///< the operating system refused; Error::system_error() holds errno
  file_format,       ///< a model file is damaged, foreign or newer than this library
  not_finite,        ///< training met a NaN or infinite loss or gradient
  unavailable,       ///< the instruction set that was asked for is not here
  device,            ///< CUDA cannot be used here, or a CUDA device failed
  none_kept,         ///< training had no epoch inside FitOptions::max_round_trip
};

/// Thrown by every function of the library that can fail. The message names the argument, its value and the
/// expected value.
class NVPFLOW_API Error : public std::runtime_error {
 public:
  /// system_error: errno, for ErrorCode::io.
  Error(ErrorCode code, const std::string& message, int system_error = 0)
      : std::runtime_error(message), code_(code), system_error_(system_error) {}

  /// What kind of failure it is.
  ErrorCode code() const noexcept { return code_; }
  /// errno for ErrorCode::io, else 0.
  int system_error() const noexcept { return system_error_; }

 private:
  ErrorCode code_;
  int system_error_;
};

}  // namespace nvpflow
