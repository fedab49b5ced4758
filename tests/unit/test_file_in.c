// Files of any size, read in order while the next chunks are on their way; without threads too.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/file_in.h"
#include "tests/unit/assert_text.h"
#include "tests/unit/files_case.h"
#include "tests/unit/temp_folder.h"

#include <fcntl.h>
#include <sys/resource.h>

// Files of any size, those too that need more memory than the reader has.
static void files_are_read_in_order(void **state) {
  (void)state;
  static const int64_t sizes[] = {0,
                                  1,
                                  FILE_IN_CHUNK - 1,
                                  FILE_IN_CHUNK,
                                  FILE_IN_CHUNK + 1,
                                  5 * FILE_IN_CHUNK,
                                  (FILE_IN_SLOTS + 5) * FILE_IN_CHUNK + 7};
  char *path = path_in(folder, "big"), *memory = xmalloc(file_in_memory(1ull << 40));
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600); // mostly holes, a number at the head of each chunk
    assert_int_equal(ftruncate(fd, sizes[s]), 0);
    for (int64_t at = 0; at + 8 <= sizes[s]; at += FILE_IN_CHUNK) assert_int_equal(pwrite(fd, &at, 8, at), 8);
    close(fd);
    Error err;
    FileIn *f = file_in_open(path, memory, &err);
    assert_non_null(f);
    const void *data;
    int64_t at = 0, n;
    while ((n = file_in_next(f, &data, &err)) > 0) {
      assert_int_equal(n, min_i64(FILE_IN_CHUNK, sizes[s] - at));
      if (n >= 8) assert_memory_equal(data, &at, 8);
      at += n;
    }
    assert_int_equal(n, 0);
    assert_int_equal(at, sizes[s]);
    assert_int_equal(file_in_next(f, &data, &err), 0);
    file_in_close(f);
    f = file_in_open(path, memory, &err); // given up at once
    file_in_close(f);
  }
  Error err;
  assert_null(file_in_open(folder, memory, &err));
  assert_null(file_in_open("/nonexistent", memory, &err));
  assert_contains(err.text, "/nonexistent");
  unlink(path);
  free(path);
  free(memory);
}

// Reads the file "big" where no thread can be started. 0 when it is whole.
static int read_alone(void) {
  Error err;
  char *path = path_in(folder, "big"), *memory = xmalloc(file_in_memory(1ull << 40));
  if (setrlimit(RLIMIT_NPROC, &(struct rlimit){0, 0}) != 0) return 1;
  FileIn *f = file_in_open(path, memory, &err);
  const void *data;
  int64_t at = 0, n;
  if (!f) return 2;
  while ((n = file_in_next(f, &data, &err)) > 0) {
    if (memcmp(data, &at, 8) != 0) return 3;
    at += n;
  }
  file_in_close(f);
  free(memory);
  free(path);
  return n == 0 && at == (FILE_IN_SLOTS + 2) * FILE_IN_CHUNK + 9 ? 0 : 4;
}

// That there is no thread to be had is no fault of the file.
static void files_are_read_without_threads(void **state) {
  (void)state;
  char *path = path_in(folder, "big");
  int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
  assert_int_equal(ftruncate(fd, (FILE_IN_SLOTS + 2) * FILE_IN_CHUNK + 9), 0);
  for (int64_t at = 0; at <= (FILE_IN_SLOTS + 2) * FILE_IN_CHUNK; at += FILE_IN_CHUNK)
    assert_int_equal(pwrite(fd, &at, 8, at), 8);
  close(fd);
  assert_int_equal(as_nobody(folder, read_alone), 0);
  free(path);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(files_are_read_in_order, empty_folder),
      cmocka_unit_test_setup(files_are_read_without_threads, empty_folder),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
