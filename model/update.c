// The programs between passes: the update, hashes of gradients, the EMA in the weights' place and back.
//
// What lies on the host passes through the arena part by part: a part travels in while the one before is worked on and
// the one before that travels back. Where only some do, the others are worked on in between, so that the link is busy
// from the first to the last.
#include "model/update.h"

#include "model/placement.h"
#include "model/program/compile.h"
#include "model/recording.h"

#include <stdlib.h>

enum {
  IN_FLIGHT = 3,    // parts: two travelling, one worked on
  JOINED = 1 << 26, // elements that buckets are joined up to: each further op costs a pause between two kernels
};

// What an op covers: elements [begin, end) of the slabs, which are of parameters [first, first + n).
typedef struct Part {
  const ParamBucket *bucket; // the first of its buckets
  int first, n;
  int64_t begin, end;
} Part;

typedef struct Parts {
  const Model *model;
  Program *p;
  Part *of;
  int n;
} Parts;

static void parts_add(Parts *s, Part part) {
  s->of = xrealloc(s->of, (size_t)(s->n + 1) * sizeof *s->of);
  s->of[s->n++] = part;
}

// Buckets, joined where they are small. `leaving`: those whose gradients leave, too.
static void parts_join(Parts *s, int leaving) {
  const ParamTable *w = &s->model->params;
  const ParamBucket *before = NULL;
  for (const ParamBucket *b = w->bucket; b < w->bucket + w->buckets; b++) {
    if (bucket_leaves(s->model, b) && !leaving) continue;
    int joins = before && b == before + 1 && !bucket_leaves(s->model, b) && !bucket_leaves(s->model, before);
    Part *last = joins ? &s->of[s->n - 1] : NULL;
    if (last && b->end - last->begin <= JOINED) {
      last->n += b->n;
      last->end = b->end;
    } else {
      parts_add(s, (Part){b, b->first, b->n, b->begin, b->end});
    }
    before = b;
  }
}

static Part part_share(const Model *model, const ParamBucket *b) {
  Shard shard = bucket_shard(model, b);
  return (Part){b, b->first, b->n, shard.begin, shard.end};
}

// This process's share of every bucket, of those first that the next step reads at once.
static void parts_share(Parts *s) {
  const ParamTable *w = &s->model->params;
  for (int opens = 1; opens >= 0; opens--)
    for (const ParamBucket *b = w->bucket; b < w->bucket + w->buckets; b++)
      if (bucket_opens(w, b) == opens) parts_add(s, part_share(s->model, b));
}

static int is_shared(const Parts *s) {
  return config_shards(s->model->config) > 1;
}

// Buckets, cut where they are large and where what lies on the host ends.
static void parts_cut(Parts *s) {
  const ParamTable *w = &s->model->params;
  const int64_t ends[] = {state_host_count(s->model, SPACE_EMA), state_host_count(s->model, SPACE_ADAM_M)};
  for (const ParamBucket *b = w->bucket; b < w->bucket + w->buckets; b++)
    for (int64_t begin = b->begin, end; begin < b->end; begin = end) {
      end = min_i64(begin + s->model->update_part, b->end);
      for (int i = 0; i < 2; i++)
        if (begin < ends[i]) end = min_i64(end, ends[i]);
      Part part = {b, b->first, 0, begin, end};
      while (w->of[part.first].offset + w->of[part.first].count <= begin) part.first++;
      while (part.first + part.n < b->first + b->n && w->of[part.first + part.n].offset < part.end) part.n++;
      parts_add(s, part);
    }
}

// Parts of the first `away` of all elements travel: they are spread evenly among the others.
static void parts_spread(Parts *s, int64_t away) {
  Part *spread = xmalloc((size_t)s->n * sizeof *spread);
  int travel = 0;
  while (travel < s->n && s->of[travel].end <= away) travel++;
  const int stay = s->n - travel;
  for (int i = 0, sent = 0, stayed = 0; i < s->n; i++) {
    int goes = sent < travel && (stayed == stay || (int64_t)stayed * travel * 2 > (2 * (int64_t)sent + 1) * stay);
    spread[i] = s->of[goes ? sent++ : travel + stayed++];
  }
  free(s->of);
  s->of = spread;
}

// ---- operands ----

static Dtype space_type(Space space) {
  static const Dtype types[] = {
      [SPACE_ACT] = DT_ACT, [SPACE_REAL] = DT_REAL, [SPACE_MOMENTS] = DT_MOMENT, [SPACE_REMAINDERS] = DT_U8};
  return types[space_info[space].element];
}

// Elements from `begin` on of a space, as many as the part has.
static TensorId place(const Parts *s, const Part *part, Space space, int64_t begin) {
  int64_t element = (int64_t)space_element(s->model->backend, space), count = part->end - part->begin;
  Dtype type = space_type(space);
  return program_external(s->p, space, begin * element, type, type == DT_U8 ? count * element : count,
                          space_info[space].label);
}

static TensorId part_of(const Parts *s, const Part *part, Space space) {
  if (!space_element(s->model->backend, space)) return NO_TENSOR;
  if (space_is_shared(s->model, space)) {
    Shard shard = bucket_shard(s->model, part->bucket);
    return place(s, part, space, shard.at + part->begin - shard.begin);
  }
  if (space != SPACE_GRADS) return place(s, part, space, part->begin);
  return place(s, part, space, gradients_begin(s->model, part->bucket) + part->begin - part->bucket->begin);
}

static int is_away(const Parts *s, const Part *part, Space space) {
  return space == SPACE_HOST_GRADS || part->end <= state_host_count(s->model, space);
}

// The part of a space as ops take it: where it lies, or what travels in from the host.
static TensorId part_lend(const Parts *s, const Part *part, Space space) {
  Space from = space == SPACE_GRADS && bucket_leaves(s->model, part->bucket) ? SPACE_HOST_GRADS : space;
  if (!is_away(s, part, from)) return part_of(s, part, from);
  TensorId t = program_tensor(s->p, space_type(from), part->end - part->begin, "%s on the way", space_info[from].label);
  program_copy(s->p, LANE_H2D, part_of(s, part, from), t);
  return t;
}

static void part_return(const Parts *s, const Part *part, Space space, TensorId lent) {
  if (is_away(s, part, space)) program_copy(s->p, LANE_D2H, lent, part_of(s, part, space));
}

static OpArgs part_args(const Parts *s, const Part *part) {
  const ParamTable *w = &s->model->params;
  return (OpArgs){.params = {.spans = w->spans + part->first, .n = part->n, .begin = part->begin, .end = part->end}};
}

static Parts parts_open(const Model *model, const char *name) {
  Dims d = dims_from_config(model->config, 1, 1);
  return (Parts){.model = model, .p = program_new(name, &d, model->backend, NULL)};
}

static Program *parts_close(Parts *s) {
  free(s->of);
  program_finish(s->p);
  return s->p;
}

// ---- the update ----

static TensorId scalars_of(Program *p) {
  return program_external(p, SPACE_SCALARS, 0, DT_U8, sizeof(StepScalars), "scalars");
}

static TensorId status_of(Program *p) {
  return program_external(p, SPACE_STATUS, 0, DT_U8, sizeof(UpdateStatus), "status");
}

static void record_squares(const Parts *s, const Part *part) {
  OpArgs a = part_args(s, part);
  program_op(s->p, OP_GRAD_SQUARES, IN(part_of(s, part, SPACE_GRADS)),
             OUT(param_sums(s->p, &s->model->params, SUMS_OF_SQUARES, part->first, part->n)), &a);
}

void bucket_squares(Program *p, const Model *model, const ParamBucket *b) {
  const Parts s = {.model = model, .p = p};
  const Part part = part_share(model, b);
  record_squares(&s, &part);
}

// Sums of squares of the gradients that are on the device, unless they were summed with them (bucket_squares), and the
// decision of the step.
static void record_decision(const Model *model, Program *p) {
  Parts s = {.model = model, .p = p};
  if (model->config->processes == 1) parts_join(&s, 0);
  for (const Part *part = s.of; part < s.of + s.n; part++) record_squares(&s, part);
  free(s.of);
  TensorId squares = param_sums(p, &model->params, SUMS_OF_SQUARES, 0, model->params.n);
  if (is_shared(&s)) program_collective(p, OP_ALL_REDUCE, squares);
  TensorId metrics = program_external(p, SPACE_METRICS, 0, DT_F64, metrics_size(&p->dims), "metrics");
  OpArgs a = {.params = {.spans = model->params.spans, .n = model->params.n, .end = model->params.total}};
  program_op(p, OP_GRAD_DECIDE, IN(squares, metrics, scalars_of(p)), OUT(status_of(p)), &a);
}

// What the update of a part takes, lent to it.
typedef struct Lent {
  TensorId grads, m, v, ema;
} Lent;

static Lent update_lend(const Parts *s, const Part *part, int ema) {
  return (Lent){.grads = part_lend(s, part, SPACE_GRADS),
                .m = part_lend(s, part, SPACE_ADAM_M),
                .v = part_lend(s, part, SPACE_ADAM_V),
                .ema = ema ? part_lend(s, part, SPACE_EMA) : NO_TENSOR};
}

static void update_return(const Parts *s, const Part *part, Lent lent, int ema) {
  part_return(s, part, SPACE_ADAM_M, lent.m);
  part_return(s, part, SPACE_ADAM_V, lent.v);
  if (ema) part_return(s, part, SPACE_EMA, lent.ema);
}

static void record_part(const Parts *s, Lane lane, const Part *part, Lent lent, TensorId status, TensorId scalars) {
  OpArgs a = part_args(s, part);
  a.params.bf16_moments = s->model->config->train.moments == MOMENTS_BF16;
  program_op_on(s->p, lane, OP_ADAMW, IN(lent.grads, status, scalars),
                OUT(part_of(s, part, SPACE_WEIGHTS), lent.m, lent.v, part_of(s, part, SPACE_REMAINDER), lent.ema), &a);
}

static int part_travels(const Parts *s, const Part *part, int ema) {
  return is_away(s, part, SPACE_ADAM_M) || (ema && is_away(s, part, SPACE_EMA));
}

// Lends parts from *sent on until as many as may be on their way, *ahead of them, are; those between them stay.
static void lend_ahead(const Parts *s, Lent *lent, int ema, int *sent, int *ahead) {
  for (; *sent < s->n; (*sent)++) {
    int travels = part_travels(s, &s->of[*sent], ema);
    if (travels && *ahead == IN_FLIGHT - 1) break;
    lent[*sent] = update_lend(s, &s->of[*sent], ema);
    *ahead += travels;
  }
}

// Of everything, part by part, after the decision. Weights that are updated in shares come together while others are
// updated: `all` of them, or those alone that the next step reads at once.
static void record_apply(Parts *s, TensorId status, TensorId scalars, int ema, int all) {
  // With the EMA's update what follows from the moments does from the EMA, which leaves before them.
  int64_t away = state_host_count(s->model, ema ? SPACE_EMA : SPACE_ADAM_M);
  if (is_shared(s))
    parts_share(s);
  else if (away)
    parts_cut(s);
  else
    parts_join(s, 1);
  if (away) parts_spread(s, away);
  Lent *lent = xcalloc((size_t)s->n, sizeof *lent);
  // A part is sent for before the one that makes room for it travels back: by addresses alone it waits for the one
  // before that.
  for (int i = 0, sent = 0, ahead = 0; i < s->n; i++) {
    lend_ahead(s, lent, ema, &sent, &ahead);
    record_part(s, LANE_COMPUTE, &s->of[i], lent[i], status, scalars);
    if (all || bucket_opens(&s->model->params, s->of[i].bucket)) bucket_gather(s->p, s->model, s->of[i].bucket);
    ahead -= part_travels(s, &s->of[i], ema);
    lend_ahead(s, lent, ema, &sent, &ahead);
    update_return(s, &s->of[i], lent[i], ema);
  }
  free(lent);
}

Program *update_record(const Model *model, int ema) {
  Parts s = parts_open(model, ema ? "update with ema" : "update");
  record_decision(model, s.p);
  record_apply(&s, status_of(s.p), scalars_of(s.p), ema, 0);
  return parts_close(&s);
}

Program *decision_record(const Model *model) {
  Parts s = parts_open(model, "decision");
  record_decision(model, s.p);
  return parts_close(&s);
}

Program *apply_record(const Model *model, int ema) {
  Parts s = parts_open(model, ema ? "update at once with ema" : "update at once");
  record_apply(&s, status_of(s.p), scalars_of(s.p), ema, 1);
  return parts_close(&s);
}

void bucket_update(Program *p, const Model *model, const ParamBucket *b, int ema) {
  const Parts s = {.model = model, .p = p};
  const Part part = part_share(model, b);
  record_part(&s, LANE_UPDATE, &part, update_lend(&s, &part, ema), status_of(p), scalars_of(p));
  bucket_gather(p, model, b);
}

// ---- others ----

Program *gather_record(const Model *model) {
  Parts s = parts_open(model, "weights of all");
  for (const ParamBucket *b = model->params.bucket; b < model->params.bucket + model->params.buckets; b++)
    if (!bucket_opens(&model->params, b)) bucket_gather(s.p, model, b);
  return parts_close(&s);
}

Program *hash_record(const Model *model) {
  Parts s = parts_open(model, "gradient hash");
  if (gradients_are_shared(model))
    parts_share(&s);
  else
    parts_join(&s, 1);
  for (const Part *part = s.of; part < s.of + s.n; part++) {
    OpArgs a = part_args(&s, part);
    program_op(s.p, OP_GRAD_HASH, IN(part_lend(&s, part, SPACE_GRADS)),
               OUT(param_sums(s.p, &model->params, SUMS_OF_BITS, part->first, part->n)), &a);
  }
  return parts_close(&s);
}

// A part of the weights, where it is laid aside: among the gradients, shares one after the other.
static TensorId part_aside(const Parts *s, const Part *part) {
  int away = s->model->state == STATE_GRADIENTS; // the gradients' slab has no room
  int64_t at = is_shared(s) ? bucket_shard(s->model, part->bucket).at : part->begin;
  return program_external(s->p, away ? SPACE_HOST_GRADS : SPACE_GRADS,
                          at * (int64_t)s->model->backend->dtype_bytes[DT_ACT], DT_ACT, part->end - part->begin,
                          "weights laid aside");
}

static void record_aside(const Parts *s, const Part *part, int enter) {
  TensorId weights = part_of(s, part, SPACE_WEIGHTS), aside = part_aside(s, part);
  Lane lane = s->model->state != STATE_GRADIENTS ? LANE_COMPUTE : enter ? LANE_D2H : LANE_H2D;
  program_copy(s->p, lane, enter ? weights : aside, enter ? aside : weights);
}

Program *ema_record(const Model *model, int enter) {
  Parts s = parts_open(model, enter ? "ema in" : "ema out");
  const Part all = {.bucket = model->params.bucket, .n = model->params.n, .end = model->params.total};
  if (is_shared(&s)) {
    parts_share(&s);
    for (int i = 0; i < s.n; i++) {
      record_aside(&s, &s.of[i], enter);
      if (!enter && bucket_opens(&model->params, s.of[i].bucket)) bucket_gather(s.p, model, s.of[i].bucket);
    }
  } else {
    record_aside(&s, &all, enter);
    if (enter && state_host_count(model, SPACE_EMA))
      parts_cut(&s);
    else
      parts_add(&s, all);
  }
  if (!enter) return parts_close(&s);
  TensorId *ema = xcalloc((size_t)s.n, sizeof *ema);
  for (int i = 0, sent = 0; i < s.n; i++) {
    for (; sent < s.n && sent < i + IN_FLIGHT - 1; sent++) ema[sent] = part_lend(&s, &s.of[sent], SPACE_EMA);
    OpArgs cast = {.span = {.count = s.of[i].end - s.of[i].begin}};
    program_op(s.p, OP_CAST, IN(ema[i]), OUT(part_of(&s, &s.of[i], SPACE_WEIGHTS)), &cast);
    bucket_gather(s.p, model, s.of[i].bucket);
  }
  free(ema);
  return parts_close(&s);
}
