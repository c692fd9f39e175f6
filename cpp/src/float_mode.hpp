// The floating-point mode in which everything is computed, whatever mode the calling thread is in: round to nearest,
// subnormal numbers kept, no traps. Other libraries change their thread's mode (torch.set_flush_denormal, fesetround),
// and threads that started before or after it are in another one: a row's bits would depend on its thread.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace nvpflow {

/// Puts this thread into the mode for its own lifetime, and back into the mode it was in. If the thread is in the mode
/// already, as nearly all are, that costs the reading of a register and a comparison.
class FloatMode {
 public:
  FloatMode() : before_(read()) {
    if (differs()) [[unlikely]]
      write(kMode);
  }
  ~FloatMode() {
    if (differs()) [[unlikely]]
      write(before_);
  }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__x86_64__) || defined(__i386__)
  // MXCSR: all exceptions masked. The lowest six bits record exceptions; they set no mode.
  using Word = std::uint32_t;
  static constexpr Word kMode = 0x1f80, kBits = 0xffc0;
  static Word read() { return _mm_getcsr(); }
  static void write(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = std::uint64_t;  // FPCR
  static constexpr Word kMode = 0, kBits = ~Word{0};
  static Word read() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void write(Word word) { asm volatile("msr fpcr, %0" : : "r"(word) : "memory"); }
#else
  using Word = int;  // C++ gives access only to the rounding
  static constexpr Word kMode = FE_TONEAREST, kBits = ~0;
  static Word read() { return std::fegetround(); }
  static void write(Word word) { std::fesetround(word); }
#endif

  bool differs() const { return (before_ & kBits) != (kMode & kBits); }

  const Word before_;
};

}  // namespace nvpflow
