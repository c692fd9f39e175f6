// KERNEL: the reverse pass of a flow, tile by tile: a tile goes forward, its activations stay on the tape, and it comes
// back before the next one starts. No array as long as the batch exists; a row costs 3 times the FLOPs of its forward.
//
// gradient_tile does the forward and the cotangents; it leaves the input of every dense layer, feature-major, and the
// cotangent of its output, row-major. weight_gradient multiplies the two for any part of one kernel, so that threads
// can share the parameters out among themselves: each element of the gradient is summed over the rows of a tile, and
// over the tiles in order, whatever the number of threads. A register block is kGradientIn inputs x kGradientOut
// vectors of outputs and reads kGradientIn + kGradientOut values a row for kGradientIn * kGradientOut multiply-adds.

namespace nvpflow::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kGradientIn = 8, kGradientOut = 3;  // of 32 registers: 24 sums, 3 cotangents, 1 input
#elif defined(__AVX2__)
constexpr int kGradientIn = 4, kGradientOut = 3;
#elif defined(__aarch64__)
constexpr int kGradientIn = 8, kGradientOut = 3;
#else
constexpr int kGradientIn = 4, kGradientOut = 2;
#endif

/// gelu and silu need their argument for the derivative; the others' derivative follows from their value.
NVPFLOW_INLINE bool keeps_argument(Act act) { return act == Act::gelu || act == Act::silu; }

template <class T>
NVPFLOW_INLINE Vec<T> activation_derivative(Act act, Vec<T> value, Vec<T> argument) {
  const Vec<T> one = set1(T(1));
  switch (act) {
    case Act::relu:
      return value > T(0) ? one : set1(T(0));
    case Act::leaky_relu:
      return value > T(0) ? one : set1(T(0.01));
    case Act::elu:
      return value > T(0) ? one : value + T(1);
    case Act::gelu:
      return gelu_derivative<T>(argument);
    case Act::silu:
      return silu_derivative<T>(argument);
    case Act::tanh:
      return fma(-value, value, one);
    case Act::sigmoid:
      return value * (one - value);
    case Act::softplus:
      return -expm1_bounded<T>(-value);
    default:
      return one;
  }
}

// ---- the tape ----------------------------------------------------------------------------------------------------
// One tile's numbers, in the order below, offsets in elements for a stride of `rows`:
//   fixed part   state [D], partial [kLanes], log_prob [1], two buffers [max_width], cotangent [D], log_det cotangent
//   [1] per coupling input [a], per hidden layer value [H] and, where kept, argument [H]; s, exp(+-s), product [b
//   each];
//                cotangents row-major: per hidden layer [rows][H up to lanes], scale and translation [rows][b up to
//                lanes]
//   per standardize   output [D]; sums over the tile's rows of the gradients of mean and log_std, [2 D] numbers

template <class T>
struct FixedTape {
  T *state, *partial, *log_prob, *buffer0, *buffer1, *cotangent, *log_det_cotangent, *layers;
  int64_t size;  // elements before `layers`

  FixedTape(const Program<T>& p, T* tape, int64_t rows) {
    Carver<T> carver{tape};
    state = carver.take(p.input_size * rows);
    partial = carver.take(kLanes<T> * rows);
    log_prob = carver.take(rows);
    buffer0 = carver.take(padded<T>(p.max_width) * rows);
    buffer1 = carver.take(padded<T>(p.max_width) * rows);
    cotangent = carver.take(p.input_size * rows);
    log_det_cotangent = carver.take(rows);
    layers = carver.take(0);
    size = carver.used;
  }
};

template <class T>
int64_t hidden_tape(const Layer<T>& layer, int32_t j) {
  return layer.dense[j].out * (keeps_argument(layer.activation) ? 2 : 1);
}

template <class T>
int64_t layer_tape(const Program<T>& program, const Layer<T>& layer, int64_t rows) {
  if (layer.kind == Kind::standardize) return program.input_size * rows + padded<T>(2 * program.input_size);
  int64_t n = layer.a_count + 3 * layer.b_count + 2 * padded<T>(layer.b_count);
  for (int32_t j = 0; j + 1 < layer.num_dense; ++j) n += hidden_tape(layer, j) + padded<T>(layer.dense[j].out);
  return n * rows;
}

template <class T>
int64_t tape_size(const Program<T>& program) {
  const int64_t rows = program.gradient_rows;
  int64_t n = FixedTape<T>(program, nullptr, rows).size;
  for (int64_t k = 0; k < program.num_layers; ++k) n += layer_tape(program, program.layers[k], rows);
  return n;
}

template <class T>
struct CouplingTape {
  T* input;
  T *s, *scale, *product;  // product: d(output) / d(s)
  T* hidden;               // values and arguments of the hidden layers, one after the other
  T* cotangents;           // row-major

  CouplingTape(const Layer<T>& layer, T* tape, int64_t rows) {
    input = tape;
    s = input + layer.a_count * rows;
    scale = s + layer.b_count * rows;
    product = scale + layer.b_count * rows;
    hidden = product + layer.b_count * rows;
    cotangents = hidden;
    for (int32_t j = 0; j + 1 < layer.num_dense; ++j) cotangents += hidden_tape(layer, j) * rows;
  }

  T* value(const Layer<T>& layer, int32_t j, int64_t rows) const {
    T* p = hidden;
    for (int32_t i = 0; i < j; ++i) p += hidden_tape(layer, i) * rows;
    return p;
  }
  T* argument(const Layer<T>& layer, int32_t j, int64_t rows) const {
    T* p = value(layer, j, rows);
    return keeps_argument(layer.activation) ? p + layer.dense[j].out * rows : p;
  }
  /// group: a hidden layer, then scale, then translation.
  T* cotangent(const Layer<T>& layer, int64_t group, int64_t rows) const {
    T* p = cotangents;
    for (int64_t g = 0; g < group; ++g) p += padded<T>(layer.gradients[g].out) * rows;
    return p;
  }
};

template <class T>
T* layer_tape_at(const Program<T>& program, int64_t layer, T* layers, int64_t rows) {
  for (int64_t k = 0; k < layer; ++k) layers += layer_tape(program, program.layers[k], rows);
  return layers;
}

// ---- forward with a tape -----------------------------------------------------------------------------------------

template <class T>
void coupling_forward_taped(const Layer<T>& layer, bool inverse, T* state, T* partial, T* tape, T* head, int64_t rows) {
  const CouplingTape<T> keep(layer, tape, rows);
  const int64_t n = layer.b_count;
  __builtin_memcpy(keep.input, state + layer.a_begin * rows, static_cast<size_t>(layer.a_count * rows) * sizeof(T));
  const T* x = keep.input;
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    if (j + 1 == layer.num_dense) {
      dense_tile<T>(view(layer.dense[j]), x, head, rows, Act::none);
      break;
    }
    T* value = keep.value(layer, j, rows);
    T* argument = keep.argument(layer, j, rows);
    dense_tile<T>(view(layer.dense[j]), x, argument, rows, layer.activation);
    if (needs_pass(layer.activation)) activate<T>(layer.activation, argument, value, layer.dense[j].out * rows);
    x = value;
  }
  T* b = state + layer.b_begin * rows;
  for (int64_t j = 0; j < n; ++j) {
    T* log_det = partial + (j % kLanes<T>)*rows;
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int64_t at = j * rows + r;
      const Vec<T> s = log_scale<T>(layer, load<T>(head + at));
      const Vec<T> t = load<T>(head + n * rows + at);
      const Vec<T> in = load<T>(b + at);
      const Vec<T> scale = exp<T>(inverse ? -s : s);
      const Vec<T> out = inverse ? (in - t) * scale : fma(in, scale, t);
      const Vec<T> sum = load<T>(log_det + r);
      store<T>(log_det + r, inverse ? sum - s : sum + s);
      store<T>(b + at, out);
      store<T>(keep.s + at, s);
      store<T>(keep.scale + at, scale);
      store<T>(keep.product + at, inverse ? -out : in * scale);
    }
  }
}

template <class T>
void flow_forward_taped(const Program<T>& program, bool inverse, const FixedTape<T>& fixed, int64_t rows) {
  for (int64_t i = 0; i < kLanes<T> * rows; i += kLanes<T>) store<T>(fixed.partial + i, Vec<T>{});
  for (int64_t k = 0; k < program.num_layers; ++k) {
    const int64_t index = inverse ? program.num_layers - 1 - k : k;
    const Layer<T>& layer = program.layers[index];
    T* tape = layer_tape_at(program, index, fixed.layers, rows);
    if (layer.kind == Kind::coupling) {
      coupling_forward_taped<T>(layer, inverse, fixed.state, fixed.partial, tape, fixed.buffer0, rows);
    } else {
      standardize_tile<T>(layer, inverse, program.input_size, fixed.state, fixed.partial, rows);
      __builtin_memcpy(tape, fixed.state, static_cast<size_t>(program.input_size * rows) * sizeof(T));
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------

/// From the cotangent of the layer's output to that of its input, in place; head [2 b][rows] = cotangent of [u_s, t].
template <class T>
void affine_backward(const Layer<T>& layer, bool inverse, const CouplingTape<T>& keep, const FixedTape<T>& fixed,
                     T* head, int64_t rows) {
  const int64_t n = layer.b_count;
  T* b = fixed.cotangent + layer.b_begin * rows;
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int64_t at = j * rows + r;
      const Vec<T> g = load<T>(b + at), g_log_det = load<T>(fixed.log_det_cotangent + r);
      const Vec<T> scaled = g * load<T>(keep.scale + at);
      const Vec<T> tanh_u = load<T>(keep.s + at) * layer.inverse_bound;
      const Vec<T> g_s = fma(g, load<T>(keep.product + at), inverse ? -g_log_det : g_log_det);
      store<T>(b + at, scaled);
      store<T>(head + at, g_s * fma(-tanh_u, tanh_u, set1(T(1))));
      store<T>(head + n * rows + at, inverse ? -scaled : g);
    }
  }
}

/// Cotangent of a dense layer's input: W times that of its output.
template <class T>
NVPFLOW_INLINE void dense_backward(const Dense<T>& d, const T* g_out, T* g_in, int64_t rows) {
  dense_tile<T>({d.transposed, nullptr, d.out, d.in, 1}, g_out, g_in, rows, Act::none);
}

template <class T>
void coupling_backward(const Layer<T>& layer, const GradientCall<T>& call, bool input_wanted, T* tape,
                       const FixedTape<T>& fixed, int64_t count, int64_t rows) {
  const CouplingTape<T> keep(layer, tape, rows);
  T* g = fixed.buffer0;
  T* next = fixed.buffer1;
  affine_backward<T>(layer, call.inverse, keep, fixed, g, rows);
  for (int32_t j = layer.num_dense - 1; j >= 0; --j) {
    if (call.parameters) {
      const int64_t last_group = j + 1 == layer.num_dense ? j + 1 : j;
      for (int64_t group = j; group <= last_group; ++group) {
        const DenseGradient& part = layer.gradients[group];
        scatter_tile<T>(g + part.column * rows, rows, count, part.out, keep.cotangent(layer, group, rows),
                        padded<T>(part.out));
      }
    }
    if (j == 0 && !input_wanted) return;
    dense_backward<T>(layer.dense[j], g, next, rows);
    if (j > 0) {
      const T* value = keep.value(layer, j - 1, rows);
      const T* argument = keep.argument(layer, j - 1, rows);
      for (int64_t i = 0; i < layer.dense[j].in * rows; i += kLanes<T>) {
        const Vec<T> derivative = activation_derivative<T>(layer.activation, load<T>(value + i), load<T>(argument + i));
        store<T>(next + i, load<T>(next + i) * derivative);
      }
    }
    T* swap = g;
    g = next;
    next = swap;
  }
  T* a = fixed.cotangent + layer.a_begin * rows;
  for (int64_t i = 0; i < layer.a_count * rows; i += kLanes<T>) store<T>(a + i, load<T>(a + i) + load<T>(g + i));
}

/// tape: the layer's output, then room for the sums over the tile's rows, mean [D] and log_std [D].
template <class T>
void standardize_backward(const Layer<T>& layer, bool inverse, int64_t features, T* tape, const FixedTape<T>& fixed,
                          int64_t count, int64_t rows) {
  T* sums = tape + features * rows;
  for (int64_t j = 0; j < features; ++j) {
    T g_mean = 0, g_log_std = 0;
    const T* out = tape + j * rows;
    T* g = fixed.cotangent + j * rows;
    for (int64_t r = 0; r < count; ++r) {
      const T g_log_det = fixed.log_det_cotangent[r];
      if (inverse) {  // out = in * std + mean, log_det = +sum log_std
        g_mean += g[r];
        g_log_std += g[r] * (out[r] - layer.mean[j]) + g_log_det;
      } else {  // out = (in - mean) / std, log_det = -sum log_std
        g_mean -= g[r] * layer.inverse_std[j];
        g_log_std -= g[r] * out[r] + g_log_det;
      }
    }
    sums[j] = g_mean;
    sums[features + j] = g_log_std;
    const Vec<T> factor = set1(inverse ? layer.std[j] : layer.inverse_std[j]);
    for (int64_t r = 0; r < rows; r += kLanes<T>) store<T>(g + r, load<T>(g + r) * factor);
  }
}

/// The cotangents that the backward pass starts from; rows past `count` hold numbers that nobody reads.
template <class T>
void start_cotangents(const Program<T>& program, const GradientCall<T>& call, const FixedTape<T>& fixed, int64_t begin,
                      int64_t count, int64_t rows) {
  const int64_t features = program.input_size;
  if (call.nll) {
    for (int64_t i = 0; i < features * rows; i += kLanes<T>) {
      store<T>(fixed.cotangent + i, load<T>(fixed.state + i) * call.nll_factor);
    }
  } else if (call.grad_out != nullptr) {
    load_tile<T>(call.grad_out, nullptr, begin, count, features, fixed.cotangent, rows);
  } else {
    for (int64_t i = 0; i < features * rows; i += kLanes<T>) store<T>(fixed.cotangent + i, Vec<T>{});
  }
  for (int64_t r = 0; r < rows; ++r) {
    const bool given = call.grad_log_det != nullptr && r < count;
    fixed.log_det_cotangent[r] = call.nll ? -call.nll_factor : given ? call.grad_log_det[begin + r] : T(0);
  }
}

template <class T>
double sum_rows(const T* values, int64_t count) {
  double sum = 0;
  for (int64_t r = 0; r < count; ++r) sum += static_cast<double>(values[r]);
  return sum;
}

template <class T>
double gradient_tile(const Program<T>& program, const GradientCall<T>& call, int64_t begin, int64_t end, T* tape) {
  const int64_t count = end - begin, rows = round_up(count, kLanes<T>), features = program.input_size;
  const FixedTape<T> fixed(program, tape, rows);
  load_tile<T>(call.in, call.index, begin, count, features, fixed.state, rows);
  T* poison = fixed.log_prob;  // free until the densities are written
  const bool poisoned = find_poison<T>(fixed.state, features, poison, rows);
  if (poisoned) spread_poison<T>(poison, fixed.state, features, rows);
  flow_forward_taped<T>(program, call.inverse, fixed, rows);
  start_cotangents<T>(program, call, fixed, begin, count, rows);
  if (poisoned) {
    spread_poison<T>(poison, fixed.cotangent, features, rows);
    spread_poison<T>(poison, fixed.log_det_cotangent, 1, rows);
  }
  double sum = 0;
  if (call.nll) {
    sum_partials_tile<T>(fixed.partial, rows);
    // The log-determinants are in the first row of the partial sums: move them before it is overwritten.
    for (int64_t r = 0; r < rows; r += kLanes<T>) store<T>(fixed.buffer0 + r, load<T>(fixed.partial + r));
    log_prob_tile<T>(fixed.state, features, fixed.buffer0, fixed.partial, fixed.log_prob, rows);
    sum = sum_rows<T>(fixed.log_prob, count);
  }
  for (int64_t k = program.num_layers - 1; k >= 0; --k) {
    const int64_t index = call.inverse ? program.num_layers - 1 - k : k;
    const Layer<T>& layer = program.layers[index];
    T* layer_tape = layer_tape_at(program, index, fixed.layers, rows);
    if (layer.kind == Kind::coupling) {
      const bool input_wanted = k > 0 || call.grad_in != nullptr;
      coupling_backward<T>(layer, call, input_wanted, layer_tape, fixed, count, rows);
    } else {
      standardize_backward<T>(layer, call.inverse, features, layer_tape, fixed, count, rows);
    }
  }
  if (call.grad_in != nullptr) {
    scatter_tile<T>(fixed.cotangent, rows, count, features, call.grad_in + begin * features, features);
  }
  return sum;
}

// ---- gradients of the weights ------------------------------------------------------------------------------------

/// out[MI][n] += x[MI][count] g[count][n], n = NO vectors of which the last has `valid` elements beyond the others.
template <class T, int MI, int NO>
NVPFLOW_INLINE void outer_block(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t count, T* out,
                                int64_t out_stride, int64_t valid) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[MI][NO] = {};
  for (int64_t r = 0; r < count; ++r) {
    Vec<T> cotangent[NO];
    for (int n = 0; n < NO; ++n) cotangent[n] = load<T>(g + r * g_stride + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < MI; ++m) {
      const Vec<T> input = set1(x[m * x_stride + r]);
      for (int n = 0; n < NO; ++n) sum[m][n] = fma(input, cotangent[n], sum[m][n]);
    }
  }
  for (int m = 0; m < MI; ++m) {
    for (int n = 0; n < NO; ++n) {
      T* p = out + m * out_stride + n * L;
      const int64_t here = valid - n * L;
      store_upto<T>(p, load_upto<T>(p, here) + sum[m][n], here);
    }
  }
}

/// MI rows of a kernel's gradient, all its columns.
template <class T, int MI>
void outer_strip(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t count, T* out, int64_t n) {
  constexpr int L = kLanes<T>;
  int64_t o = 0;
  for (; o + (kGradientOut - 1) * L < n; o += kGradientOut * L) {
    outer_block<T, MI, kGradientOut>(x, x_stride, g + o, g_stride, count, out + o, n, n - o);
  }
  if constexpr (kGradientOut > 2) {
    if (o + L < n) {
      outer_block<T, MI, 2>(x, x_stride, g + o, g_stride, count, out + o, n, n - o);
      o += 2 * L;
    }
  }
  if (o < n) outer_block<T, MI, 1>(x, x_stride, g + o, g_stride, count, out + o, n, n - o);
}

template <class T>
void bias_gradient(const T* g, int64_t g_stride, int64_t count, T* out, int64_t n) {
  for (int64_t o = 0; o < n; o += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t r = 0; r < count; ++r) sum = sum + load<T>(g + r * g_stride + o);
    store_upto<T>(out + o, load_upto<T>(out + o, n - o) + sum, n - o);
  }
}

template <class T>
void weight_gradient(const Program<T>& program, int64_t index, int64_t group, int64_t first, int64_t last,
                     int64_t count, const T* tape_begin, T* gradient) {
  const Layer<T>& layer = program.layers[index];
  const int64_t rows = round_up(count, kLanes<T>);
  const FixedTape<T> fixed(program, const_cast<T*>(tape_begin), rows);
  T* tape = layer_tape_at(program, index, fixed.layers, rows);
  if (layer.kind == Kind::standardize) {
    const T* sums = tape + program.input_size * rows;
    for (int64_t j = first; j < last; ++j) {
      gradient[layer.mean_offset + j] += sums[j];
      gradient[layer.log_std_offset + j] += sums[program.input_size + j];
    }
    return;
  }
  const CouplingTape<T> keep(layer, tape, rows);
  const DenseGradient& part = layer.gradients[group];
  const int32_t j = static_cast<int32_t>(smaller(group, layer.num_dense - 1));
  const T* x = j == 0 ? keep.input : keep.value(layer, j - 1, rows);
  const T* g = keep.cotangent(layer, group, rows);
  const int64_t g_stride = padded<T>(part.out);
  T* out = gradient + part.kernel_offset;
  int64_t i = first;
  for (; i + kGradientIn <= last; i += kGradientIn) {
    outer_strip<T, kGradientIn>(x + i * rows, rows, g, g_stride, count, out + i * part.out, part.out);
  }
  if constexpr (kGradientIn > 4) {
    if (i + 4 <= last) {
      outer_strip<T, 4>(x + i * rows, rows, g, g_stride, count, out + i * part.out, part.out);
      i += 4;
    }
  }
  for (; i < last; ++i) outer_strip<T, 1>(x + i * rows, rows, g, g_stride, count, out + i * part.out, part.out);
  if (first == 0) bias_gradient<T>(g, g_stride, count, gradient + part.bias_offset, part.out);
}

}  // namespace
}  // namespace nvpflow::cpu
