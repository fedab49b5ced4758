#include "tests/fuzz/fuzz.h"

#include "data/image.h"
#include "data/source.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { FUZZ_MAX_PIXELS = 1 << 16 };

void fuzz_fail(const char *what, const char *file, int line) {
  printf("%s:%d: does not hold: %s\n", file, line, what);
  fflush(stdout);
  abort();
}

static char scratch[64];

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw) {
  (void)st, (void)type, (void)ftw;
  return remove(path);
}

static void scratch_remove(void) {
  nftw(scratch, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

char *fuzz_path(const char *name) {
  if (!scratch[0]) {
    const char *memory = "/dev/shm"; // thousands of files a second are written
    snprintf(scratch, sizeof scratch, "%s/tessera-fuzz-XXXXXX", access(memory, W_OK) == 0 ? memory : "/tmp");
    FUZZ_CHECK(mkdtemp(scratch));
    atexit(scratch_remove);
  }
  return xasprintf("%s/%s", scratch, name);
}

char *fuzz_file(const char *name, const void *bytes, size_t n) {
  char *path = fuzz_path(name);
  FILE *f = fopen(path, "wb");
  FUZZ_CHECK(f && fwrite(bytes, 1, n, f) == n);
  FUZZ_CHECK(fclose(f) == 0);
  return path;
}

const char *fuzz_memory(const void *bytes, size_t n) {
  static int fd = -1;
  static char path[32];
  if (fd < 0) fd = memfd_create("fuzz", MFD_CLOEXEC);
  FUZZ_CHECK(fd >= 0 && ftruncate(fd, 0) == 0 && pwrite(fd, bytes, n, 0) == (ssize_t)n);
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  return path;
}

uint8_t *fuzz_png(size_t *n) {
  uint8_t pixels[9 * 7 * 3];
  for (size_t i = 0; i < sizeof pixels; i++) pixels[i] = (uint8_t)(i * 11);
  Image image = {9, 7, pixels};
  Error err;
  uint8_t *png = image_encode_png(&image, n, &err);
  FUZZ_CHECK(png);
  return png;
}

static void check_part(const Source *s, const SamplePart *part) {
  if (part->kind == PART_TEXT) {
    FUZZ_CHECK(part->text_bytes > 0 && part->text[part->text_bytes] == 0);
    return;
  }
  FUZZ_CHECK(part->width >= 1 && part->height >= 1);
  FUZZ_CHECK((int64_t)part->width * part->height <= IMAGE_MAX_PIXELS);
  uint8_t *bytes;
  size_t n;
  Error err = {0};
  Image image;
  char *name = source_image_name(s, part->image);
  FUZZ_CHECK(name[0]);
  free(name);
  if (source_read_image(s, part->image, &bytes, &n, &err) != 0) {
    FUZZ_CHECK(!bytes && err.text[0]);
    return;
  }
  if (image_decode(bytes, n, FUZZ_MAX_PIXELS, &image, &err) != 0) FUZZ_CHECK(!image.rgb && err.text[0]);
  image_free(&image);
  free(bytes);
}

void fuzz_source(const char *type, const char *path, const char *held_out_by) {
  Error err = {0};
  Source *s = source_open(type, path, held_out_by, &err);
  if (!s) {
    FUZZ_CHECK(err.text[0]);
    return;
  }
  FUZZ_CHECK(source_count(s) > 0);
  for (int64_t i = 0; i < source_count(s); i++) {
    const Sample *sample = source_sample(s, i);
    FUZZ_CHECK(sample->parts > 0 && sample->key && sample->group);
    if (sample->kind == SAMPLE_CAPTIONED) FUZZ_CHECK(sample->parts == 2 && sample->part[1].kind == PART_IMAGE);
    for (int k = 0; k < sample->parts; k++) check_part(s, &sample->part[k]);
    sample_is_held_out(sample->group, 0.5);
  }
  source_close(s);
}
