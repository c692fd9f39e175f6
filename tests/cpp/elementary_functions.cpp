// Built once per instruction set, with the flags of its kernels and NVPFLOW_ISA_NAME set to its name.

#include "elementary_functions.hpp"

#include <cstdint>

#include "cpu/elementary.hpp"
#include "cpu/simd.hpp"

namespace nvpflow_test {
namespace {

namespace cpu = nvpflow::cpu;

template <class T>
cpu::Vec<T> vector_of(Function function, cpu::Vec<T> x) {
  switch (function) {
    case Function::exp:
      return cpu::exp<T>(x);
    case Function::exp_within_one:
      return cpu::exp_within_one<T>(x);
    case Function::tanh:
      return cpu::tanh<T>(x);
    case Function::sigmoid:
      return cpu::sigmoid<T>(x);
    case Function::softplus:
      return cpu::softplus<T>(x);
    case Function::gelu:
      return cpu::gelu<T>(x);
    case Function::silu:
      return cpu::silu<T>(x);
    case Function::elu:
      return cpu::elu<T>(x);
    case Function::log:
      return cpu::log<T>(x);
    case Function::atan:
      return cpu::atan<T>(x);
    case Function::sin_quarter:
      return cpu::sin_quarter<T>(x);
    case Function::cos_quarter:
      return cpu::cos_quarter<T>(x);
  }
  return x;
}

template <class T>
void evaluate(Function function, const T* in, T* out, int64_t count) {
  for (int64_t i = 0; i < count; i += cpu::kLanes<T>) {
    cpu::store_upto<T>(out + i, vector_of<T>(function, cpu::load_upto<T>(in + i, count - i)), count - i);
  }
}

}  // namespace

#define NVPFLOW_JOIN_(a, b) a##b
#define NVPFLOW_JOIN(a, b) NVPFLOW_JOIN_(a, b)
#define NVPFLOW_TEXT_(a) #a
#define NVPFLOW_TEXT(a) NVPFLOW_TEXT_(a)

extern const ElementaryFunctions NVPFLOW_JOIN(elementary_, NVPFLOW_ISA_NAME);
const ElementaryFunctions NVPFLOW_JOIN(elementary_, NVPFLOW_ISA_NAME) = {NVPFLOW_TEXT(NVPFLOW_ISA_NAME),
                                                                         evaluate<float>, evaluate<double>};

}  // namespace nvpflow_test
