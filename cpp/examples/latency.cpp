// Scores one row in a loop, as a real-time program would, and prints a histogram of the time that a call took.
//
//   latency MODEL [CALLS]        a model file of dtype float32; 200000 calls
//
// On a quiet machine pin it to a core of its own: taskset -c 3 ./latency model.safetensors
#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <span>
#include <string>
#include <vector>

#include <nvpflow/flow.hpp>

namespace {

/// Counts of times in buckets of equal ratio, so that adding one neither allocates nor takes time.
class Histogram {
 public:
  void add(std::int64_t nanoseconds) {
    const auto time = static_cast<std::uint64_t>(std::max<std::int64_t>(nanoseconds, 1));
    const auto octave = static_cast<unsigned>(std::bit_width(time)) - 1;
    const std::uint64_t within = (octave >= 2 ? time >> (octave - 2) : time << (2 - octave)) & 3;
    ++counts_[4 * octave + within];
    ++total_;
    longest_ = std::max(longest_, nanoseconds);
  }

  /// Upper bound of the bucket in which the quantile lies, in nanoseconds.
  double quantile(double q) const {
    std::int64_t seen = 0;
    for (std::size_t i = 0; i < counts_.size(); ++i) {
      seen += counts_[i];
      if (static_cast<double>(seen) >= q * static_cast<double>(total_)) {
        return std::min(end_of(i), static_cast<double>(longest_));
      }
    }
    return static_cast<double>(longest_);
  }

  void print() const {
    const std::int64_t most = *std::max_element(counts_.begin(), counts_.end());
    for (std::size_t i = 0; i < counts_.size(); ++i) {
      if (counts_[i] == 0) continue;
      const auto width = static_cast<int>(60 * counts_[i] / most);
      std::printf("  < %12.0f ns %10lld %.*s\n", end_of(i), static_cast<long long>(counts_[i]), width,
                  "############################################################");
    }
    std::printf("p50 %.0f ns, p99 %.0f ns, p99.9 %.0f ns, max %lld ns\n", quantile(0.5), quantile(0.99),
                quantile(0.999), static_cast<long long>(longest_));
  }

 private:
  static double end_of(std::size_t bucket) {
    const double octave = static_cast<double>(std::uint64_t{1} << (bucket / 4));
    return octave * (1.25 + 0.25 * static_cast<double>(bucket % 4));
  }

  std::array<std::int64_t, 256> counts_{};
  std::int64_t total_ = 0, longest_ = 0;
};

void run(const std::string& path, std::int64_t calls) {
  const nvpflow::Flow flow = nvpflow::Flow::load(path);
  const auto columns = static_cast<std::size_t>(flow.spec().input_size);
  std::printf("%s: %zu columns, %lld parameters, on %s\n", path.c_str(), columns,
              static_cast<long long>(flow.num_parameters()), nvpflow::cpu_isa());

  // Rows to score: the flow's own samples.
  constexpr std::size_t kRows = 1024;
  std::vector<float> rows(kRows * columns);
  flow.sample<float>(1, rows);

  flow.prepare(1);  // from here on: no allocation, no lock, no system call
  Histogram histogram;
  double sum = 0;
  for (std::int64_t i = 0; i < calls; ++i) {
    const std::span<const float> row(rows.data() + static_cast<std::size_t>(i) % kRows * columns, columns);
    float log_prob = 0;
    const auto start = std::chrono::steady_clock::now();
    flow.log_prob<float>(row, {&log_prob, 1});
    const auto end = std::chrono::steady_clock::now();
    histogram.add(std::chrono::duration_cast<std::chrono::nanoseconds>(end - start).count());
    sum += static_cast<double>(log_prob);
  }
  histogram.print();
  std::printf("mean log p %.4f nats over %lld calls, two readings of the clock in each time\n",
              sum / static_cast<double>(calls), static_cast<long long>(calls));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: latency MODEL [CALLS]\n");
    return 2;
  }
  const long long calls = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 200000;
  if (calls <= 0) {
    std::fprintf(stderr, "latency: CALLS is '%s', expected a number above 0\n", argv[2]);
    return 2;
  }
  try {
    run(argv[1], calls);
  } catch (const std::exception& error) {  // nvpflow::Error, or std::bad_alloc
    std::fprintf(stderr, "latency: %s\n", error.what());
    return 1;
  }
  return 0;
}
