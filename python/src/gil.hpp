// Letting other Python threads run, also while the interpreter ends.
#pragma once

#include <Python.h>

#include <cstddef>

namespace nvpflow::python {

bool is_finalizing();
/// Never returns once the interpreter is ending. Not for the thread that ends it.
void park_if_finalizing();

/// Lets other Python threads run. When the interpreter has ended meanwhile, this thread, a daemon's, stops here for
/// good: taking the GIL would end it in the middle of C++ code, as Python before 3.14 does.
class GilReleased {
 public:
  GilReleased() : ends_it_(is_finalizing()), state_(PyEval_SaveThread()) {}
  ~GilReleased();
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  bool ends_it_;  // the thread that has the GIL while the interpreter ends is the one that ends it
  PyThreadState* state_;
};

/// Calls f, without the GIL where it passes over more bytes than some microseconds allow.
template <class F>
void run_released_over(std::size_t bytes, F&& f) {
  constexpr std::size_t kLong = 1 << 17;
  if (bytes < kLong) return f();
  const GilReleased released;
  f();
}

}  // namespace nvpflow::python
