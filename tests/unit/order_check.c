#include "tests/unit/order_check.h"

#include "model/program/access.h"

#include <stdlib.h>

// What every op touches, computed once.
typedef struct OpAccess {
  int n;
  Access of[OP_MAX_ACCESS];
} OpAccess;

static OpAccess *access_table(const Program *p) {
  OpAccess *table = xmalloc((size_t)p->n_ops * sizeof *table);
  for (int i = 0; i < p->n_ops; i++) table[i].n = op_access(p, &p->ops[i], table[i].of);
  return table;
}

static const char *access_name(const Program *p, const Access *a) {
  return a->tensor == NO_TENSOR ? "the live pack" : p->tensors[a->tensor].name;
}

// before[i]: a bit for every op that is certainly done when op i starts. Transitive closure over lanes and waits.
static uint64_t *order_closure(const Program *p, size_t words) {
  uint64_t *before = xcalloc((size_t)p->n_ops * words, sizeof *before);
  for (int i = 0; i < p->n_ops; i++) {
    uint64_t *mine = before + (size_t)i * words;
    int direct[LANE_COUNT + 1], n = 0;
    for (int k = i - 1; k >= 0 && !n; k--)
      if (p->ops[k].lane == p->ops[i].lane) direct[n++] = k;
    for (int w = 0; w < p->ops[i].n_waits; w++) direct[n++] = p->ops[i].waits[w].op;
    for (int d = 0; d < n; d++) {
      const uint64_t *theirs = before + (size_t)direct[d] * words;
      for (size_t w = 0; w < words; w++) mine[w] |= theirs[w];
      mine[direct[d] / 64] |= (uint64_t)1 << direct[d] % 64;
    }
  }
  return before;
}

// Any two ops that conflict are ordered.
static int verify_order(const Program *p, const OpAccess *access, Error *err) {
  size_t words = ((size_t)p->n_ops + 63) / 64;
  uint64_t *before = order_closure(p, words);
  int rc = 0;
  for (int j = 0; j < p->n_ops && !rc; j++) {
    const uint64_t *ordered = before + (size_t)j * words;
    for (int i = 0; i < j && !rc; i++) {
      if (ordered[i / 64] >> i % 64 & 1) continue;
      for (int a = 0; a < access[i].n && !rc; a++)
        for (int b = 0; b < access[j].n && !rc; b++)
          if (access_conflicts(&access[i].of[a], &access[j].of[b]))
            rc = error_set(err, NULL,
                           "program %s: op %d %s (tensor %s) and op %d %s (tensor %s) touch the same bytes in no order",
                           p->name, i, op_info[p->ops[i].kind].name, access_name(p, &access[i].of[a]), j,
                           op_info[p->ops[j].kind].name, access_name(p, &access[j].of[b]));
    }
  }
  free(before);
  return rc;
}

// Gradients that share the arena are written as tensors that overlap, and read as others.
static int is_gradient(const Program *p, const Access *a) {
  return a->tensor != NO_TENSOR && p->tensors[a->tensor].space == SPACE_GRADS;
}

static int is_own(const Program *p, const Access *write, const Access *read) {
  return write->tensor == read->tensor || (is_gradient(p, write) && is_gradient(p, read));
}

// In recorded order (every other legal order gives the same values once verify_order holds): the bytes that op j reads
// as tensor t have been written by t alone since t was first written, or since the program before it where t is a
// gradient that is read first. `j` is p->n_ops for what is read afterwards.
static int verify_own(const Program *p, const OpAccess *access, int j, const Access *read, Error *err) {
  if (read->space != SPACE_ARENA && read->space != SPACE_HOST) return 0;
  const char *reader = j < p->n_ops ? op_info[p->ops[j].kind].name : "the end of the program";
  int first = 0, found = 0;
  for (; first < j && !found; first += !found)
    for (int k = 0; k < access[first].n; k++)
      found |= access[first].of[k].write && is_own(p, &access[first].of[k], read) &&
               access_conflicts(&access[first].of[k], read);
  if (!found && is_gradient(p, read))
    first = 0;
  else if (!found)
    return error_set(err, NULL, "program %s: op %d %s reads tensor %s, which nothing has written", p->name, j, reader,
                     access_name(p, read));
  for (int i = first; i < min_i64(j + 1, p->n_ops); i++)
    for (int k = 0; k < access[i].n; k++) {
      const Access *w = &access[i].of[k];
      if (!w->write || is_own(p, w, read) || !access_conflicts(w, read)) continue;
      return error_set(err, NULL, "program %s: op %d %s reads tensor %s, whose bytes op %d %s has overwritten as %s",
                       p->name, j, reader, access_name(p, read), i, op_info[p->ops[i].kind].name, access_name(p, w));
    }
  return 0;
}

// Two outputs of one op must not share bytes.
static int verify_outputs(const Program *p, const OpAccess *access, int j, Error *err) {
  for (int a = 0; a < access[j].n; a++)
    for (int b = 0; b < a; b++)
      if (access[j].of[a].write && access[j].of[b].write && access_conflicts(&access[j].of[a], &access[j].of[b]))
        return error_set(err, NULL, "program %s: op %d %s writes the same bytes as %s and as %s", p->name, j,
                         op_info[p->ops[j].kind].name, access_name(p, &access[j].of[b]),
                         access_name(p, &access[j].of[a]));
  return 0;
}

int order_check(const Program *p, Error *err) {
  OpAccess *access = access_table(p);
  int rc = 0;
  for (int i = 0; i < p->n_ops && !rc; i++)
    for (int w = 0; w < p->ops[i].n_waits && !rc; w++)
      if (p->ops[i].waits[w].op < 0 || p->ops[i].waits[w].op >= i)
        rc = error_set(err, NULL, "program %s: op %d waits for op %d", p->name, i, p->ops[i].waits[w].op);
  if (!rc) rc = verify_order(p, access, err);
  for (int j = 0; j < p->n_ops && !rc; j++) {
    rc = verify_outputs(p, access, j, err);
    for (int k = 0; k < access[j].n && !rc; k++)
      if (access[j].of[k].read) rc = verify_own(p, access, j, &access[j].of[k], err);
  }
  for (TensorId t = 0; t < p->n_tensors && !rc; t++) {
    const Tensor *x = &p->tensors[t];
    int is_shared = p->shares_gradients && x->space == SPACE_GRADS && x->first >= 0;
    Access end = {tensor_space(p, x), x->offset, x->offset + x->bytes, 1, 0, t};
    if (x->is_output || is_shared) rc = verify_own(p, access, p->n_ops, &end, err);
  }
  free(access);
  return rc;
}
