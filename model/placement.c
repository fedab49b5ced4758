#include "model/placement.h"

#include "kernels/exact.h"

// Of what the state names last: elements that do not stay.
static int64_t away_count(const Model *m) {
  const ParamTable *t = &m->params;
  return m->kept ? t->bucket[t->buckets - m->kept].begin : t->total;
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

int space_is_shared(const Model *m, Space space) {
  return config_shards(m->config) > 1 &&
         (space == SPACE_ADAM_M || space == SPACE_ADAM_V || space == SPACE_EMA || space == SPACE_REMAINDER);
}

int bucket_leaves(const Model *m, const ParamBucket *b) {
  return m->state == STATE_GRADIENTS && b->layer >= 0 && b->end <= away_count(m);
}

// Elements of the buckets before `end` that stay.
static int64_t staying(const Model *m, const ParamBucket *end) {
  int64_t sum = 0;
  for (const ParamBucket *b = m->params.bucket; b < end; b++)
    if (!bucket_leaves(m, b)) sum += b->end - b->begin;
  return sum;
}

// Elements of the largest that leaves.
static int64_t slot_count(const Model *m) {
  int64_t most = 0;
  for (int i = 0; i < m->params.buckets; i++) {
    const ParamBucket *b = &m->params.bucket[i];
    if (bucket_leaves(m, b)) most = max_i64(most, b->end - b->begin);
  }
  return most;
}

// Where sums come back one travels each way beside the one that is worked on; else only there.
static int slots(const Model *m) {
  int most = m->config->train.micro_batches > 1 ? GRADIENT_SLOTS : GRADIENT_SLOTS - 1;
  return (int)min_i64(most, m->config->model.layers);
}

int64_t gradients_count(const Model *m) {
  return staying(m, m->params.bucket + m->params.buckets) + slots(m) * slot_count(m);
}

int64_t gradients_host_count(const Model *m) {
  return m->state == STATE_GRADIENTS ? away_count(m) : 0;
}

int64_t gradients_begin(const Model *m, const ParamBucket *b) {
  if (!bucket_leaves(m, b)) return staying(m, b);
  return staying(m, m->params.bucket + m->params.buckets) + b->layer % slots(m) * slot_count(m);
}

TensorId bucket_gradients(Program *p, const Model *m, const ParamBucket *b, Space space) {
  int64_t begin = space == SPACE_GRADS ? gradients_begin(m, b) : b->begin,
          bytes = (int64_t)m->backend->dtype_bytes[DT_REAL];
  return program_external(p, space, begin * bytes, DT_REAL, b->end - b->begin, "gradients of a bucket");
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
