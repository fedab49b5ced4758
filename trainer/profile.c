#include "trainer/profile.h"

#include "base/json.h"
#include "base/ranks.h"
#include "model/program/cost.h"
#include "model/program/replay.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct KindCost {
  int64_t calls;
  double seconds, flops, bytes, floor;
  char note[64]; // of the first of them (Backend.note)
} KindCost;

struct Profile {
  const Backend *backend;
  OpTime *times; // [room]
  int room;
  bool table;
  int64_t first_step, last_step; // timed; none yet where the last is before the first
  KindCost kind[OP_COUNT];
  const char *trace_path;
  FILE *trace;
  double trace_end;  // seconds of the step that are in the trace
  DeviceRates rates; // what the device can do; 0: not known
};

Profile *profile_open(const Engine *e, bool table, const char *trace, int64_t first) {
  Profile *p = xcalloc(1, sizeof *p);
  *p = (Profile){
      .backend = e->model.backend, .table = table, .first_step = first, .last_step = first - 1, .trace_path = trace};
  if (table && p->backend->rates) p->rates = p->backend->rates();
  return p;
}

static bool is_traced(const Profile *p, int64_t step) {
  return p->trace_path && step == p->first_step;
}

OpTime *profile_times(Profile *p, const Program *program, int64_t step) {
  if (!p || step < p->first_step || (!p->table && !is_traced(p, step))) return NULL;
  if (program->n_ops > p->room) p->times = xrealloc(p->times, (size_t)program->n_ops * sizeof *p->times);
  p->room = program->n_ops > p->room ? program->n_ops : p->room;
  return p->times;
}

static void add_costs(Profile *p, const Program *program, const Extents *x) {
  for (int i = 0; i < program->n_ops; i++) {
    const Op *op = &program->ops[i];
    KindCost *k = &p->kind[op->kind];
    double flops, bytes, floor = 0;
    op_cost(program, op, x, &flops, &bytes);
    if (!k->calls && p->backend->note)
      p->backend->note(p->backend, op->kind, &program->dims, &op->args, k->note, sizeof k->note);
    if (p->rates.bytes > 0) floor = bytes / p->rates.bytes;
    if (p->rates.flops > 0) floor = fmax(floor, flops / p->rates.flops);
    k->calls++;
    k->seconds += p->times[i].end - p->times[i].begin;
    k->flops += flops;
    k->bytes += bytes;
    k->floor += floor;
  }
}

static const char *const lane_name[LANE_COUNT] = {[LANE_COMPUTE] = "compute",
                                                  [LANE_D2H] = "device to host",
                                                  [LANE_H2D] = "host to device",
                                                  [LANE_UPDATE] = "update",
                                                  [LANE_COMM] = "between processes"};

// The file of the traced step, opened at its first replay. Chrome's trace event format: a process for the step, a
// thread for each lane, times in microseconds.
static int trace_open(Profile *p, Error *err) {
  if (p->trace) return 0;
  p->trace = fopen(p->trace_path, "w");
  if (!p->trace)
    return error_set(err, "check the path and permissions", "--trace %s: %s", p->trace_path, strerror(errno));
  fprintf(p->trace,
          "{\"displayTimeUnit\": \"ms\", \"traceEvents\": [\n"
          "{\"ph\": \"M\", \"name\": \"process_name\", \"pid\": 1, \"args\": {\"name\": \"step %lld, %s\"}}",
          (long long)p->first_step + 1, p->backend->name);
  for (int l = 0; l < LANE_COUNT - (ranks_size() == 1); l++) // the last is between processes
    fprintf(p->trace,
            ",\n{\"ph\": \"M\", \"name\": \"thread_name\", \"pid\": 1, \"tid\": %d, \"args\": {\"name\": \"%s\"}},\n"
            "{\"ph\": \"M\", \"name\": \"thread_sort_index\", \"pid\": 1, \"tid\": %d, \"args\": {\"sort_index\": %d}}",
            l, lane_name[l], l, l);
  return 0;
}

// A slice of a lane from `begin` to `end`, in seconds of the step; its args are still open. The ends are rounded rather
// than the length, so that slices that touch or nest in seconds do so in the file.
static void trace_slice(FILE *f, Lane lane, const char *name, double begin, double end) {
  double from = round(1e9 * begin), to = round(1e9 * end);
  fprintf(f, ",\n{\"ph\": \"X\", \"pid\": 1, \"tid\": %d, \"name\": \"%s\", \"ts\": %.3f, \"dur\": %.3f, \"args\": {",
          (int)lane, name, from / 1e3, (to - from) / 1e3);
}

// One replay: a slice of the program's name on the compute lane, and in it and beside it those of its ops. It begins
// where the replay before ended: what lies between the two is the reading of times.
static void trace_replay(Profile *p, const Program *program, const Extents *x) {
  double offset = p->trace_end, length = 0;
  for (int i = 0; i < program->n_ops; i++) length = fmax(length, p->times[i].end);
  // A nanosecond longer than its last op: viewers add decimals, and of equal ends the inner one may come out later.
  p->trace_end += length + 1e-9;
  trace_slice(p->trace, LANE_COMPUTE, program->name, offset, p->trace_end);
  if (x->text + x->image > 0) // of a pack
    fprintf(p->trace, "\"text rows\": %.0f, \"image rows\": %.0f, \"images\": %.0f", x->text, x->image, x->segments);
  fputs("}}", p->trace);
  for (int i = 0; i < program->n_ops; i++) {
    const Op *op = &program->ops[i];
    TensorId named = op->out[0] != NO_TENSOR ? op->out[0] : op->in[0];
    double flops, bytes, seconds = p->times[i].end - p->times[i].begin;
    op_cost(program, op, x, &flops, &bytes);
    Lane lane = program->one_queue ? LANE_COMPUTE : op->lane; // as it ran
    trace_slice(p->trace, lane, op_info[op->kind].name, offset + p->times[i].begin, offset + p->times[i].end);
    fputs("\"tensor\": ", p->trace);
    json_write_string(p->trace, named == NO_TENSOR ? "" : program->tensors[named].name);
    if (op->layer >= 0) fprintf(p->trace, ", \"layer\": %d", op->layer);
    int computes = op->lane == LANE_COMPUTE || op->lane == LANE_UPDATE;
    if (!computes) { // over the link they go once, while an op's bytes are read and written
      bytes = (double)program->tensors[op->out[0]].bytes;
      fprintf(p->trace, ", \"bytes\": %.0f", bytes);
    }
    if (seconds > 0) fprintf(p->trace, ", \"GB/s\": %.4g", bytes / seconds / 1e9);
    if (seconds > 0 && computes) fprintf(p->trace, ", \"GFLOP/s\": %.1f", flops / seconds / 1e9);
    fputs("}}", p->trace);
  }
}

static int trace_close(Profile *p, Error *err) {
  if (!p->trace) return 0;
  fputs("\n]}\n", p->trace);
  int bad = ferror(p->trace);
  bad |= fclose(p->trace);
  p->trace = NULL;
  if (bad) return error_set(err, "check space on the disk", "--trace %s: it could not be written", p->trace_path);
  log_info("trace of step %lld: %s (open it in Perfetto or speedscope)", (long long)p->first_step + 1, p->trace_path);
  return 0;
}

int profile_note(Profile *p, const Program *program, const Extents *extents, int64_t step, Error *err) {
  static const Extents none;
  const Extents *x = extents ? extents : &none;
  p->last_step = step;
  if (p->table) add_costs(p, program, x);
  if (!is_traced(p, step)) return 0;
  if (trace_open(p, err) != 0) return -1;
  trace_replay(p, program, x);
  return extents ? 0 : trace_close(p, err); // the update ends the step: the trace is whole, whatever becomes of the run
}

static void print_table(Profile *p) {
  double total = 0, steps = (double)(p->last_step - p->first_step + 1);
  for (int k = 0; k < OP_COUNT; k++) total += p->kind[k].seconds;
  log_info("%-18s %6s %9s %6s %9s %9s%s   (a step, op by op)", "op", "calls", "ms", "share", "GB/s", "GFLOP/s",
           p->rates.bytes > 0 ? "   floor" : "");
  for (int shown = 0; shown < OP_COUNT; shown++) {
    int most = 0;
    for (int k = 1; k < OP_COUNT; k++)
      if (p->kind[k].seconds > p->kind[most].seconds) most = k;
    KindCost *k = &p->kind[most];
    char floor[16] = "";
    if (k->seconds <= 0) break;
    if (p->rates.bytes > 0) snprintf(floor, sizeof floor, " %6.1f%%", 100 * k->floor / k->seconds);
    log_info("%-18s %6.4g %9.3f %5.1f%% %9.1f %9.1f%s%s%s", op_info[most].name, (double)k->calls / steps,
             1e3 * k->seconds / steps, 100 * k->seconds / total, k->bytes / k->seconds / 1e9,
             k->flops / k->seconds / 1e9, floor, *k->note ? "   " : "", k->note);
    k->seconds = 0;
  }
  log_info("%-18s %6s %9.3f", "all", "", 1e3 * total / steps);
  if (p->rates.bytes > 0)
    log_info("floor: the larger of bytes at %.2f TB/s, which a copy reaches here, and FLOPs at %.0f TFLOP/s, %s, over "
             "the time",
             p->rates.bytes / 1e12, p->rates.flops / 1e12,
             p->rates.flops_measured ? "which a large product of cuBLASLt reaches here"
                                     : "four fifths of the data sheet's, since there is no cuBLASLt to measure");
}

int profile_close(Profile *p, Error *err) {
  if (!p) return 0;
  int timed = p->last_step >= p->first_step;
  if (p->table && timed) print_table(p);
  if (!timed) log_warn("the run ended before step %lld: no step was timed", (long long)p->first_step + 1);
  int bad = trace_close(p, err);
  free(p->times);
  free(p);
  return bad;
}
