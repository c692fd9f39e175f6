// A ladder of kernels: what the library uses beside what was tried and lost, each checked and timed, so that the next
// candidate starts from what is known. One thread; the best of many short runs.
//
//   cmake -S . -B build -DNVPFLOW_TESTS=ON && cmake --build build --target kernel_ladder && build/tests/kernel_ladder
//
// Built with -march=native: it shows the instruction set of the machine that compiles it.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels.cpp"

#include "rejected.inl"

namespace {

using namespace nvpflow::cpu;
using nvpflow::Act;
using Clock = std::chrono::steady_clock;
constexpr int L = kLanes<float>;

/// Seconds of one call: the best of 15 runs of a few milliseconds.
template <class F>
double seconds(F&& f) {
  double best = 1e9;
  for (int run = 0; run < 15; ++run) {
    const auto start = Clock::now();
    double passed = 0;
    int calls = 0;
    for (; passed < 2e-3; ++calls) {
      f();
      passed = std::chrono::duration<double>(Clock::now() - start).count();
    }
    best = std::min(best, passed / calls);
  }
  return best;
}

/// 64-byte aligned numbers in [-0.2, 0.2).
class Numbers {
 public:
  explicit Numbers(std::size_t count)
      : count_(count), data_(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 127) / 64 * 64))) {
    for (std::size_t i = 0; i < count; ++i) {
      data_[i] = static_cast<float>((i * 2654435761u >> 8) % 4001) * 1e-4f - 0.2f;
    }
  }
  ~Numbers() { std::free(data_); }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;
  operator float*() { return data_; }
  void poison() { std::fill_n(data_, count_, std::nanf("")); }

 private:
  std::size_t count_;
  float* data_;
};

bool all_passed = true;

/// One rung. FLOPs of a call (0: not counted); check(): whether what the last call wrote is right.
template <class F, class Check>
void rung(const char* name, double flops, F&& f, Check&& check) {
  f();
  const bool good = check();
  all_passed = all_passed && good;
  const double s = seconds(f);
  std::printf("  %-52s %8.2f us", name, s * 1e6);
  if (flops > 0) std::printf(" %8.1f GFLOP/s", flops / s * 1e-9);
  std::printf("%s\n", good ? "" : "  WRONG");
}

float weight(const float* w, std::int64_t in, std::int64_t i, std::int64_t o) {
  return w[o / L * L * in + i * L + o % L];
}

struct Layout {  // of x and y
  bool row_major;
  std::int64_t stride;
  std::int64_t at(std::int64_t row, std::int64_t unit) const {
    return row_major ? row * stride + unit : unit * stride + row;
  }
};

/// Against a plain sum in float64.
bool dense_is_right(const Dense<float>& d, const float* x, Layout x_at, const float* y, Layout y_at,
                    std::int64_t rows) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t o = 0; o < d.out; ++o) {
      double sum = static_cast<double>(d.bias[o]);
      for (std::int64_t i = 0; i < d.in; ++i) {
        sum += static_cast<double>(weight(d.weights, d.in, i, o)) * static_cast<double>(x[x_at.at(r, i)]);
      }
      const double expected = std::max(sum, 0.0), got = static_cast<double>(y[y_at.at(r, o)]);
      if (!(std::abs(got - expected) <= 1e-5 * (1 + std::abs(expected)))) return false;
    }
  }
  return true;
}

void dense_layer(std::int64_t in, std::int64_t out, std::int64_t rows) {
  const std::int64_t segments = in >= 64 ? 4 : in >= 32 ? 2 : 1, width = padded<float>(std::max(in, out));
  Numbers w(static_cast<std::size_t>(in * padded<float>(out))), bias(static_cast<std::size_t>(padded<float>(out)));
  Numbers x(static_cast<std::size_t>(width * rows)), y(static_cast<std::size_t>(width * rows));
  const Dense<float> d = {w, bias, nullptr, in, out, (in + segments - 1) / segments};
  Dense<float> wide = d;
  wide.wide_blocks = true;
  const double flops = 2.0 * static_cast<double>(in * out * rows);
  std::printf("dense layer %lld -> %lld, %lld rows\n", static_cast<long long>(in), static_cast<long long>(out),
              static_cast<long long>(rows));
  const auto tile = [&](const char* name, auto kernel) {
    y.poison();
    rung(name, flops, [&] { kernel(); }, [&] { return dense_is_right(d, x, {false, rows}, y, {false, rows}, rows); });
  };
  const auto by_rows = [&](const char* name, auto kernel) {
    const Layout x_at = {true, padded<float>(in)}, y_at = {true, padded<float>(out)};
    y.poison();
    rung(
        name, flops, [&] { kernel(x_at.stride, y_at.stride); },
        [&] { return dense_is_right(d, x, x_at, y, y_at, rows); });
  };
  if (rows % L == 0) {
    tile("feature-major, the library's blocks", [&] { dense_tile<float>(d, x, y, rows, Act::relu); });
    tile("feature-major, the library's wide blocks", [&] { dense_tile<float>(wide, x, y, rows, Act::relu); });
    tile("feature-major, 4 x 4", [&] { tile_blocks<float, 4, 4>(d, x, y, rows); });
    tile("feature-major, 8 x 1", [&] { tile_blocks<float, 8, 1>(d, x, y, rows); });
  }
  by_rows("row-major, the library's blocks",
          [&](auto xs, auto ys) { dense_rows<float>(d, x, xs, y, ys, rows, Act::relu); });
  by_rows("row-major, the library's wide blocks",
          [&](auto xs, auto ys) { dense_rows<float>(wide, x, xs, y, ys, rows, Act::relu); });
  if (rows <= kMaxFewRows<float>) {
    by_rows("row-major, one block for all rows (library)",
            [&](auto xs, auto ys) { dense_few_rows<float>(FullWeights<float>{d}, x, xs, y, ys, rows, Act::relu); });
    by_rows("row-major, row after row (reads weights each time)", [&](auto xs, auto ys) {
      for (std::int64_t r = 0; r < rows; ++r)
        dense_few_rows<float>(FullWeights<float>{d}, x + r * xs, xs, y + r * ys, ys, 1, Act::relu);
    });
  }
}

/// As many multiply-adds as `inputs` of a wide block have, from registers alone: what its loads and stores are measured
/// by. Each sum ends at `inputs` / 2.
void registers_alone(std::int64_t inputs) {
  constexpr int kSums = kBlockOut * (kBlockRows + (kCanBeWide ? 1 : 0));
  constexpr int kCalls = 64;
  Vec<float> weight = set1(0.5f), input = set1(1.0f), sum[kSums];
  const auto opaque = [](Vec<float>& v) __attribute__((always_inline)) {  // as if it had changed
#if defined(__aarch64__)
    asm volatile("" : "+w"(v));
#else
    asm volatile("" : "+x"(v));
#endif
  };
  const auto run = [&] {
    for (int call = 0; call < kCalls; ++call) {
#pragma GCC unroll 24
      for (Vec<float>& s : sum) s = Vec<float>{};
      for (std::int64_t i = 0; i < inputs; ++i) {
#pragma GCC unroll 24
        for (Vec<float>& s : sum) {
          opaque(weight);  // or one sum would do for all
          s = fma(weight, input, s);
        }
      }
    }
  };
  const double flops = 2.0 * kSums * L * kCalls * static_cast<double>(inputs);
  rung("multiply-adds from registers alone", flops, run, [&] {
    return std::all_of(std::begin(sum), std::end(sum),
                       [&](const Vec<float>& s) { return s[0] == 0.5f * static_cast<float>(inputs); });
  });
}

/// A conditioner of one hidden layer, layer by layer and with its hidden units in registers alone.
template <int kIn, int kOut>
void conditioner(std::int64_t width, std::int64_t rows) {
  const auto numbers = [](std::int64_t count) { return Numbers(static_cast<std::size_t>(count)); };
  Numbers w0 = numbers(kIn * width), c0 = numbers(width), w1 = numbers(width * padded<float>(kOut)), c1 = numbers(kOut);
  Numbers x = numbers(kIn * rows), h = numbers(width * rows), y = numbers(kOut * rows);
  Dense<float> hidden = {w0, c0, nullptr, kIn, width, kIn}, head = {w1, c1, nullptr, width, kOut, width / 4};
  const auto by_layers = [&] {
    dense_tile<float>(hidden, x, h, rows, Act::relu);
    dense_tile<float>(head, h, y, rows, Act::none);
  };
  by_layers();
  const std::vector<float> expected(y + 0, y + kOut * rows);
  // The same sums in the same order: dense_layer holds each layer to float64.
  const auto right = [&] { return std::memcmp(y, expected.data(), expected.size() * sizeof(float)) == 0; };
  std::printf("conditioner %d -> %lld -> %d, %lld rows\n", kIn, static_cast<long long>(width), kOut,
              static_cast<long long>(rows));
  const double flops = 2.0 * static_cast<double>((kIn + kOut) * width * rows);
  const auto timed = [&](const char* name, auto kernel) {
    y.poison();
    rung(name, flops, kernel, right);
  };
  timed("layer by layer, the library's blocks", by_layers);
  hidden.wide_blocks = head.wide_blocks = true;
  timed("layer by layer, the library's wide blocks", by_layers);
  if constexpr (kHasHiddenHead<float>) {
    timed("hidden units in registers alone (library)",
          [&] { hidden_and_head<float, kIn, kOut>(hidden, head, x, y, rows); });
  }
}

/// exp(s) b + t with s = tanh(u), b in place: the coupling's last stage, N vectors in step.
template <class V>
void affine(const char* name, std::int64_t vectors) {
  const Layer<float> layer;
  Numbers u(static_cast<std::size_t>(vectors * L)), t(static_cast<std::size_t>(vectors * L));
  Numbers b(static_cast<std::size_t>(vectors * L)), log_det(static_cast<std::size_t>(vectors * L));
  const std::vector<float> before(b + 0, b + vectors * L);
  const Affine<float> stage = {layer, false, L, L, L};
  const auto run = [&] {
    for (std::int64_t i = 0; i < vectors * L; i += kVectors<V> * L) {
      stage.template apply<V>(u + i, t + i, b + i, log_det + i, L);
    }
  };
  const auto restore = [&] { std::memcpy(b, before.data(), before.size() * sizeof(float)); };
  rung(
      name, 0,
      [&] {
        restore();  // what is timed includes this copy: without it b grows to infinity
        run();
      },
      [&] {
        for (std::int64_t i = 0; i < vectors * L; ++i) {
          const double s = std::tanh(static_cast<double>(u[i]));
          const double expected =
              std::exp(s) * static_cast<double>(before[static_cast<std::size_t>(i)]) + static_cast<double>(t[i]);
          if (!(std::abs(static_cast<double>(b[i]) - expected) <= 1e-6)) return false;
        }
        return true;
      });
}

void outer(std::int64_t in, std::int64_t first, std::int64_t second, std::int64_t rows) {
  const std::int64_t out = first + second, xs = padded<float>(in), gs = padded<float>(out);
  Numbers x(static_cast<std::size_t>(xs * rows)), g(static_cast<std::size_t>(gs * rows));
  Numbers sums(static_cast<std::size_t>((in + 1) * out));
  float *kernel = sums, *bias = kernel + in * out;
  const OuterProduct<float> p = {x, xs, g, gs, rows, rows, 0, 0, out};
  const auto columns = [&](bool add) {
    return DenseColumns<float>{{{kernel, kernel + in * first}, {first, second}, add},
                               {{bias, bias + first}, {first, second}, add}};
  };
  const auto zero = [&] { std::fill_n(kernel, (in + 1) * out, 0.0f); };
  const auto right = [&] {
    for (std::int64_t i = 0; i <= in; ++i) {
      for (std::int64_t o = 0; o < out; ++o) {
        double sum = 0;
        for (std::int64_t r = 0; r < rows; ++r) {
          sum += (i == in ? 1.0 : static_cast<double>(x[r * xs + i])) * static_cast<double>(g[r * gs + o]);
        }
        const std::int64_t n = o < first ? first : second, column = o < first ? o : o - first;
        const float* part =
            i == in ? bias + (o < first ? 0 : first) : (o < first ? kernel : kernel + in * first) + i * n;
        if (!(std::abs(static_cast<double>(part[column]) - sum) <= 1e-5 * (1 + std::abs(sum)))) return false;
      }
    }
    return true;
  };
  std::printf("gradient of weights %lld x (%lld + %lld), %lld rows\n", static_cast<long long>(in),
              static_cast<long long>(first), static_cast<long long>(second), static_cast<long long>(rows));
  const double flops = 2.0 * static_cast<double>(in * out * rows);
  rung("the library's blocks", flops, [&] { outer_product<float>(p, 0, in, columns(false)); }, right);
  rung("the same, added to zeros", flops, [&] { zero(), outer_product<float>(p, 0, in, columns(true)); }, right);
  rung("both heads apart, bias apart", flops, [&] { zero(), heads_apart<float>(p, in, columns(true)); }, right);
}

}  // namespace

int main() {
  std::printf("vectors of %d numbers; wide blocks, where there are any, are the library's on Intel's processors\n\n",
              L);
  // What a wide block's loads and stores cost: its multiply-adds without them, then one strip of blocks, all of which
  // lies in the first-level cache.
  std::printf("registers\n");
  registers_alone(128);
  for (const std::int64_t in : {8, 128}) dense_layer(in, kBlockOut, L * (kBlockRows + (kCanBeWide ? 1 : 0)));
  for (const std::int64_t rows : {128, 16, 8, 3}) {
    dense_layer(8, 128, rows);
    dense_layer(128, 16, rows);
    dense_layer(256, 256, rows);
  }
  conditioner<8, 16>(128, 144);
  conditioner<8, 16>(256, 144);
  conditioner<3, 6>(64, 144);
  std::printf("coupling's last stage, 64 vectors\n");
  affine<Vec<float>>("one vector after the other", 64);
  affine<Pair<Vec<float>>>("two in step", 64);
  affine<Pair<Pair<Vec<float>>>>("four in step", 64);
  affine<Pair<Pair<Pair<Vec<float>>>>>("eight in step", 64);
  outer(8, 128, 0, 128);
  outer(128, 8, 8, 128);
  outer(256, 32, 32, 64);
  if (!all_passed) std::printf("WRONG results above\n");
  return all_passed ? 0 : 1;
}
