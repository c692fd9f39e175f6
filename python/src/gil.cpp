#include "gil.hpp"

#include <chrono>
#include <thread>
#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

namespace nvpflow::python {

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

void park_if_finalizing() {
  if (!is_finalizing()) return;
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

GilReleased::~GilReleased() {
  if (!ends_it_) park_if_finalizing();
#ifdef __GLIBCXX__
  // Python may still begin to end while this thread waits for the GIL; its pthread_exit unwinds the stack as an
  // exception of this kind, which must not leave a destructor.
  try {
    PyEval_RestoreThread(state_);
  } catch (abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  PyEval_RestoreThread(state_);
#endif
}

}  // namespace nvpflow::python
