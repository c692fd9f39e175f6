// Built once per instruction set, with its flags and NVPFLOW_ISA_NAME set to its name. Includes only what emits no
// shared symbol; offers one table.

#include "kernels.hpp"
#include "adam.inl"
#include "blocks.hpp"
#include "gradient.inl"
#include "pack.inl"
#include "simd.hpp"
#include "transform.inl"

namespace nvpflow::cpu {
namespace {

template <class T>
Vec<T> elementary_vector(Function function, Vec<T> x) {
  switch (function) {
    case Function::exp:
      return exp<T>(x);
    case Function::exp_within_one:
      return exp_within_one<T>(x);
    case Function::tanh:
      return tanh<T>(x);
    case Function::sigmoid:
      return sigmoid<T>(x);
    case Function::softplus:
      return softplus<T>(x);
    case Function::gelu:
      return gelu<T>(x);
    case Function::silu:
      return silu<T>(x);
    case Function::elu:
      return elu<T>(x);
    case Function::log:
      return log<T>(x);
    case Function::sin_quarter:
      return sin_quarter<T>(x);
    case Function::cos_quarter:
      return cos_quarter<T>(x);
  }
  return x;
}

template <class T>
void elementary(Function function, const T* in, T* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    store_upto<T>(out + i, elementary_vector<T>(function, load_upto<T>(in + i, count - i)), count - i);
  }
}

template <class T>
constexpr Kernels<T> kTable = {
    kLanes<T>,
    kLanes<T> * kBlockRows,
    kLanes<T> * (kBlockRows + kCanBeWide),
    transform_scratch<T>,
    transform<T>,
    conditioner<T>,
    noise<T>,
    transpose_weights<T>,
    tape_size<T>,
    gradient_tile<T>,
    weight_gradient<T>,
    adam<T>,
    sum_of_squares<T>,
    elementary<T>,
};

}  // namespace

#define NVPFLOW_JOIN_(a, b) a##b
#define NVPFLOW_JOIN(a, b) NVPFLOW_JOIN_(a, b)
#define NVPFLOW_TEXT_(a) #a
#define NVPFLOW_TEXT(a) NVPFLOW_TEXT_(a)

extern const IsaEntry NVPFLOW_JOIN(isa_, NVPFLOW_ISA_NAME);
const IsaEntry NVPFLOW_JOIN(isa_, NVPFLOW_ISA_NAME) = {NVPFLOW_TEXT(NVPFLOW_ISA_NAME), &kTable<float>, &kTable<double>};

}  // namespace nvpflow::cpu
