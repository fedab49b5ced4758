// The plan of a grouped product: how wide its tiles are and into how many parts its inner dimensions are cut.
#include "kernels/cuda/gemm_plan.h"

// The card that plans are made for: an H100, whatever the card. It is not asked of the device, since the plan decides
// the order of sums and a run shall go on to the same bits on another card. A plan follows from the ratio of the two
// rates alone, and only where parts are summed.
static const double planned_tile_rate = 5.4e6; // FLOPs a microsecond of one of GEMM_SHARES multiprocessors, wide tiles
static const double planned_memory_rate = 3e6; // bytes a microsecond
static const double narrow_tiles_cost = 1.25;  // times as long for the same FLOPs

// Two kinds in one launch must promise more than one: for small's SwiGLU backward, widths 384 and 512, the rates above
// promise 5%, and whole steps are 1.1% slower (H200).
static const double two_kinds_cost = 1.06;

// The kinds of tiles, GEMM_BM rows each.
typedef struct TileKind {
  int bn;                   // columns
  double inner_us, tile_us; // microseconds of a tile: for each of its inner dimension, to begin and end
  double reading_us;        // tile_us where the epilogue reads rows: fitted to three models' SwiGLU backward on an H200
} TileKind;
static const TileKind tile_kinds[] = {{128, narrow_tiles_cost * 2 * GEMM_BM * 128 / planned_tile_rate, 1, 6.3},
                                      {256, 2.0 * GEMM_BM * 256 / planned_tile_rate, 2, 12.5}};
enum { TILE_KINDS = sizeof tile_kinds / sizeof *tile_kinds };

// gemm_weights' tiles are rows of dW, gemm_rows' are rows of C.
static int tile_rows(const GemmSide *s, int kind) {
  return kind == GEMM_TN ? s->M : s->rows;
}

bool gemm_side_empty(const GemmSide *s, int kind) {
  return s->groups == 0 || tile_rows(s, kind) == 0 || s->N == 0 || (kind != GEMM_TN && s->K == 0);
}

// The counts are on the device: groups are thought of as equal, both sides as full.
static int64_t side_tiles(const GemmSide *s, int kind, int bn) {
  int64_t down = kind == GEMM_TN ? (int64_t)s->groups * ceil_div(s->M, GEMM_BM)
                                 : ceil_div(s->rows, GEMM_BM) + (s->groups - 1) / 2; // the groups' last tiles
  return down * ceil_div(s->N, bn);
}
static int side_inner(const GemmSide *s, int kind) {
  return kind == GEMM_TN ? s->rows / s->groups : s->K;
}

// A side's parts where `parts` are best for sides of one group. Weight gradients are cut on the device, by the counts,
// unless none of them can ask for it: too few rows, or as many tiles as there are shares.
static int side_parts(const GemmSide *s, int kind, int bn, int parts) {
  if (kind != GEMM_TN) return s->groups == 1 ? parts : 1;
  bool whole = s->rows <= (2 * GEMM_SHORTEST_PART - 1) * GEMM_SHARE_DEPTH;
  whole |= s->groups == 1 && side_tiles(s, kind, bn) >= GEMM_SHARES;
  return whole ? 1 : 0;
}

// What a launch takes with these tiles. One side: whole rounds of tiles. Two: they fill each other's gaps but for the
// longest tiles.
static double launch_us(const Gemm *g, int kind, const TileKind *const tile[MODALITIES], int parts) {
  double work = 0, longest = 0, rounds = 0;
  int sides = 0;
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &g->side[m];
    if (gemm_side_empty(s, kind)) continue;
    int own = s->groups == 1 ? parts : 1;
    double us =
        (double)side_inner(s, kind) / own * tile[m]->inner_us + (g->reads ? tile[m]->reading_us : tile[m]->tile_us);
    int64_t tiles = side_tiles(s, kind, tile[m]->bn) * own;
    sides++;
    work += tiles * us / GEMM_SHARES;
    rounds += ceil_div64(tiles, GEMM_SHARES) * us;
    if (us > longest) longest = us;
    if (own == 1) continue;
    const double sums = (double)tile_rows(s, kind) * s->N * sizeof(float) * (2 * own + 1) / planned_memory_rate;
    work += 2 + sums;
    rounds += 4 + sums;
  }
  return sides > 1 ? work + longest / 2 : rounds;
}

GemmPlan gemm_plan(const Gemm *g, int kind) {
  enum { MIN_INNER = 512 }; // of a part
  int most = GEMM_MAX_PARTS, parts = 1;
  bool same = g->same_tiles;
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &g->side[m];
    same |= gemm_side_empty(s, kind);
    if (gemm_side_empty(s, kind) || s->groups > 1) continue;
    int longest = side_inner(s, kind) / MIN_INNER;
    if (longest < most) most = longest;
  }
  const TileKind *widest = &tile_kinds[TILE_KINDS - 1], *best[MODALITIES] = {widest, widest}; // if nothing is faster
  for (int m = 0; m < MODALITIES; m++)
    for (const TileKind *k = tile_kinds; k <= widest; k++)
      if (k->bn == g->tiles[m]) best[m] = k;
  double least = launch_us(g, kind, best, parts);
  for (const TileKind *text = tile_kinds; text <= widest; text++)
    for (const TileKind *image = same ? text : tile_kinds; image <= (same ? text : widest); image++)
      for (int p = 1; p == 1 || p <= most; p++) {
        if ((g->tiles[TEXT] && text != best[TEXT]) || (g->tiles[IMAGE] && image != best[IMAGE])) break;
        const TileKind *const tile[MODALITIES] = {text, image};
        const double us = launch_us(g, kind, tile, p) * (text == image ? 1 : two_kinds_cost);
        if (us < least) least = us, best[TEXT] = text, best[IMAGE] = image, parts = p;
      }
  GemmPlan p = {{best[TEXT]->bn, best[IMAGE]->bn}, {1, 1}, 0};
  size_t sums = 0, most_sums = 0; // floats of parts of weight gradients, if all groups were cut as far as they may be
  for (int m = 0; m < MODALITIES; m++) {
    const GemmSide *s = &g->side[m];
    if (gemm_side_empty(s, kind)) continue;
    p.parts[m] = side_parts(s, kind, p.bn[m], parts);
    if (p.parts[m] > 1) p.scratch += (size_t)parts * tile_rows(s, kind) * s->N * sizeof(float);
    if (p.parts[m] == 0) sums += (size_t)(s->rows / GEMM_SHARE_DEPTH + s->groups) / GEMM_SHORTEST_PART * s->M * s->N;
    const size_t all = (size_t)GEMM_SHARE_UNITS * GEMM_BM * p.bn[m];
    if (all > most_sums) most_sums = all;
  }
  p.scratch += (sums < most_sums ? sums : most_sums) * sizeof(float);
  return p;
}
