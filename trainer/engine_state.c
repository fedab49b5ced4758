// Where the optimizer's state lies, and the programs that depend on it.
#include "model/placement.h"
#include "model/update.h"
#include "trainer/engine_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void engine_free_state_programs(Engine *e) {
  Program **all[] = {&e->update, &e->update_ema, &e->gather, &e->ema_in, &e->ema_out, &e->hash};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    program_free(*all[i]);
    *all[i] = NULL;
  }
}

// Bytes of `count` elements of a space that has one for each parameter.
static int64_t element_bytes(const Engine *e, Space space, int64_t count) {
  return count * (int64_t)space_element(e->model.backend, space);
}

// An element for each parameter, part of which may lie on the host.
static void set_slab_bytes(Engine *e, Space space) {
  e->bases.host_bytes[space] = element_bytes(e, space, state_host_count(&e->model, space));
  int64_t share = e->model.params.total / config_shards(e->config);
  e->bytes[space] = element_bytes(e, space, share) - e->bases.host_bytes[space];
}

static void set_state_bytes(Engine *e, int train) {
  const Config *c = e->config;
  const Backend *b = e->model.backend;
  int64_t n = e->model.params.total;
  int away = e->model.state == STATE_GRADIENTS;
  if (c->train.ema > 0) set_slab_bytes(e, SPACE_EMA);
  // Where the weights lie while the EMA is in their place.
  if (c->train.ema > 0)
    e->bytes[away ? SPACE_HOST_GRADS : SPACE_GRADS] = n / config_shards(c) * (int64_t)b->dtype_bytes[DT_ACT];
  if (!train) return;
  set_slab_bytes(e, SPACE_REMAINDER);
  set_slab_bytes(e, SPACE_ADAM_M);
  set_slab_bytes(e, SPACE_ADAM_V);
  if (c->train.micro_batches > 1 && b->gradient_per_micro)
    e->bytes[SPACE_MICRO_GRADS] = element_bytes(e, SPACE_MICRO_GRADS, n);
  e->bytes[SPACE_GRADS] = element_bytes(e, SPACE_GRADS, n / config_gradient_shards(c));
  e->bytes[gradients_space(&e->model)] = element_bytes(e, SPACE_GRADS, gradients_count(&e->model));
  e->bytes[SPACE_HOST_GRADS] =
      max_i64(e->bytes[SPACE_HOST_GRADS], element_bytes(e, SPACE_HOST_GRADS, gradients_host_count(&e->model)));
  e->bytes[SPACE_PARAM_SUMS] = param_sums_offset(&e->model.params, PARAM_SUMS);
  e->bytes[SPACE_SCALARS] = sizeof(StepScalars);
  e->bytes[SPACE_STATUS] = sizeof(UpdateStatus);
}

// Records all programs but training's and the forward-only ones for a place of the state, on top of `forward`, the
// bytes of those.
static void record_state(Engine *e, MemoryState state, int kept, const int64_t forward[SPACE_COUNT], int train) {
  const Config *c = e->config;
  int has_ema = c->train.ema > 0;
  engine_free_state_programs(e);
  memcpy(e->bytes, forward, sizeof e->bytes);
  e->model.state = state;
  e->model.kept = kept;
  set_state_bytes(e, train);
  if (has_ema) {
    e->ema_in = ema_record(&e->model, 1);
    e->ema_out = ema_record(&e->model, 0);
  }
  if (train) e->update = update_record(&e->model, 0);
  if (train && config_shards(c) > 1) e->gather = gather_record(&e->model);
  if (train && has_ema) e->update_ema = update_record(&e->model, 1);
  if (train && c->train.verify_every) e->hash = hash_record(&e->model);
  const Program *all[] = {e->ema_in, e->ema_out, e->update, e->update_ema, e->gather, e->hash};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if (all[i]) engine_measure(e, all[i]);
}

// The most buckets that can stay without it being too much with the smallest need of activations.
static int most_kept(Engine *e, int train) {
  int64_t bytes[SPACE_COUNT], host_bytes[SPACE_COUNT], others = engine_least_bytes(e, train) - engine_device_bytes(e);
  int kept = 0;
  memcpy(bytes, e->bytes, sizeof bytes);
  memcpy(host_bytes, e->bases.host_bytes, sizeof host_bytes);
  for (int k = 1; k < e->model.params.buckets; k++) {
    e->model.kept = k;
    set_state_bytes(e, train);
    if (engine_device_bytes(e) + others <= e->budget) kept = k;
  }
  memcpy(e->bytes, bytes, sizeof bytes);
  memcpy(e->bases.host_bytes, host_bytes, sizeof host_bytes);
  e->model.kept = 0;
  return kept;
}

// memory.state: what it names, or as "auto" the least that lets the smallest need of activations fit beside it.
int engine_choose_state(Engine *e, int train, Error *err) {
  MemoryState want = e->config->memory.state, state = want == STATE_AUTO ? STATE_DEVICE : want;
  int64_t forward[SPACE_COUNT];
  memcpy(forward, e->bytes, sizeof forward);
  if (!e->model.backend->queues || config_shards(e->config) > 1) state = want = STATE_DEVICE;
  record_state(e, state, 0, forward, train);
  while (want == STATE_AUTO && state < STATE_GRADIENTS && engine_least_bytes(e, train) > e->budget)
    record_state(e, ++state, 0, forward, train);
  if (want == STATE_AUTO && state > STATE_DEVICE) record_state(e, state, most_kept(e, train), forward, train);
  return train ? engine_choose_policy(e, err) : 0;
}

char *engine_state_text(const Engine *e) {
  static const char *const what[][2] = {
      [STATE_EMA] = {"EMA", "part of the EMA"},
      [STATE_MOMENTS] = {"EMA and moments", "EMA and part of the moments"},
      [STATE_GRADIENTS] = {"EMA, moments and gradients", "EMA, moments and part of the gradients"}};
  if (e->model.state <= STATE_DEVICE) return xstrdup("");
  return xasprintf("%s on the host, %.3f GB", what[e->model.state][e->model.kept > 0],
                   (double)engine_state_on_host(e) / 1e9);
}

// Bytes that a program's copies carry between the state on the host and the device.
static double state_traffic(const Program *p, Lane lane) {
  double bytes = 0;
  for (int i = 0; p && i < p->n_ops; i++) {
    const Op *op = &p->ops[i];
    Space host = p->tensors[lane == LANE_D2H ? op->out[0] : op->in[0]].space;
    if (op->lane == lane && host != SPACE_HOST) bytes += (double)op->args.span.count;
  }
  return bytes;
}

// What of the state is on the host, and what that costs a step in the update, where nothing hides it.
void engine_print_state(const Engine *e, FILE *f) {
  const LinkRates *link = &e->costs.link;
  const Program *updates[] = {e->update, e->update_ema};
  static const char *const names[] = {"a step", "a step with EMA"};
  if (e->model.state <= STATE_DEVICE) return;
  char *text = engine_state_text(e);
  fprintf(f, "state: %s\n", text);
  free(text);
  for (int i = 0; i < 2; i++) {
    double in = state_traffic(updates[i], LANE_H2D), out = state_traffic(updates[i], LANE_D2H);
    if (in + out == 0) continue;
    fprintf(f, "  the update of %-16s %9.3f GB to the device, %9.3f GB back", names[i], in / 1e9, out / 1e9);
    if (link->both_h2d > 0) fprintf(f, ": %.0f ms", 1e3 * fmax(in / link->both_h2d, out / link->both_d2h));
    fputc('\n', f);
  }
  double away = state_traffic(engine_micro_step(e, e->config->train.micro_batches - 1)->program, LANE_D2H);
  if (away > 0) fprintf(f, "  gradients                  %9.3f GB to the host in each backward pass\n", away / 1e9);
}
