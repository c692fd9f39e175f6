// Counts a whole process's requests of memory, whoever makes them: NumPy, PyTorch, XLA, operator new. Preloaded by
// tests/python/test_interop.py; glibc alone, whose own functions answer.
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static atomic_size_t least = (size_t)-1;  // bytes from which a request counts; the largest number: none does
static atomic_long count;

void allocations_arm(size_t bytes) {
  count = 0;
  least = bytes;
}

long allocations_disarm(void) {
  least = (size_t)-1;
  return count;
}

static void note(size_t bytes) {
  if (bytes >= least) ++count;
}

void* malloc(size_t bytes) {
  note(bytes);
  return __libc_malloc(bytes);
}

void* calloc(size_t n, size_t bytes) {
  note(n * bytes);
  return __libc_calloc(n, bytes);
}

void* realloc(void* old, size_t bytes) {
  note(bytes);
  return __libc_realloc(old, bytes);
}

void* memalign(size_t alignment, size_t bytes) {
  note(bytes);
  return __libc_memalign(alignment, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

int posix_memalign(void** result, size_t alignment, size_t bytes) {
  void* memory = memalign(alignment, bytes);
  if (memory == NULL) return ENOMEM;
  *result = memory;
  return 0;
}
