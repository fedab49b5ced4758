// safetensors: round trips, hostile and damaged files, writes that fail.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/hash.h"
#include "tests/unit/assert_text.h"
#include "tests/unit/files_case.h"
#include "tests/unit/temp_folder.h"

#include <errno.h>

static void round_trip(void **state) {
  (void)state;
  char *path = path_in(folder, "m.safetensors");
  for (uint64_t draw = 0; draw < 100; draw++) {
    Tensors m;
    tensors_random(&m, draw, 9);
    SafePair metadata[] = {{"format", "pt"}, {"key \"2\"", "line\nline"}};
    Error err;
    int pairs = (int)(draw % 3);
    if (safetensors_write(path, m.t, m.n, metadata, pairs, draw % 2, &err)) fail_msg("%s", err.text);
    SafeFile *f = safetensors_open(path, &err);
    if (!f) fail_msg("%s", err.text);
    assert_same_tensors(f, &m);
    assert_int_equal(f->n_metadata, pairs);
    for (int i = 0; i < pairs; i++) assert_string_equal(metadata_value(f, metadata[i].key), metadata[i].value);
    assert_null(metadata_value(f, "none"));
    assert_null(safetensors_find(f, "none"));
    safetensors_close(f);
    tensors_free(&m);
  }
  free(path);
}

static void get_demands_shape(void **state) {
  (void)state;
  char *path = path_in(folder, "g.safetensors");
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
  char *path = path_in(folder, "h.safetensors");
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
  char *path = path_in(folder, "short");
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
  char *path = path_in(folder, "m.safetensors"), *damaged = path_in(folder, "d.safetensors");
  Tensors m;
  tensors_random(&m, 42, 6);
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
    size_t length = i % 5 == 0 ? random_number(i, 0, 0) % n : n;
    for (uint32_t k = 0; i % 5 && k <= i % 3; k++) {
      size_t at = random_number(i, 1, k) % (8 + header); // the header; data has no structure to damage
      if (i % 2)
        copy[at] ^= (char)(1 << random_number(i, 2, k) % 8);
      else
        copy[at] = "0123456789[]{},:\""[random_number(i, 2, k) % 17];
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
  tensors_free(&m);
}

static void write_errors(void **state) {
  (void)state;
  uint8_t data[4] = {0};
  SafeTensor t[2] = {{"a", SAFE_U8, 1, {4}, data}, {"a", SAFE_U8, 1, {4}, data}};
  Error err;
  char *path = path_in(folder, "w.safetensors");
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
  char *a = path_in(folder, "a.safetensors"), *b = path_in(folder, "b.safetensors");
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

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(round_trip, empty_folder),
      cmocka_unit_test_setup(get_demands_shape, empty_folder),
      cmocka_unit_test_setup(hostile_headers, empty_folder),
      cmocka_unit_test_setup(mutations, empty_folder),
      cmocka_unit_test_setup(write_errors, empty_folder),
      cmocka_unit_test_setup(sources_give_the_same_bytes, empty_folder),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
