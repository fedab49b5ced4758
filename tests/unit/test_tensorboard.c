// Event files and metrics.jsonl, read back by a parser of their formats that shares nothing with the writer.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/json.h"
#include "base/philox.h"
#include "trainer/output/append.h"
#include "data/image.h"
#include "trainer/output/report.h"
#include "trainer/output/tensorboard.h"

#include <dirent.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

// ---- a reader of event files ----

typedef struct Value {
  char tag[80];
  char kind; // 's'calar, 'h'istogram, 'i'mage
  int64_t step;
  float scalar;
  double min, max, count, sum, squares, limit[40], bucket[40];
  int limits, buckets;
  int64_t width, height, colorspace;
  uint8_t *png; // [bytes]
  size_t bytes;
} Value;

typedef struct Log {
  Value *values; // [n] in reading order, less what a START superseded
  int n, room, events, starts, files;
  int64_t start_step; // of the last START
} Log;

// CRC-32C bit by bit, from its definition: polynomial 0x1EDC6F41, both ends reflected.
static uint32_t crc32c(const uint8_t *p, size_t n) {
  uint32_t crc = 0xFFFFFFFF;
  for (size_t i = 0; i < n; i++)
    for (int bit = 0; bit < 8; bit++) {
      uint32_t top = (crc ^ (uint32_t)(p[i] >> bit)) & 1;
      crc >>= 1;
      if (top) crc ^= 0x82F63B78;
    }
  return crc ^ 0xFFFFFFFF;
}

static uint64_t little_endian(const uint8_t *p, int bytes) {
  uint64_t v = 0;
  for (int i = bytes - 1; i >= 0; i--) v = v << 8 | p[i];
  return v;
}

static double as_double(const uint8_t *p) {
  uint64_t bits = little_endian(p, 8);
  double v;
  memcpy(&v, &bits, 8);
  return v;
}

// One field of a message: a number (varint, 4 or 8 bytes) or bytes.
typedef struct Field {
  int number, wire;
  uint64_t value;
  const uint8_t *at;
  size_t n;
} Field;

static uint64_t read_varint(const uint8_t **p, const uint8_t *end) {
  uint64_t v = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    assert_true(*p < end);
    uint8_t byte = *(*p)++;
    v |= (uint64_t)(byte & 0x7F) << shift;
    if (byte < 0x80) return v;
  }
  fail_msg("a varint of more than 10 bytes");
  return 0;
}

static int read_field(const uint8_t **p, const uint8_t *end, Field *f) {
  if (*p == end) return 0;
  uint64_t key = read_varint(p, end);
  *f = (Field){.number = (int)(key >> 3), .wire = (int)(key & 7)};
  if (f->wire == 0) {
    f->value = read_varint(p, end);
    return 1;
  }
  f->n = f->wire == 1 ? 8 : f->wire == 5 ? 4 : (size_t)read_varint(p, end);
  assert_true(f->wire == 1 || f->wire == 5 || f->wire == 2);
  assert_true(f->n <= (size_t)(end - *p));
  f->at = *p;
  *p += f->n;
  return 1;
}

static int read_doubles(const Field *f, double out[40]) {
  assert_int_equal(f->wire, 2);
  assert_int_equal(f->n % 8, 0);
  assert_in_range(f->n / 8, 1, 40);
  for (size_t i = 0; i < f->n / 8; i++) out[i] = as_double(f->at + 8 * i);
  return (int)(f->n / 8);
}

static void read_histogram(const Field *message, Value *v) {
  const uint8_t *p = message->at, *end = p + message->n;
  v->kind = 'h';
  double *number[] = {&v->min, &v->max, &v->count, &v->sum, &v->squares};
  for (Field f; read_field(&p, end, &f);) {
    assert_in_range(f.number, 1, 7);
    if (f.number <= 5) {
      assert_int_equal(f.wire, 1);
      *number[f.number - 1] = as_double(f.at);
    } else {
      *(f.number == 6 ? &v->limits : &v->buckets) = read_doubles(&f, f.number == 6 ? v->limit : v->bucket);
    }
  }
}

static void read_image(const Field *message, Value *v) {
  const uint8_t *p = message->at, *end = p + message->n;
  v->kind = 'i';
  for (Field f; read_field(&p, end, &f);) {
    assert_int_equal(f.wire, f.number == 4 ? 2 : 0);
    if (f.number == 1) v->height = (int64_t)f.value;
    if (f.number == 2) v->width = (int64_t)f.value;
    if (f.number == 3) v->colorspace = (int64_t)f.value;
    if (f.number != 4) continue;
    v->bytes = f.n;
    v->png = xmalloc(f.n + 1);
    memcpy(v->png, f.at, f.n);
  }
}

static void read_summary(Log *log, const Field *message, int64_t step) {
  const uint8_t *p = message->at, *end = p + message->n;
  for (Field f; read_field(&p, end, &f);) {
    assert_int_equal(f.number, 1);
    assert_int_equal(f.wire, 2);
    Value v = {.step = step};
    const uint8_t *q = f.at, *stop = q + f.n;
    for (Field g; read_field(&q, stop, &g);) {
      if (g.number == 1) {
        assert_true(g.n < sizeof v.tag);
        memcpy(v.tag, g.at, g.n);
      } else if (g.number == 2) {
        assert_int_equal(g.wire, 5);
        uint32_t bits = (uint32_t)little_endian(g.at, 4);
        memcpy(&v.scalar, &bits, 4);
        v.kind = 's';
      } else if (g.number == 4) {
        read_image(&g, &v);
      } else {
        assert_int_equal(g.number, 5);
        read_histogram(&g, &v);
      }
    }
    assert_true(v.kind && v.tag[0]);
    if (log->n == log->room) log->values = xrealloc(log->values, (size_t)(log->room += 64) * sizeof v);
    log->values[log->n++] = v;
  }
}

// What TensorBoard does at a START: values of that and later steps read so far are forgotten.
static void purge(Log *log, int64_t step) {
  int kept = 0;
  for (int i = 0; i < log->n; i++) {
    if (log->values[i].step < step)
      log->values[kept++] = log->values[i];
    else
      free(log->values[i].png);
  }
  log->n = kept;
  log->starts++;
  log->start_step = step;
}

static void read_event(Log *log, const uint8_t *p, size_t n, int first) {
  const uint8_t *end = p + n;
  int64_t step = -1;
  double wall = 0;
  for (Field f; read_field(&p, end, &f);) {
    if (f.number == 1) {
      assert_int_equal(f.wire, 1);
      wall = as_double(f.at);
    } else if (f.number == 2) {
      assert_int_equal(f.wire, 0);
      step = (int64_t)f.value;
    } else if (f.number == 3) {
      assert_true(first && f.n == 13 && memcmp(f.at, "brain.Event:2", 13) == 0);
    } else if (f.number == 5) {
      read_summary(log, &f, step);
    } else {
      assert_int_equal(f.number, 7);
      assert_true(f.n == 2 && f.at[0] == 8 && f.at[1] == 1); // status (field 1, varint) = START
      purge(log, step);
    }
  }
  assert_true(step >= 0);
  assert_true(fabs(wall - (double)time(NULL)) < 100);
  log->events++;
}

static void read_file(Log *log, const char *path) {
  Error err;
  size_t n;
  uint8_t *bytes = (uint8_t *)file_read(path, (size_t)1 << 30, &n, &err);
  assert_non_null(bytes);
  int first = 1;
  for (size_t at = 0; at < n; first = 0) {
    assert_true(n - at >= 12);
    uint64_t length = little_endian(bytes + at, 8);
    assert_true(length <= n - at - 16);
    for (int part = 0; part < 2; part++) { // the length, then the payload
      const uint8_t *p = bytes + at + (part ? 12 : 0);
      size_t size = part ? (size_t)length : 8;
      uint32_t crc = crc32c(p, size), masked = ((crc >> 15) | (crc << 17)) + 0xa282ead8;
      assert_int_equal(little_endian(p + size, 4), masked);
    }
    read_event(log, bytes + at + 12, (size_t)length, first);
    at += 16 + (size_t)length;
  }
  assert_false(first);
  free(bytes);
  log->files++;
}

static int is_events(const struct dirent *e) {
  return strncmp(e->d_name, "events.out.tfevents.", 20) == 0;
}

// All event files of a folder in the order of their names.
static Log read_folder(const char *folder) {
  Log log = {0};
  struct dirent **names;
  int n = scandir(folder, &names, is_events, alphasort);
  assert_true(n >= 0);
  for (int i = 0; i < n; i++) {
    char *path = xasprintf("%s/%s", folder, names[i]->d_name);
    read_file(&log, path);
    free(path);
    free(names[i]);
  }
  free(names);
  return log;
}

static void log_free(Log *log) {
  for (int i = 0; i < log->n; i++) free(log->values[i].png);
  free(log->values);
}

// The only value of a tag and step.
static const Value *find(const Log *log, const char *tag, int64_t step) {
  const Value *found = NULL;
  for (int i = 0; i < log->n; i++) {
    if (log->values[i].step != step || strcmp(log->values[i].tag, tag) != 0) continue;
    if (found) fail_msg("%s at step %lld is there twice", tag, (long long)step);
    found = &log->values[i];
  }
  return found;
}

static void assert_scalar(const Log *log, const char *tag, int64_t step, double expected) {
  const Value *v = find(log, tag, step);
  if (!v || v->kind != 's' || v->scalar != (float)expected)
    fail_msg("%s at step %lld: %g, expected %g", tag, (long long)step, v ? (double)v->scalar : NAN, expected);
}

// ---- folders ----

static char *folder_new(void) {
  char *path = xstrdup("/tmp/tessera-events-XXXXXX");
  assert_non_null(mkdtemp(path));
  return path;
}

static void folder_remove(char *folder) {
  DIR *dir = opendir(folder);
  for (struct dirent *e; (e = readdir(dir));) {
    char *path = xasprintf("%s/%s", folder, e->d_name);
    unlink(path);
    free(path);
  }
  closedir(dir);
  assert_int_equal(rmdir(folder), 0);
  free(folder);
}

static double random_value(uint64_t seed, uint32_t i) {
  return (double)philox4(seed, 1, 0, i).v[0] / 4294967296.0;
}

// ---- tests ----

static void test_crc(void **state) {
  (void)state;
  assert_int_equal(crc32c((const uint8_t *)"123456789", 9), 0xE3069283); // the check value of CRC-32C
  uint8_t zeros[32] = {0};
  assert_int_equal(crc32c(zeros, 32), 0x8A9136AA); // RFC 3720, B.4
}

static void check_histogram(const Value *v, const double *values, int n) {
  double count = 0, sum = 0, squares = 0, min = INFINITY, max = -INFINITY, counted[40] = {0};
  assert_non_null(v);
  assert_int_equal(v->kind, 'h');
  assert_int_equal(v->limits, v->buckets);
  for (int i = 0; i < n; i++) {
    if (!isfinite(values[i])) continue;
    count++;
    sum += values[i];
    squares += values[i] * values[i];
    min = fmin(min, values[i]);
    max = fmax(max, values[i]);
    int at = 0;
    while (at < v->limits && values[i] > v->limit[at]) at++;
    assert_in_range(at, 0, v->limits - 1);
    counted[at]++;
  }
  assert_true(v->min == min && v->max == max && v->count == count && v->sum == sum && v->squares == squares);
  assert_true(v->limit[v->limits - 1] == max);
  for (int b = 0; b < v->limits; b++) {
    assert_true(v->bucket[b] == counted[b]);
    if (b) assert_true(v->limit[b] >= v->limit[b - 1]);
  }
}

static void test_round_trip(void **state) {
  (void)state;
  enum { ROUNDS = 40, MOST = 300 };
  static const double special[] = {0, -0.0, 1e300, -1e300, 3e-45, 16777217, INFINITY, NAN};
  char *folder = folder_new();
  Error err;
  EventWriter *w = events_open(folder, 0, &err);
  assert_non_null(w);
  events_write(w, 1); // nothing was added: no event
  double values[ROUNDS][MOST];
  int64_t steps[ROUNDS];
  uint8_t *png = xmalloc(70000);
  for (uint32_t i = 0; i < 70000; i++) png[i] = (uint8_t)philox4(7, 0, 0, i).v[0];
  for (int r = 0; r < ROUNDS; r++) {
    steps[r] = r == ROUNDS - 1 ? INT64_MAX : r * (int64_t)r * r * 1000 + r;
    int n = r * 7 % MOST;
    for (int i = 0; i < MOST; i++) values[r][i] = r % 5 == 4 ? 1.5 : random_value((uint64_t)r, (uint32_t)i) * 20 - 3;
    if (r % 3 == 0) values[r][1] = NAN, values[r][0] = INFINITY;
    if (r % 8 == 7) values[r][0] = 1.7e308, values[r][1] = -1.7e308;
    events_histogram(w, "a/histogram", values[r], n);
    for (int i = 0; i < 8; i++) {
      char tag[40];
      snprintf(tag, sizeof tag, "caf\xc3\xa9/%d", i);
      events_scalar(w, tag, r % 2 ? special[i] : values[r][i]);
    }
    events_image(w, "image", r + 1, 128 * r + 200, png + r, (size_t)(r * r * 40));
    events_write(w, steps[r]);
  }
  events_close(w);
  Log log = read_folder(folder);
  assert_int_equal(log.events, 2 + ROUNDS);
  assert_int_equal(log.starts, 1);
  for (int r = 0; r < ROUNDS; r++) {
    int n = r * 7 % MOST;
    const Value *h = find(&log, "a/histogram", steps[r]), *image = find(&log, "image", steps[r]);
    if (n == 0)
      assert_null(h);
    else
      check_histogram(h, values[r], n);
    for (int i = 0; i < 8; i++) {
      char tag[40];
      snprintf(tag, sizeof tag, "caf\xc3\xa9/%d", i);
      float expected = (float)(r % 2 ? special[i] : values[r][i]);
      const Value *v = find(&log, tag, steps[r]);
      assert_non_null(v);
      assert_memory_equal(&v->scalar, &expected, sizeof expected);
    }
    assert_non_null(image);
    assert_int_equal(image->width, r + 1);
    assert_int_equal(image->height, 128 * r + 200);
    assert_int_equal(image->colorspace, 3);
    assert_int_equal(image->bytes, r * r * 40);
    assert_memory_equal(image->png, png + r, image->bytes);
  }
  log_free(&log);
  free(png);
  folder_remove(folder);
}

// Files begun within one second, and one of a clock that was ahead, are still read in order; each START supersedes.
static void test_restarts(void **state) {
  (void)state;
  char *folder = folder_new(),
       *ahead = xasprintf("%s/events.out.tfevents.%010lld.elsewhere.1", folder, (long long)time(NULL) + 5000);
  Error err;
  static const int64_t from[] = {0, 8, 4, 4, 9};
  for (int k = 0; k < 5; k++) {
    EventWriter *w = events_open(folder, from[k], &err);
    assert_non_null(w);
    for (int64_t step = from[k]; step < from[k] + 6; step++) {
      events_scalar(w, "x", (double)(100 * k + step));
      events_write(w, step);
    }
    events_close(w);
    if (k) continue;
    struct dirent **names; // the first file becomes that of a clock ahead of this one
    assert_int_equal(scandir(folder, &names, is_events, alphasort), 1);
    char *path = xasprintf("%s/%s", folder, names[0]->d_name);
    assert_int_equal(rename(path, ahead), 0);
    free(path);
    free(names[0]);
    free(names);
  }
  Log log = read_folder(folder);
  assert_int_equal(log.files, 5);
  assert_int_equal(log.starts, 5);
  for (int64_t step = 0; step < 15; step++)
    assert_scalar(&log, "x", step, (double)(step + (step >= 9 ? 400 : step >= 4 ? 300 : 0)));
  assert_int_equal(log.n, 15);
  log_free(&log);
  assert_null(events_open("/nowhere/at all", 0, &err));
  assert_non_null(strstr(err.text, "/nowhere/at all/events.out"));
  free(ahead);
  folder_remove(folder);
}

// A file at its size limit keeps whole records only, and goes on when there is room again.
static void test_full(void **state) {
  (void)state;
  char *folder = folder_new(), *path = xasprintf("%s/lines", folder);
  struct rlimit before, small;
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
  small = before;
  small.rlim_cur = 1000;
  signal(SIGXFSZ, SIG_IGN);
  AppendFile f;
  Error err;
  assert_int_equal(append_open(&f, path, 1, &err), 0);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
  char record[30];
  memset(record, 'x', sizeof record);
  int written = 0, lost = 0;
  for (int i = 0; i < 40; i++) *(append_record(&f, record, sizeof record) == 0 ? &written : &lost) += 1;
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
  assert_int_equal(written, 33);
  assert_int_equal(lseek(f.fd, 0, SEEK_END), written * (int)sizeof record); // no piece of a record is left behind
  assert_int_equal(f.missing, lost);
  memset(record, 'y', sizeof record);
  assert_int_equal(append_record(&f, record, sizeof record), 0);
  assert_int_equal(f.missing, 0);
  append_close(&f);
  size_t n;
  char *text = file_read(path, 1 << 20, &n, &err);
  assert_int_equal(n, 34 * sizeof record);
  assert_true(strspn(text, "x") == 33 * sizeof record);
  assert_memory_equal(text + 33 * sizeof record, record, sizeof record);
  free(text);
  assert_int_equal(append_open(&f, path, 1, &err), -1); // it is there already
  append_close(&f);
  free(path);
  folder_remove(folder);
}

// ---- the report ----

enum { LAYERS = 3, TEXT_EXPERTS = 4, IMAGE_EXPERTS = 5, GROUPS = TEXT_EXPERTS + IMAGE_EXPERTS };
static const Dims dims = {.L = LAYERS, .E = {[TEXT] = TEXT_EXPERTS, [IMAGE] = IMAGE_EXPERTS}};

static StepReport step_report(int64_t step) {
  double x = random_value(3, (uint32_t)step);
  StepReport s = {.step = step,
                  .figure = {[FIGURE_LOSS] = 5 + x,
                             [FIGURE_FLOW] = x,
                             [FIGURE_CE] = 3 - x,
                             [FIGURE_CE_CAPTION] = 2 + x,
                             [FIGURE_CE_TEXT] = NAN,
                             [FIGURE_BALANCE] = .01 * x,
                             [FIGURE_Z] = .001,
                             [FIGURE_LR] = 1e-3,
                             [FIGURE_GRAD_NORM] = 1 + x,
                             [FIGURE_TOKENS] = 1000,
                             [FIGURE_TOKEN_RATE] = 2000,
                             [FIGURE_MFU] = step % 2 ? .5 : NAN,
                             [FIGURE_SECONDS] = .5}};
  if (step == 7) {
    s.figure[FIGURE_LOSS] = s.figure[FIGURE_FLOW] = INFINITY;
    s.skipped = 1;
    strcpy(s.bad, "block.0.\"w\"");
  }
  return s;
}

// Assignments of a step: text expert 0 of layer 0 is dead, layer 2 sees no image.
static void step_load(int64_t step, double *load) {
  for (int i = 0; i < LAYERS * GROUPS; i++) load[i] = philox4(11, 0, (uint64_t)step, (uint32_t)i).v[0] % 100;
  load[0] = 0;
  for (int i = 0; i < IMAGE_EXPERTS; i++) load[2 * GROUPS + TEXT_EXPERTS + i] = 0;
}

static Evaluation evaluation(int64_t step) {
  Evaluation e = {.documents = 9, .flow = (double)step, .retrieval = .5, .retrieval_training = NAN};
  for (int k = 0; k < EVAL_TIMES; k++)
    for (int p = 0; p < EVAL_PAIRINGS; p++) e.flow_at[k][p] = k + 10 * p, e.x_mse[k][p] = k + 10 * p + .5;
  e.load[TEXT] = (LoadFigures){.entropy = .75, .max_over_mean = 2, .dead = 1, .experts = 12};
  e.load[IMAGE] = (LoadFigures){.entropy = NAN, .max_over_mean = NAN, .experts = 15};
  return e;
}

// Runs steps [from, to), evaluating when 30 and 60 steps are done.
static void run(const char *folder, int64_t from, int64_t to) {
  Error err;
  double load[LAYERS * GROUPS];
  Report *r = report_open(folder, from, 1000, &err);
  assert_non_null(r);
  for (int64_t step = from; step < to; step++) {
    StepReport s = step_report(step);
    report_step(r, &s);
    step_load(step, load);
    report_load(r, load, &dims);
    if ((step + 1) % 30 != 0) continue;
    Evaluation e = evaluation(step + 1);
    report_evaluation(r, &e, step + 1);
  }
  report_close(r);
}

// Counts the lines of metrics.jsonl; step lines must be 0, 1, 2 .. in order.
static void count_lines(const char *folder, int *steps, int *evals, int *loads, cJSON **load_line) {
  char *path = xasprintf("%s/metrics.jsonl", folder);
  Error err;
  size_t n;
  char *text = file_read(path, 1 << 24, &n, &err);
  assert_non_null(text);
  *steps = *evals = *loads = 0;
  for (char *line = text, *end; *line; line = end + 1) {
    end = strchr(line, '\n');
    assert_non_null(end);
    cJSON *json = json_parse(line, (size_t)(end - line), "metrics.jsonl", JSON_PLAIN, &err);
    if (!json) fail_msg("%s", err.text);
    const cJSON *step = cJSON_GetObjectItem(json, "step");
    assert_true(cJSON_IsNumber(step));
    if (cJSON_HasObjectItem(json, "eval")) {
      assert_int_equal(step->valuedouble, 30 * ++*evals);
    } else if (cJSON_HasObjectItem(json, "load")) {
      ++*loads;
      cJSON_Delete(*load_line);
      *load_line = json;
      json = NULL;
    } else {
      StepReport s = step_report(*steps);
      assert_int_equal(step->valuedouble, (*steps)++);
      assert_int_equal(cJSON_HasObjectItem(json, "loss"), !s.skipped);
      assert_false(cJSON_HasObjectItem(json, "ce_text"));
      assert_true(fabs(cJSON_GetObjectItem(json, "ce")->valuedouble - s.figure[FIGURE_CE]) < 1e-8);
      assert_true(cJSON_GetObjectItem(json, "tokens_per_second")->valuedouble == 2000);
      const cJSON *mfu = cJSON_GetObjectItem(json, "mfu");
      assert_true((int)step->valuedouble % 2 ? mfu && mfu->valuedouble == 0.5 : !mfu);
      if (s.skipped) assert_string_equal(cJSON_GetObjectItem(json, "skipped")->valuestring, s.bad);
    }
    cJSON_Delete(json);
  }
  free(text);
  free(path);
}

// The load histograms of the steps [from, to).
static void check_load(const Log *log, int64_t from, int64_t to) {
  double sums[LAYERS][GROUPS] = {{0}}, load[LAYERS * GROUPS], shares[2][LAYERS * GROUPS];
  int n[2] = {0};
  for (int64_t step = from; step < to; step++) {
    step_load(step, load);
    for (int i = 0; i < LAYERS * GROUPS; i++) sums[i / GROUPS][i % GROUPS] += load[i];
  }
  for (int m = 0; m < 2; m++) {
    int first = m ? TEXT_EXPERTS : 0, experts = m ? IMAGE_EXPERTS : TEXT_EXPERTS;
    for (int l = 0; l < LAYERS; l++) {
      double sum = 0;
      for (int e = 0; e < experts; e++) sum += sums[l][first + e];
      for (int e = 0; e < experts && sum > 0; e++) shares[m][n[m]++] = sums[l][first + e] * experts / sum;
    }
  }
  assert_int_equal(n[1], 2 * IMAGE_EXPERTS); // layer 2 saw none
  check_histogram(find(log, "router/text_load", to), shares[0], n[0]);
  check_histogram(find(log, "router/image_load", to), shares[1], n[1]);
  assert_scalar(log, "router/text_dead", to, 1);
}

static void test_report(void **state) {
  (void)state;
  char *folder = folder_new(), *path = xasprintf("%s/metrics.jsonl", folder);
  cJSON *load = NULL;
  int steps, evals, loads;
  run(folder, 0, 70);
  count_lines(folder, &steps, &evals, &loads, &load);
  assert_int_equal(steps, 70);
  assert_int_equal(evals, 2);
  assert_int_equal(loads, 2);
  assert_int_equal(cJSON_GetObjectItem(cJSON_GetObjectItem(load, "load"), "steps")->valuedouble, 20);
  Log log = read_folder(folder);
  for (int64_t step = 0; step < 70; step++) {
    StepReport s = step_report(step);
    assert_scalar(&log, "loss/ce", step + 1, s.figure[FIGURE_CE]);
    assert_scalar(&log, "optimizer/grad_norm", step + 1, s.figure[FIGURE_GRAD_NORM]);
    assert_scalar(&log, "speed/tokens_per_second", step + 1, 2000);
    assert_null(find(&log, "loss/ce_text", step + 1));
    if (s.skipped)
      assert_null(find(&log, "loss/total", step + 1));
    else
      assert_scalar(&log, "loss/total", step + 1, s.figure[FIGURE_LOSS]);
  }
  assert_scalar(&log, "eval/flow", 30, 30);
  assert_scalar(&log, "eval_flow_at_shuffled/t0.3", 60, 11);
  assert_scalar(&log, "eval_x_mse/t0.9", 60, 4.5);
  assert_scalar(&log, "eval/text_experts_entropy", 60, .75);
  assert_null(find(&log, "eval/retrieval_training", 60));
  assert_null(find(&log, "eval/image_experts_dead", 60));
  check_load(&log, 0, 50);
  check_load(&log, 50, 70);
  log_free(&log);

  // Killed in the middle of a line, then resumed from step 60: nothing twice, the evaluation at 60 still there.
  FILE *f = fopen(path, "ab");
  fputs("{\"step\":70,\"lo", f);
  fclose(f);
  run(folder, 60, 65);
  count_lines(folder, &steps, &evals, &loads, &load);
  assert_int_equal(steps, 65);
  assert_int_equal(evals, 2);
  assert_int_equal(loads, 2);
  const cJSON *figures = cJSON_GetObjectItem(load, "load");
  assert_int_equal(cJSON_GetObjectItem(load, "step")->valuedouble, 65);
  assert_int_equal(cJSON_GetObjectItem(figures, "steps")->valuedouble, 5);
  const cJSON *text = cJSON_GetObjectItem(figures, "text_experts");
  assert_int_equal(cJSON_GetObjectItem(text, "dead")->valuedouble, 1);
  assert_int_equal(cJSON_GetObjectItem(text, "all")->valuedouble, LAYERS * TEXT_EXPERTS);
  assert_true(cJSON_GetObjectItem(text, "max_over_mean")->valuedouble > 1);
  log = read_folder(folder);
  assert_int_equal(log.start_step, 61);
  for (int64_t step = 1; step <= 65; step++)
    assert_scalar(&log, "loss/ce", step, step_report(step - 1).figure[FIGURE_CE]);
  assert_null(find(&log, "loss/ce", 66));
  assert_null(find(&log, "router/text_load", 70));
  assert_scalar(&log, "eval/flow", 60, 60);
  check_load(&log, 60, 65);
  log_free(&log);

  run(folder, 0, 3); // begun anew
  count_lines(folder, &steps, &evals, &loads, &load);
  assert_int_equal(steps, 3);
  log = read_folder(folder);
  assert_int_equal(log.values[log.n - 1].step, 3);
  assert_null(find(&log, "eval/flow", 30));
  log_free(&log);
  cJSON_Delete(load);
  free(path);
  folder_remove(folder);
}

static void test_drawings(void **state) {
  (void)state;
  char *folder = folder_new(), *path = xasprintf("%s/sheet.png", folder);
  Error err;
  Image image = {.width = 37, .height = 11, .rgb = xcalloc(37 * 11, 3)};
  for (int i = 0; i < 37 * 11 * 3; i++) image.rgb[i] = (uint8_t)(i * 7);
  assert_int_equal(image_write_png(path, &image, &err), 0);
  Report *r = report_open(folder, 20, 30, &err);
  assert_non_null(r);
  report_drawings(r, path, 20);
  report_drawings(r, "/nowhere.png", 21); // a warning
  report_close(r);
  Log log = read_folder(folder);
  assert_int_equal(log.n, 1);
  const Value *v = find(&log, "drawings", 20);
  assert_non_null(v);
  Image back;
  assert_int_equal(image_decode(v->png, v->bytes, IMAGE_MAX_PIXELS, &back, &err), 0);
  assert_int_equal(v->width, 37);
  assert_int_equal(v->height, 11);
  assert_int_equal(back.width, 37);
  assert_memory_equal(back.rgb, image.rgb, 37 * 11 * 3);
  image_free(&back);
  image_free(&image);
  log_free(&log);
  free(path);
  folder_remove(folder);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_crc),  cmocka_unit_test(test_round_trip), cmocka_unit_test(test_restarts),
      cmocka_unit_test(test_full), cmocka_unit_test(test_report),     cmocka_unit_test(test_drawings),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
