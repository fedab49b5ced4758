// Every op of the CUDA backend against the CPU backend, at every shape of tests/cuda_shapes.c: outputs within the
// tolerances of tests/cuda_case.h, zeros where zeros are due, nothing written where nothing should be, the same bits
// twice.
//
//   cuda_ops [--bench] [OP | FAMILY ...]    one line per op; exit code 1 when one fails
//
// --bench times each op instead, at the size of a layer of the base config. The calls run in a child process: an op
// that brings it down, or hangs, is reported and left out, and the others go on.
#include "tests/cuda_families.h"

#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct Family {
  const char *name;
  void (*run)(CudaCase *c, const CudaShape *shape);
  OpKind ops[8];
  int n;
} Family;

static const Family families[] = {
    {"copies", run_copies, {OP_COPY, OP_ZERO, OP_ADD, OP_CAST}, 4},
    {"update", run_update, {OP_GRAD_NORM, OP_ADAMW, OP_EMA}, 3},
    {"linear", run_linears, {OP_LINEAR_FWD, OP_LINEAR_DGRAD, OP_LINEAR_WGRAD}, 3},
    {"embedding", run_embedding, {OP_NOISE, OP_EMBED_FWD, OP_EMBED_BWD, OP_POOL_FWD, OP_POOL_BWD}, 5},
    {"condition",
     run_conditions,
     {OP_TIME_FEATURES, OP_SILU_FWD, OP_SILU_BWD, OP_COND_FWD, OP_COND_BWD, OP_MOD_FWD, OP_MOD_BWD},
     7},
    {"adaln", run_adaln, {OP_ADALN_FWD, OP_ADALN_BWD}, 2},
    {"rope", run_rope, {OP_QKNORM_ROPE_FWD, OP_QKNORM_ROPE_BWD}, 2},
    {"attention", run_attention, {OP_ATTENTION_FWD, OP_ATTENTION_BWD}, 2},
    {"router", run_routers, {OP_ROUTER_FWD, OP_ROUTER_LOSS, OP_ROUTER_BWD}, 3},
    {"experts",
     run_experts,
     {OP_EXPERT_UP_FWD, OP_EXPERT_DOWN_FWD, OP_EXPERT_COMBINE, OP_EXPERT_DOWN_BWD, OP_EXPERT_DOWN_WGRAD,
      OP_EXPERT_UP_DGRAD, OP_EXPERT_UP_WGRAD},
     7},
    {"swiglu", run_swiglu, {OP_SWIGLU_FWD, OP_SWIGLU_BWD}, 2},
    {"head", run_heads, {OP_HEAD_CE, OP_HEAD_LOGITS}, 2},
    {"flow", run_flow, {OP_FLOW_LOSS}, 1},
};
enum { FAMILIES = sizeof families / sizeof *families };

static void print_op(const Report *report, OpKind kind) {
  const OpReport *r = &report->of[kind];
  bool ok = r->cases && !r->failures && !report->crashed[kind];
  printf("%-18s %4d cases %6.2f s  worst row %.1e ", op_info[kind].name, r->cases, r->seconds, r->row);
  const char *at = op_info[kind].out;
  for (int i = 0; *at; i++) {
    if (r->error[i] > 0) printf(" %.*s %.1e", (int)strcspn(at, "?+ "), at, r->error[i]);
    at += strcspn(at, " ");
    at += *at == ' ';
  }
  printf("  %s\n", ok ? "pass" : "FAIL");
  if (r->failures) printf("    %d failures, the first: %s\n", r->failures, r->failure);
  if (!r->cases && !report->crashed[kind]) printf("    no case reached it\n");
  fflush(stdout);
}

static void run_family(CudaCase *c, int f) {
  const Family *family = &families[f];
  Report *report = c->report;
  bool any = false;
  for (int i = 0; i < family->n; i++) {
    OpKind kind = family->ops[i];
    any = any || c->wanted[kind];
    if (!report->crashed[kind]) report->of[kind] = (OpReport){0};
  }
  if (!any) return;
  report->family = f;
  const CudaShape *shapes = c->bench ? &cuda_bench_shape : cuda_shapes;
  for (int s = 0; s < (c->bench ? 1 : n_cuda_shapes); s++) {
    cuda_shape_open(c, &shapes[s], (uint64_t)(f * 100 + s + 1));
    family->run(c, &shapes[s]);
    op_case_free(&c->ops);
  }
  for (int i = 0; i < family->n && !c->bench; i++)
    if (c->wanted[family->ops[i]]) print_op(report, family->ops[i]);
}

// Runs families from `first` on in a child; true when it came to its end. Otherwise the op it died in is marked.
static bool run_child(Report *report, const bool *wanted, bool bench, int first) {
  report->running = OP_COUNT;
  fflush(stdout);
  pid_t child = fork();
  if (child < 0) panic("cannot start a process");
  if (child == 0) {
    Error err;
    CudaCase c = {.report = report, .wanted = wanted, .bench = bench};
    if (backend_cuda.open && backend_cuda.open(&err) != 0) fatal(&err);
    for (int f = first; f < FAMILIES; f++) run_family(&c, f);
    cuda_case_close(&c);
    exit(0);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) panic("lost the child process");
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return true;
  if (report->running == OP_COUNT) exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
  OpReport *r = &report->of[report->running];
  report->crashed[report->running] = true;
  r->failures++;
  snprintf(r->failure, sizeof r->failure, "%s: the process ended (%s %d)", report->what,
           WIFSIGNALED(status) ? "signal" : "exit code", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
  return false;
}

static bool name_matches(const char *name, const char *wanted) {
  return strcasecmp(name, wanted) == 0;
}

static void select_ops(const char *wish, bool wanted[OP_COUNT]) {
  bool found = false;
  for (int f = 0; f < FAMILIES; f++)
    for (int i = 0; i < families[f].n; i++) {
      OpKind kind = families[f].ops[i];
      if (!name_matches(families[f].name, wish) && !name_matches(op_info[kind].name, wish)) continue;
      wanted[kind] = found = true;
    }
  if (found) return;
  fprintf(stderr, "cuda_ops: there is no op or family %s\n", wish);
  exit(2);
}

int main(int argc, char **argv) {
  bool bench = false, wanted[OP_COUNT] = {0}, selected = false;
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--bench") == 0) {
      bench = true;
      continue;
    }
    select_ops(argv[i], wanted);
    selected = true;
  }
  for (int k = 0; k < OP_COUNT && !selected; k++) wanted[k] = true;
  Report *report = mmap(NULL, sizeof *report, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (report == MAP_FAILED) panic("no shared memory");
  double start = time_now();
  for (int family = 0; !run_child(report, wanted, bench, family);) family = report->family;
  int failed = 0, ops = 0;
  for (int k = 0; k < OP_COUNT; k++) {
    if (!wanted[k]) continue;
    const OpReport *r = &report->of[k];
    bool ok = bench ? !report->crashed[k] : r->cases && !r->failures;
    ops++;
    failed += !ok;
    if (!ok) printf("FAIL %s: %s\n", op_info[k].name, r->failures ? r->failure : "no case reached it");
  }
  printf("%d of %d ops %s in %.0f s\n", ops - failed, ops, bench ? "timed" : "agree", time_now() - start);
  return failed ? 1 : 0;
}
