// swap and reload while many threads call: each call sees one of two models whole. Run it under ThreadSanitizer, too
// (CONTRIBUTING). NVPFLOW_RELOAD_SECONDS: how long each case goes on, 1 where it is not set.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include <nvpflow/flow.hpp>

namespace {

using nvpflow::Flow;
using nvpflow::FlowSpec;
using Answer = std::vector<float>;

/// Seconds that a case goes on.
double duration() {
  const char* text = std::getenv("NVPFLOW_RELOAD_SECONDS");
  return text == nullptr ? 1.0 : std::strtod(text, nullptr);
}

/// A flow far from the identity, so that a mixture of two would show in every number.
Flow model(const FlowSpec& spec, std::uint64_t seed) {
  Flow flow(spec, seed);
  std::vector<float> parameters(static_cast<std::size_t>(flow.num_parameters()));
  flow.copy_parameters<float>(parameters);
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    parameters[i] = 3 * parameters[i] + 0.01f * static_cast<float>(i * (seed + 7) % 17) - 0.08f;
  }
  flow.set_parameters<float>(parameters);
  return flow;
}

/// Everything that a call says of the rows: z, log_det and a sample from the same call's weights each.
void answer_forward(const Flow& flow, const std::vector<float>& x, Answer& out) {
  const std::size_t rows = x.size() / 12;
  flow.forward<float>(x, std::span(out).first(x.size()), std::span(out).last(rows));
}

struct Load {
  std::vector<std::thread> readers;
  std::atomic<bool> stop{false};
  std::atomic<long> old_seen{0}, new_seen{0}, neither{0}, errors{0};

  /// Threads that ask `flow` and compare with the two answers that are right.
  void start(const Flow& flow, const std::vector<float>& x, const Answer& a, const Answer& b) {
    for (int t = 0; t < 4; ++t) {
      readers.emplace_back([&] {
        Answer out(a.size());
        while (!stop.load(std::memory_order_relaxed)) {
          try {
            answer_forward(flow, x, out);
          } catch (const std::exception&) {
            errors.fetch_add(1);
          }
          (out == a ? old_seen : out == b ? new_seen : neither).fetch_add(1);
        }
      });
    }
  }

  void finish() {
    stop.store(true);
    for (std::thread& reader : readers) reader.join();
    CHECK(errors.load() == 0);
    CHECK(neither.load() == 0);
    CHECK(old_seen.load() > 0);
    CHECK(new_seen.load() > 0);
  }
};

template <class F>
long repeat(F f) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(duration());
  long count = 0;
  for (; count < 20 || std::chrono::steady_clock::now() < end; ++count) f(count);
  return count;
}

Answer answer_of(const Flow& flow, const std::vector<float>& x) {
  Answer out(x.size() + x.size() / 12);
  answer_forward(flow, x, out);
  return out;
}

const FlowSpec kSpec = FlowSpec::real_nvp(12, 3, {40}, nvpflow::Activation::tanh);

}  // namespace

TEST_CASE("swap under load") {
  for (const std::size_t rows : {1u, 64u}) {
    CAPTURE(rows);
    Flow served = model(kSpec, 1), other = model(kSpec, 2);
    const std::vector<float> x(rows * 12, 0.3f);
    const Answer a = answer_of(served, x), b = answer_of(other, x);
    REQUIRE(a != b);
    Load load;
    load.start(served, x, a, b);
    const long count = repeat([&](long i) {
      served.swap(other);
      if (answer_of(served, x) != (i % 2 == 0 ? b : a)) load.neither.fetch_add(1);  // it counts once swap has returned
      // A flow keeps two copies of its parameters and writes them in turn: the same ones once more, so that each copy
      // holds now one model and now the other, and a reader that is still there would see it change.
      std::vector<float> same(static_cast<std::size_t>(served.num_parameters()));
      served.copy_parameters<float>(same);
      served.set_parameters<float>(same);
    });
    load.finish();
    CHECK(answer_of(served, x) == (count % 2 == 0 ? a : b));
    CHECK(answer_of(other, x) == (count % 2 == 0 ? b : a));
  }
}

TEST_CASE("reload under load") {
  const std::string paths[] = {"test_reload_a.safetensors", "test_reload_b.safetensors"};
  Flow served = model(kSpec, 1);
  const std::vector<float> x(12, -0.2f);
  const Flow next = model(kSpec, 2);
  const Answer a = answer_of(served, x), b = answer_of(next, x);
  served.save(paths[0]);
  next.save(paths[1]);
  Load load;
  load.start(served, x, a, b);
  repeat([&](long i) { served.reload(paths[(i / 2 + 1) % 2]); });  // each twice: as above
  load.finish();
  for (const std::string& path : paths) std::remove(path.c_str());
}

TEST_CASE("threads that swap the same flows in both directions do not wait for each other for ever") {
  Flow first = model(kSpec, 1), second = model(kSpec, 2);
  const std::vector<float> x(12, 0.1f);
  const Answer a = answer_of(first, x), b = answer_of(second, x);
  std::thread back([&] {
    for (int i = 0; i < 300; ++i) second.swap(first);
  });
  for (int i = 0; i < 300; ++i) first.swap(second);
  back.join();
  CHECK(answer_of(first, x) == a);
  CHECK(answer_of(second, x) == b);
}

TEST_CASE("what cannot be reloaded or swapped leaves both as they were") {
  Flow flow = model(kSpec, 1);
  Flow wider(FlowSpec::real_nvp(12, 3, {41}, nvpflow::Activation::tanh));
  const std::vector<float> x(12, 0.1f);
  const Answer before = answer_of(flow, x);
  CHECK_THROWS_WITH_AS(flow.swap(wider), "layers[0].hidden_sizes is [41] in other, expected [40]", nvpflow::Error);
  CHECK_THROWS_AS(flow.reload("there/is/no/such/file"), nvpflow::Error);
  wider.save("test_reload_wider.safetensors");
  std::string message;
  try {
    flow.reload("test_reload_wider.safetensors");
  } catch (const nvpflow::Error& error) {
    message = error.what();
  }
  std::remove("test_reload_wider.safetensors");
  CHECK(message.find("hidden_sizes is [41] in the file, expected [40]") != std::string::npos);
  CHECK(answer_of(flow, x) == before);
}
