// Counts what one thread does while it holds the GIL that would keep other threads from running: copies and comparisons
// of many bytes, memory of many bytes that it frees, and waits for a lock. Preloaded by tests/python/test_threads.py;
// glibc alone.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

static atomic_size_t least = (size_t)-1;  // bytes from which a copy counts; the largest number: nothing does
static atomic_long copies, frees, locks;
static pthread_t watched;
static int (*holds_gil)(void);

void gil_arm(size_t bytes) {
  holds_gil = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Check");
  watched = pthread_self();
  copies = frees = locks = 0;
  least = bytes;
}

/// Copies; what else was counted goes to `freed` and `taken`.
long gil_disarm(long* freed, long* taken) {
  least = (size_t)-1;
  *freed = frees;
  *taken = locks;
  return copies;
}

static int armed(void) { return least != (size_t)-1 && pthread_equal(pthread_self(), watched) && holds_gil(); }

static void note(size_t bytes) {
  if (bytes >= least && armed()) ++copies;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void* memmove(void* to, const void* from, size_t bytes) {
  static void* (*next)(void*, const void*, size_t);
  if (next == NULL) {  // the loader copies before it can be asked
    unsigned char* out = to;
    const unsigned char* in = from;
    if (bytes < 4096) {
      if (out < in)
        for (size_t i = 0; i < bytes; ++i) ((volatile unsigned char*)out)[i] = in[i];
      else
        for (size_t i = bytes; i-- > 0;) ((volatile unsigned char*)out)[i] = in[i];
      return to;
    }
    next = NEXT(memmove);
  }
  note(bytes);
  return next(to, from, bytes);
}

void* memcpy(void* to, const void* from, size_t bytes) { return memmove(to, from, bytes); }
void* __memcpy_chk(void* to, const void* from, size_t bytes, size_t room) {
  (void)room;
  return memmove(to, from, bytes);
}

int memcmp(const void* a, const void* b, size_t bytes) {
  note(bytes);
  const unsigned char *x = a, *y = b;
  for (size_t i = 0; i < bytes; ++i) {
    if (x[i] != y[i]) return x[i] - y[i];
  }
  return 0;
}

extern void __libc_free(void* memory);
void free(void* memory) {
  if (least != (size_t)-1 && memory != NULL && malloc_usable_size(memory) >= least && armed()) ++frees;
  __libc_free(memory);
}

int pthread_mutex_lock(pthread_mutex_t* mutex) {
  static int (*next)(pthread_mutex_t*);
  if (next == NULL) next = NEXT(pthread_mutex_lock);
  if (least != (size_t)-1 && armed()) ++locks;
  return next(mutex);
}
