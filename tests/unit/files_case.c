#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "tests/unit/files_case.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

uint32_t random_number(uint64_t draw, uint32_t stream, uint32_t i) {
  return philox4(5, draw, stream, i).v[0];
}

char *path_in(const char *folder, const char *name) {
  return xasprintf("%s/%s", folder, name);
}

void write_bytes(const char *path, const void *data, size_t n) {
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(data, 1, n, f), n);
  assert_int_equal(fclose(f), 0);
}

char *read_bytes(const char *path, size_t *n) {
  Error err;
  char *text = file_read(path, 1 << 28, n, &err);
  if (!text) fail_msg("%s", err.text);
  return text;
}

int entries(const char *path) {
  int n = 0;
  char *pattern = xasprintf("ls -A %s | wc -l", path);
  FILE *f = popen(pattern, "r");
  assert_int_equal(fscanf(f, "%d", &n), 1);
  pclose(f);
  free(pattern);
  return n;
}

int as_nobody(const char *folder, int (*test)(void)) {
  assert_int_equal(chmod(folder, 0755), 0);
  pid_t child = fork();
  if (child == 0) _exit(geteuid() == 0 && setuid(65534) != 0 ? 100 : test());
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  return WEXITSTATUS(status);
}

void tensors_random(Tensors *m, uint64_t draw, int max_dim) {
  *m = (Tensors){.n = 1 + (int)(random_number(draw, 0, 0) % MAX_TENSORS)};
  for (int i = 0; i < m->n; i++) {
    SafeTensor *t = &m->t[i];
    t->name = m->name[i];
    uint32_t stream = 1 + (uint32_t)i;
    t->dtype = (SafeDtype)(random_number(draw, stream, 0) % SAFE_DTYPES);
    t->rank = (int)(random_number(draw, stream, 1) % 4);
    for (int d = 0; d < t->rank; d++) t->shape[d] = random_number(draw, stream, 2 + (uint32_t)d) % (uint32_t)max_dim;
    snprintf(m->name[i], sizeof m->name[i], "layer.%d.\"é\\%u", i, random_number(draw, stream, 8));
    uint8_t *data = xmalloc(safe_bytes(t));
    for (size_t b = 0; b < safe_bytes(t); b++) data[b] = (uint8_t)random_number(draw, stream, 16 + (uint32_t)b);
    t->data = data;
  }
}

void tensors_free(Tensors *m) {
  for (int i = 0; i < m->n; i++) free((void *)m->t[i].data);
}

void assert_same_tensors(const SafeFile *f, const Tensors *m) {
  assert_int_equal(f->n, m->n);
  for (int i = 0; i < m->n; i++) {
    const SafeTensor *want = &m->t[i], *got = safetensors_find(f, want->name);
    assert_non_null(got);
    assert_int_equal(got->dtype, want->dtype);
    assert_int_equal(got->rank, want->rank);
    for (int d = 0; d < got->rank; d++) assert_int_equal(got->shape[d], want->shape[d]);
    assert_int_equal((uintptr_t)got->data % safe_bytes(&(SafeTensor){.dtype = got->dtype}), 0);
    if (safe_bytes(want)) assert_memory_equal(got->data, want->data, safe_bytes(want));
  }
}

const char *metadata_value(const SafeFile *f, const char *key) {
  for (int i = 0; i < f->n_metadata; i++)
    if (strcmp(f->metadata[i].key, key) == 0) return f->metadata[i].value;
  return NULL;
}
