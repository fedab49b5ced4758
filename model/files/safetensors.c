#include "model/files/safetensors.h"

#include "base/file_out.h"
#include "base/json.h"
#include "base/text_out.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LENGTH_BYTES = 8, ALIGNMENT = 8 };
static const uint64_t HEADER_MAX = 100u << 20;      // as in the reference implementation
static const double EXACT_MAX = 9007199254740992.0; // 2^53: integers a JSON number holds exactly

struct SafeMap {
  void *base;
  size_t bytes, mapped; // of the file; of them still mapped
  cJSON *header;        // owns names and metadata
};

static const struct {
  const char *name;
  size_t bytes;
} dtypes[SAFE_DTYPES] = {
    [SAFE_F32] = {"F32", 4}, [SAFE_F64] = {"F64", 8}, [SAFE_I32] = {"I32", 4},
    [SAFE_I64] = {"I64", 8}, [SAFE_U8] = {"U8", 1},   [SAFE_BF16] = {"BF16", 2},
};

// The product of the shape.
static int64_t safe_elements(const SafeTensor *t) {
  int64_t n = 1;
  for (int i = 0; i < t->rank; i++) n *= t->shape[i];
  return n;
}

size_t safe_bytes(const SafeTensor *t) {
  return (size_t)safe_elements(t) * dtypes[t->dtype].bytes;
}

// ---- reading ----

// A non-negative integer that a double holds exactly.
static int read_integer(const cJSON *item, int64_t *out) {
  if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble <= EXACT_MAX)) return -1;
  *out = (int64_t)item->valuedouble;
  return (double)*out == item->valuedouble ? 0 : -1;
}

// Bytes of the tensor, refusing products that do not fit.
static int read_shape(SafeTensor *t, const cJSON *shape, int64_t *bytes) {
  if (!cJSON_IsArray(shape) || cJSON_GetArraySize(shape) > SAFE_MAX_RANK) return -1;
  *bytes = (int64_t)dtypes[t->dtype].bytes;
  const cJSON *dim;
  cJSON_ArrayForEach(dim, shape) {
    if (read_integer(dim, &t->shape[t->rank])) return -1;
    if (__builtin_mul_overflow(*bytes, t->shape[t->rank++], bytes)) return -1;
  }
  return 0;
}

static int read_dtype(const cJSON *item, SafeDtype *out) {
  for (int d = 0; cJSON_IsString(item) && d < SAFE_DTYPES; d++) {
    if (strcmp(item->valuestring, dtypes[d].name) != 0) continue;
    *out = (SafeDtype)d;
    return 0;
  }
  return -1;
}

static int read_tensor(SafeTensor *t, const cJSON *item, const uint8_t *data, int64_t data_bytes, const char *path,
                       Error *err) {
  const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype");
  const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(item, "data_offsets");
  int64_t bytes, begin, end;
  t->name = item->string;
  if (read_dtype(dtype, &t->dtype))
    return error_set(err, "F32, F64, I32, I64, U8 and BF16 are read", "%.300s: tensor %.100s has dtype %.20s", path,
                     t->name, cJSON_IsString(dtype) ? dtype->valuestring : "missing");
  if (read_shape(t, cJSON_GetObjectItemCaseSensitive(item, "shape"), &bytes))
    return error_set(err, NULL, "%.300s: tensor %.100s has a bad shape", path, t->name);
  if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
      read_integer(cJSON_GetArrayItem(offsets, 0), &begin) || read_integer(cJSON_GetArrayItem(offsets, 1), &end) ||
      begin > end || end > data_bytes)
    return error_set(err, "is the file complete?", "%.300s: tensor %.100s lies outside the %lld bytes of data", path,
                     t->name, (long long)data_bytes);
  if (end - begin != bytes)
    return error_set(err, NULL, "%.300s: tensor %.100s has %lld bytes of data where its shape says %lld", path, t->name,
                     (long long)(end - begin), (long long)bytes);
  t->data = data + begin;
  return 0;
}

static int compare_data(const void *a, const void *b) {
  const SafeTensor *x = *(const SafeTensor *const *)a, *y = *(const SafeTensor *const *)b;
  const char *p = x->data, *q = y->data;
  if (p != q) return p < q ? -1 : 1;
  size_t m = safe_bytes(x), n = safe_bytes(y); // an empty tensor goes before the one that begins there
  return (m > n) - (m < n);
}

// Sorted by place, every tensor begins where the one before ended, and the last one ends with the file.
static int check_cover(const SafeFile *f, const char *data, size_t data_bytes, const char *path, Error *err) {
  const SafeTensor **order = xmalloc((size_t)f->n * sizeof *order);
  for (int i = 0; i < f->n; i++) order[i] = &f->tensor[i];
  if (f->n > 1) qsort(order, (size_t)f->n, sizeof *order, compare_data);
  const char *at = data;
  int rc = 0;
  for (int i = 0; i < f->n && rc == 0; i++) {
    if ((const char *)order[i]->data != at)
      rc = error_set(err, NULL, "%.300s: tensor %.100s %s", path, order[i]->name,
                     (const char *)order[i]->data < at ? "overlaps another" : "has a hole before it");
    at = (const char *)order[i]->data + safe_bytes(order[i]);
  }
  free(order);
  if (rc == 0 && at != data + data_bytes)
    rc = error_set(err, NULL, "%.300s: %lld bytes at its end belong to no tensor", path,
                   (long long)(data + data_bytes - at));
  return rc;
}

static int read_metadata(SafeFile *f, const cJSON *item, const char *path, Error *err) {
  if (!cJSON_IsObject(item)) return error_set(err, NULL, "%.300s: __metadata__ is not an object", path);
  f->metadata = xcalloc((size_t)cJSON_GetArraySize(item), sizeof *f->metadata);
  const cJSON *pair;
  cJSON_ArrayForEach(pair, item) {
    if (!cJSON_IsString(pair))
      return error_set(err, NULL, "%.300s: __metadata__ %.100s is not a string", path, pair->string);
    f->metadata[f->n_metadata++] = (SafePair){pair->string, pair->valuestring};
  }
  return 0;
}

static int read_header(SafeFile *f, const char *path, Error *err) {
  const char *base = f->map->base;
  uint64_t length;
  memcpy(&length, base, LENGTH_BYTES); // little-endian, like the hosts this runs on
  if (length > HEADER_MAX || length > f->map->bytes - LENGTH_BYTES)
    return error_set(err, "is it a complete safetensors file?", "%.300s: its header of %llu bytes does not fit", path,
                     (unsigned long long)length);
  f->map->header = json_parse(base + LENGTH_BYTES, (size_t)length, path, JSON_PLAIN, err);
  if (!f->map->header) return -1;
  if (!cJSON_IsObject(f->map->header)) return error_set(err, NULL, "%.300s: its header is not an object", path);
  const char *data = base + LENGTH_BYTES + length;
  size_t data_bytes = f->map->bytes - LENGTH_BYTES - (size_t)length;
  f->tensor = xcalloc((size_t)cJSON_GetArraySize(f->map->header), sizeof *f->tensor);
  const cJSON *item;
  cJSON_ArrayForEach(item, f->map->header) {
    bool metadata = strcmp(item->string, "__metadata__") == 0;
    int rc = metadata ? read_metadata(f, item, path, err)
                      : read_tensor(&f->tensor[f->n++], item, (const uint8_t *)data, (int64_t)data_bytes, path, err);
    if (rc) return -1;
  }
  return check_cover(f, data, data_bytes, path, err);
}

static int map_file(struct SafeMap *map, const char *path, Error *err) {
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe would wait for its writer
  struct stat st;
  if (fd < 0 || fstat(fd, &st) != 0) {
    error_set(err, "check the path", "cannot open %.300s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return -1;
  }
  bool usable = S_ISREG(st.st_mode) && st.st_size >= LENGTH_BYTES;
  void *base = usable ? mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
  int code = errno;
  close(fd);
  if (!usable) return error_set(err, NULL, "%.300s is not a safetensors file", path);
  if (base == MAP_FAILED) return error_set(err, NULL, "cannot map %.300s: %s", path, strerror(code));
  map->base = base;
  map->bytes = map->mapped = (size_t)st.st_size;
  return 0;
}

SafeFile *safetensors_open(const char *path, Error *err) {
  SafeFile *f = xcalloc(1, sizeof *f);
  f->map = xcalloc(1, sizeof *f->map);
  if (map_file(f->map, path, err) == 0 && read_header(f, path, err) == 0) return f;
  safetensors_close(f);
  return NULL;
}

void safetensors_close(SafeFile *f) {
  if (!f) return;
  if (f->map->base) munmap(f->map->base, f->map->mapped);
  cJSON_Delete(f->map->header);
  free(f->map);
  free(f->tensor);
  free(f->metadata);
  free(f);
}

void safetensors_unmap_data(SafeFile *f) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), keep = (safetensors_header(f) + page - 1) / page * page;
  if (keep >= f->map->mapped) return;
  munmap((char *)f->map->base + keep, f->map->mapped - keep);
  f->map->mapped = keep;
}

uint64_t safetensors_size(const SafeFile *f) {
  return f->map->bytes;
}

uint64_t safetensors_header(const SafeFile *f) {
  uint64_t length;
  memcpy(&length, f->map->base, LENGTH_BYTES);
  return LENGTH_BYTES + length;
}

const SafeTensor *safetensors_find(const SafeFile *f, const char *name) {
  for (int i = 0; i < f->n; i++)
    if (strcmp(f->tensor[i].name, name) == 0) return &f->tensor[i];
  return NULL;
}

// "F32 [2, 3]"
static void describe(SafeDtype dtype, int rank, const int64_t *shape, char out[200]) {
  int at = snprintf(out, 200, "%s [", dtypes[dtype].name);
  for (int i = 0; i < rank; i++)
    at += snprintf(out + at, 200 - (size_t)at, "%s%lld", i ? ", " : "", (long long)shape[i]);
  snprintf(out + at, 200 - (size_t)at, "]");
}

const SafeTensor *safetensors_get(const SafeFile *f, const char *name, SafeDtype dtype, int rank, const int64_t *shape,
                                  Error *err) {
  const SafeTensor *t = safetensors_find(f, name);
  if (!t) {
    error_set(err, "was it written by another model?", "tensor %.100s is missing", name);
    return NULL;
  }
  bool same = t->dtype == dtype && (rank < 0 || t->rank == rank);
  for (int i = 0; same && i < rank; i++) same = t->shape[i] == shape[i];
  if (same) return t;
  char found[200], wanted[200];
  describe(t->dtype, t->rank, t->shape, found);
  describe(dtype, rank, shape, wanted);
  error_set(err, "was it written by another model?", "tensor %.100s is %s, expected %s", name, found,
            rank < 0 ? dtypes[dtype].name : wanted);
  return NULL;
}

// ---- writing ----

// The header for the tensors in `order`, malloc'd, padded with spaces so that the data is aligned.
static char *build_header(const SafeTensor *const *order, int n, const SafePair *metadata, int n_metadata,
                          size_t *length) {
  TextOut out;
  FILE *f = text_begin(&out);
  fputc('{', f);
  for (int i = 0; i < n_metadata; i++) {
    fputs(i ? "," : "\"__metadata__\":{", f);
    json_write_string(f, metadata[i].key);
    fputc(':', f);
    json_write_string(f, metadata[i].value);
  }
  fputs(n_metadata ? "}" : "", f);
  uint64_t at = 0;
  for (int i = 0; i < n; i++) {
    const SafeTensor *t = order[i];
    fputs(i || n_metadata ? "," : "", f);
    json_write_string(f, t->name);
    fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", dtypes[t->dtype].name);
    for (int d = 0; d < t->rank; d++) fprintf(f, "%s%lld", d ? "," : "", (long long)t->shape[d]);
    fprintf(f, "],\"data_offsets\":[%llu,", (unsigned long long)at);
    at += safe_bytes(t);
    fprintf(f, "%llu]}", (unsigned long long)at);
  }
  fputc('}', f);
  long end = ftell(f);
  fprintf(f, "%*s", (int)((ALIGNMENT - end % ALIGNMENT) % ALIGNMENT), "");
  char *text = text_end(&out);
  *length = out.bytes;
  return text;
}

static int compare_names(const void *a, const void *b) {
  return strcmp((*(const SafeTensor *const *)a)->name, (*(const SafeTensor *const *)b)->name);
}

// Tensors by falling element size, otherwise as given; -1 with *err set when two have one name.
static int order_tensors(const SafeTensor **order, const SafeTensor *tensors, int n, Error *err) {
  for (int i = 0; i < n; i++) order[i] = &tensors[i];
  if (n > 1) qsort(order, (size_t)n, sizeof *order, compare_names);
  for (int i = 1; i < n; i++)
    if (strcmp(order[i - 1]->name, order[i]->name) == 0)
      return error_set(err, NULL, "two tensors are named %.100s", order[i]->name);
  int at = 0;
  for (size_t bytes = 8; bytes; bytes /= 2)
    for (int i = 0; i < n; i++)
      if (dtypes[tensors[i].dtype].bytes == bytes) order[at++] = &tensors[i];
  return 0;
}

static int write_tensor(FileOut *f, const SafeTensor *t, int i, const SafeSource *source, const atomic_bool *stop) {
  size_t bytes = safe_bytes(t);
  for (size_t at = 0, n; at < bytes; at += n) {
    const void *data = source ? source->buffer : NULL;
    n = bytes - at < SAFE_CHUNK ? bytes - at : SAFE_CHUNK;
    if (t->data)
      data = (const char *)t->data + at;
    else
      source->fill(source->context, i, at, n, source->buffer);
    if (file_out_write(f, data, n)) return -1;
    if (stop && *stop) {
      errno = ECANCELED;
      return -1;
    }
  }
  return 0;
}

static int write_all(FileOut *f, const SafeContent *c, const SafeTensor *const *order, const atomic_bool *stop) {
  size_t length;
  char *header = build_header(order, c->n, c->metadata, c->n_metadata, &length);
  uint64_t length64 = length;
  int rc = file_out_write(f, &length64, LENGTH_BYTES) || file_out_write(f, header, length) ? -1 : 0;
  for (int i = 0; i < c->n && rc == 0; i++)
    rc = write_tensor(f, order[i], (int)(order[i] - c->tensors), c->source, stop);
  int code = errno;
  free(header);
  errno = code;
  return rc;
}

static int write_file(const char *path, const SafeContent *c, bool sync, const atomic_bool *stop, SafeSum *sum,
                      Error *err) {
  const SafeTensor **order = xmalloc((size_t)c->n * sizeof *order);
  FileOut f;
  int rc = order_tensors(order, c->tensors, c->n, err), code = 0;
  if (rc) {
    error_prefix(err, "%.200s", path);
  } else if ((rc = file_out_open(&f, path)) != 0) {
    error_set(err, "check the folder", "cannot create %.300s: %s", path, strerror(errno));
  } else {
    if ((rc = write_all(&f, c, order, stop)) != 0) code = errno;
    if (file_out_close(&f, sync && rc == 0) && rc == 0) {
      rc = -1;
      code = errno;
    }
    *sum = (SafeSum){f.bytes, hash64_end(&f.hash)};
  }
  free(order);
  if (!code) return rc;
  if (f.regular) unlink(path); // a device is not ours to remove
  return error_set(err, code == ENOSPC ? "free some space on that disk" : NULL, "cannot write %.300s: %s", path,
                   strerror(code));
}

int safetensors_write(const char *path, const SafeTensor *tensors, int n, const SafePair *metadata, int n_metadata,
                      bool sync, Error *err) {
  SafeContent content = {.tensors = tensors, .n = n, .metadata = metadata, .n_metadata = n_metadata};
  SafeSum sum;
  return write_file(path, &content, sync, NULL, &sum, err);
}

int safetensors_stream(const char *path, const SafeContent *content, const atomic_bool *stop, SafeSum *sum,
                       Error *err) {
  return write_file(path, content, true, stop, sum, err);
}
