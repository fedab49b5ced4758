// Pinned host memory. The driver finds and clears page after page on the thread that pins them: so a large slab is on
// huge pages where the system has them, and several threads write to it before.
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/pinned.h"

extern "C" {
#include "base/base.h"
}

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

static const size_t large = (size_t)64 << 20; // bytes from which on threads are worth it
static const size_t huge = (size_t)2 << 20, part_bytes = (size_t)32 << 20;

// Where a large slab lies: mapped with room to begin it on a huge page.
typedef struct Mapping {
  void *at;
  size_t bytes;
} Mapping;

static struct {
  std::mutex lock;
  std::map<void *, Mapping> of; // by the slab's address
} slabs;

// Has every page of a part of a slab there, filled with zeros.
static void part_touch(char *at, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  if (madvise(at, bytes, MADV_POPULATE_WRITE) == 0) return;
#endif
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  for (size_t i = 0; i < bytes; i += page) ((volatile char *)at)[i] = 0;
}

static void pages_touch(char *at, size_t bytes) {
  const size_t parts = (bytes + part_bytes - 1) / part_bytes;
  const unsigned workers = std::min(std::max(std::thread::hardware_concurrency(), 1u), 16u);
  std::atomic<size_t> next(0);
  std::vector<std::thread> thread;
  const auto work = [&] {
    for (size_t part; (part = next++) < parts;)
      part_touch(at + part * part_bytes, std::min(part_bytes, bytes - part * part_bytes));
  };
  madvise(at, bytes, MADV_HUGEPAGE);
  for (unsigned i = 1; i < workers; i++) thread.emplace_back(work);
  work();
  for (auto &t : thread) t.join();
}

static void *slab_alloc(size_t bytes) {
  const double began = time_now();
  const Mapping m = {mmap(NULL, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
                     bytes + huge};
  if (m.at == MAP_FAILED) return NULL;
  char *const slab = (char *)(((uintptr_t)m.at + huge - 1) / huge * huge);
  pages_touch(slab, bytes);
  const double touched = time_now();
  if (!cuda_was_allocated(cudaHostRegister(slab, bytes, cudaHostRegisterDefault))) {
    munmap(m.at, m.bytes);
    return NULL;
  }
  const double registered = time_now();
  if (registered - began > 1)
    log_info("%.1f GB of host memory pinned in %.1f s: found in %.1f, registered in %.1f", (double)bytes / 1e9,
             registered - began, touched - began, registered - touched);
  std::lock_guard<std::mutex> guard(slabs.lock);
  slabs.of[slab] = m;
  return slab;
}

void *pinned_alloc(size_t bytes) {
  void *p = NULL;
  cuda_use_device();
  if (bytes >= large) return slab_alloc(bytes);
  return cuda_was_allocated(cudaMallocHost(&p, bytes)) ? p : NULL;
}

void pinned_release(void *p) {
  Mapping m = {};
  cuda_use_device();
  {
    std::lock_guard<std::mutex> guard(slabs.lock);
    const auto found = slabs.of.find(p);
    if (found != slabs.of.end()) {
      m = found->second;
      slabs.of.erase(found);
    }
  }
  if (!m.at) {
    CUDA_CHECK(cudaFreeHost(p));
    return;
  }
  CUDA_CHECK(cudaHostUnregister(p));
  munmap(m.at, m.bytes);
}
