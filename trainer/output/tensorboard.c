#include "trainer/output/tensorboard.h"

#include "trainer/output/append.h"

#include <dirent.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FILE_PREFIX "events.out.tfevents."

// Field numbers.
enum { EVENT_WALL_TIME = 1, EVENT_STEP = 2, EVENT_FILE_VERSION = 3, EVENT_SUMMARY = 5, EVENT_SESSION_LOG = 7 };
enum { SESSION_STATUS = 1, SESSION_START = 1 }; // SessionLog.status and its value START
enum { SUMMARY_VALUE = 1 };
enum { VALUE_TAG = 1, VALUE_SCALAR = 2, VALUE_IMAGE = 4, VALUE_HISTOGRAM = 5 };
enum { IMAGE_HEIGHT = 1, IMAGE_WIDTH = 2, IMAGE_COLORSPACE = 3, IMAGE_BYTES = 4, COLORSPACE_RGB = 3 };
enum { HISTO_MIN = 1, HISTO_MAX, HISTO_COUNT, HISTO_SUM, HISTO_SQUARES, HISTO_LIMIT, HISTO_BUCKET };
enum { BUCKETS = 30 };
// How a field's value is encoded.
enum { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

typedef struct Buffer {
  uint8_t *data; // [room]
  size_t n, room;
} Buffer;

struct EventWriter {
  AppendFile file;
  Buffer summary; // values added since the last event
  Buffer value, inner, event, record;
  uint32_t crc[256]; // CRC-32C of each byte
};

// ---- protocol buffers ----

static void put_bytes(Buffer *b, const void *bytes, size_t n) {
  if (b->n + n > b->room) {
    b->room = 2 * (b->n + n);
    b->data = xrealloc(b->data, b->room);
  }
  if (n) memcpy(b->data + b->n, bytes, n);
  b->n += n;
}

static void put_little_endian(Buffer *b, uint64_t v, int bytes) {
  uint8_t out[8];
  for (int i = 0; i < bytes; i++) out[i] = (uint8_t)(v >> (8 * i));
  put_bytes(b, out, (size_t)bytes);
}

static void put_varint(Buffer *b, uint64_t v) {
  for (; v >= 0x80; v >>= 7) put_bytes(b, &(uint8_t){(uint8_t)(v | 0x80)}, 1);
  put_bytes(b, &(uint8_t){(uint8_t)v}, 1);
}

static void put_key(Buffer *b, int field, int wire) {
  put_varint(b, (uint64_t)field << 3 | (uint64_t)wire);
}

static void put_int(Buffer *b, int field, int64_t v) {
  put_key(b, field, WIRE_VARINT);
  put_varint(b, (uint64_t)v);
}

static void put_double(Buffer *b, int field, double v) {
  uint64_t bits;
  memcpy(&bits, &v, sizeof bits);
  put_key(b, field, WIRE_64);
  put_little_endian(b, bits, 8);
}

static void put_float(Buffer *b, int field, float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  put_key(b, field, WIRE_32);
  put_little_endian(b, bits, 4);
}

// A string, bytes, an embedded message or a packed list.
static void put_field(Buffer *b, int field, const void *bytes, size_t n) {
  put_key(b, field, WIRE_BYTES);
  put_varint(b, n);
  put_bytes(b, bytes, n);
}

static void put_doubles(Buffer *b, int field, const double *v, int n) {
  put_key(b, field, WIRE_BYTES);
  put_varint(b, 8 * (uint64_t)n);
  for (int i = 0; i < n; i++) {
    uint64_t bits;
    memcpy(&bits, &v[i], sizeof bits);
    put_little_endian(b, bits, 8);
  }
}

// ---- records ----

static uint32_t masked_crc(const EventWriter *w, const uint8_t *p, size_t n) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < n; i++) crc = (crc >> 8) ^ w->crc[(crc ^ p[i]) & 0xFF];
  crc = ~crc;
  return (crc >> 15 | crc << 17) + 0xA282EAD8u;
}

// Writes one event whose `what` is field `field` with the given bytes.
static int write_event(EventWriter *w, int64_t step, int field, const void *bytes, size_t n) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  Buffer *e = &w->event, *r = &w->record;
  e->n = r->n = 0;
  put_double(e, EVENT_WALL_TIME, (double)now.tv_sec + (double)now.tv_nsec * 1e-9);
  put_int(e, EVENT_STEP, step);
  put_field(e, field, bytes, n);
  put_little_endian(r, e->n, 8);
  put_little_endian(r, masked_crc(w, r->data, 8), 4);
  put_bytes(r, e->data, e->n);
  put_little_endian(r, masked_crc(w, e->data, e->n), 4);
  return append_record(&w->file, r->data, r->n);
}

// The time in a new file's name: now, or just after that of the newest file there, should that be later (two restarts
// in one second, a clock set back).
static long long name_time(const char *folder) {
  long long at = (long long)time(NULL);
  DIR *dir = opendir(folder);
  if (!dir) return at;
  size_t prefix = strlen(FILE_PREFIX);
  for (struct dirent *e; (e = readdir(dir));) {
    const char *digits = e->d_name + prefix;
    if (strncmp(e->d_name, FILE_PREFIX, prefix) != 0 || strspn(digits, "0123456789") != 10) continue;
    long long other = atoll(digits);
    if (other >= at && other < 9999999999) at = other + 1;
  }
  closedir(dir);
  return at;
}

EventWriter *events_open(const char *folder, int64_t first_step, Error *err) {
  char host[64] = "", *path;
  if (gethostname(host, sizeof host - 1) != 0 || !host[0]) strcpy(host, "localhost");
  EventWriter *w = xcalloc(1, sizeof *w);
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t c = i;
    for (int k = 0; k < 8; k++) c = c >> 1 ^ (c & 1 ? 0x82F63B78u : 0); // Castagnoli's polynomial, reflected
    w->crc[i] = c;
  }
  path = xasprintf("%s/" FILE_PREFIX "%010lld.%s.%d", folder, name_time(folder), host, (int)getpid());
  if (append_open(&w->file, path, 1, err) != 0) {
    free(path);
    free(w);
    return NULL;
  }
  free(path);
  static const char version[] = "brain.Event:2";
  static const uint8_t start[] = {SESSION_STATUS << 3 | WIRE_VARINT, SESSION_START};
  if (write_event(w, first_step, EVENT_FILE_VERSION, version, sizeof version - 1) != 0 ||
      write_event(w, first_step, EVENT_SESSION_LOG, start, sizeof start) != 0) {
    error_set(err, "free some space; the warning above says what the system answered", "cannot begin %s", w->file.path);
    events_close(w);
    return NULL;
  }
  return w;
}

// ---- values ----

// Begins a Value in w->value.
static Buffer *value_begin(EventWriter *w, const char *tag) {
  w->value.n = w->inner.n = 0;
  put_field(&w->value, VALUE_TAG, tag, strlen(tag));
  return &w->value;
}

static void value_end(EventWriter *w) {
  put_field(&w->summary, SUMMARY_VALUE, w->value.data, w->value.n);
}

void events_scalar(EventWriter *w, const char *tag, double value) {
  put_float(value_begin(w, tag), VALUE_SCALAR, (float)value);
  value_end(w);
}

void events_histogram(EventWriter *w, const char *tag, const double *values, int64_t n) {
  double low = INFINITY, high = -INFINITY, count = 0, sum = 0, squares = 0;
  for (int64_t i = 0; i < n; i++) {
    if (!isfinite(values[i])) continue;
    low = fmin(low, values[i]);
    high = fmax(high, values[i]);
    count++;
    sum += values[i];
    squares += values[i] * values[i];
  }
  if (count == 0) return;
  // Bucket b counts what lies above limit[b - 1] and up to limit[b]; the first one begins at the smallest value.
  double limit[BUCKETS], bucket[BUCKETS] = {0};
  int buckets = high > low ? BUCKETS : 1;
  for (int b = 0; b < buckets; b++) { // never below the one before, whatever the rounding
    double f = (b + 1) / (double)buckets;
    limit[b] = fmin(high, fmax(b ? limit[b - 1] : low, low * (1 - f) + high * f));
  }
  limit[buckets - 1] = high;
  for (int64_t i = 0; i < n; i++) {
    if (!isfinite(values[i])) continue;
    int b = 0;
    while (b < buckets - 1 && values[i] > limit[b]) b++;
    bucket[b]++;
  }
  Buffer *v = value_begin(w, tag), *h = &w->inner;
  put_double(h, HISTO_MIN, low);
  put_double(h, HISTO_MAX, high);
  put_double(h, HISTO_COUNT, count);
  put_double(h, HISTO_SUM, sum);
  put_double(h, HISTO_SQUARES, squares);
  put_doubles(h, HISTO_LIMIT, limit, buckets);
  put_doubles(h, HISTO_BUCKET, bucket, buckets);
  put_field(v, VALUE_HISTOGRAM, h->data, h->n);
  value_end(w);
}

void events_image(EventWriter *w, const char *tag, int width, int height, const void *png, size_t bytes) {
  Buffer *v = value_begin(w, tag), *image = &w->inner;
  put_int(image, IMAGE_HEIGHT, height);
  put_int(image, IMAGE_WIDTH, width);
  put_int(image, IMAGE_COLORSPACE, COLORSPACE_RGB);
  put_field(image, IMAGE_BYTES, png, bytes);
  put_field(v, VALUE_IMAGE, image->data, image->n);
  value_end(w);
}

void events_write(EventWriter *w, int64_t step) {
  if (w->summary.n) write_event(w, step, EVENT_SUMMARY, w->summary.data, w->summary.n);
  w->summary.n = 0;
}

void events_close(EventWriter *w) {
  if (!w) return;
  append_close(&w->file);
  Buffer *owned[] = {&w->summary, &w->value, &w->inner, &w->event, &w->record};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]->data);
  free(w);
}
