// Training by several processes: threads stand for them here, whose sums are formed in a random order.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <nvpflow/communicator.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/train.hpp>

#include "cpu/cpu_flow.hpp"
#include "cpu/kernels.hpp"
#include "exact_gradient.hpp"
#include "shards.hpp"

using namespace nvpflow;

namespace {

/// Where so many ranks meet.
class Meeting {
 public:
  explicit Meeting(int size) : arrays_(static_cast<std::size_t>(size)), barrier_(size), random_(7) {}

  template <class Combine>
  void meet(int rank, std::span<std::int64_t> values, Combine combine) {
    arrays_[static_cast<std::size_t>(rank)] = values;
    barrier_.arrive_and_wait();
    if (rank == 0) {
      std::vector<std::vector<std::int64_t>> all;
      for (const auto& array : arrays_) {
        same_size_ = same_size_ && array.size() == values.size();
        all.emplace_back(array.begin(), array.end());
      }
      while (all.size() > 1) {  // random pairs
        std::shuffle(all.begin(), all.end(), random_);
        for (std::size_t i = 0; i < all.back().size(); ++i) all[0][i] = combine(all[0][i], all.back()[i]);
        all.pop_back();
      }
      result_ = all.front();
    }
    barrier_.arrive_and_wait();
    std::copy(result_.begin(), result_.end(), values.begin());
    barrier_.arrive_and_wait();
  }
  bool same_size() const { return same_size_; }

 private:
  std::vector<std::span<std::int64_t>> arrays_;
  std::vector<std::int64_t> result_;
  std::barrier<> barrier_;
  std::mt19937_64 random_;
  bool same_size_ = true;
};

class Rank final : public Communicator {
 public:
  Rank(Meeting& meeting, int rank, int size) : meeting_(meeting), rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void sum(std::span<std::int64_t> values) override {
    meeting_.meet(rank_, values, [](std::int64_t a, std::int64_t b) {
      return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
    });
  }
  void max(std::span<std::int64_t> values) override {
    meeting_.meet(rank_, values, [](std::int64_t a, std::int64_t b) { return std::max(a, b); });
  }

 private:
  Meeting& meeting_;
  int rank_, size_;
};

/// f(rank, communicator) on a thread for each of so many ranks.
template <class F>
void on_ranks(int size, F&& f) {
  Meeting meeting(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      Rank own(meeting, rank, size);
      f(rank, own);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(meeting.same_size());
}

constexpr std::int64_t kFeatures = 3;

template <class T>
std::vector<T> some_rows(std::int64_t count) {
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  std::vector<T> x;
  for (std::int64_t i = 0; i < count; ++i) {
    const double a = normal(random), b = normal(random), c = normal(random);
    for (const double v : {5 + 2 * a, a * b, 0.01 * c + 0.1 * a * a}) x.push_back(static_cast<T>(v));
  }
  return x;
}

struct Result {
  std::vector<double> parameters;
  History history;
  std::string message;
};

template <class T>
Result fit_rows(std::span<const T> x, std::span<const T> validation, const FitOptions& options, Communicator* ranks,
                FitObserver* observer = nullptr) {
  const DType dtype = sizeof(T) == 4 ? DType::float32 : DType::float64;
  Flow flow(FlowSpec::real_nvp(kFeatures, 2, {9}, Activation::relu, 1.0, /*standardize=*/true, dtype), /*seed=*/1);
  Result found;
  try {
    found.history = fit<T>(flow, x, validation, options, observer, {}, {}, nullptr, ranks);
  } catch (const Error& error) {
    found.message = error.what();
  }
  std::vector<T> parameters(static_cast<std::size_t>(flow.num_parameters()));
  flow.copy_parameters<T>(parameters);
  found.parameters.assign(parameters.begin(), parameters.end());
  return found;
}

/// What every one of `size` ranks comes to.
template <class T>
std::vector<Result> fit_on_ranks(int size, const std::vector<T>& x, const std::vector<T>& validation,
                                 const FitOptions& options) {
  std::vector<Result> results(static_cast<std::size_t>(size));
  on_ranks(size, [&](int rank, Communicator& ranks) {
    const auto part = [&](const std::vector<T>& rows) {
      const auto count = static_cast<std::int64_t>(rows.size()) / kFeatures;
      const auto [begin, end] = rows_of_process(count, options.shards, rank, size);
      return std::span<const T>(rows).subspan(static_cast<std::size_t>(begin * kFeatures),
                                              static_cast<std::size_t>((end - begin) * kFeatures));
    };
    results[static_cast<std::size_t>(rank)] = fit_rows<T>(part(x), part(validation), options, &ranks);
  });
  return results;
}

void check_equal(const Result& a, const Result& b) {
  CHECK(a.message == b.message);
  CHECK(a.parameters == b.parameters);
  CHECK(a.history.best_epoch == b.history.best_epoch);
  CHECK(a.history.best_loss == b.history.best_loss);
  REQUIRE(a.history.epochs.size() == b.history.epochs.size());
  for (std::size_t i = 0; i < a.history.epochs.size(); ++i) {
    CHECK(a.history.epochs[i].train_loss == b.history.epochs[i].train_loss);
    CHECK(a.history.epochs[i].gradient_norm == b.history.epochs[i].gradient_norm);
    const double loss = a.history.epochs[i].validation_loss;
    CHECK((std::isnan(loss) || loss == b.history.epochs[i].validation_loss));
  }
}

FitOptions few_epochs(std::int64_t shards) {
  FitOptions options;
  options.epochs = 3;
  options.shards = shards;
  return options;
}

template <class T>
void check_ranks(std::int64_t rows, std::int64_t shards, const std::vector<int>& sizes) {
  CAPTURE(rows);
  CAPTURE(shards);
  CAPTURE(sizeof(T));
  const std::vector<T> x = some_rows<T>(rows);
  const Result alone = fit_rows<T>(x, {}, few_epochs(shards), nullptr);
  CHECK(alone.message.empty());
  CHECK(alone.history.epochs.size() == 3);
  CHECK(alone.history.epochs.back().train_loss < alone.history.epochs.front().train_loss);
  for (const int size : sizes) {
    CAPTURE(size);
    for (const Result& of_rank : fit_on_ranks<T>(size, x, {}, few_epochs(shards))) check_equal(of_rank, alone);
  }
}

template <class T>
void check_sums() {
  const FlowSpec spec = FlowSpec::real_nvp(5, 2, {33});
  const ParamLayout layout(spec);
  const auto size = static_cast<std::size_t>(layout.size());
  for (const std::int64_t shards : {2, 7, 64}) {
    std::mt19937_64 random(9);
    std::normal_distribution<double> normal;
    std::vector<std::vector<T>> addends(static_cast<std::size_t>(shards), std::vector<T>(size));
    for (auto& addend : addends) {
      for (T& v : addend) v = static_cast<T>(normal(random) * std::exp2(static_cast<double>(random() % 30)));
    }
    std::vector<T> first;
    for (int threads : {1, 2}) {
      std::shuffle(addends.begin(), addends.end(), random);
      ExactGradient<T> sum(layout, shards, threads);
      const auto add_all = [&] {
        sum.clear();
        for (const auto& addend : addends) sum.add(addend.data(), -1.5);
      };
      add_all();
      CHECK(sum.is_outside());  // the first grid knows nothing
      CHECK(sum.is_finite());
      sum.widen();
      add_all();
      CHECK(!sum.is_outside());
      std::vector<T> found(size, std::numeric_limits<T>::quiet_NaN());  // all of it is trained
      sum.take(found.data());
      CHECK(sum.sum_log_prob() == -1.5 * static_cast<double>(shards));
      for (std::size_t i = 0; i < size; ++i) {
        long double exact = 0;
        for (const auto& addend : addends) exact += static_cast<long double>(addend[i]);
        const double error = static_cast<double>(std::abs(exact - static_cast<long double>(found[i])));
        REQUIRE(error <= std::abs(static_cast<double>(exact)) * std::numeric_limits<T>::epsilon() + 0x1p-20);
      }
      if (first.empty()) first = found;
      CHECK(found == first);
      add_all();
      CHECK(!sum.is_outside());  // the next grid leaves room
    }
  }
}

/// Stops or fails on one rank.
class Troublesome final : public FitObserver {
 public:
  enum class Trouble { none, stops, fails, ends };
  explicit Troublesome(Trouble trouble) : trouble_(trouble) {}
  bool on_progress(std::int64_t epoch, std::int64_t step, std::int64_t) override {
    if (epoch != 2 || step != 1) return true;
    if (trouble_ == Trouble::fails) throw Error(ErrorCode::io, "the disk is full");
    return trouble_ != Trouble::stops;
  }
  bool on_epoch(const EpochRecord&) override { return trouble_ != Trouble::ends; }

 private:
  Trouble trouble_;
};

}  // namespace

TEST_CASE("rounding to integers is that of the C library") {
  std::mt19937_64 random(5);
  std::vector<double> values = {0.0,    -0.0,    0.5,          1.5,          -0.5,         -2.5,
                                0x1p61, -0x1p61, 4294967295.5, 2147483648.5, -2147483648.5};
  for (int i = 0; i < 200000; ++i) {
    const double size = std::ldexp(1.0, static_cast<int>(random() % 124) - 62);
    values.push_back((static_cast<double>(random() >> 11) * 0x1p-52 - 1) * size);
  }
  const std::vector<float> narrow(values.begin(), values.end());
  const auto count = static_cast<std::int64_t>(values.size());
  const auto check = [&](const auto& of, auto add) {
    std::vector<std::int64_t> words(of.size(), 7);
    CHECK(add(of.data(), count, 0.5, 0x1p62, words.data()) == 0);
    for (std::size_t i = 0; i < of.size(); ++i) {
      REQUIRE(words[i] == 7 + std::llrint(0.5 * static_cast<double>(of[i])));
    }
  };
  check(values, cpu::chosen_kernels<double>().add_to_grid);
  check(narrow, cpu::chosen_kernels<float>().add_to_grid);
}

TEST_CASE("gradients are added up exactly, in any order") {
  check_sums<float>();
  check_sums<double>();
}

TEST_CASE("a gradient that is not finite is seen") {
  const ParamLayout layout(FlowSpec::real_nvp(4, 1, {}));
  std::vector<float> values(static_cast<std::size_t>(layout.size()), 1.0f);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    ExactGradient<float> sum(layout, 2, 1);
    sum.clear();
    values[3] = bad;
    sum.add(values.data(), 0);
    CHECK(!sum.is_finite());
  }
  ExactGradient<float> sum(layout, 2, 1);
  sum.clear();
  sum.add(std::vector<float>(values.size()).data(), -1e300);
  CHECK(sum.sum_log_prob() == -std::numeric_limits<double>::infinity());
}

TEST_CASE("the weights do not depend on the number of processes") {
  check_ranks<float>(1000, 7, {1, 2, 3, 5, 7});
  check_ranks<double>(611, 4, {2, 3, 4});
  check_ranks<float>(37, 16, {2, 16});  // fewer rows than a step has, and shards without rows of their own
}

TEST_CASE("one shard is a run of its own") {
  const std::vector<float> x = some_rows<float>(500);
  FitOptions none = few_epochs(0);
  check_equal(fit_rows<float>(x, {}, few_epochs(1), nullptr), fit_rows<float>(x, {}, none, nullptr));
}

TEST_CASE("validation rows are shared, too, and decide for all") {
  const std::vector<float> x = some_rows<float>(901), held_out = some_rows<float>(101);
  FitOptions options = few_epochs(5);
  options.patience = 1;
  options.epochs = 40;
  options.learning_rate = 0.1;
  options.max_round_trip = 0.5;
  const Result alone = fit_rows<float>(x, held_out, options, nullptr);
  CHECK(alone.message.empty());
  CHECK(alone.history.validation_rows == 101);
  for (const int size : {2, 5}) {
    for (const Result& of_rank : fit_on_ranks<float>(size, x, held_out, options)) check_equal(of_rank, alone);
  }
}

TEST_CASE("another number of processes goes on from a checkpoint, also in an epoch") {
  const std::vector<float> x = some_rows<float>(800);
  const std::string file = "test_shards.checkpoint";
  FitOptions options = few_epochs(6);
  options.batch_size = 60;
  options.checkpoint = file;
  options.checkpoint_every = 5;
  std::remove(file.c_str());
  const Result whole = fit_rows<float>(x, {}, options, nullptr);
  for (const std::int64_t last_epoch : {1, 2}) {
    std::remove(file.c_str());
    class Killed final : public FitObserver {
     public:
      explicit Killed(std::int64_t epoch) : epoch_(epoch) {}
      bool on_progress(std::int64_t epoch, std::int64_t step, std::int64_t) override {
        return epoch != epoch_ || step < 7;
      }

     private:
      std::int64_t epoch_;
    } killed(last_epoch);
    CHECK(fit_rows<float>(x, {}, options, nullptr, &killed).history.stop_reason == "interrupted");
    for (const Result& of_rank : fit_on_ranks<float>(3, x, {}, options)) check_equal(of_rank, whole);
  }
  std::remove(file.c_str());
}

TEST_CASE("what one process meets, all meet") {
  const std::vector<float> x = some_rows<float>(600);
  using Trouble = Troublesome::Trouble;
  for (const Trouble trouble : {Trouble::stops, Trouble::fails, Trouble::ends}) {
    std::vector<Result> results(3);
    on_ranks(3, [&](int rank, Communicator& ranks) {
      Troublesome observer(rank == 1 ? trouble : Trouble::none);
      const std::span<const float> own = std::span<const float>(x).subspan(static_cast<std::size_t>(rank) * 600, 600);
      results[static_cast<std::size_t>(rank)] = fit_rows<float>(own, {}, few_epochs(3), &ranks, &observer);
    });
    for (const Result& result : results) CHECK(result.history.epochs.size() == (trouble == Trouble::fails ? 0 : 1));
    CHECK(results[0].parameters == results[2].parameters);
    CHECK(results[0].history.stop_reason == results[1].history.stop_reason);
    if (trouble == Trouble::fails) {
      CHECK(results[1].message == "the disk is full");
      CHECK(results[2].message == "process 1 of 3, counted from 0, stopped: the disk is full");
    }
  }
}

TEST_CASE("processes that differ are refused before the first step") {
  const std::vector<float> x = some_rows<float>(600);
  const auto message_of = [&](auto&& change) {
    std::vector<Result> results(3);
    on_ranks(3, [&](int rank, Communicator& ranks) {
      std::vector<float> own(x.begin() + rank * 600, x.begin() + (rank + 1) * 600);
      FitOptions options = few_epochs(3);
      if (rank == 1) change(own, options);
      results[static_cast<std::size_t>(rank)] = fit_rows<float>(own, {}, options, &ranks);
    });
    for (const Result& result : results) CHECK(!result.message.empty());
    return results[0].message;
  };
  const auto has = [](const std::string& message, const char* text) { return message.find(text) != std::string::npos; };
  CHECK(has(message_of([](auto&, FitOptions& o) { o.learning_rate = 0.5; }),
            "learning_rate differs among the processes"));
  CHECK(has(message_of([](auto&, FitOptions& o) { o.shards = 6; }), "shards is 3 in one process and 6 in another"));
  CHECK(has(message_of([](auto&, FitOptions& o) { o.epochs = 0; }),
            "process 1 of 3, counted from 0, stopped: epochs is 0"));
  CHECK(has(message_of([](auto& own, FitOptions&) { own[7] = NAN; }), "x has 1 of 200 rows with NaN"));
  CHECK(has(message_of([](auto& own, FitOptions&) { own.resize(300); }),
            "x has 200 rows in process 0 of 3, expected 166, from row 0 of the 500"));
}
