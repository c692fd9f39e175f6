// The loop of a scoring server: worker threads take requests from a queue and score them on one shared flow, while the
// main thread looks after the model file and reloads it when a new one has been put in its place. No request waits for
// a reload, fails because of one, or is scored by a mixture of two models.
//
//   server MODEL [SECONDS] [WORKERS]        a model file of dtype float32; 10 seconds, 2 workers
//
// Replace MODEL meanwhile, for example with flow.save(MODEL) from Python, which renames and so is seen whole.
#include <sys/stat.h>
#include <sys/types.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <nvpflow/flow.hpp>

namespace {

using Clock = std::chrono::steady_clock;

/// SIGTERM ends the loop; requests that have arrived are still answered.
volatile std::sig_atomic_t terminated = 0;

struct Request {
  std::vector<float> rows;
  Clock::time_point arrived;
};

/// Requests between the thread that takes them in and the workers. Bounded: a server that falls behind says so early.
class Queue {
 public:
  bool push(Request request) {
    const std::lock_guard lock(mutex_);
    if (requests_.size() >= kMost) return false;
    requests_.push_back(std::move(request));
    changed_.notify_one();
    return true;
  }

  /// Waits for a request; false: the queue is closed and empty.
  bool pop(Request& request) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return closed_ || !requests_.empty(); });
    if (requests_.empty()) return false;
    request = std::move(requests_.front());
    requests_.pop_front();
    return true;
  }

  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

 private:
  static constexpr std::size_t kMost = 256;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Request> requests_;
  bool closed_ = false;
};

struct Served {
  std::int64_t requests = 0, rows = 0;
  std::vector<double> microseconds;  // from arrival to answer
};

void work(const nvpflow::Flow& flow, Queue& queue, Served& served) {
  const auto columns = static_cast<std::size_t>(flow.spec().input_size);
  std::vector<float> log_prob;
  for (Request request; queue.pop(request);) {
    log_prob.resize(request.rows.size() / columns);
    flow.log_prob<float>(request.rows, log_prob);
    const std::chrono::duration<double, std::micro> took = Clock::now() - request.arrived;
    served.microseconds.push_back(took.count());
    ++served.requests;
    served.rows += static_cast<std::int64_t>(log_prob.size());
  }
}

/// Reloads when the file is another one than before. A model that cannot be used is reported, and the old one serves
/// on.
class Watcher {
 public:
  explicit Watcher(std::string path) : path_(std::move(path)) { seen_ = version(); }

  void look(nvpflow::Flow& flow) {
    const Version now = version();
    if (now == seen_) return;
    seen_ = now;
    try {
      flow.reload(path_);
      ++reloads;
      std::printf("reloaded %s\n", path_.c_str());
    } catch (const nvpflow::Error& error) {
      std::printf("kept the old model: %s\n", error.what());
    }
  }

  int reloads = 0;

 private:
  /// Times of files advance in steps of milliseconds: a file put in place within one has the old one's time, but not
  /// its inode.
  struct Version {
    std::filesystem::file_time_type time;
    ino_t inode = 0;
    bool operator==(const Version&) const = default;
  };

  Version version() const {
    struct stat status = {};
    std::error_code ignored;  // missing for a moment: the next look sees what has come
    const auto time = std::filesystem::last_write_time(path_, ignored);
    return stat(path_.c_str(), &status) == 0 ? Version{time, status.st_ino} : seen_;
  }

  std::string path_;
  Version seen_;
};

void report(const std::vector<Served>& all, std::int64_t refused, int reloads, double seconds) {
  Served sum;
  for (const Served& one : all) {
    sum.requests += one.requests;
    sum.rows += one.rows;
    sum.microseconds.insert(sum.microseconds.end(), one.microseconds.begin(), one.microseconds.end());
  }
  std::sort(sum.microseconds.begin(), sum.microseconds.end());
  const auto quantile = [&](double q) {
    if (sum.microseconds.empty()) return 0.0;
    return sum.microseconds[static_cast<std::size_t>(q * static_cast<double>(sum.microseconds.size() - 1))];
  };
  std::printf("%lld requests, %lld rows, %.0f rows/s; %lld refused; %d reloads\n", static_cast<long long>(sum.requests),
              static_cast<long long>(sum.rows), static_cast<double>(sum.rows) / seconds,
              static_cast<long long>(refused), reloads);
  std::printf("from arrival to answer: p50 %.0f us, p99 %.0f us\n", quantile(0.5), quantile(0.99));
}

void run(const std::string& path, double seconds, int workers) {
  nvpflow::Flow flow = nvpflow::Flow::load(path);
  // One thread a request: the server's parallelism is between requests.
  flow.set_num_threads(1);
  Watcher watcher(path);
  Queue queue;
  std::vector<Served> served(static_cast<std::size_t>(workers));
  std::vector<std::thread> threads;
  for (Served& one : served) threads.emplace_back(work, std::cref(flow), std::ref(queue), std::ref(one));
  std::printf("serving %s\n", path.c_str());

  // In place of a network: requests of 1 to 32 rows, as fast as the queue takes them up to one in 100 us.
  const auto columns = static_cast<std::size_t>(flow.spec().input_size);
  std::vector<float> rows(32 * columns);
  flow.sample<float>(7, rows);
  std::int64_t refused = 0;
  const auto start = Clock::now();
  const std::chrono::duration<double> duration(seconds);
  for (std::size_t i = 0; terminated == 0 && Clock::now() - start < duration; ++i) {
    const std::size_t count = 1 + i % 32;
    const auto end = rows.begin() + static_cast<std::ptrdiff_t>(count * columns);
    if (!queue.push({std::vector<float>(rows.begin(), end), Clock::now()})) ++refused;
    if (i % 100 == 0) watcher.look(flow);
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  queue.close();
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> took = Clock::now() - start;
  report(served, refused, watcher.reloads, took.count());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: server MODEL [SECONDS] [WORKERS]\n");
    return 2;
  }
  const double seconds = argc > 2 ? std::strtod(argv[2], nullptr) : 10;
  const int workers = argc > 3 ? std::atoi(argv[3]) : 2;
  if (!(seconds > 0) || workers < 1 || workers > 1024) {
    std::fprintf(stderr, "server: expected SECONDS above 0 and WORKERS from 1 to 1024\n");
    return 2;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::signal(SIGTERM, [](int) { terminated = 1; });
  try {
    run(argv[1], seconds, workers);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "server: %s\n", error.what());
    return 1;
  }
  return 0;
}
