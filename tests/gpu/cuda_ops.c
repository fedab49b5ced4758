// Every op of the CUDA backend against the CPU backend, at every shape of tests/gpu/cuda_shapes.c: outputs within the
// tolerances of tests/gpu/cuda_case.h, zeros where zeros are due, nothing written where nothing should be, the same
// bits twice. The same for the kernels that a flag puts in their place, and AdaLN's numerical stability.
//
//   cuda_ops [--bench] [OP | FAMILY ...]    one line per op; exit code 1 when one fails, 2 without a GPU
//
// --bench times each op instead, at the size of a layer of the base config; products also at those of small and fine.
// The calls run in a child process: an op that brings it down, or hangs, is reported and left out, and the others go
// on.
#include "tests/gpu/cuda_families.h"

#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

// The command line, and what came of it.
typedef struct Run {
  bool bench, wanted[FAMILIES][OP_COUNT];
  Report *report; // [FAMILIES]
} Run;

static bool op_passed(const Run *run, int f, OpKind kind) {
  const OpReport *r = &run->report[f].of[kind];
  return run->bench ? !run->report[f].crashed[kind] : r->cases && !r->failures;
}

static void print_name(int f, OpKind kind) {
  int width = 19 - printf("%s", op_info[kind].name);
  printf(" %-*s", width, families[f].mark ? families[f].mark : "");
}

static void print_op(const Run *run, int f, OpKind kind) {
  const Report *report = &run->report[f];
  const OpReport *r = &report->of[kind];
  print_name(f, kind);
  printf("%4d cases %6.2f s  worst row %.1e ", r->cases, r->seconds, r->row);
  for (int i = 0; i < op_info[kind].n_out; i++)
    if (r->error[i] > 0) printf(" %s %.1e", op_info[kind].out[i].name, r->error[i]);
  printf("  %s\n", op_passed(run, f, kind) ? "pass" : "FAIL");
  if (r->failures) printf("    %d failures, the first: %s\n", r->failures, r->failure);
  if (!r->cases && !report->crashed[kind]) printf("    no case reached it\n");
  fflush(stdout);
}

static bool family_wanted(const Run *run, int f) {
  for (int i = 0; i < families[f].n; i++)
    if (run->wanted[f][families[f].ops[i]]) return true;
  return false;
}

static void run_family(const Run *run, int f) {
  const Family *family = &families[f];
  Report *report = &run->report[f];
  Backend backend = backend_cuda;
  CudaCase c = {.backend = &backend,
                .act_tolerance = family->act_tolerance > 0 ? family->act_tolerance : ACT_TOLERANCE,
                .report = report,
                .wanted = run->wanted[f],
                .bench = run->bench};
  if (family->way) kernels_choose(&backend, family->way);
  for (int k = 0; k < OP_COUNT; k++)
    if (!report->crashed[k]) report->of[k] = (OpReport){0};
  const CudaShape *shapes = run->bench ? cuda_bench_shapes : cuda_shapes;
  const int timed = family->both_timed ? CUDA_BENCH_SHAPES : 1;
  for (int s = 0; s < (run->bench ? timed : n_cuda_shapes); s++) {
    cuda_shape_open(&c, &shapes[s], (uint64_t)(f * 100 + s + 1));
    if (run->bench && family->mark) cuda_case_shape(&c, family->mark);
    family->run(&c, &shapes[s]);
    op_case_free(&c.ops);
  }
  cuda_case_close(&c);
  for (int i = 0; i < family->n && !run->bench; i++)
    if (run->wanted[f][family->ops[i]]) print_op(run, f, family->ops[i]);
}

// Runs families from `first` on in a child. Returns FAMILIES when it came to its end; otherwise the op it died in is
// marked, and its family is the one to go on with.
static int run_child(Run *run, int first) {
  for (int f = 0; f < FAMILIES; f++) run->report[f].running = OP_COUNT;
  fflush(stdout);
  pid_t child = fork();
  if (child < 0) panic("cannot start a process");
  if (child == 0) {
    Error err;
    if (backend_cuda.open(&err) != 0) fatal(&err);
    for (int f = first; f < FAMILIES; f++)
      if (family_wanted(run, f)) run_family(run, f);
    exit(0);
  }
  int status = 0, f = first;
  if (waitpid(child, &status, 0) != child) panic("lost the child process");
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return FAMILIES;
  while (f < FAMILIES && run->report[f].running == OP_COUNT) f++;
  if (f == FAMILIES) exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
  Report *report = &run->report[f];
  OpReport *r = &report->of[report->running];
  report->crashed[report->running] = true;
  r->failures++;
  snprintf(r->failure, sizeof r->failure, "%s: the process ended (%s %d)", report->what,
           WIFSIGNALED(status) ? "signal" : "exit code", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
  return f;
}

static bool name_matches(const char *name, const char *wanted) {
  return strcasecmp(name, wanted) == 0;
}

static void select_ops(const char *wish, Run *run) {
  bool found = false;
  for (int f = 0; f < FAMILIES; f++)
    for (int i = 0; i < families[f].n; i++) {
      OpKind kind = families[f].ops[i];
      bool named = !families[f].apart && name_matches(op_info[kind].name, wish);
      if (!named && !name_matches(families[f].name, wish)) continue;
      run->wanted[f][kind] = found = true;
    }
  if (found) return;
  fprintf(stderr, "cuda_ops: there is no op or family %s\n", wish);
  exit(2);
}

int main(int argc, char **argv) {
  Run run = {0};
  bool selected = false;
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--bench") == 0) {
      run.bench = true;
      continue;
    }
    select_ops(argv[i], &run);
    selected = true;
  }
  for (int f = 0; f < FAMILIES; f++)
    for (int i = 0; i < families[f].n; i++) {
      bool *wanted = &run.wanted[f][families[f].ops[i]];
      *wanted = (*wanted || !selected) && !(families[f].apart && run.bench);
    }
  size_t bytes = FAMILIES * sizeof *run.report;
  run.report = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (run.report == MAP_FAILED) panic("no shared memory");
  double start = time_now();
  for (int family = 0; family < FAMILIES;) family = run_child(&run, family);
  int failed = 0, ops = 0;
  for (int f = 0; f < FAMILIES; f++)
    for (int i = 0; i < families[f].n; i++) {
      OpKind kind = families[f].ops[i];
      if (!run.wanted[f][kind]) continue;
      ops++;
      if (op_passed(&run, f, kind)) continue;
      const OpReport *r = &run.report[f].of[kind];
      failed++;
      printf("FAIL ");
      print_name(f, kind);
      printf(": %s\n", r->failures ? r->failure : "no case reached it");
    }
  printf("%d of %d ops %s in %.0f s\n", ops - failed, ops, run.bench ? "timed" : "agree", time_now() - start);
  return failed ? 1 : 0;
}
