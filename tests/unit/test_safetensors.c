// safetensors and checkpoints: round trips, hostile and damaged files, saves that fail or are killed, pruning, the
// lock.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/hash.h"
#include "base/philox.h"
#include "model/files/checkpoint.h"
#include "tests/unit/temp_folder.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static uint32_t rnd(uint64_t draw, uint32_t stream, uint32_t i) {
  return philox4(5, draw, stream, i).v[0];
}

static void assert_contains(const char *text, const char *part) {
  if (!strstr(text, part)) fail_msg("\"%s\" does not contain \"%s\"", text, part);
}

static char *in_folder(const char *name) {
  return xasprintf("%s/%s", folder, name);
}

static void write_bytes(const char *path, const void *data, size_t n) {
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(data, 1, n, f), n);
  assert_int_equal(fclose(f), 0);
}

static char *read_bytes(const char *path, size_t *n) {
  Error err;
  char *text = file_read(path, 1 << 28, n, &err);
  if (!text) fail_msg("%s", err.text);
  return text;
}

static int entries(const char *path) {
  int n = 0;
  char *pattern = xasprintf("ls -A %s | wc -l", path);
  FILE *f = popen(pattern, "r");
  assert_int_equal(fscanf(f, "%d", &n), 1);
  pclose(f);
  free(pattern);
  return n;
}

// ---- safetensors ----

enum { MAX_TENSORS = 12 };
typedef struct Model {
  int n;
  SafeTensor t[MAX_TENSORS];
  char name[MAX_TENSORS][48];
} Model;

// Tensors of every dtype with random shapes: scalars, empty ones and odd sizes among them.
static Model model_random(uint64_t draw, int max_dim) {
  Model m = {.n = 1 + (int)(rnd(draw, 0, 0) % MAX_TENSORS)};
  for (int i = 0; i < m.n; i++) {
    SafeTensor *t = &m.t[i];
    uint32_t stream = 1 + (uint32_t)i;
    t->dtype = (SafeDtype)(rnd(draw, stream, 0) % SAFE_DTYPES);
    t->rank = (int)(rnd(draw, stream, 1) % 4);
    for (int d = 0; d < t->rank; d++) t->shape[d] = rnd(draw, stream, 2 + (uint32_t)d) % (uint32_t)max_dim;
    snprintf(m.name[i], sizeof m.name[i], "layer.%d.\"é\\%u", i, rnd(draw, stream, 8));
    uint8_t *data = xmalloc(safe_bytes(t));
    for (size_t b = 0; b < safe_bytes(t); b++) data[b] = (uint8_t)rnd(draw, stream, 16 + (uint32_t)b);
    t->data = data;
  }
  return m;
}

static void model_name(Model *m) { // after the struct has its final place
  for (int i = 0; i < m->n; i++) m->t[i].name = m->name[i];
}

static void model_free(Model *m) {
  for (int i = 0; i < m->n; i++) free((void *)m->t[i].data);
}

static void assert_same(const SafeFile *f, const Model *m) {
  assert_int_equal(f->n, m->n);
  for (int i = 0; i < m->n; i++) {
    const SafeTensor *want = &m->t[i], *got = safetensors_find(f, want->name);
    assert_non_null(got);
    assert_int_equal(got->dtype, want->dtype);
    assert_int_equal(got->rank, want->rank);
    for (int d = 0; d < got->rank; d++) assert_int_equal(got->shape[d], want->shape[d]);
    assert_int_equal((uintptr_t)got->data % safe_dtype_bytes(got->dtype), 0);
    if (safe_bytes(want)) assert_memory_equal(got->data, want->data, safe_bytes(want));
  }
}

static void round_trip(void **state) {
  (void)state;
  char *path = in_folder("m.safetensors");
  for (uint64_t draw = 0; draw < 100; draw++) {
    Model m = model_random(draw, 9);
    model_name(&m);
    SafePair metadata[] = {{"format", "pt"}, {"key \"2\"", "line\nline"}};
    Error err;
    int pairs = (int)(draw % 3);
    if (safetensors_write(path, m.t, m.n, metadata, pairs, draw % 2, &err)) fail_msg("%s", err.text);
    SafeFile *f = safetensors_open(path, &err);
    if (!f) fail_msg("%s", err.text);
    assert_same(f, &m);
    assert_int_equal(f->n_metadata, pairs);
    for (int i = 0; i < pairs; i++) assert_string_equal(safetensors_metadata(f, metadata[i].key), metadata[i].value);
    assert_null(safetensors_metadata(f, "none"));
    assert_null(safetensors_find(f, "none"));
    safetensors_close(f);
    model_free(&m);
  }
  free(path);
}

static void get_demands_shape(void **state) {
  (void)state;
  char *path = in_folder("g.safetensors");
  float data[6] = {1, 2, 3, 4, 5, 6};
  SafeTensor t = {"w", SAFE_F32, 2, {2, 3}, data};
  Error err;
  assert_int_equal(safetensors_write(path, &t, 1, NULL, 0, false, &err), 0);
  SafeFile *f = safetensors_open(path, &err);
  assert_non_null(safetensors_get(f, "w", SAFE_F32, 2, (int64_t[]){2, 3}, &err));
  assert_non_null(safetensors_get(f, "w", SAFE_F32, -1, NULL, &err));
  assert_null(safetensors_get(f, "w", SAFE_F32, 2, (int64_t[]){3, 2}, &err));
  assert_contains(err.text, "tensor w is F32 [2, 3], expected F32 [3, 2]");
  assert_null(safetensors_get(f, "w", SAFE_BF16, -1, NULL, &err));
  assert_contains(err.text, "expected BF16");
  assert_null(safetensors_get(f, "w", SAFE_F32, 1, (int64_t[]){6}, &err));
  assert_null(safetensors_get(f, "v", SAFE_F32, -1, NULL, &err));
  assert_contains(err.text, "v is missing");
  safetensors_close(f);
  free(path);
}

// Opens header + `data_bytes` bytes of data, with *length as the header's length (NULL: the true one).
static SafeFile *open_made(const char *header, size_t data_bytes, const uint64_t *length, Error *err) {
  char *path = in_folder("h.safetensors");
  size_t n = strlen(header);
  uint64_t stated = length ? *length : n;
  char *bytes = xcalloc(8 + n + data_bytes, 1);
  memcpy(bytes, &stated, 8);
  memcpy(bytes + 8, header, n);
  write_bytes(path, bytes, 8 + n + data_bytes);
  SafeFile *f = safetensors_open(path, err);
  free(bytes);
  free(path);
  return f;
}

#define T(dtype, shape, begin, end) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"

static void hostile_headers(void **state) {
  (void)state;
  static const struct {
    const char *header;
    size_t data_bytes;
    const char *expected; // NULL: valid
  } cases[] = {
      {"{}", 0, NULL},
      {"{}   ", 0, NULL},
      {"{\"a\":" T("F32", "[2]", "0", "8") "}", 8, NULL},
      {"{\"a\":" T("F32", "[]", "0", "4") "}", 4, NULL},
      {"{\"b\":" T("U8", "[3]", "4", "7") ",\"a\":" T("F32", "[1]", "0", "4") "}", 7, NULL},
      {"{\"a\":" T("F32", "[0,5]", "0", "0") ",\"b\":" T("U8", "[2]", "0", "2") "}", 2, NULL},
      {"{}", 1, "1 bytes at its end belong to no tensor"},
      {"[]", 0, "not an object"},
      {"", 0, "a value is expected"},
      {"{\"a\":3}", 0, "dtype missing"},
      {"{\"a\":{}}", 0, "dtype missing"},
      {"{\"a\":" T("F16", "[2]", "0", "4") "}", 4, "dtype F16"},
      {"{\"a\":" T("F32", "[2]", "0", "9") "}", 9, "9 bytes of data where its shape says 8"},
      {"{\"a\":" T("F32", "[2]", "0", "8") "}", 7, "outside the 7 bytes"},
      {"{\"a\":" T("F32", "[2]", "8", "0") "}", 8, "outside"},
      {"{\"a\":" T("F32", "[2]", "-8", "0") "}", 8, "outside"},
      {"{\"a\":" T("F32", "[2]", "0.5", "8.5") "}", 9, "outside"},
      {"{\"a\":" T("F32", "[2]", "\"0\"", "8") "}", 8, "outside"},
      {"{\"a\":" T("F32", "[2]", "0", "1e300") "}", 8, "outside"},
      {"{\"a\":" T("F32", "2", "0", "8") "}", 8, "bad shape"},
      {"{\"a\":" T("F32", "[-2]", "0", "8") "}", 8, "bad shape"},
      {"{\"a\":" T("F32", "[1.5]", "0", "6") "}", 6, "bad shape"},
      {"{\"a\":" T("F32", "[4294967296,4294967296]", "0", "0") "}", 0, "bad shape"},
      {"{\"a\":" T("F64", "[2305843009213693952]", "0", "0") "}", 0, "bad shape"},
      {"{\"a\":" T("F32", "[4294967296,1073741824]", "0", "0") "}", 0, "bad shape"},
      {"{\"a\":" T("U8", "[1,1,1,1,1,1,1,1]", "0", "1") "}", 1, NULL},
      {"{\"a\":" T("U8", "[1,1,1,1,1,1,1,1,1]", "0", "1") "}", 1, "bad shape"},
      {"{\"a\":" T("U8", "[4]", "0", "4") ",\"b\":" T("U8", "[4]", "2", "6") "}", 6, "tensor b overlaps another"},
      {"{\"a\":" T("U8", "[4]", "0", "4") ",\"b\":" T("U8", "[4]", "0", "4") "}", 4, "overlaps another"},
      {"{\"a\":" T("U8", "[4]", "0", "4") ",\"b\":" T("U8", "[0]", "2", "2") "}", 4, "overlaps another"},
      {"{\"a\":" T("U8", "[2]", "0", "2") ",\"b\":" T("U8", "[2]", "4", "6") "}", 6, "tensor b has a hole before it"},
      {"{\"a\":" T("U8", "[2]", "0", "2") ",\"a\":" T("U8", "[2]", "2", "4") "}", 4, "key \"a\" again"},
      {"{\"__metadata__\":{\"k\":\"v\"}}", 0, NULL},
      {"{\"__metadata__\":{\"k\":1}}", 0, "__metadata__ k is not a string"},
      {"{\"__metadata__\":[]}", 0, "__metadata__ is not an object"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    Error err = {0};
    SafeFile *f = open_made(cases[i].header, cases[i].data_bytes, NULL, &err);
    if (!f != !!cases[i].expected) fail_msg("%s: %s", cases[i].header, f ? "accepted" : err.text);
    if (cases[i].expected) assert_contains(err.text, cases[i].expected);
    safetensors_close(f);
  }
  static const uint64_t lengths[] = {3, 1 << 30, INT64_MAX, 1ull << 63, UINT64_MAX};
  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
    Error err;
    assert_null(open_made("{}", 0, &lengths[i], &err));
    assert_contains(err.text, "does not fit");
  }
  Error err;
  char *path = in_folder("short");
  write_bytes(path, "1234567", 7);
  assert_null(safetensors_open(path, &err));
  assert_contains(err.text, "not a safetensors file");
  assert_null(safetensors_open(folder, &err));
  assert_null(safetensors_open("/nonexistent", &err));
  assert_contains(err.text, "/nonexistent");
  free(path);
}

// Random flips and truncations: refused, or every byte that the tensors claim is there to be read.
static void mutations(void **state) {
  (void)state;
  char *path = in_folder("m.safetensors"), *damaged = in_folder("d.safetensors");
  Model m = model_random(42, 6);
  model_name(&m);
  SafePair metadata = {"k", "v"};
  Error err;
  assert_int_equal(safetensors_write(path, m.t, m.n, &metadata, 1, false, &err), 0);
  size_t n;
  char *bytes = read_bytes(path, &n);
  uint64_t header;
  memcpy(&header, bytes, 8);
  int refused = 0;
  uint64_t sum = 0;
  for (uint64_t i = 0; i < 2000; i++) {
    char *copy = xmalloc(n);
    memcpy(copy, bytes, n);
    size_t length = i % 5 == 0 ? rnd(i, 0, 0) % n : n;
    for (uint32_t k = 0; i % 5 && k <= i % 3; k++) {
      size_t at = rnd(i, 1, k) % (8 + header); // the header; data has no structure to damage
      if (i % 2)
        copy[at] ^= (char)(1 << rnd(i, 2, k) % 8);
      else
        copy[at] = "0123456789[]{},:\""[rnd(i, 2, k) % 17];
    }
    write_bytes(damaged, copy, length);
    memset(&err, 0, sizeof err);
    SafeFile *f = safetensors_open(damaged, &err);
    if (!f) assert_true(err.text[0]);
    for (int t = 0; f && t < f->n; t++) sum += hash64(f->tensor[t].data, safe_bytes(&f->tensor[t]), sum);
    refused += !f;
    safetensors_close(f);
    free(copy);
  }
  assert_true(sum && refused > 1000 && refused < 2000);
  free(bytes);
  free(path);
  free(damaged);
  model_free(&m);
}

static void write_errors(void **state) {
  (void)state;
  uint8_t data[4] = {0};
  SafeTensor t[2] = {{"a", SAFE_U8, 1, {4}, data}, {"a", SAFE_U8, 1, {4}, data}};
  Error err;
  char *path = in_folder("w.safetensors");
  assert_int_equal(safetensors_write(path, t, 2, NULL, 0, false, &err), -1);
  assert_contains(err.text, "two tensors are named a");
  assert_int_equal(safetensors_write("/nonexistent/x", t, 1, NULL, 0, false, &err), -1);
  assert_contains(err.text, "/nonexistent/x");
  if (access("/dev/full", W_OK) == 0) {
    assert_int_equal(safetensors_write("/dev/full", t, 1, NULL, 0, false, &err), -1);
    assert_contains(err.text, strerror(ENOSPC));
    assert_int_equal(access("/dev/full", W_OK), 0);
  }
  assert_int_equal(entries(folder), 0);
  free(path);
}

static void fill_part(void *context, int i, size_t at, size_t n, void *out) {
  const SafeTensor *t = context;
  assert_true(n <= SAFE_CHUNK && at + n <= safe_bytes(&t[i]));
  memcpy(out, (const char *)t[i].data + at, n);
}

// Tensors that come from a source, larger than a chunk, beside some that have their data.
static void sources_give_the_same_bytes(void **state) {
  (void)state;
  int64_t big = SAFE_CHUNK / 4 * 5 / 4 + 1;
  float *data = xmalloc((size_t)big * sizeof *data);
  for (int64_t i = 0; i < big; i++) data[i] = (float)i;
  SafeTensor whole[3] = {{"a", SAFE_U8, 1, {3}, "abc"}, {"b", SAFE_F32, 1, {big}, data}, {"c", SAFE_F32, 1, {9}, data}};
  SafeTensor bare[3] = {whole[0], whole[1], whole[2]};
  bare[1].data = bare[2].data = NULL;
  SafeSource source = {fill_part, whole, xmalloc(SAFE_CHUNK)};
  SafePair pair = {"format", "pt"};
  SafeContent content = {bare, 3, 1, &pair, &source};
  atomic_bool stop = false;
  SafeSum sum;
  Error err;
  char *a = in_folder("a.safetensors"), *b = in_folder("b.safetensors");
  if (safetensors_write(a, whole, 3, &pair, 1, false, &err)) fail_msg("%s", err.text);
  if (safetensors_stream(b, &content, &stop, &sum, &err)) fail_msg("%s", err.text);
  size_t n, m;
  char *x = read_bytes(a, &n), *y = read_bytes(b, &m);
  assert_int_equal(n, m);
  assert_memory_equal(x, y, n);
  assert_true(sum.bytes == n && sum.hash == hash64(x, n, 0));
  stop = true; // another file of the checkpoint failed
  assert_int_equal(safetensors_stream(b, &content, &stop, &sum, &err), -1);
  assert_int_equal(access(b, F_OK), -1);
  free(x);
  free(y);
  free(a);
  free(b);
  free(data);
  free(source.buffer);
}

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
  char *path = in_folder("big"), *memory = xmalloc(file_in_memory(1ull << 40));
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

// Runs `test` in a child without root's rights, which may read `folder`: its exit code.
static int as_nobody(int (*test)(void)) {
  assert_int_equal(chmod(folder, 0755), 0);
  pid_t child = fork();
  if (child == 0) _exit(geteuid() == 0 && setuid(65534) != 0 ? 100 : test());
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  return WEXITSTATUS(status);
}

// Reads the file "big" where no thread can be started. 0 when it is whole.
static int read_alone(void) {
  Error err;
  char *path = in_folder("big"), *memory = xmalloc(file_in_memory(1ull << 40));
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
  char *path = in_folder("big");
  int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
  assert_int_equal(ftruncate(fd, (FILE_IN_SLOTS + 2) * FILE_IN_CHUNK + 9), 0);
  for (int64_t at = 0; at <= (FILE_IN_SLOTS + 2) * FILE_IN_CHUNK; at += FILE_IN_CHUNK)
    assert_int_equal(pwrite(fd, &at, 8, at), 8);
  close(fd);
  assert_int_equal(as_nobody(read_alone), 0);
  free(path);
}

static void names_of_checkpoints(void **state) {
  (void)state;
  static const struct {
    const char *name;
    int64_t step;
  } cases[] = {{"ckpt-0", 0},
               {"ckpt-7", 7},
               {"ckpt-120", 120},
               {"ckpt-999999999999999999", 999999999999999999},
               {"ckpt-", -1},
               {"ckpt-007", -1},
               {"ckpt-00", -1},
               {"ckpt--7", -1},
               {"ckpt-+7", -1},
               {"ckpt- 7", -1},
               {"ckpt-7x", -1},
               {"ckpt-7 ", -1},
               {".tmp-ckpt-7", -1},
               {"set-aside-ckpt-7", -1},
               {"ckpt-1000000000000000000", -1}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    if (checkpoint_step(cases[i].name) != cases[i].step) fail_msg("%s", cases[i].name);
}

static void hash_is_xxh64(void **state) {
  (void)state;
  assert_true(hash64("", 0, 0) == 0xEF46DB3751D8E999ull);
  assert_true(hash64("abc", 3, 0) == 0x44BC2CF5AD770999ull);
  // From xxHash's own sanity test: bytes of a multiplicative generator; the lengths reach every branch.
  uint8_t bytes[222];
  uint64_t gen = 2654435761u;
  for (int i = 0; i < 222; i++, gen *= 11400714785074694797ull) bytes[i] = (uint8_t)(gen >> 56);
  static const struct {
    size_t n;
    uint64_t seed, expected;
  } cases[] = {{1, 0, 0xE934A84ADB052768ull},   {1, 2654435761u, 0x5014607643A9B4C3ull},
               {14, 0, 0x8282DCC4994E35C8ull},  {14, 2654435761u, 0xC3BD6BF63DEB6DF0ull},
               {222, 0, 0xB641AE8CB691C174ull}, {222, 2654435761u, 0x20CB8AB7AE10C14Aull}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    assert_true(hash64(bytes, cases[i].n, cases[i].seed) == cases[i].expected);
  // The same in pieces of any length.
  for (uint64_t round = 0; round < 200; round++) {
    size_t n = rnd(round, 20, 0) % sizeof bytes;
    Hash64 h = hash64_begin(round);
    for (size_t at = 0, piece; at < n; at += piece) {
      piece = rnd(round, 21, (uint32_t)at) % (round % 70 + 1);
      if (piece > n - at) piece = n - at;
      hash64_add(&h, bytes + at, piece);
      if (!piece) piece = 1, hash64_add(&h, bytes + at, 1);
    }
    assert_true(hash64_end(&h) == hash64(bytes, n, round));
  }
}

// ---- checkpoints ----

static const CheckpointKeep keep_all = {1000, 0};

// Opens a checkpoint and reads all of it; NULL with *err naming what is wrong.
static Checkpoint *open_whole(const char *dir, Error *err) {
  Checkpoint *c = checkpoint_open(dir, err);
  if (!c || checkpoint_verify(c, err) == 0) return c;
  checkpoint_close(c);
  return NULL;
}

// The newest that is whole, as a run finds it: checkpoint_find's results.
static int find_whole(const char *run, Checkpoint **c, Error *err) {
  int64_t below = INT64_MAX;
  int rc;
  while ((rc = checkpoint_find(run, &below, c, err)) == 1 && checkpoint_verify(*c, err) != 0) checkpoint_close(*c);
  return rc;
}

// Two files of random tensors and a state that depend on the step.
static int save(const char *run, int64_t step, CheckpointKeep keep, Error *err) {
  Model a = model_random((uint64_t)step, 9), b = model_random((uint64_t)step + 1000, 5);
  model_name(&a);
  model_name(&b);
  CheckpointFile files[] = {{"model.safetensors", a.t, a.n, NULL}, {"optimizer-0x1.safetensors", b.t, b.n, NULL}};
  char *text = xasprintf("{\"loader\": {\"draw\": \"%lld\"}, \"list\": [1, 2.5, \"]}\"]}", (long long)step * 3);
  int rc = checkpoint_save(run, step, files, 2, text, keep, err);
  free(text);
  model_free(&a);
  model_free(&b);
  return rc;
}

static void take_part(void *context, int i, size_t at, size_t n, const void *data) {
  memcpy(((char **)context)[i] + at, data, n);
}

// A file of a checkpoint with its data.
static SafeFile *open_file(const Checkpoint *c, const char *name) {
  Error err;
  char *path = xasprintf("%s/%s", c->dir, name);
  SafeFile *f = safetensors_open(path, &err);
  if (!f) fail_msg("%s", err.text);
  free(path);
  return f;
}

static void assert_file_holds(const Checkpoint *c, const char *name, const Model *m) {
  SafeFile *f = open_file(c, name);
  assert_same(f, m);
  safetensors_close(f);
}

// A file as it is read, tensor by tensor.
static void assert_reads(const Checkpoint *c, const char *name) {
  SafeFile *f = open_file(c, name);
  Error err;
  char **taken = xcalloc((size_t)f->n, sizeof *taken), *memory = xmalloc(checkpoint_memory(c));
  for (int i = 0; i < f->n; i++) taken[i] = xmalloc(safe_bytes(&f->tensor[i]));
  if (checkpoint_read(c, name, memory, take_part, taken, &err) != 0) fail_msg("%s", err.text);
  for (int i = 0; i < f->n; i++) {
    assert_memory_equal(taken[i], f->tensor[i].data, safe_bytes(&f->tensor[i]));
    free(taken[i]);
  }
  free(taken);
  free(memory);
  safetensors_close(f);
}

static void assert_holds(const Checkpoint *c, int64_t step) {
  assert_int_equal(c->step, step);
  Model a = model_random((uint64_t)step, 9), b = model_random((uint64_t)step + 1000, 5);
  model_name(&a);
  model_name(&b);
  assert_file_holds(c, "model.safetensors", &a);
  assert_file_holds(c, "optimizer-0x1.safetensors", &b);
  assert_reads(c, "model.safetensors");
  assert_reads(c, "optimizer-0x1.safetensors");
  assert_null(checkpoint_file(c, "ema.safetensors"));
  const cJSON *loader = cJSON_GetObjectItemCaseSensitive(c->state, "loader");
  const cJSON *draw = cJSON_GetObjectItemCaseSensitive(loader, "draw");
  assert_int_equal(atoll(draw->valuestring), step * 3);
  model_free(&a);
  model_free(&b);
}

static void assert_newest(int64_t step) {
  Checkpoint *c;
  Error err;
  if (find_whole(folder, &c, &err) != 1) fail_msg("%s", err.text);
  assert_holds(c, step);
  checkpoint_close(c);
}

static void assert_steps(const char *expected) {
  char *command = xasprintf("ls -A %s | grep -v lock | sort -V | tr '\\n' ' '", folder), found[256] = "";
  FILE *f = popen(command, "r");
  if (!fgets(found, sizeof found, f)) found[0] = 0;
  pclose(f);
  free(command);
  assert_string_equal(found, expected);
}

static void checkpoint_round_trip(void **state) {
  (void)state;
  Checkpoint *c;
  Error err;
  assert_int_equal(find_whole("/nonexistent/run", &c, &err), 0);
  assert_int_equal(find_whole(folder, &c, &err), 0);
  for (int64_t step = 0; step < 12; step += 3) {
    if (save(folder, step, keep_all, &err)) fail_msg("%s", err.text);
    assert_newest(step);
  }
  if (save(folder, 9, keep_all, &err)) fail_msg("%s", err.text); // over the one that is there
  assert_newest(9);
  assert_steps("ckpt-0 ckpt-3 ckpt-6 ckpt-9 ");
  // One folder by name, also when it was moved elsewhere.
  char *from = in_folder("ckpt-6"), *to = in_folder("best");
  assert_int_equal(rename(from, to), 0);
  c = open_whole(to, &err);
  assert_non_null(c);
  assert_holds(c, 6);
  checkpoint_close(c);
  assert_null(open_whole(from, &err));
  free(from);
  free(to);
}

static void pruning(void **state) {
  (void)state;
  Error err;
  for (int64_t step = 10; step <= 70; step += 10)
    assert_int_equal(save(folder, step, (CheckpointKeep){2, 30}, &err), 0);
  assert_steps("ckpt-30 ckpt-60 ckpt-70 ");
  // A run that went back keeps what it has just saved and leaves later steps alone.
  assert_int_equal(save(folder, 40, (CheckpointKeep){1, 0}, &err), 0);
  assert_steps("ckpt-40 ckpt-60 ckpt-70 ");
  // A damaged one does not count as kept.
  char *file = in_folder("ckpt-70/model.safetensors");
  assert_int_equal(truncate(file, 20), 0);
  assert_int_equal(save(folder, 80, (CheckpointKeep){2, 0}, &err), 0);
  assert_steps("ckpt-60 ckpt-70 ckpt-80 ");
  assert_int_equal(save(folder, 90, (CheckpointKeep){2, 0}, &err), 0);
  assert_steps("ckpt-80 ckpt-90 ");
  free(file);
}

// Every damage to any file of the newest checkpoint is found, and the one before is taken.
static void damage_is_found(void **state) {
  (void)state;
  static const char *const names[] = {"state.json", "model.safetensors", "optimizer-0x1.safetensors"};
  Error err;
  assert_int_equal(save(folder, 1, keep_all, &err), 0);
  assert_int_equal(save(folder, 2, keep_all, &err), 0);
  char *dir = in_folder("ckpt-2");
  for (int file = 0; file < 3; file++) {
    char *path = xasprintf("%s/%s", dir, names[file]);
    size_t n;
    char *bytes = read_bytes(path, &n);
    for (uint64_t i = 0; i < 150; i++) {
      size_t at = rnd(i, 9, (uint32_t)file) % n;
      char kept = bytes[at];
      bytes[at] ^= (char)(1 << rnd(i, 10, 0) % 8);
      write_bytes(path, bytes, i % 3 ? n : at); // a flip, or cut off
      bytes[at] = kept;
      memset(&err, 0, sizeof err);
      Checkpoint *c = open_whole(dir, &err);
      if (c) fail_msg("byte %zu of %s: damage not seen", at, names[file]);
      assert_contains(err.text, names[file]);
    }
    assert_int_equal(unlink(path), 0);
    assert_null(open_whole(dir, &err));
    assert_newest(1);
    assert_int_equal(mkfifo(path, 0600), 0); // nobody ever writes into it
    alarm(20);
    assert_newest(1);
    alarm(0);
    assert_int_equal(unlink(path), 0);
    write_bytes(path, bytes, n);
    assert_newest(2);
    free(bytes);
    free(path);
  }
  // A checksum that is right does not make hostile content right.
  char *path = xasprintf("%s/state.json", dir);
  static const char *const bodies[] = {
      "\"format\": 2, \"step\": 2, \"files\": {}, \"state\": {}}",
      "\"format\": 1, \"step\": 2, \"files\": [], \"state\": {}}",
      "\"format\": 1, \"step\": 2, \"files\": {}, \"state\": 1}",
      "\"format\": 1",
      "\"format\": 1, \"step\": 2, \"files\": {\"../ckpt-1/model.safetensors\": {\"bytes\": 1, \"xxh64\": \"\"}}, "
      "\"state\": {}}",
      "\"format\": 1, \"step\": 2, \"files\": {\"model.safetensors\": 1}, \"state\": {}}"};
  for (size_t i = 0; i < sizeof bodies / sizeof bodies[0]; i++) {
    char *text = xasprintf("{\"xxh64\": \"%016llx\",\n%s", (unsigned long long)hash64(bodies[i], strlen(bodies[i]), 0),
                           bodies[i]);
    write_bytes(path, text, strlen(text));
    assert_null(open_whole(dir, &err));
    assert_contains(err.text, "state.json");
    free(text);
  }
  char *first = in_folder("ckpt-1/state.json");
  assert_int_equal(unlink(first), 0);
  Checkpoint *c;
  assert_int_equal(find_whole(folder, &c, &err), -1);
  assert_contains(err.text, "none of the 2 checkpoints");
  free(first);
  free(path);
  free(dir);
}

// A save that runs out of room: an error, no temporary folder, the old checkpoint as it was.
static size_t address_space(void) {
  size_t pages = 0;
  FILE *f = fopen("/proc/self/statm", "r");
  if (!f || fscanf(f, "%zu", &pages) != 1) fail();
  fclose(f);
  return pages * (size_t)sysconf(_SC_PAGESIZE);
}

// A run that fits into ulimit -v must be able to go on there: while its slabs are taken, its checkpoint is open.
static void open_checkpoints_take_no_room(void **state) {
  (void)state;
  enum { BYTES = 32 << 20 };
  Error err;
  SafeTensor t = {.name = "w", .dtype = SAFE_U8, .rank = 1, .shape = {BYTES}, .data = xcalloc(BYTES, 1)};
  CheckpointFile file = {"model.safetensors", &t, 1, NULL};
  assert_int_equal(checkpoint_save(folder, 1, &file, 1, "{}", keep_all, &err), 0);
  free((void *)t.data);
  char *dir = in_folder("ckpt-1");
  size_t before = address_space();
  Checkpoint *c = checkpoint_open(dir, &err);
  size_t after = address_space();
  assert_non_null(c);
  assert_in_range(after, 0, before + BYTES / 2);
  assert_int_equal(checkpoint_verify(c, &err), 0);
  checkpoint_close(c);
  free(dir);
}

// Who uses a run that is being trained finds a checkpoint although older ones go all the time.
static void pruned_ones_are_not_damage(void **state) {
  (void)state;
  enum { LOOKS = 1000 };
  Error err;
  CheckpointKeep keep_one = {1, 0};
  assert_int_equal(save(folder, 1, keep_one, &err), 0);
  pid_t trainer = fork();
  for (int64_t step = 2; trainer == 0; step++)
    if (save(folder, step, keep_one, &err) != 0 || getppid() == 1) _exit(1);
  for (int i = 0; i < LOOKS; i++) {
    int64_t below = INT64_MAX;
    Checkpoint *c;
    int rc = checkpoint_find(folder, &below, &c, &err);
    if (rc == 1) {
      checkpoint_close(c);
      continue;
    }
    kill(trainer, SIGKILL);
    fail_msg("look %d: %d, %s", i, rc, err.text);
  }
  assert_int_equal(kill(trainer, SIGKILL), 0);
  assert_int_equal(waitpid(trainer, NULL, 0), trainer);
}

static int finds_one_that_may_not_be_read(void) {
  int64_t below = INT64_MAX;
  Checkpoint *c;
  Error err = {0};
  if (checkpoint_find(folder, &below, &c, &err) != -1) return 1;
  return strstr(err.text, "ckpt-2") && strstr(err.text, "Permission denied") && strstr(err.hint, "owner") ? 0 : 2;
}

// Who may not read the newest checkpoint must not go on from the one before as if it were damaged.
static void unreadable_is_not_damaged(void **state) {
  (void)state;
  Error err;
  for (int step = 1; step <= 2; step++) assert_int_equal(save(folder, step, keep_all, &err), 0);
  char *paths[] = {in_folder("ckpt-2"), in_folder("ckpt-2/state.json"), in_folder("ckpt-2/model.safetensors")};
  for (int i = 0; i < 3; i++) {
    mode_t mode = i ? 0644 : 0755;
    assert_int_equal(chmod(paths[i], 0), 0);
    assert_int_equal(as_nobody(finds_one_that_may_not_be_read), 0);
    assert_int_equal(chmod(paths[i], mode), 0);
  }
  assert_int_equal(as_nobody(finds_one_that_may_not_be_read), 1);
  for (int i = 0; i < 3; i++) free(paths[i]);
}

static void failed_save_loses_nothing(void **state) {
  (void)state;
  Error err;
  assert_int_equal(save(folder, 1, keep_all, &err), 0);
  SafeTensor t = {"a", SAFE_U8, 0, {0}, "x"};
  CheckpointFile small = {"small.safetensors", &t, 1, NULL};
  signal(SIGXFSZ, SIG_IGN);
  struct rlimit old, limit;
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
  // About 80 bytes for small.safetensors and 160 for state.json: room for neither, for the first, for both.
  for (int i = 0; i < 3; i++) {
    limit = (struct rlimit){(rlim_t[]){40, 120, 1000}[i], old.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    int second = checkpoint_save(folder, 2, &small, 1, "{}", (CheckpointKeep){1, 0}, &err);
    char text[sizeof err.text];
    memcpy(text, err.text, sizeof text);
    int first = i == 2 ? 0 : checkpoint_save(folder, 1, &small, 1, "{}", (CheckpointKeep){1, 0}, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_int_equal(second, i == 2 ? 0 : -1);
    assert_int_equal(first, i == 2 ? 0 : -1);
    assert_steps(i == 2 ? "ckpt-2 " : "ckpt-1 ");
    if (i == 2) break;
    assert_contains(text, "checkpoint of step 2 not saved: cannot write");
    assert_contains(text, i ? "state.json" : "small.safetensors");
    assert_newest(1);
  }
  CheckpointFile files[] = {small, {"../b.safetensors", &t, 1, NULL}};
  assert_int_equal(checkpoint_save(folder, 3, files, 2, "{}", keep_all, &err), -1);
  assert_contains(err.text, "\"../b.safetensors\" is no name");
  assert_int_equal(checkpoint_save(folder, 3, files, 1, "{\"a\":", keep_all, &err), -1);
  assert_int_equal(checkpoint_save(folder, 3, files, 1, "3", keep_all, &err), -1);
  assert_contains(err.text, "must be a JSON object");
  assert_int_equal(checkpoint_save("/nonexistent/run", 3, files, 1, "{}", keep_all, &err), -1);
  assert_steps("ckpt-2 ");
}

// Savers killed at random moments: the newest valid checkpoint is always one that was being saved, or the one before.
static void killed_save_loses_nothing(void **state) {
  (void)state;
  Error err;
  assert_int_equal(save(folder, 100, keep_all, &err), 0);
  int64_t last = 100;
  for (uint32_t round = 0; round < 25; round++) {
    pid_t child = fork();
    if (child == 0) {
      for (int64_t step = last + 1;; step++) save(folder, step, (CheckpointKeep){2, 0}, &err);
    }
    assert_true(child > 0);
    usleep(rnd(round, 11, 0) % 20000);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    Checkpoint *c;
    if (find_whole(folder, &c, &err) != 1) fail_msg("%s", err.text);
    assert_true(c->step >= last);
    last = c->step;
    assert_holds(c, last);
    checkpoint_close(c);
  }
  assert_true(last > 100);
  assert_int_equal(save(folder, last + 1, (CheckpointKeep){1, 0}, &err), 0);
  assert_int_equal(entries(folder), 1); // nothing is left of those that were cut short
}

static void one_run_per_folder(void **state) {
  (void)state;
  Error err;
  int fd = run_lock(folder, &err);
  assert_true(fd >= 0);
  char *expected = xasprintf("another run uses %s (process %ld)", folder, (long)getpid());
  pid_t child = fork();
  if (child == 0) _exit(run_lock(folder, &err) == -1 && strstr(err.text, expected) ? 0 : 1);
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(status, 0);
  close(fd);
  fd = run_lock(folder, &err);
  assert_true(fd >= 0);
  close(fd);
  assert_int_equal(run_lock("/nonexistent/run", &err), -1);
  free(expected);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(round_trip, empty_folder),
      cmocka_unit_test_setup(get_demands_shape, empty_folder),
      cmocka_unit_test_setup(hostile_headers, empty_folder),
      cmocka_unit_test_setup(mutations, empty_folder),
      cmocka_unit_test_setup(write_errors, empty_folder),
      cmocka_unit_test_setup(sources_give_the_same_bytes, empty_folder),
      cmocka_unit_test_setup(files_are_read_in_order, empty_folder),
      cmocka_unit_test_setup(files_are_read_without_threads, empty_folder),
      cmocka_unit_test_setup(names_of_checkpoints, empty_folder),
      cmocka_unit_test_setup(hash_is_xxh64, empty_folder),
      cmocka_unit_test_setup(checkpoint_round_trip, empty_folder),
      cmocka_unit_test_setup(pruning, empty_folder),
      cmocka_unit_test_setup(damage_is_found, empty_folder),
      cmocka_unit_test_setup(open_checkpoints_take_no_room, empty_folder),
      cmocka_unit_test_setup(pruned_ones_are_not_damage, empty_folder),
      cmocka_unit_test_setup(unreadable_is_not_damaged, empty_folder),
      cmocka_unit_test_setup(failed_save_loses_nothing, empty_folder),
      cmocka_unit_test_setup(killed_save_loses_nothing, empty_folder),
      cmocka_unit_test_setup(one_run_per_folder, empty_folder),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
