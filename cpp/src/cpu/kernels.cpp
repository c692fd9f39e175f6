// Built once per instruction set, with its flags and NVPFLOW_ISA_NAME set to its name. Includes only what emits no
// shared symbol; offers one table.

#include "kernels.hpp"
#include "adam.inl"
#include "blocks.hpp"
#include "gradient.inl"
#include "grid.inl"
#include "pack.inl"
#include "simd.hpp"
#include "transform.inl"

namespace nvpflow::cpu {
namespace {

template <class T>
constexpr Kernels<T> kTable = {
    kLanes<T>,
    kLanes<T> * kBlockRows,
    kLanes<T> * (kBlockRows + kCanBeWide),
    transform_scratch<T>,
    transform<T>,
    conditioner<T>,
    fold<T>,
    noise<T>,
    transpose_weights<T>,
    layer_tape<T>,
    tape_size<T>,
    gradient_tile<T>,
    gradient_parts<T>,
    gradient_part<T>,
    base_part<T>,
    weight_gradient<T>,
    adam<T>,
    add_to_grid<T>,
    sum_of_squares<T>,
};

}  // namespace

#define NVPFLOW_JOIN_(a, b) a##b
#define NVPFLOW_JOIN(a, b) NVPFLOW_JOIN_(a, b)
#define NVPFLOW_TEXT_(a) #a
#define NVPFLOW_TEXT(a) NVPFLOW_TEXT_(a)

extern const IsaEntry NVPFLOW_JOIN(isa_, NVPFLOW_ISA_NAME);
const IsaEntry NVPFLOW_JOIN(isa_, NVPFLOW_ISA_NAME) = {NVPFLOW_TEXT(NVPFLOW_ISA_NAME), &kTable<float>, &kTable<double>};

}  // namespace nvpflow::cpu
