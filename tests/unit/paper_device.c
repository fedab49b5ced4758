#include "tests/unit/paper_device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <string.h>

#include "kernels/cpu/cpu.h"
#include "model/config/load.h"
#include "model/program/expected.h"
#include "model/program/policy.h"

Backend paper_device(void) {
  static const Queues none; // none of them is ever called
  Backend b = backend_cpu;
  b.name = "paper";
  b.dtype_bytes[DT_ACT] = 2;
  b.remainder_bytes = 2;
  b.gradient_per_micro = 0;
  b.head_chunk = 8192;
  b.queues = &none;
  b.assumed = (DeviceRates){4.2e12, 710e12, 0};
  b.assumed_link = (LinkRates){55.3e9, 55.3e9, 48.9e9, 48.9e9, 10e-6};
  for (int k = 0; k < OP_COUNT; k++)
    if (!b.fn[k]) b.fn[k] = b.fn[OP_COPY];
  return b;
}

static Program *record(const void *paper, const PolicyTable *policy) {
  const Paper *p = paper;
  const Config *c = &p->config;
  return transformer_record(&p->model, MODE_TRAIN_ONLY, c->data.micro_batch_tokens, config_max_images(c) + 1, policy)
      .program;
}

void paper_open(Paper *p, const char *file, const char *const *sets, int n_sets) {
  Error err;
  memset(p, 0, sizeof *p);
  if (config_load(&p->config, file, sets, n_sets, &err) != 0) fail_msg("%s", err.text);
  p->backend = paper_device();
  p->model = (Model){.config = &p->config, .backend = &p->backend, .params = params_build(&p->config)};
  Extents extents = extents_expected(&p->config, p->config.data.micro_batch_tokens);
  p->costs = costs_new(&p->backend, &extents);
  p->task = (ChooseTask){.record = record,
                         .model = p,
                         .layers = p->config.model.layers,
                         .passes = 1,
                         .costs = &p->costs,
                         .rules = {.offload = 1, .least_copy = 2 << 20}};
  p->room = (Room){.arena = INT64_MAX / 4, .host = INT64_MAX / 4};
  memset(p->task.rules.pinned, POLICY_COUNT, sizeof p->task.rules.pinned);
}

void paper_close(Paper *p) {
  costs_free(&p->costs);
  params_free(&p->model.params);
}

PlanOutcome paper_outcome(const Paper *p, MemoryPolicy policy) {
  PolicyTable t = policy_table_new(p->task.layers, policy);
  t.least_copy = p->task.rules.least_copy;
  PlanOutcome o = outcome_of(&p->task, &t);
  policy_table_free(&t);
  return o;
}
