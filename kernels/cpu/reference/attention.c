// Attention, forward and backward: every query against every key of the pack, with the mask spelled out.
#include "kernels/cpu/reference/rows.h"

#include <stdlib.h>

static int allowed(const Batch *b, int64_t query, int64_t key) {
  return b->doc_start[query] <= key && key < b->kv_end[query] && query < b->q_end[key];
}

// Element 0 of head h of token t in [T, heads, D]. Query head h uses kv head h / (H / G).
static int64_t head_at(const KernelCall *c, int64_t t, int heads, int h) {
  return (t * heads + h) * c->dims->D;
}
static int kv_head(const KernelCall *c, int h) {
  return h / (c->dims->H / c->dims->G);
}

static double dot(const double *x, const double *y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}

// q k / sqrt(D); -infinity where it is not allowed.
static double score(const KernelCall *c, const double *q, const double *k, int64_t query, int64_t key, int h) {
  const Dims *d = c->dims;
  if (!allowed(c->batch, query, key)) return -INFINITY;
  return dot(q + head_at(c, query, d->H, h), k + head_at(c, key, d->G, kv_head(c, h)), d->D) / sqrt(d->D);
}

void reference_ATTENTION_FWD(const KernelCall *c) {
  const double *q = c->in.ATTENTION_FWD.q;                             // [T, H, D]
  const double *k = c->in.ATTENTION_FWD.k, *v = c->in.ATTENTION_FWD.v; // [T, G, D]
  double *o = c->out.ATTENTION_FWD.o, *lse = c->out.ATTENTION_FWD.lse; // [T, H, D] in row order, [H, T]
  const int T = c->dims->T, H = c->dims->H, G = c->dims->G, D = c->dims->D, used = used_rows(c);
  double *p = xcalloc((size_t)T, sizeof *p); // scores, then exp(score - top)
  memset(o, 0, (size_t)T * (size_t)(H * D) * sizeof *o);
  for (int64_t query = 0; query < T; query++) {
    for (int h = 0; h < H; h++) {
      lse[h * T + query] = INFINITY;
      if (query >= used) continue;
      double top = -INFINITY, sum = 0;
      for (int64_t key = 0; key < used; key++) {
        p[key] = score(c, q, k, query, key, h);
        top = fmax(top, p[key]);
      }
      for (int64_t key = 0; key < used; key++) {
        p[key] = exp(p[key] - top);
        sum += p[key];
      }
      lse[h * T + query] = top + log(sum);
      double *to = o + head_at(c, c->batch->row[query], H, h);
      for (int64_t key = 0; key < used; key++)
        for (int i = 0; i < D && p[key] > 0; i++) to[i] += p[key] / sum * v[head_at(c, key, G, kv_head(c, h)) + i];
    }
  }
  free(p);
}

void reference_ATTENTION_BWD(const KernelCall *c) {
  const double *dout = c->in.ATTENTION_BWD.dout, *o = c->in.ATTENTION_BWD.o; // [T, H, D] in row order
  const double *q = c->in.ATTENTION_BWD.q, *lse = c->in.ATTENTION_BWD.lse;   // [T, H, D], [H, T]
  const double *k = c->in.ATTENTION_BWD.k, *v = c->in.ATTENTION_BWD.v;       // [T, G, D]
  double *dq = c->out.ATTENTION_BWD.dq;                                      // [T, H, D]
  double *dk = c->out.ATTENTION_BWD.dk, *dv = c->out.ATTENTION_BWD.dv;       // [T, G, D]
  const int T = c->dims->T, H = c->dims->H, G = c->dims->G, D = c->dims->D, used = used_rows(c);
  memset(dq, 0, (size_t)T * (size_t)(H * D) * sizeof *dq);
  memset(dk, 0, (size_t)T * (size_t)(G * D) * sizeof *dk);
  memset(dv, 0, (size_t)T * (size_t)(G * D) * sizeof *dv);
  for (int64_t query = 0; query < used; query++) {
    for (int h = 0; h < H; h++) {
      int64_t at = head_at(c, query, H, h), out_at = head_at(c, c->batch->row[query], H, h);
      double delta = dot(dout + out_at, o + out_at, D); // sum of p dp over the keys
      for (int64_t key = 0; key < used; key++) {
        if (!allowed(c->batch, query, key)) continue;
        int64_t kv_at = head_at(c, key, G, kv_head(c, h));
        double p = exp(score(c, q, k, query, key, h) - lse[h * T + query]);
        double dp = dot(dout + out_at, v + kv_at, D), ds = p * (dp - delta) / sqrt(D);
        for (int i = 0; i < D; i++) {
          dq[at + i] += ds * k[kv_at + i];
          dk[kv_at + i] += ds * q[at + i];
          dv[kv_at + i] += p * dout[out_at + i];
        }
      }
    }
  }
}
