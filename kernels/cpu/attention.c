// Attention over packed documents (as plain loops: reference/attention.c), tile by tile: up to ROWS (query, head) rows
// of one kv head against up to KEYS keys of the same document; the query heads that share a kv head are rows of one
// tile. The forward pass keeps a running softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax",
// 2018). The backward pass rebuilds the probabilities from lse: in one pass over the tiles of a short document, else by
// key tile for dk and dv and by query tile for dq. Tiles start at fixed distances from their document's start, and
// every output has one writer that sums in a fixed order, so the bits do not depend on threads.
#include "kernels/cpu/cpu.h"

#ifdef __AVX512F__
enum { VEC_BYTES = 64 };
#else
enum { VEC_BYTES = 32 };
#endif
typedef real Vec __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real)), may_alias));

enum {
  LANES = VEC_BYTES / sizeof(real),
  PAD = 2 * LANES, // widths of packed tiles are multiples of this
  ROWS = 64,
  KEYS = 64,
  BLOCK = 64,      // a task does the tiles that start in this many sequence positions
  SHORT_DOC = 512, // documents up to this length take dq, dk and dv from one pass
  MICRO_ROWS = 6   // MICRO_ROWS x PAD sums stay in registers
};

typedef struct Heads {
  const Batch *batch;
  int64_t T, H, G, D;
  int64_t R;    // query heads that share a kv head
  int64_t W;    // D rounded up to PAD: the width of a packed row
  int64_t tile; // queries of a tile, each of R rows
  int64_t used; // positions before the filler, which comes last in either order
} Heads;

static Heads heads_of(const KernelCall *c) {
  const Dims *d = c->dims;
  int64_t R = d->H / d->G;
  return (Heads){.batch = c->batch,
                 .T = d->T,
                 .H = d->H,
                 .G = d->G,
                 .D = d->D,
                 .R = R,
                 .W = (d->D + PAD - 1) / PAD * PAD,
                 .tile = R < ROWS ? ROWS / R : 1,
                 .used = c->batch->dims->n_text + c->batch->dims->n_image};
}

// What one thread works with: packed tiles and what is formed from them. forward_tile lets out, top and sum grow where
// the backward pass keeps dout, lse and delta.
typedef struct Buffers {
  real *q, *dout;                // [rows, W]
  real *lse, *delta;             // [rows]
  real *p, *ds;                  // [rows, KEYS]
  real *dq;                      // [rows, W]
  real *columns, *value_columns; // [D, KEYS]
  real *key_rows;                // [KEYS, W]
  real *dkeys, *dvalues;         // [KEYS, W]
} Buffers;

// Lays them out from `at`; returns how many numbers they take.
static int64_t buffers_bind(Buffers *b, const Heads *hd, real *at) {
  int64_t rows = hd->tile * hd->R, W = hd->W, used = 0;
  const struct {
    real **to;
    int64_t count;
  } arrays[] = {{&b->q, rows * W},        {&b->dout, rows * W},    {&b->lse, rows},
                {&b->delta, rows},        {&b->p, rows * KEYS},    {&b->ds, rows * KEYS},
                {&b->dq, rows * W},       {&b->columns, W * KEYS}, {&b->value_columns, W * KEYS},
                {&b->key_rows, KEYS * W}, {&b->dkeys, KEYS * W},   {&b->dvalues, KEYS * W}};
  for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
    *arrays[i].to = at ? at + used : NULL;
    used += (arrays[i].count + PAD - 1) / PAD * PAD;
  }
  return used;
}

static Scratch buffers_take(const Heads *hd) {
  Buffers none;
  return scratch_take(buffers_bind(&none, hd, NULL) * (int64_t)sizeof(real));
}

// The calling thread's.
static Buffers buffers_own(const Heads *hd, const Scratch *scratch) {
  Buffers b;
  buffers_bind(&b, hd, scratch_own(scratch));
  return b;
}

static int64_t min_of(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// ---- products of tiles ----

// rows x PAD of C (+)= A B; element (i, k) of A stands at A[i a_row + k a_col].
static inline __attribute__((always_inline)) void micro_product(int rows, int64_t K, const real *A, int64_t a_row,
                                                                int64_t a_col, const real *B, int64_t ldb, int add,
                                                                real *C, int64_t ldc) {
  Vec sum[MICRO_ROWS][2];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    sum[r][0] = add ? *(const Vec *)(C + r * ldc) : (Vec){0};
    sum[r][1] = add ? *(const Vec *)(C + r * ldc + LANES) : (Vec){0};
  }
  for (int64_t k = 0; k < K; k++) {
    Vec b0 = *(const Vec *)(B + k * ldb), b1 = *(const Vec *)(B + k * ldb + LANES);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      real a = A[r * a_row + k * a_col];
      sum[r][0] += a * b0;
      sum[r][1] += a * b1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    *(Vec *)(C + r * ldc) = sum[r][0];
    *(Vec *)(C + r * ldc + LANES) = sum[r][1];
  }
}

// C [M, N] (+)= A [M, K] B [K, N], N a multiple of PAD. A has any strides, so that it may be read transposed. For these
// sizes a BLAS call costs as much as the product.
static void tile_product(int64_t M, int64_t N, int64_t K, const real *A, int64_t a_row, int64_t a_col, const real *B,
                         int64_t ldb, int add, real *C, int64_t ldc) {
  for (int64_t n = 0; n < N; n += PAD) {
    for (int64_t m = 0; m < M; m += MICRO_ROWS) {
      const real *a = A + m * a_row, *b = B + n;
      real *to = C + m * ldc + n;
      switch (min_of(M - m, MICRO_ROWS)) { // a constant number of rows each, or the sums would not stay in registers
      case 1:
        micro_product(1, K, a, a_row, a_col, b, ldb, add, to, ldc);
        break;
      case 2:
        micro_product(2, K, a, a_row, a_col, b, ldb, add, to, ldc);
        break;
      case 3:
        micro_product(3, K, a, a_row, a_col, b, ldb, add, to, ldc);
        break;
      case 4:
        micro_product(4, K, a, a_row, a_col, b, ldb, add, to, ldc);
        break;
      case 5:
        micro_product(5, K, a, a_row, a_col, b, ldb, add, to, ldc);
        break;
      default:
        micro_product(MICRO_ROWS, K, a, a_row, a_col, b, ldb, add, to, ldc);
      }
    }
  }
}

// ---- tiles ----

// Keys [first, first + n) of one kv head.
typedef struct KeyTile {
  int64_t first, n, width;  // width: n rounded up to PAD
  int32_t seen_until[KEYS]; // q_end of each key; 0 past n: seen by no query
  int32_t last_query;       // the largest of them
} KeyTile;

// Queries [first, first + n) of one kv head; row i of the tile is query first + i / R, head i % R.
typedef struct QueryTile {
  int64_t first, n, rows;
} QueryTile;

static KeyTile key_tile(const Heads *hd, int64_t first, int64_t end) {
  KeyTile t = {.first = first, .n = min_of(end - first, KEYS)};
  t.width = (t.n + PAD - 1) / PAD * PAD;
  for (int64_t j = 0; j < t.n; j++) {
    t.seen_until[j] = hd->batch->q_end[first + j];
    if (t.seen_until[j] > t.last_query) t.last_query = t.seen_until[j];
  }
  return t;
}

static QueryTile query_tile(const Heads *hd, int64_t first, int64_t end) {
  int64_t n = min_of(end - first, hd->tile);
  return (QueryTile){.first = first, .n = n, .rows = n * hd->R};
}

// rows [n, W] = keys or values [T, G, D] of kv head g.
static void pack_keys(const Heads *hd, const KeyTile *t, const real *x, int64_t g, real *rows) {
  const real *from = x + (t->first * hd->G + g) * hd->D;
  for (int64_t j = 0; j < t->n; j++) {
    real *to = rows + j * hd->W;
    memcpy(to, from + j * hd->G * hd->D, (size_t)hd->D * sizeof *to);
    for (int64_t i = hd->D; i < hd->W; i++) to[i] = 0;
  }
}

// columns [D, KEYS] = the same transposed, zeros from n to width.
static void pack_keys_transposed(const Heads *hd, const KeyTile *t, const real *x, int64_t g, real *columns) {
  const real *from = x + (t->first * hd->G + g) * hd->D;
  int64_t stride = hd->G * hd->D;
  for (int64_t i = 0; i < hd->D; i++) {
    real *to = columns + i * KEYS;
    for (int64_t j = 0; j < t->n; j++) to[j] = from[j * stride + i];
    for (int64_t j = t->n; j < t->width; j++) to[j] = 0;
  }
}

// rows [rows, W] = q [T, H, D] / sqrt(D).
static void pack_queries(const Heads *hd, const QueryTile *t, const real *q, int64_t g, real *rows) {
  real scale = (real)(1 / sqrt((double)hd->D)), *to = rows;
  for (int64_t query = t->first; query < t->first + t->n; query++) {
    const real *from = q + (query * hd->H + g * hd->R) * hd->D;
    for (int64_t r = 0; r < hd->R; r++, from += hd->D, to += hd->W) {
      for (int64_t i = 0; i < hd->D; i++) to[i] = from[i] * scale;
      for (int64_t i = hd->D; i < hd->W; i++) to[i] = 0;
    }
  }
}

// How many keys of the tile, from its first, a query may see by kv_end.
static int32_t keys_visible(const Heads *hd, const KeyTile *t, int64_t query) {
  int64_t n = hd->batch->kv_end[query] - t->first;
  return n < 0 ? 0 : (int32_t)min_of(n, t->n);
}

// ---- forward ----

// One row of scores [width] becomes exp(score - top) over the keys `query` may see, 0 elsewhere; `top` and `sum` of the
// running softmax are updated. Returns what earlier sums are to be multiplied by.
static real softmax_row(const Heads *hd, const KeyTile *keys, int64_t query, real *score, real *top, real *sum) {
  int32_t visible = keys_visible(hd, keys, query), width = (int32_t)keys->width, at = (int32_t)query;
  real highest = *top, added = 0;
#pragma omp simd reduction(max : highest)
  for (int32_t j = 0; j < width; j++) {
    real x = ((j < visible) & (at < keys->seen_until[j])) ? score[j] : -(real)INFINITY;
    highest = x > highest ? x : highest;
    score[j] = x;
  }
  if (highest == -(real)INFINITY) highest = 0; // nothing seen yet: every term becomes 0
#pragma omp simd reduction(+ : added)
  for (int32_t j = 0; j < width; j++) {
    real p = real_exp(score[j] - highest);
    added += p;
    score[j] = p;
  }
  real keep = *sum == 0 ? 1 : real_exp(*top - highest); // nothing summed yet: nothing to scale
  *top = added > 0 ? highest : *top;
  *sum = *sum * keep + added;
  return keep;
}

static void forward_tile(const Heads *hd, const KernelCall *c, int64_t g, const QueryTile *queries,
                         const Buffers *own) {
  const Batch *b = hd->batch;
  const real *k = c->in.ATTENTION_FWD.k, *v = c->in.ATTENTION_FWD.v; // [T, G, D]
  real *o = c->out.ATTENTION_FWD.o;                                  // [T, H D], row order
  real *lse = c->out.ATTENTION_FWD.lse;                              // [H, T]
  int64_t rows = queries->rows, W = hd->W, D = hd->D, R = hd->R;
  real *q = own->q, *out = own->dout, *top = own->lse, *sum = own->delta; // [rows, W] twice, [rows] twice
  real *columns = own->columns, *values = own->key_rows, *score = own->p; // [D, KEYS], [KEYS, W], [rows, KEYS]
  pack_queries(hd, queries, c->in.ATTENTION_FWD.q, g, q);
  memset(out, 0, (size_t)(rows * W) * sizeof *out);
  for (int64_t i = 0; i < rows; i++) {
    top[i] = -(real)INFINITY;
    sum[i] = 0;
  }
  int64_t end = b->kv_end[queries->first + queries->n - 1]; // kv_end never decreases
  for (int64_t first = b->doc_start[queries->first]; first < end; first += KEYS) {
    KeyTile keys = key_tile(hd, first, end);
    if (keys.last_query <= queries->first) continue; // an image hidden from these queries
    pack_keys_transposed(hd, &keys, k, g, columns);
    pack_keys(hd, &keys, v, g, values);
    tile_product(rows, keys.width, D, q, W, 1, columns, KEYS, 0, score, KEYS);
    for (int64_t i = 0; i < rows; i++) {
      real keep = softmax_row(hd, &keys, queries->first + i / R, score + i * KEYS, &top[i], &sum[i]);
      if (keep == 1) continue;
      for (int64_t j = 0; j < W; j++) out[i * W + j] *= keep;
    }
    tile_product(rows, W, keys.n, score, KEYS, 1, values, W, 1, out, W);
  }
  for (int64_t i = 0; i < rows; i++) {
    int64_t query = queries->first + i / R, h = g * R + i % R;
    real *to = o + (b->row[query] * hd->H + h) * D;
    real scale = 1 / sum[i];
    for (int64_t j = 0; j < D; j++) to[j] = out[i * W + j] * scale;
    lse[h * hd->T + query] = top[i] + (real)log((double)sum[i]);
  }
}

void cpu_ATTENTION_FWD(const KernelCall *c) {
  const Heads hd = heads_of(c);
  const Batch *b = c->batch;
  real *o = c->out.ATTENTION_FWD.o, *lse = c->out.ATTENTION_FWD.lse;
  int64_t blocks = (hd.used + BLOCK - 1) / BLOCK;
  const Scratch scratch = buffers_take(&hd);
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < blocks * hd.G; task++) {
    int64_t block = task / hd.G, g = task % hd.G, end = min_of((block + 1) * BLOCK, hd.used);
    Buffers own = buffers_own(&hd, &scratch);
    for (int64_t at = block * BLOCK; at < end; at++) {
      if ((at - b->doc_start[at]) % hd.tile) continue;
      int64_t stop = at + 1; // a tile is of one document
      while (stop < hd.used && stop - at < hd.tile && b->doc_start[stop] == b->doc_start[at]) stop++;
      QueryTile queries = query_tile(&hd, at, stop);
      forward_tile(&hd, c, g, &queries, &own);
    }
  }
  memset(o + hd.used * hd.H * hd.D, 0, (size_t)((hd.T - hd.used) * hd.H * hd.D) * sizeof *o);
  for (int64_t h = 0; h < hd.H; h++)
    for (int64_t at = hd.used; at < hd.T; at++) lse[h * hd.T + at] = (real)INFINITY;
}

// ---- backward ----

// What the backward pass needs of a query tile: q / sqrt(D) and dO [rows, W], lse and rowsum(dO * O) [rows].
static void pack_backward(const Heads *hd, const KernelCall *c, int64_t g, const QueryTile *t, const Buffers *own) {
  const real *dout = c->in.ATTENTION_BWD.dout, *o = c->in.ATTENTION_BWD.o; // [T, H D], row order
  const real *lse = c->in.ATTENTION_BWD.lse;                               // [H, T]
  pack_queries(hd, t, c->in.ATTENTION_BWD.q, g, own->q);
  for (int64_t i = 0; i < t->rows; i++) {
    int64_t query = t->first + i / hd->R, h = g * hd->R + i % hd->R;
    int64_t at = (hd->batch->row[query] * hd->H + h) * hd->D;
    real *to = own->dout + i * hd->W, delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int64_t j = 0; j < hd->D; j++) {
      to[j] = dout[at + j];
      delta += dout[at + j] * o[at + j];
    }
    for (int64_t i = hd->D; i < hd->W; i++) to[i] = 0;
    own->delta[i] = delta;
    own->lse[i] = lse[h * hd->T + query];
  }
}

// p = probabilities, ds = gradient of the scaled scores.
static void score_gradient(const Heads *hd, const QueryTile *queries, const KeyTile *keys, const Buffers *own) {
  real *p = own->p, *ds = own->ds;
  tile_product(queries->rows, keys->width, hd->D, own->q, hd->W, 1, own->columns, KEYS, 0, p, KEYS);
  tile_product(queries->rows, keys->width, hd->D, own->dout, hd->W, 1, own->value_columns, KEYS, 0, ds, KEYS);
  for (int64_t i = 0; i < queries->rows; i++) {
    int64_t query = queries->first + i / hd->R;
    int32_t visible = keys_visible(hd, keys, query), width = (int32_t)keys->width, at = (int32_t)query;
    real lse = own->lse[i], delta = own->delta[i], *row = p + i * KEYS, *gradient = ds + i * KEYS;
#pragma omp simd
    for (int32_t j = 0; j < width; j++) {
      real e = real_exp(row[j] - lse);
      real x = ((j < visible) & (at < keys->seen_until[j])) ? e : 0;
      row[j] = x;
      gradient[j] = x * (gradient[j] - delta);
    }
  }
}

// dq [T, H, D] += ds K / sqrt(D).
static void add_query_gradient(const Heads *hd, int64_t g, const QueryTile *queries, const KeyTile *keys,
                               const Buffers *own, real *dq) {
  int64_t rows = queries->rows, W = hd->W;
  real *sum = own->dq, scale = (real)(1 / sqrt((double)hd->D)); // [rows, W]
  tile_product(rows, W, keys->n, own->ds, KEYS, 1, own->key_rows, W, 0, sum, W);
  for (int64_t i = 0; i < rows; i++) {
    real *to = dq + ((queries->first + i / hd->R) * hd->H + g * hd->R + i % hd->R) * hd->D;
    for (int64_t j = 0; j < hd->D; j++) to[j] += scale * sum[i * W + j];
  }
}

static void clear_query_gradient(const Heads *hd, int64_t g, int64_t first, int64_t end, real *dq) {
  for (int64_t query = first; query < end; query++)
    memset(dq + (query * hd->H + g * hd->R) * hd->D, 0, (size_t)(hd->R * hd->D) * sizeof *dq);
}

// dk, dv of keys [first, end), at most KEYS of one document; their share of dq as well when dq is not NULL.
static void backward_keys(const Heads *hd, const KernelCall *c, int64_t g, int64_t first, int64_t end, real *dq,
                          const Buffers *own) {
  int64_t W = hd->W, D = hd->D;
  real *dk = c->out.ATTENTION_BWD.dk, *dv = c->out.ATTENTION_BWD.dv; // [T, G, D]
  real *dkeys = own->dkeys, *dvalues = own->dvalues;
  KeyTile keys = key_tile(hd, first, end);
  pack_keys_transposed(hd, &keys, c->in.ATTENTION_BWD.k, g, own->columns);
  pack_keys_transposed(hd, &keys, c->in.ATTENTION_BWD.v, g, own->value_columns);
  if (dq) pack_keys(hd, &keys, c->in.ATTENTION_BWD.k, g, own->key_rows);
  memset(dkeys, 0, (size_t)(keys.n * W) * sizeof *dkeys);
  memset(dvalues, 0, (size_t)(keys.n * W) * sizeof *dvalues);
  for (int64_t at = hd->batch->q_start[first]; at < keys.last_query; at += hd->tile) { // q_start never decreases
    QueryTile queries = query_tile(hd, at, keys.last_query);
    pack_backward(hd, c, g, &queries, own);
    score_gradient(hd, &queries, &keys, own);
    tile_product(keys.n, W, queries.rows, own->p, 1, KEYS, own->dout, W, 1, dvalues, W);
    tile_product(keys.n, W, queries.rows, own->ds, 1, KEYS, own->q, W, 1, dkeys, W);
    if (dq) add_query_gradient(hd, g, &queries, &keys, own, dq);
  }
  for (int64_t j = 0; j < keys.n; j++) {
    memcpy(dk + ((first + j) * hd->G + g) * D, dkeys + j * W, (size_t)D * sizeof *dk);
    memcpy(dv + ((first + j) * hd->G + g) * D, dvalues + j * W, (size_t)D * sizeof *dv);
  }
}

// dq of one query tile.
static void backward_queries(const Heads *hd, const KernelCall *c, int64_t g, const QueryTile *queries,
                             const Buffers *own) {
  const Batch *b = hd->batch;
  real *dq = c->out.ATTENTION_BWD.dq;
  pack_backward(hd, c, g, queries, own);
  clear_query_gradient(hd, g, queries->first, queries->first + queries->n, dq);
  int64_t end = b->kv_end[queries->first + queries->n - 1];
  for (int64_t first = b->doc_start[queries->first]; first < end; first += KEYS) {
    KeyTile keys = key_tile(hd, first, end);
    if (keys.last_query <= queries->first) continue;
    pack_keys_transposed(hd, &keys, c->in.ATTENTION_BWD.k, g, own->columns);
    pack_keys_transposed(hd, &keys, c->in.ATTENTION_BWD.v, g, own->value_columns);
    pack_keys(hd, &keys, c->in.ATTENTION_BWD.k, g, own->key_rows);
    score_gradient(hd, queries, &keys, own);
    add_query_gradient(hd, g, queries, &keys, own, dq);
  }
}

// The part of a document that belongs to the task which holds position `at`.
static void backward_at(const Heads *hd, const KernelCall *c, int64_t g, int64_t at, const Buffers *own) {
  const Batch *b = hd->batch;
  int64_t start = b->doc_start[at], offset = at - start, end = at + 1;
  real *dq = c->out.ATTENTION_BWD.dq;
  if (offset % KEYS && offset % hd->tile) return;
  while (end < hd->used && b->doc_start[end] == start) end++;
  if (end - start <= SHORT_DOC) {
    if (offset) return;
    clear_query_gradient(hd, g, start, end, dq);
    for (int64_t first = start; first < end; first += KEYS)
      backward_keys(hd, c, g, first, min_of(first + KEYS, end), dq, own);
    return;
  }
  if (offset % KEYS == 0) backward_keys(hd, c, g, at, min_of(at + KEYS, end), NULL, own);
  if (offset % hd->tile == 0) {
    QueryTile queries = query_tile(hd, at, end);
    backward_queries(hd, c, g, &queries, own);
  }
}

void cpu_ATTENTION_BWD(const KernelCall *c) {
  const Heads hd = heads_of(c);
  real *dq = c->out.ATTENTION_BWD.dq;                                // [T, H, D]
  real *dk = c->out.ATTENTION_BWD.dk, *dv = c->out.ATTENTION_BWD.dv; // [T, G, D]
  int64_t blocks = (hd.used + BLOCK - 1) / BLOCK;
  const Scratch scratch = buffers_take(&hd);
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < blocks * hd.G; task++) {
    int64_t block = task / hd.G, end = min_of((block + 1) * BLOCK, hd.used);
    Buffers own = buffers_own(&hd, &scratch);
    for (int64_t at = block * BLOCK; at < end; at++) backward_at(&hd, c, task % hd.G, at, &own);
  }
  size_t filler = (size_t)((hd.T - hd.used) * hd.D) * sizeof(real);
  memset(dq + hd.used * hd.H * hd.D, 0, (size_t)hd.H * filler);
  memset(dk + hd.used * hd.G * hd.D, 0, (size_t)hd.G * filler);
  memset(dv + hd.used * hd.G * hd.D, 0, (size_t)hd.G * filler);
}
