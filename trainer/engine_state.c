// Where the optimizer's state lies, and the programs that depend on it.
#include "kernels/backends.h"
#include "model/placement.h"
#include "model/update.h"
#include "trainer/engine_internal.h"
#include "trainer/predict.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void engine_free_state_programs(Engine *e) {
  Program **all[] = {&e->update,
                     &e->update_ema,
                     &e->ema_in,
                     &e->ema_out,
                     &e->hash,
                     &e->flush[DUE_WEIGHTS],
                     &e->flush[DUE_UPDATE],
                     &e->flush[DUE_UPDATE_EMA]};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    program_free(*all[i]);
    *all[i] = NULL;
  }
}

int engine_overlaps(const Engine *e) {
  return e->config->kernels.update == UPDATE_OVERLAPPED && e->model.state <= STATE_DEVICE;
}

int engine_may_leave(const Engine *e) {
  return e->model.backend->queues && config_shards(e->config) == 1;
}

int engine_chooses_state(const Engine *e) {
  const Config *c = e->config;
  return engine_may_leave(e) && c->memory.state == STATE_AUTO && c->memory.policy == MEMORY_AUTO;
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

static void record_updates(Engine *e, int has_ema) {
  const Model *m = &e->model;
  if (config_shards(e->config) > 1) e->flush[DUE_WEIGHTS] = gather_record(m);
  if (!engine_overlaps(e)) {
    e->update = update_record(m, 0);
    if (has_ema) e->update_ema = update_record(m, 1);
    return;
  }
  e->update = decision_record(m);
  e->flush[DUE_UPDATE] = apply_record(m, 0);
  if (!has_ema) return;
  e->update_ema = decision_record(m);
  e->flush[DUE_UPDATE_EMA] = apply_record(m, 1);
}

void engine_place_state(Engine *e, Place place, const int64_t forward[SPACE_COUNT], int train) {
  const Config *c = e->config;
  int has_ema = c->train.ema > 0;
  engine_free_state_programs(e);
  memcpy(e->bytes, forward, sizeof e->bytes);
  e->model.state = place.state;
  e->model.kept = place.kept;
  set_state_bytes(e, train);
  e->bytes[SPACE_ARENA] += engine_gradients_in_arena(e);
  if (has_ema) {
    e->ema_in = ema_record(&e->model, 1);
    e->ema_out = ema_record(&e->model, 0);
  }
  if (train) record_updates(e, has_ema);
  if (train && c->train.verify_every) e->hash = hash_record(&e->model);
  Program *all[] = {e->ema_in,
                    e->ema_out,
                    e->update,
                    e->update_ema,
                    e->hash,
                    e->flush[DUE_WEIGHTS],
                    e->flush[DUE_UPDATE],
                    e->flush[DUE_UPDATE_EMA]};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if (all[i]) engine_measure(e, engine_in_queues(e, all[i]));
}

// The most that can stay, whole buckets, without it being too much with the smallest need of activations.
static int64_t most_kept(Engine *e, int train) {
  int64_t bytes[SPACE_COUNT], host_bytes[SPACE_COUNT], others = engine_least_bytes(e, train) - engine_device_bytes(e);
  int64_t kept = 0;
  memcpy(bytes, e->bytes, sizeof bytes);
  memcpy(host_bytes, e->bases.host_bytes, sizeof host_bytes);
  for (int b = e->model.params.buckets - 1; b > 0; b--) {
    e->model.kept = e->model.params.total - e->model.params.bucket[b].begin;
    set_state_bytes(e, train);
    if (engine_device_bytes(e) + others <= e->budget) kept = e->model.kept;
  }
  memcpy(e->bytes, bytes, sizeof bytes);
  memcpy(e->bases.host_bytes, host_bytes, sizeof host_bytes);
  e->model.kept = 0;
  return kept;
}

// ---- places ----

// An update with all of what a state names on the host: seconds in all, of its ops, and of the link, which is slower.
typedef struct Away {
  double seconds, ops, link;
  int64_t arena;
  int one_queue;
} Away;

static Away away_of(const Engine *e, int ema) {
  Program *p = engine_in_queues(e, update_record(&e->model, ema));
  Simulation s = predict_program(&e->costs, p);
  Away a = {s.seconds, s.busy[LANE_COMPUTE], fmax(s.busy[LANE_H2D], s.busy[LANE_D2H]), p->arena_bytes, p->one_queue};
  for (int i = 0; p->one_queue && i < p->n_ops; i++) // all of it was taken for its ops
    if (p->ops[i].lane != LANE_COMPUTE) a.ops -= op_seconds(&e->costs, p, &p->ops[i]);
  program_free(p);
  return a;
}

// Seconds of it where only this share of what travels does: less of the link, whose first and last copies the other
// parts hide about half, or what the ops take beside it. In one queue nothing hides anything.
static double partly(const Away *a, double share) {
  if (a->one_queue) return a->ops + share * (a->seconds - a->ops);
  return fmax(a->ops, a->seconds - (1 - share) * (a->seconds + a->link) / 2);
}

typedef struct PlaceList {
  Place *place;
  Room *room;
  int n;
  int64_t memory; // bytes that this machine has
} PlaceList;

// A place; one to be chosen on the host only where the arena holds what passes through it and this machine has the
// memory. Gradients leave where nothing else fits, whatever the machine has.
static void list_place(Engine *e, PlaceList *list, Place place, int64_t arena, double seconds) {
  e->model.state = place.state;
  e->model.kept = place.kept;
  set_state_bytes(e, 1);
  Room room = engine_room(e);
  room.seconds = seconds;
  int64_t left = list->memory - engine_state_on_host(e);
  if (place.state > STATE_DEVICE && place.state < STATE_GRADIENTS && engine_chooses_state(e)) {
    if (room.arena < engine_gradients_in_arena(e) + arena || left < 0) return;
    room.host = min_i64(room.host, left);
  }
  list->place = xrealloc(list->place, (size_t)(list->n + 1) * sizeof *list->place);
  list->room = xrealloc(list->room, (size_t)(list->n + 1) * sizeof *list->room);
  list->place[list->n] = place;
  list->room[list->n++] = room;
}

// A state of which ever more is on the host, from all but `shares` of STATE_SHARES on.
static void list_state(Engine *e, PlaceList *list, MemoryState state, int shares) {
  const int has_ema = e->config->train.ema > 0;
  const double ema_share = has_ema ? 1.0 / e->config->train.ema_every : 0, total = (double)e->model.params.total;
  const double pair = 2.0 * (double)space_element(e->model.backend, SPACE_ADAM_M) /
                      (double)space_element(e->model.backend, SPACE_EMA); // both moments, in elements of an EMA
  e->model.state = state;
  e->model.kept = 0;
  const Away plain = away_of(e, 0), ema = has_ema ? away_of(e, 1) : plain;
  for (; shares >= 0; shares--) {
    int64_t kept = e->model.kept = e->model.params.total * shares / STATE_SHARES / 64 * 64;
    double moments = (double)state_host_count(&e->model, SPACE_ADAM_M) / total,
           average = has_ema ? (double)state_host_count(&e->model, SPACE_EMA) / total : 0;
    if (state < STATE_MOMENTS) moments = 1; // the plain update is as it is
    double with = state < STATE_MOMENTS ? average : (pair * moments + average) / (pair + has_ema);
    if (state == STATE_DEVICE) with = 1;
    double seconds = (1 - ema_share) * partly(&plain, moments) + ema_share * partly(&ema, with);
    list_place(e, list, (Place){state, kept}, max_i64(plain.arena, ema.arena), seconds);
  }
}

int engine_places(Engine *e, Place **place, Room **room) {
  int64_t bytes[SPACE_COUNT], host_bytes[SPACE_COUNT];
  const Place now = {e->model.state, e->model.kept};
  PlaceList list = {.memory = backend_of_host()->memory()};
  memcpy(bytes, e->bytes, sizeof bytes);
  memcpy(host_bytes, e->bases.host_bytes, sizeof host_bytes);
  if (engine_chooses_state(e) && now.state < STATE_GRADIENTS) {
    list_state(e, &list, STATE_DEVICE, 0);
    if (e->config->train.ema > 0) list_state(e, &list, STATE_EMA, STATE_SHARES - 1);
    list_state(e, &list, STATE_MOMENTS, STATE_SHARES - 1);
  } else {
    list_place(e, &list, now, 0, predict_update(e));
  }
  e->model.state = now.state;
  e->model.kept = now.kept;
  memcpy(e->bytes, bytes, sizeof bytes);
  memcpy(e->bases.host_bytes, host_bytes, sizeof host_bytes);
  *place = list.place;
  *room = list.room;
  return list.n;
}

Place engine_last_place(Engine *e, const int64_t forward[SPACE_COUNT]) {
  engine_place_state(e, (Place){STATE_GRADIENTS, 0}, forward, 1);
  Place last = {STATE_GRADIENTS, most_kept(e, 1)};
  engine_place_state(e, last, forward, 1);
  return last;
}

// memory.state: what it names; "auto" begins on the device, and with another policy than "auto" stays there.
int engine_choose_state(Engine *e, int train, Error *err) {
  MemoryState want = e->config->memory.state;
  int64_t forward[SPACE_COUNT];
  memcpy(forward, e->bytes, sizeof forward);
  Place place = {want == STATE_AUTO || !engine_may_leave(e) ? STATE_DEVICE : want, 0};
  engine_place_state(e, place, forward, train);
  if (train) return engine_choose_policy(e, forward, err);
  // Without training nothing is slower for it: the least that must.
  if (want != STATE_AUTO || !engine_may_leave(e)) return 0;
  while (place.state < STATE_GRADIENTS && engine_device_bytes(e) > e->budget) {
    place.state++;
    engine_place_state(e, place, forward, 0);
  }
  place.kept = place.state > STATE_DEVICE ? most_kept(e, 0) : 0;
  if (place.kept) engine_place_state(e, place, forward, 0);
  return 0;
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
    if (op->lane != lane) continue; // others need not have that operand
    Space host = p->tensors[lane == LANE_D2H ? op->out[0] : op->in[0]].space;
    if (host != SPACE_HOST) bytes += (double)op->args.span.count;
  }
  return bytes;
}

// What of the state is on the host, and what that costs a step in the update, where nothing hides it.
void engine_print_state(const Engine *e, FILE *f) {
  const LinkRates *link = &e->costs.link;
  const Program *updates[] = {e->update, e->update_ema};
  static const char *const names[] = {"a step", "a step with EMA"};
  if (!e->model.backend->queues)
    fprintf(f, "state: in the memory of the %s with all else; memory.state moves it beside a GPU only\n",
            e->model.backend->name);
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
