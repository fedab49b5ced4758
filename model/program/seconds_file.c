#include "model/program/seconds_file.h"

#include "base/json.h"
#include "base/text_out.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const size_t most_bytes = 16 << 20;

// The groups of numbers, by name. `zero`: may be 0.
typedef struct Number {
  const char *group, *name;
  size_t at; // in Costs
  int zero;
} Number;

static const Number numbers[] = {
    {"extents", "text", offsetof(Costs, extents.text), 1},
    {"extents", "image", offsetof(Costs, extents.image), 1},
    {"extents", "segments", offsetof(Costs, extents.segments), 1},
    {"extents", "targets", offsetof(Costs, extents.targets), 1},
    {"extents", "pairs", offsetof(Costs, extents.pairs), 1},
    {"rates", "bytes", offsetof(Costs, rates.bytes), 0},
    {"rates", "flops", offsetof(Costs, rates.flops), 0},
    {"link", "d2h", offsetof(Costs, link.d2h), 0},
    {"link", "h2d", offsetof(Costs, link.h2d), 0},
    {"link", "both_d2h", offsetof(Costs, link.both_d2h), 0},
    {"link", "both_h2d", offsetof(Costs, link.both_h2d), 0},
    {"link", "latency", offsetof(Costs, link.latency), 1},
    {"collectives", "reduce", offsetof(Costs, group.reduce), 1},
    {"collectives", "gather", offsetof(Costs, group.gather), 1},
    {"collectives", "latency", offsetof(Costs, group.latency), 1},
    {"collectives", "drag", offsetof(Costs, group.drag), 1},
};
enum { NUMBERS = sizeof numbers / sizeof *numbers };

static double *number_in(Costs *c, const Number *n) {
  return (double *)(void *)((char *)c + n->at);
}

// ---- writing ----

static void write_text(FILE *f, const char *name, const char *value) {
  fprintf(f, "\"%s\": ", name);
  json_write_string(f, value);
}

static void write_all(FILE *f, const Costs *c, const CostsKey *key) {
  Costs copy = *c;
  fputs("{", f);
  write_text(f, "device", key->device);
  fputs(", ", f);
  write_text(f, "build", key->build);
  fputs(",\n ", f);
  write_text(f, "sizes", key->sizes);
  fputs(",\n ", f);
  write_text(f, "processes", key->processes);
  for (int i = 0; i < NUMBERS; i++) {
    int opens = i == 0 || strcmp(numbers[i].group, numbers[i - 1].group) != 0;
    if (opens) fprintf(f, "%s,\n \"%s\": {", i ? "}" : "", numbers[i].group);
    fprintf(f, "%s\"%s\": ", opens ? "" : ", ", numbers[i].name);
    json_write_number(f, *number_in(&copy, &numbers[i]));
  }
  fputs("},\n \"classes\": [", f);
  for (int i = 0; i < c->n_classes; i++) {
    const ClassSeconds *x = &c->classes[i];
    fprintf(f, "%s\n  {\"class\": \"%016" PRIx64 "\", \"op\": \"%s\", \"seconds\": ", i ? "," : "", x->of,
            op_info[x->kind].name);
    json_write_number(f, x->seconds);
    fputs(", \"model\": ", f);
    json_write_number(f, x->model);
    fprintf(f, ", \"measured\": %d}", x->measured);
  }
  fputs("]}\n", f);
}

int costs_save(const Costs *c, const CostsKey *key, const char *path, Error *err) {
  TextOut out;
  FILE *f = text_begin(&out);
  write_all(f, c, key);
  char *text = text_end(&out);
  int bad = file_replace(path, text, out.bytes, err);
  free(text);
  return bad;
}

// ---- reading ----

// The number under this name, at least `least`, or NaN.
static double read_number(const cJSON *object, const char *name, double least) {
  const cJSON *x = cJSON_GetObjectItemCaseSensitive(object, name);
  return cJSON_IsNumber(x) && x->valuedouble >= least ? x->valuedouble : NAN;
}

static const char *read_text(const cJSON *object, const char *name) {
  const cJSON *x = cJSON_GetObjectItemCaseSensitive(object, name);
  return cJSON_IsString(x) ? x->valuestring : "";
}

static int kind_named(const char *name) {
  int k = 0;
  while (k < OP_COUNT && strcmp(op_info[k].name, name) != 0) k++;
  return k;
}

static int read_class(const cJSON *object, ClassSeconds *x) {
  const double least = 1e-12;
  const char *class = read_text(object, "class");
  char *end;
  int kind = kind_named(read_text(object, "op"));
  double measured = read_number(object, "measured", 1);
  *x = (ClassSeconds){.of = strtoull(class, &end, 16),
                      .kind = (OpKind)kind,
                      .seconds = read_number(object, "seconds", least),
                      .model = read_number(object, "model", least),
                      .measured = measured <= 1e6 ? (int)measured : 0};
  return strlen(class) == 16 && !*end && kind < OP_COUNT && isfinite(x->seconds) && isfinite(x->model) && x->measured;
}

static int read_all(const cJSON *root, Costs *c) {
  const cJSON *classes = cJSON_GetObjectItemCaseSensitive(root, "classes"), *item;
  for (int i = 0; i < NUMBERS; i++) {
    const cJSON *group = cJSON_GetObjectItemCaseSensitive(root, numbers[i].group);
    double x = read_number(group, numbers[i].name, numbers[i].zero ? 0 : 1);
    if (!isfinite(x)) return 0;
    *number_in(c, &numbers[i]) = x;
  }
  if (!cJSON_IsArray(classes)) return 0;
  cJSON_ArrayForEach(item, classes) {
    ClassSeconds x;
    if (!read_class(item, &x)) return 0;
    costs_put(c, &x);
  }
  return 1;
}

int costs_load(Costs *c, const CostsKey *key, const char *path) {
  const char *const named[][3] = {{"device", key->device, "device"},
                                  {"build", key->build, "build"},
                                  {"sizes", key->sizes, "config's sizes"},
                                  {"processes", key->processes, "number of processes"}};
  Error err;
  if (access(path, F_OK) != 0) return 0;
  cJSON *root = json_parse_file(path, most_bytes, JSON_PLAIN, &err);
  if (!root) {
    log_info("%s: times are measured again", err.text);
    return 0;
  }
  Costs read = {.processes = c->processes, .multiprocessors = c->multiprocessors}; // what no file says
  const char *other = NULL;
  for (size_t i = 0; i < sizeof named / sizeof *named && !other; i++)
    if (named[i][1] && strcmp(read_text(root, named[i][0]), named[i][1]) != 0) other = named[i][2];
  int good = !other && read_all(root, &read);
  if (other)
    log_info("%s has times of another %s: they are measured again", path, other);
  else if (!good)
    log_info("%s is damaged: times are measured again", path);
  cJSON_Delete(root);
  if (!good) {
    costs_free(&read);
    return 0;
  }
  costs_free(c);
  *c = read;
  return 1;
}
