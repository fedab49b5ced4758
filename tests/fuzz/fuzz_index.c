// The cached index of a shard, with whatever checksum, size and time it needs to be believed.
#include "base/hash.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  enum { HEAD = 32 }; // magic, checksum, size and time of the shard: see data/index_cache.c
  if (size < HEAD) return 0;
  static const char shard_bytes[4096];
  char *shard = fuzz_file("shard.tar", shard_bytes, sizeof shard_bytes);
  struct stat st;
  FUZZ_CHECK(stat(shard, &st) == 0);
  uint8_t *cache = xmalloc(size);
  memcpy(cache, data, size);
  int64_t stamp[2] = {st.st_size, (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec};
  memcpy(cache + 16, stamp, sizeof stamp);
  uint64_t checksum = hash64(cache + 16, size - 16, 0);
  memcpy(cache + 8, &checksum, sizeof checksum);
  free(fuzz_file(".shard.tar.index", cache, size));
  fuzz_source("webdataset", shard, "key");
  free(cache);
  free(shard);
  return 0;
}
