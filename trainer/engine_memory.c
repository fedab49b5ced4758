// What an engine says of its memory: the table of --plan, what does not fit, and what would make it fit.
#include "base/machine.h"
#include "data/loader.h"
#include "kernels/backends.h"
#include "model/program/planner.h"
#include "trainer/engine_internal.h"
#include "trainer/slab.h"

#include <math.h>
#include <stdlib.h>

static const char *const memory_policy_name[] = {
    [MEMORY_AUTO] = "auto", [MEMORY_KEEP] = "keep", [MEMORY_RECOMPUTE] = "recompute", [MEMORY_OFFLOAD] = "offload"};

// "the largest: 8 x expert h, 0.201 GB", of what fills the arena.
static void name_largest(const Engine *e, char *text, size_t size) {
  const Program *fullest = NULL;
  const Program *all[ENGINE_FORWARD_PROGRAMS + 3] = {e->first.program, e->later.program, e->last.program};
  for (int i = 0; i < e->n_forward; i++) all[3 + i] = e->forward[i].m.program;
  for (int i = 0; i < e->n_forward + 3; i++)
    if (all[i] && (!fullest || engine_arena_need(e, all[i]) > engine_arena_need(e, fullest))) fullest = all[i];
  Peak peak = planner_peak(fullest);
  snprintf(text, size, "the largest: %d x %s, %.3f GB", peak.share[0].count, peak.share[0].name,
           (double)peak.share[0].bytes / 1e9);
}

char *engine_memory_text(const Engine *e) {
  char *state = engine_state_text(e);
  char *text = xasprintf("%.3f GB of the %.3f GB that it may take, policy %s%s%s", (double)engine_device_bytes(e) / 1e9,
                         (double)e->budget / 1e9, memory_policy_name[e->chosen], state[0] ? "; " : "", state);
  free(state);
  return text;
}

// The smallest changes with which what needs too much would fit. `activations`: those bytes of it that fewer slots
// save, down to the gradients that lie where they have lain. What is needed is the most of many sums, each of which
// falls on a line of its own as slots get fewer: it lies nowhere above the line from here to there.
static void name_ways_out(const Engine *e, int64_t need, int64_t activations, char *text, size_t size) {
  enum { STEP = 64 };
  const Config *c = e->config;
  const int least = 4 + c->data.max_caption + config_max_image_tokens(c); // what the config takes
  const double gradients = (double)engine_gradients_in_arena(e);
  double left = (double)(e->budget - (need - activations)) - gradients, above = (double)activations - gradients;
  int tokens = left > 0 ? (int)(.97 * left / above * e->slots) / STEP * STEP : 0;
  int n = snprintf(text, size, "memory.budget_gb=%.3f is enough", ceil((double)need / 1e6) / 1e3);
  if (tokens >= least)
    n += snprintf(text + n, size - (size_t)n, ", or about --tokens %d (--tokens max finds the most)", tokens);
  else if (tokens == 0)
    n += snprintf(text + n, size - (size_t)n, "; no --tokens is, for state %s %.3f GB",
                  gradients > 0 ? "and gradients alone need" : "alone needs",
                  ((double)(need - activations) + gradients) / 1e9);
  int64_t host = engine_host_budget(e); // 0 where the state takes all that this machine has
  if (engine_on_host(e, SPACE_HOST) && e->chosen == MEMORY_AUTO && 5 * e->bytes[SPACE_HOST] >= 4 * host)
    n += snprintf(text + n, size - (size_t)n, "; more of memory.host_gb than %.3f may help", (double)host / 1e9);
  int leaves = engine_may_leave(e) && c->memory.state == STATE_AUTO && c->memory.policy != MEMORY_AUTO;
  if (leaves)
    n += snprintf(text + n, size - (size_t)n, "; --memory auto, or memory.state=%s, moves state to the host",
                  c->train.ema > 0 ? "ema" : "moments");
  snprintf(text + n, size - (size_t)n, "; --plan shows the table");
}

int engine_check_budget(const Engine *e, Error *err) {
  int64_t budget = e->budget, need = engine_device_bytes(e);
  int64_t activations = e->bytes[SPACE_ARENA] + (engine_counts(e, SPACE_HOST) ? e->bytes[SPACE_HOST] : 0);
  int64_t offloaded = engine_on_host(e, SPACE_HOST) ? e->bytes[SPACE_HOST] : 0, may = engine_host_budget(e);
  if (need <= budget && e->config->memory.host_gb > 0 && offloaded > may)
    return error_set(err,
                     "raise it, lower data.micro_batch_tokens (--tokens) or train with --memory recompute; --plan "
                     "shows the table",
                     "%.3f GB of activations are to be offloaded, %.3f GB more than memory.host_gb",
                     (double)offloaded / 1e9, (double)(offloaded - may) / 1e9);
  if (need <= budget) return 0;
  char largest[128], ways[256];
  const char *limit;
  name_largest(e, largest, sizeof largest);
  name_ways_out(e, need, activations, ways, sizeof ways);
  machine_memory("", &limit);
  int given = e->config->memory.budget_gb > 0, device = !given && e->model.backend->queues;
  return error_set(err, ways,
                   "%.3f GB are needed (%.3f GB of state, %.3f GB of activations%s under memory.policy %s; %s), %.3f "
                   "GB more than the %.3f GB of memory.budget_gb%s%s",
                   (double)need / 1e9, (double)(need - activations) / 1e9, (double)activations / 1e9,
                   engine_gradients_in_arena(e) ? " and gradients" : "", memory_policy_name[e->chosen], largest,
                   (double)(need - budget) / 1e9, (double)budget / 1e9,
                   given    ? ""
                   : device ? " auto, what the device has free"
                            : " auto, four fifths of ",
                   given || device ? "" : limit);
}

int engine_check_host(const Engine *e, Error *err) {
  int64_t there = backend_of_host()->memory(), state = engine_state_on_host(e);
  int64_t offloaded = engine_on_host(e, SPACE_HOST) ? e->bytes[SPACE_HOST] : 0;
  static const char *const hint =
      "lower data.micro_batch_tokens (--tokens), train with --memory recompute or raise memory.budget_gb; --plan shows "
      "the table";
  if (offloaded + state > there)
    return error_set(err, hint,
                     "%.3f GB are to lie in this machine's memory (%.3f GB of activations, %.3f GB of the optimizer's "
                     "state), which has %.3f GB for that",
                     (double)(offloaded + state) / 1e9, (double)offloaded / 1e9, (double)state / 1e9,
                     (double)there / 1e9);
  return 0;
}

int engine_refuse_space(const Engine *e, Space space, Error *err) {
  char largest[128];
  name_largest(e, largest, sizeof largest);
  engine_print_plan(e, stderr);
  return error_set(
      err,
      engine_on_host(e, space)
          ? "close what else uses this machine's memory, or raise memory.budget_gb; the table is above"
          : "lower data.micro_batch_tokens (--tokens) or train with --memory recompute; the table is above",
      "out of memory: %s needs %.3f GB%s%s", space_info[space].label, (double)e->bytes[space] / 1e9,
      space == SPACE_ARENA ? "; " : "", space == SPACE_ARENA ? largest : "");
}

// ---- the table ----

static int64_t copy_bytes(const Engine *e) {
  int64_t sum = 0;
  for (int s = 0; s < SPACE_COUNT; s++) sum += slab_copy_bytes(e, (Space)s);
  return sum;
}

#define OF_HOST " of the host, not in the total"
#define OF_ARENA " of the arena, not in the total again"

// A row of the memory table; `note` is text behind it.
static void print_row(FILE *f, const char *label, int64_t bytes, const char *note) {
  fprintf(f, "  %-24s %14lld bytes  %9.3f MB%s\n", label, (long long)bytes, (double)bytes / 1e6, note);
}

void engine_print_plan(const Engine *e, FILE *f) {
  const Config *c = e->config;
  fprintf(f, "parameters %.3f M, slots %d, modulation rows %d, micro-batches %d, policy %s",
          (double)e->model.params.parameters / 1e6, e->slots, e->segments, c->train.micro_batches,
          memory_policy_name[e->chosen]);
  if (c->processes > 1) fprintf(f, "; each of %d processes", c->processes);
  fputc('\n', f);
  for (int s = 0; s < SPACE_COUNT; s++) {
    const char *note = engine_counts(e, (Space)s) ? "" : engine_on_host(e, (Space)s) ? OF_HOST : OF_ARENA;
    if (e->bytes[s]) print_row(f, space_info[s].label, e->bytes[s], note);
    if (e->bases.host_bytes[s]) print_row(f, space_info[s].label, e->bases.host_bytes[s], OF_HOST);
  }
  if (e->first.program)
    print_row(f, "packs decoded ahead",
              loader_packs(c->train.micro_batches, c->data.threads, engine_packs_sent(e) + 1) * e->bytes[SPACE_STAGING],
              OF_HOST);
  int64_t rest = engine_device_bytes(e);
  for (int s = 0; s < SPACE_COUNT; s++)
    if (engine_counts(e, (Space)s)) rest -= e->bytes[s];
  if (rest) print_row(f, "rounding and page tables", rest, "");
  print_row(f, "total", engine_device_bytes(e), "");
  SaveCopy copy = config_save_copy(c);
  if (engine_slab_bytes(e, SPACE_ADAM_M) && copy != COPY_NEVER)
    print_row(f, "copy for checkpoints", copy_bytes(e),
              copy == COPY_AUTO ? OF_HOST "; without that room a save holds up training" : OF_HOST);
  engine_print_state(e, f);
  if (e->first.program) planner_print(e->first.program, f);
}
