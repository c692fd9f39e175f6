// KERNEL: what of a linear layer does not depend on the rows: the matrix W = L U and its inverse from the factors, and
// the gradients of the factors from that of W. In float64 for flows of either type; the formulas are those of
// cpp/src/cpu/lu_matrix.cpp.
//
// form_matrices, add_factor_gradients: an element is one sum of up to D products, a thread each; neighbours read
// neighbours, or the same number. D^3 / 3 and 2 D^3 / 3 multiply-adds, two reads from the L1 or L2 cache for each:
// bound by those, microseconds to a few hundred features, some tenths of a second for 4,096. form_inverses: a block
// takes kPanel columns of V^T through U^T L^T V^T = I, an unknown at a time: 2 D steps with a barrier each, of kPanel D
// / kThreads multiply-adds. Bound by the barriers' latency up to D of about a thousand.

#include <algorithm>

#include "../cpp/src/lu_index.hpp"
#include "elementary.cuh"

namespace nvpflow::cuda {
namespace {

constexpr int kPanel = 8;
constexpr std::int64_t kMostPanels = 256;  // that have a workspace of their own

/// A layer's factors, from their copies.
template <class T>
struct Triangles {
  const T* copies;
  FactorCopies at;
  std::int64_t features;

  NVPFLOW_DEVICE Triangles(const Program<T>& program, const Layer<T>& layer, const T* packed)
      : copies(packed + layer.copies), at(program.input_size), features(program.input_size) {}
  /// i > j.
  NVPFLOW_DEVICE double lower(std::int64_t i, std::int64_t j) const {
    return static_cast<double>(copies[at.lower + lower_index(i, j)]);
  }
  /// i < j.
  NVPFLOW_DEVICE double upper(std::int64_t i, std::int64_t j) const {
    return static_cast<double>(copies[at.upper + upper_index(features, i, j)]);
  }
  /// Of U.
  NVPFLOW_DEVICE double diagonal(std::int64_t i) const {
    return static_cast<double>(copies[at.sign + i]) * exponential(static_cast<double>(copies[at.log_diagonal + i]));
  }
};

template <class T>
NVPFLOW_DEVICE const Layer<T>& linear_layer(const Program<T>& program, std::int64_t number) {
  const Layer<T>* layer = program.layers;
  for (;; ++layer) {
    if (facts_of(layer->kind).has_matrices && number-- == 0) return *layer;
  }
}

/// Where a matrix goes.
template <class T>
struct Target {
  T *packed, *transposed;  // transposed: null where it is not wanted

  /// The weight from input i to output o.
  NVPFLOW_DEVICE void put(const Dense& d, std::int64_t i, std::int64_t o, double value) const {
    packed[d.weights + weight_index(i, o, d.in)] = static_cast<T>(value);
    if (transposed != nullptr) transposed[d.transposed + weight_index(o, i, d.out)] = static_cast<T>(value);
  }
};

NVPFLOW_DEVICE bool is_formed(Matrices wanted, bool layer_inverse, bool matrix_inverse) {
  return wanted == Matrices::both || layer_inverse == matrix_inverse;
}

template <class T>
NVPFLOW_KERNEL(kThreads)
form_matrices(NVPFLOW_ARGUMENT Program<T> program, const Matrices wanted, const T* packed,
              NVPFLOW_ARGUMENT Target<T> to) {
  const std::int64_t features = program.input_size, size = features * features;
  for (std::int64_t e = first_element(); e < program.num_linear * size; e += element_step()) {
    const Layer<T>& layer = linear_layer(program, e / size);
    if (!is_formed(wanted, layer.inverse, false)) continue;
    const Triangles<T> of(program, layer, packed);
    const std::int64_t j = e % size / features, i = e % features;  // from feature i of x to feature j of y
    double sum = 0;
    for (std::int64_t k = 0; k < (i < j ? i : j); ++k) sum = sum + of.upper(k, i) * of.lower(j, k);
    const double last = i < j ? of.diagonal(i) * of.lower(j, i) : i == j ? of.diagonal(i) : of.upper(j, i);
    to.put(program.dense[layer.first_dense], i, j, sum + last);
  }
}

/// workspace: for each block the diagonal of U [D], then the panel [D][kPanel].
template <class T>
NVPFLOW_KERNEL(kThreads)
form_inverses(NVPFLOW_ARGUMENT Program<T> program, const Matrices wanted, const T* packed,
              NVPFLOW_ARGUMENT Target<T> to, double* workspace) {
  const std::int64_t features = program.input_size, panels = ceil_div(features, kPanel);
  double* diagonal = workspace + block_index() * (1 + kPanel) * features;
  double* panel = diagonal + features;
  const int column = thread_index() % kPanel, first_row = thread_index() / kPanel, rows = num_threads() / kPanel;
  for (std::int64_t task = block_index(); task < program.num_linear * panels; task += num_blocks()) {
    const Layer<T>& layer = linear_layer(program, task / panels);
    if (!is_formed(wanted, layer.inverse, true)) continue;
    const Triangles<T> of(program, layer, packed);
    const std::int64_t first = task % panels * kPanel, own = first + column;
    block_barrier();  // no thread reads the last panel any more
    for (std::int64_t i = thread_index(); i < features; i += num_threads()) diagonal[i] = of.diagonal(i);
    for (std::int64_t i = first_row; i < features; i += rows) panel[i * kPanel + column] = i == own ? 1 : 0;
    for (std::int64_t k = first; k < features; ++k) {  // U^T
      block_barrier();
      const double known = panel[k * kPanel + column] / diagonal[k];
      for (std::int64_t i = k + 1 + first_row; i < features; i += rows) {
        panel[i * kPanel + column] -= of.upper(k, i) * known;
      }
    }
    block_barrier();
    for (std::int64_t i = first_row; i < features; i += rows) panel[i * kPanel + column] /= diagonal[i];
    for (std::int64_t k = features - 1; k > 0; --k) {  // L^T
      block_barrier();
      const double known = panel[k * kPanel + column];
      for (std::int64_t i = first_row; i < k; i += rows) panel[i * kPanel + column] -= of.lower(k, i) * known;
    }
    block_barrier();
    if (own >= features) continue;
    for (std::int64_t i = first_row; i < features; i += rows) {
      to.put(program.dense[layer.first_dense + 1], i, own, panel[i * kPanel + column]);
    }
  }
}

/// With G the gradient of W: of U's elements the triangle of L^T G, of L's that of G U^T.
template <class T>
NVPFLOW_KERNEL(kThreads)
add_factor_gradients(NVPFLOW_ARGUMENT Program<T> program, const bool inverse, const T* products, T* gradient) {
  const std::int64_t features = program.input_size, size = features * features, elements = size + features;
  for (std::int64_t e = first_element(); e < program.num_linear * elements; e += element_step()) {
    const Layer<T>& layer = linear_layer(program, e / elements);
    const Triangles<T> of(program, layer, program.packed);
    const T* matrix = products + layer.products;  // [x][y]
    const double sign = inverse != layer.inverse ? -1 : 1;
    const auto add = [&](std::int64_t at, double value) {
      gradient[at] = static_cast<T>(static_cast<double>(gradient[at]) + value);
    };
    const std::int64_t within = e % elements, j = within / features, i = within % features;
    if (within >= size) {
      add(layer.factors.bias + i, sign * static_cast<double>(matrix[size + i]));
    } else if (i <= j) {  // U[i][j]
      double sum = static_cast<double>(matrix[j * features + i]);
      for (std::int64_t k = i + 1; k < features; ++k) {
        sum = sum + of.lower(k, i) * static_cast<double>(matrix[j * features + k]);
      }
      if (i < j) {
        add(layer.factors.upper + upper_index(features, i, j), sign * sum);
      } else {
        add(layer.factors.log_diagonal + i,
            sign * (sum * of.diagonal(i) + static_cast<double>(matrix[size + features])));
      }
    } else {  // L[i][j]
      double sum = of.diagonal(j) * static_cast<double>(matrix[j * features + i]);
      for (std::int64_t k = j + 1; k < features; ++k) {
        sum = sum + of.upper(j, k) * static_cast<double>(matrix[k * features + i]);
      }
      add(layer.factors.lower + lower_index(i, j), sign * sum);
    }
  }
}

template <class T>
std::int64_t inverse_blocks(const Program<T>& program) {
  return std::min(kMostPanels, program.num_linear * ceil_div(program.input_size, kPanel));
}

}  // namespace

template <class T>
std::int64_t linear_workspace_bytes(const Program<T>& program) {
  return inverse_blocks(program) * (1 + kPanel) * program.input_size * static_cast<std::int64_t>(sizeof(double));
}

template <class T>
Status launch_pack_linear(const Program<T>& program, Matrices wanted, T* packed, T* transposed, void* workspace,
                          Stream stream) {
  if (program.num_linear == 0) return 0;
  const Target<T> to{packed, transposed};
  const T* from = packed;
  const std::int64_t size = std::int64_t{program.input_size} * program.input_size;
  if (const Status s = launch(form_matrices<T>, element_blocks(program.num_linear * size), kThreads, 0, stream, program,
                              wanted, from, to)) {
    return s;
  }
  return launch(form_inverses<T>, inverse_blocks(program), kThreads, 0, stream, program, wanted, from, to,
                static_cast<double*>(workspace));
}

template <class T>
Status launch_linear_gradient(const Program<T>& program, bool inverse, const T* products, T* gradient, Stream stream) {
  const std::int64_t features = program.input_size;
  return launch(add_factor_gradients<T>, element_blocks(program.num_linear * (features + 1) * features), kThreads, 0,
                stream, program, inverse, products, gradient);
}

#define NVPFLOW_INSTANTIATE(T)                                                            \
  template std::int64_t linear_workspace_bytes(const Program<T>&);                        \
  template Status launch_pack_linear(const Program<T>&, Matrices, T*, T*, void*, Stream); \
  template Status launch_linear_gradient(const Program<T>&, bool, const T*, T*, Stream);
NVPFLOW_INSTANTIATE(float)
NVPFLOW_INSTANTIATE(double)
#undef NVPFLOW_INSTANTIATE

}  // namespace nvpflow::cuda
