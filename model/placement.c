#include "model/placement.h"

#include "kernels/exact.h"

// Of what the state names last: elements that do not stay.
static int64_t away_count(const Model *m) {
  return m->params.total - m->kept;
}

int64_t state_host_count(const Model *m, Space space) {
  MemoryState leaves_with = space == SPACE_EMA ? STATE_EMA : STATE_MOMENTS;
  if (space != SPACE_EMA && space != SPACE_ADAM_M && space != SPACE_ADAM_V) return 0;
  return m->state < leaves_with ? 0 : m->state == leaves_with ? away_count(m) : m->params.total;
}

Shard bucket_shard(const Model *m, const ParamBucket *b) {
  int64_t n = config_shards(m->config), each = (b->end - b->begin) / n, begin = b->begin + m->shard * each;
  return (Shard){begin, begin + each, b->begin / n};
}

int gradients_are_shared(const Model *m) {
  return config_gradient_shards(m->config) > 1;
}

int space_is_shared(const Model *m, Space space) {
  if (space == SPACE_GRADS) return gradients_are_shared(m);
  return config_shards(m->config) > 1 &&
         (space == SPACE_ADAM_M || space == SPACE_ADAM_V || space == SPACE_EMA || space == SPACE_REMAINDER);
}

int bucket_leaves(const Model *m, const ParamBucket *b) {
  return m->state == STATE_GRADIENTS && b->layer >= 0 && b->end <= away_count(m);
}

// Whether its gradients are formed in a slot.
static int takes_turns(const Model *m, const ParamBucket *b) {
  return bucket_leaves(m, b) || (gradients_are_shared(m) && b->layer >= 0);
}

// Elements of the buckets before `end` that stay.
static int64_t staying(const Model *m, const ParamBucket *end) {
  int64_t sum = 0;
  for (const ParamBucket *b = m->params.bucket; b < end; b++)
    if (!takes_turns(m, b)) sum += b->end - b->begin;
  return sum;
}

// Elements of the largest that takes turns.
static int64_t slot_count(const Model *m) {
  int64_t most = 0;
  for (int i = 0; i < m->params.buckets; i++) {
    const ParamBucket *b = &m->params.bucket[i];
    if (takes_turns(m, b)) most = max_i64(most, b->end - b->begin);
  }
  return most;
}

// Where sums come back one travels each way beside the one that is worked on; else only there.
static int slots(const Model *m) {
  int come_back = m->config->train.micro_batches > 1 && !gradients_are_shared(m);
  return (int)min_i64(come_back ? GRADIENT_SLOTS : GRADIENT_SLOTS - 1, m->config->model.layers);
}

Space gradients_space(const Model *m) {
  return gradients_are_shared(m) ? SPACE_MICRO_GRADS : SPACE_GRADS;
}

int64_t gradients_count(const Model *m) {
  return staying(m, m->params.bucket + m->params.buckets) + slots(m) * slot_count(m);
}

int64_t gradients_host_count(const Model *m) {
  return m->state == STATE_GRADIENTS ? away_count(m) : 0;
}

int64_t gradients_begin(const Model *m, const ParamBucket *b) {
  if (!takes_turns(m, b)) return staying(m, b);
  return staying(m, m->params.bucket + m->params.buckets) + b->layer % slots(m) * slot_count(m);
}

int gradients_share_arena(const Model *m) {
  const Config *c = m->config;
  return c->memory.share_gradients && c->memory.arena && c->train.micro_batches == 1 &&
         c->kernels.update == UPDATE_SEQUENTIAL && m->state != STATE_GRADIENTS;
}

static TensorId gradients_at(Program *p, const Model *m, Space space, int64_t begin, int64_t count) {
  int64_t bytes = (int64_t)m->backend->dtype_bytes[DT_REAL];
  return program_external(p, space, begin * bytes, DT_REAL, count, "gradients of a bucket");
}

TensorId bucket_gradients(Program *p, const Model *m, const ParamBucket *b, Space space) {
  int64_t begin = space == gradients_space(m) ? gradients_begin(m, b) : b->begin;
  return gradients_at(p, m, space, begin, b->end - b->begin);
}

TensorId bucket_gradient_share(Program *p, const Model *m, const ParamBucket *b, Space space) {
  Shard s = bucket_shard(m, b);
  int64_t begin = space == SPACE_GRADS ? s.at : gradients_begin(m, b) + s.begin - b->begin;
  return gradients_at(p, m, space, begin, s.end - s.begin);
}

void bucket_gather(Program *p, const Model *m, const ParamBucket *b) {
  int64_t bytes = (int64_t)m->backend->dtype_bytes[DT_ACT];
  if (config_shards(m->config) == 1) return;
  TensorId weights =
      program_external(p, SPACE_WEIGHTS, b->begin * bytes, DT_ACT, b->end - b->begin, "weights of a bucket");
  program_collective(p, OP_ALL_GATHER, weights);
}

// Numbers a parameter.
static const int sums_width[PARAM_SUMS] = {[SUMS_OF_SQUARES] = EXACT_WORDS, [SUMS_OF_BITS] = 1};

int64_t param_sums_offset(const ParamTable *t, ParamSums which) {
  int64_t sum = 0;
  for (int s = 0; s < (int)which; s++) sum += sums_width[s] * t->n * (int64_t)sizeof(double);
  return sum;
}

TensorId param_sums(Program *p, const ParamTable *t, ParamSums which, int first, int n) {
  static const char *const names[PARAM_SUMS] = {"sums of squares", "hashes"};
  int width = sums_width[which];
  int64_t offset = param_sums_offset(t, which) + first * width * (int64_t)sizeof(double);
  return program_external(p, SPACE_PARAM_SUMS, offset, DT_F64, (int64_t)n * width, names[which]);
}
