// Tar archives: the index, then the archive as a WebDataset shard.
#include "data/tar.h"
#include "tests/fuzz/fuzz.h"

#include <fcntl.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const char *path = fuzz_memory(data, size);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  FUZZ_CHECK(fd >= 0);
  TarIndex index;
  Error err = {0};
  if (tar_index(fd, "archive", &index, &err) == 0) {
    for (int64_t i = 0; i < index.count; i++) {
      const TarMember *m = &index.member[i];
      FUZZ_CHECK(m->name[0] && m->offset >= 512 && m->size >= 0 && m->offset + m->size <= (int64_t)size);
    }
    tar_index_free(&index);
    fuzz_source("webdataset", path, "key");
    fuzz_source("webdataset", path, "style");
  } else {
    FUZZ_CHECK(err.text[0] && index.count == 0 && !index.member);
  }
  close(fd);
  return 0;
}
