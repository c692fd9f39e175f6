#include "lu_matrix.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../lower.hpp"
#include "../lu_index.hpp"
#include "../parallel.hpp"
#include "kernels.hpp"
#include "round_up.hpp"

namespace nvpflow::cpu {
namespace {

/// Columns that are worked on at a time: their sums stay in registers, and what lies beside them in the cache.
constexpr std::int64_t kPanel = 8;
/// Multiply-adds that are worth a thread.
constexpr std::int64_t kThreadSize = 1 << 20;

/// A row of a panel [D][kPanel].
struct PanelRow {
  double columns[kPanel];
};

/// The sum of a[k] panel[k] for k in [begin, end), in order.
PanelRow product(const double* a, const PanelRow* panel, std::int64_t begin, std::int64_t end) {
  typedef double Two __attribute__((vector_size(16)));  // what every processor has; the compiler finds no vectors here
  constexpr int kTwos = kPanel / 2;
  Two sum[kTwos] = {};
  for (std::int64_t k = begin; k < end; ++k) {
    for (int c = 0; c < kTwos; ++c) {
      Two columns;
      std::memcpy(&columns, panel[k].columns + 2 * c, sizeof columns);
      sum[c] += a[k] * columns;
    }
  }
  PanelRow row;
  std::memcpy(row.columns, sum, sizeof sum);
  return row;
}

/// f(first column, columns, panel) for every panel of a D x D matrix, shared out among threads. The panel is zero.
template <class F>
void each_panel(std::int64_t features, int threads, F&& f) {
  const std::int64_t grain = std::max<std::int64_t>(1, kThreadSize / (features * features * kPanel));
  parallel_for((features + kPanel - 1) / kPanel, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    std::vector<PanelRow> panel(static_cast<std::size_t>(features));
    for (std::int64_t i = begin; i < end; ++i) {
      std::fill(panel.begin(), panel.end(), PanelRow{});
      f(i * kPanel, std::min(kPanel, features - i * kPanel), panel.data());
    }
  });
}

/// A triangular factor as a square matrix, row-major.
class Square {
 public:
  explicit Square(std::int64_t features)
      : features_(features), values_(static_cast<std::size_t>(features * features)) {}
  double* row(std::int64_t i) { return values_.data() + i * features_; }
  const double* row(std::int64_t i) const { return values_.data() + i * features_; }

 private:
  std::int64_t features_;
  std::vector<double> values_;
};

template <class T>
Square upper_of(const Linear<T>& linear, bool transposed) {
  const std::int64_t features = linear.forward.in;
  Square square(features);
  const T* from = linear.upper;
  for (std::int64_t i = 0; i < features; ++i) {
    square.row(i)[i] = linear.diagonal[i];
    for (std::int64_t j = i + 1; j < features; ++j) {
      square.row(transposed ? j : i)[transposed ? i : j] = static_cast<double>(*from++);
    }
  }
  return square;
}

template <class T>
Square transposed_lower_of(const Linear<T>& linear) {
  const std::int64_t features = linear.forward.in;
  Square square(features);
  const T* from = linear.lower;
  for (std::int64_t i = 0; i < features; ++i) {
    square.row(i)[i] = 1;
    for (std::int64_t j = 0; j < i; ++j) square.row(j)[i] = static_cast<double>(*from++);
  }
  return square;
}

std::int64_t placed(const std::int64_t* place, std::int64_t feature) {
  return place == nullptr ? feature : place[feature];
}

/// Weights of output `out` of a dense layer: weight i lies i * lanes further.
template <class T>
T* weights_of(const Dense<T>& dense, std::int64_t out, std::int64_t lanes) {
  return const_cast<T*>(dense.weights) + out / lanes * lanes * dense.in + out % lanes;
}

/// W^T = U^T L^T by columns, which are the outputs of the layer.
template <class T>
void form_matrix(const Linear<T>& linear, const Square& upper, std::int64_t lanes, int threads) {
  const std::int64_t features = linear.forward.in;
  each_panel(features, threads, [&](std::int64_t first, std::int64_t columns, PanelRow* panel) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const T* row = linear.lower + lower_index(first + c, 0);
      for (std::int64_t k = 0; k < first + c; ++k) panel[k].columns[c] = static_cast<double>(row[k]);
      panel[first + c].columns[c] = 1;
    }
    T* to[kPanel] = {};
    for (std::int64_t c = 0; c < columns; ++c) {
      to[c] = weights_of(linear.forward, placed(linear.y_place, first + c), lanes);
    }
    for (std::int64_t i = 0; i < features; ++i) {
      const PanelRow sum = product(upper.row(i), panel, 0, std::min(i + 1, first + columns));
      for (std::int64_t c = 0; c < columns; ++c) to[c][i * lanes] = static_cast<T>(sum.columns[c]);
    }
  });
}

/// V = W^-1 by rows, which are the outputs of the layer backwards: U^T L^T V^T is the identity.
template <class T>
void form_inverse(const Linear<T>& linear, const Square& upper, std::int64_t lanes, int threads) {
  const std::int64_t features = linear.forward.in;
  const Square lower = transposed_lower_of(linear);
  each_panel(features, threads, [&](std::int64_t first, std::int64_t columns, PanelRow* panel) {
    for (std::int64_t i = first; i < features; ++i) {
      const PanelRow sum = product(upper.row(i), panel, first, i);
      for (std::int64_t c = 0; c < columns; ++c) {
        panel[i].columns[c] = ((i == first + c ? 1.0 : 0.0) - sum.columns[c]) / upper.row(i)[i];
      }
    }
    for (std::int64_t i = features - 1; i >= 0; --i) {
      const PanelRow sum = product(lower.row(i), panel, i + 1, features);
      for (std::int64_t c = 0; c < columns; ++c) panel[i].columns[c] -= sum.columns[c];
    }
    for (std::int64_t c = 0; c < columns; ++c) {
      T* to = weights_of(linear.inverse, placed(linear.x_place, first + c), lanes);
      for (std::int64_t i = 0; i < features; ++i) to[i * lanes] = static_cast<T>(panel[i].columns[c]);
    }
  });
}

/// Writes or adds to elements of the flat gradient.
template <class T>
struct Gradient {
  T* flat;
  bool add;

  void put(std::int64_t at, double value) const {
    flat[at] = static_cast<T>(add ? static_cast<double>(flat[at]) + value : value);
  }
};

/// Of U's elements, the triangle of L^T G, G the gradient of W, by columns.
template <class T>
void upper_gradient(const Linear<T>& linear, double sign, const T* matrix, double log_det, const Gradient<T>& to,
                    int threads) {
  const std::int64_t features = linear.forward.in;
  const Square lower = transposed_lower_of(linear);
  each_panel(features, threads, [&](std::int64_t first, std::int64_t columns, PanelRow* panel) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const T* of_input = matrix + (first + c) * features;
      for (std::int64_t k = 0; k < features; ++k) panel[k].columns[c] = sign * static_cast<double>(of_input[k]);
    }
    for (std::int64_t i = 0; i < first + columns; ++i) {
      const PanelRow sum = product(lower.row(i), panel, i, features);
      for (std::int64_t c = std::max<std::int64_t>(0, i - first); c < columns; ++c) {
        const std::int64_t j = first + c;
        if (i < j) {
          to.put(linear.upper_offset + upper_index(features, i, j), sum.columns[c]);
        } else {
          to.put(linear.log_diagonal_offset + i, sum.columns[c] * linear.diagonal[i] + log_det);
        }
      }
    }
  });
}

/// Of L's elements, the triangle of G U^T, by rows.
template <class T>
void lower_gradient(const Linear<T>& linear, double sign, const T* matrix, const Gradient<T>& to, int threads) {
  const std::int64_t features = linear.forward.in;
  const Square upper = upper_of(linear, false);
  each_panel(features, threads, [&](std::int64_t first, std::int64_t rows, PanelRow* panel) {
    for (std::int64_t k = 0; k < features; ++k) {
      const T* of_input = matrix + k * features + first;
      for (std::int64_t c = 0; c < rows; ++c) panel[k].columns[c] = sign * static_cast<double>(of_input[c]);
    }
    for (std::int64_t j = 0; j < first + rows - 1; ++j) {
      const PanelRow sum = product(upper.row(j), panel, j, features);
      for (std::int64_t c = std::max<std::int64_t>(0, j + 1 - first); c < rows; ++c) {
        to.put(linear.lower_offset + lower_index(first + c, j), sum.columns[c]);
      }
    }
  });
}

}  // namespace

template <class T>
LuMatrix<T>::LuMatrix(const LoweredLinear& from, std::int64_t features, std::int64_t lanes, std::int64_t segment)
    : lanes_(lanes),
      from_(from),
      lower_(static_cast<std::size_t>(features * (features - 1) / 2)),
      upper_(lower_.size()),
      diagonal_(static_cast<std::size_t>(features)) {
  const std::int64_t outputs = round_up(features, lanes);
  weights_.assign(static_cast<std::size_t>(2 * outputs * (features + 1)), T(0));  // the padding stays zero for ever
  T* next = weights_.data();
  for (Dense<T>* dense : {&linear_.forward, &linear_.inverse}) {
    dense->weights = next;
    dense->bias = next + outputs * features;
    dense->in = dense->out = features;
    dense->segment = segment;
    next += outputs * (features + 1);
  }
  linear_.lower = lower_.data();
  linear_.upper = upper_.data();
  linear_.diagonal = diagonal_.data();
  const auto kept = [](const std::vector<std::int64_t>& place) { return place.empty() ? nullptr : place.data(); };
  linear_.x_place = kept(from_.inverse ? from_.out_place : from_.in_place);
  linear_.y_place = kept(from_.inverse ? from_.in_place : from_.out_place);
  linear_.lower_offset = from_.lower;
  linear_.upper_offset = from_.upper;
  linear_.log_diagonal_offset = from_.log_diagonal;
  linear_.sign_offset = from_.sign;
  linear_.bias_offset = from_.bias;
}

template <class T>
void LuMatrix<T>::copy_factors(const T* parameters) {
  std::copy_n(parameters + from_.lower, lower_.size(), lower_.data());
  std::copy_n(parameters + from_.upper, upper_.size(), upper_.data());
  double sum = 0;
  for (std::size_t i = 0; i < diagonal_.size(); ++i) {
    const auto logarithm = static_cast<double>(parameters[from_.log_diagonal + static_cast<std::int64_t>(i)]);
    diagonal_[i] = static_cast<double>(parameters[from_.sign + static_cast<std::int64_t>(i)]) * std::exp(logarithm);
    sum += logarithm;
  }
  log_det_ = static_cast<T>(sum);
}

template <class T>
void LuMatrix<T>::pack(const T* parameters, bool forward, bool inverse, int threads) {
  copy_factors(parameters);
  const Square upper = upper_of(linear_, true);
  if (forward) form_matrix(linear_, upper, lanes_, threads);
  if (inverse) form_inverse(linear_, upper, lanes_, threads);
  T* bias = const_cast<T*>(linear_.forward.bias);
  for (std::int64_t j = 0; j < linear_.forward.out; ++j) bias[placed(linear_.y_place, j)] = parameters[from_.bias + j];
}

template <class T>
void add_lu_gradient(const Linear<T>& linear, bool inverse, const T* products, T* gradient, bool add, int threads) {
  const std::int64_t features = linear.forward.in;
  const double sign = inverse ? -1 : 1;
  const Gradient<T> to = {gradient, add};
  const T* matrix = products + linear.products;
  const T* bias = matrix + features * features;
  const double log_det = sign * static_cast<double>(bias[features]);
  upper_gradient(linear, sign, matrix, log_det, to, threads);
  lower_gradient(linear, sign, matrix, to, threads);
  for (std::int64_t j = 0; j < features; ++j) {
    to.put(linear.sign_offset + j, 0);
    to.put(linear.bias_offset + j, sign * static_cast<double>(bias[j]));
  }
}

template class LuMatrix<float>;
template class LuMatrix<double>;
template void add_lu_gradient(const Linear<float>&, bool, const float*, float*, bool, int);
template void add_lu_gradient(const Linear<double>&, bool, const double*, double*, bool, int);

}  // namespace nvpflow::cpu
