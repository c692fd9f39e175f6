// Preloaded into a process whose file operations are to fail or to end it: tests/python/test_faults.py.
//
// faults_arm(n, action, error) lets the n-th call from then on of this thread, counted from 1, go wrong: `action` says
// how, `error` is its errno where it fails, or what happens to the file that is read. faults_disarm() gives the number
// of calls seen since, faults_names() their names.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { NOTHING = 0, KILL_BEFORE = 1, KILL_AFTER = 2, FAIL = 3, SHORT = 4, KILL_HALFWAY = 5, CHANGE = 6, STALL = 7 };
enum { LONGER = 1, EMPTY = 2, A_SECOND_LATER = 3, A_NANOSECOND_LATER = 4 };

static __thread int armed = 0, action = NOTHING, error = 0;
static __thread long calls = 0, target = 0;
static __thread char names[65536];

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void note(const char* name) {
  const size_t used = strlen(names), more = strlen(name);
  if (used + more + 2 > sizeof names) return;
  memcpy(names + used, name, more);
  names[used + more] = ' ';
  names[used + more + 1] = 0;
}

static void die(void) { kill(getpid(), SIGKILL); }

// Whether this call is the one, which then has died or is to fail.
static int chosen(const char* name) {
  if (!armed) return 0;
  note(name);
  if (++calls != target) return 0;
  if (action == KILL_BEFORE) die();
  if (action == FAIL) errno = error;
  return 1;
}

__attribute__((visibility("default"))) void faults_arm(long n, int what, int number) {
  calls = 0;
  target = n;
  action = what;
  error = number;
  names[0] = 0;
  armed = 1;
}

__attribute__((visibility("default"))) long faults_disarm(void) {
  armed = 0;
  return calls;
}

__attribute__((visibility("default"))) const char* faults_names(void) { return names; }

// The call itself, unless it is the one; the process ends after it where it is to.
#define CALL(type, name, arguments)                \
  do {                                             \
    const int here = chosen(#name);                \
    if (here && action == FAIL) return (type) - 1; \
    const type came = NEXT(name) arguments;        \
    if (here && action == KILL_AFTER) die();       \
    return came;                                   \
  } while (0)

#define MODE                               \
  mode_t mode = 0;                         \
  if (flags & (O_CREAT | O_TMPFILE)) {     \
    va_list list;                          \
    va_start(list, flags);                 \
    mode = (mode_t)va_arg(list, unsigned); \
    va_end(list);                          \
  }

int open(const char* path, int flags, ...) {
  MODE;
  CALL(int, open, (path, flags, mode));
}
int open64(const char* path, int flags, ...) {
  MODE;
  CALL(int, open64, (path, flags, mode));
}

static ssize_t part(ssize_t (*next)(int, const void*, size_t), int file, const void* bytes, size_t size) {
  const int here = chosen("write");
  if (here && action == FAIL) return -1;
  if (here && action == STALL) return 0;  // as no file system should
  if (here && action == SHORT) size = 1;
  if (here && action == KILL_HALFWAY) size = (size + 1) / 2;
  const ssize_t result = next(file, bytes, size);
  if (here && (action == KILL_AFTER || action == KILL_HALFWAY)) die();
  return result;
}
ssize_t write(int file, const void* bytes, size_t size) { return part(NEXT(write), file, bytes, size); }

// Somebody else writes to the file, or seems to.
static void change(int file, int how) {
  char path[32];
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  struct stat was;
  NEXT(fstat)(file, &was);
  if (how == LONGER) truncate(path, was.st_size + 1);
  if (how == EMPTY) truncate(path, 0);
  // The time of the last change is the old one, but for what is asked for.
  struct timespec times[2] = {was.st_atim, was.st_mtim};
  if (how == A_SECOND_LATER) ++times[1].tv_sec;
  if (how == A_NANOSECOND_LATER) times[1].tv_nsec += times[1].tv_nsec == 999999999 ? -1 : 1;
  utimensat(AT_FDCWD, path, times, 0);
}

ssize_t pread(int file, void* bytes, size_t size, off_t offset) {
  const int here = chosen("pread");
  if (here && action == FAIL) return -1;
  if (here && action == CHANGE) change(file, error);
  const ssize_t result = NEXT(pread)(file, bytes, here && action == SHORT ? (size + 1) / 2 : size, offset);
  if (here && action == KILL_AFTER) die();
  return result;
}
int fstat(int file, struct stat* result) { CALL(int, fstat, (file, result)); }

int fsync(int file) { CALL(int, fsync, (file)); }
int fdatasync(int file) { CALL(int, fdatasync, (file)); }
int fchmod(int file, mode_t mode) { CALL(int, fchmod, (file, mode)); }
int rename(const char* from, const char* to) { CALL(int, rename, (from, to)); }
ssize_t readlink(const char* path, char* target, size_t size) { CALL(ssize_t, readlink, (path, target, size)); }
int unlink(const char* path) { CALL(int, unlink, (path)); }
int access(const char* path, int mode) { CALL(int, access, (path, mode)); }
int stat(const char* path, struct stat* result) { CALL(int, stat, (path, result)); }
int lstat(const char* path, struct stat* result) { CALL(int, lstat, (path, result)); }

// Linux has closed the file when close fails.
int close(int file) {
  const int here = chosen("close");
  const int result = NEXT(close)(file);
  if (here && action == KILL_AFTER) die();
  if (here && action == FAIL) {
    errno = error;
    return -1;
  }
  return result;
}
