// The switch of tests/tools/mutate.py: whether a mutant is on. One file, mapped into every process of a run, says which
// one that is and takes notes of those that a program came past.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

namespace mutation {

constexpr int kMost = 1 << 16;

inline volatile unsigned char* reached() {
  static volatile unsigned char* const notes = [] {
    static unsigned char none[kMost];
    const char* path = std::getenv("NVPFLOW_MUTANTS_REACHED");
    const int file = path == nullptr ? -1 : ::open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return none;
    void* const memory = ::mmap(nullptr, kMost, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    ::close(file);
    return memory == MAP_FAILED ? none : static_cast<unsigned char*>(memory);
  }();
  return notes;
}

inline int active() {
  static const int number = [] {
    const char* text = std::getenv("NVPFLOW_MUTANT");
    return text == nullptr ? -1 : std::atoi(text);
  }();
  return number;
}

}  // namespace mutation

inline bool mutant(int number) {
  mutation::reached()[number] = 1;
  return number == mutation::active();
}
