// COUNT calls of log_prob on one row of configuration A (D = 16, K = 4, hidden 128): what check_instructions.cmake has
// callgrind count.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <nvpflow/flow.hpp>

int main(int argc, char** argv) {
  const long count = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 1;
  const nvpflow::Flow flow(nvpflow::FlowSpec::real_nvp(16, 4, {128}));
  std::vector<float> x(16);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 0.1f * static_cast<float>(i) - 0.7f;
  float out = 0;
  for (long i = 0; i < count; ++i) flow.log_prob_unchecked(x.data(), 1, &out, nvpflow::Execution(1));
  std::printf("%g\n", static_cast<double>(out));
}
