#include "model/program/arena.h"

#include "base/base.h"

#include <stdlib.h>
#include <string.h>

// An item on its way to a place. `rank` orders equal items, so that the result never depends on qsort.
typedef struct Candidate {
  int64_t bytes; // rounded up to the alignment
  int first, last, rank;
  int64_t offset;
} Candidate;

static int rank_compare(const Candidate *a, const Candidate *b) {
  return a->rank < b->rank ? -1 : a->rank > b->rank;
}

// Greedy by size: the big ones choose first, the small ones fill what is left between them.
static int size_compare(const void *pa, const void *pb) {
  const Candidate *a = pa, *b = pb;
  if (a->bytes != b->bytes) return a->bytes > b->bytes ? -1 : 1;
  if (a->last - a->first != b->last - b->first) return a->last - a->first > b->last - b->first ? -1 : 1;
  return rank_compare(a, b);
}

// First fit by start: as an allocator would meet them.
static int start_compare(const void *pa, const void *pb) {
  const Candidate *a = pa, *b = pb;
  if (a->first != b->first) return a->first < b->first ? -1 : 1;
  if (a->last != b->last) return a->last > b->last ? -1 : 1;
  if (a->bytes != b->bytes) return a->bytes > b->bytes ? -1 : 1;
  return rank_compare(a, b);
}

// What has its place, side by side in memory: most of the time goes into looking through them.
typedef struct Placed {
  int64_t offset, end;
  int first, last;
} Placed;

static int offset_compare(const void *pa, const void *pb) {
  const Placed *a = pa, *b = pb;
  return a->offset < b->offset ? -1 : a->offset > b->offset;
}

// Places candidates in the given order, each at the lowest offset where it meets none of those placed before whose
// lifetime meets its own. `placed`: the `fixed` items at first, with room for n more, always sorted by offset. Returns
// the peak, or `most` as soon as it is not below that.
static int64_t candidates_place(Candidate *c, int n, Placed *placed, int fixed, int64_t most) {
  int64_t peak = fixed ? placed[fixed - 1].end : 0;
  for (int i = 0; i < n; i++) {
    int64_t at = 0;
    int n_placed = fixed + i;
    for (int k = 0; k < n_placed; k++) {
      const Placed *o = &placed[k];
      if (o->offset >= at + c[i].bytes) break; // the gap before o is large enough, and all later ones lie higher
      if (o->first <= c[i].last && c[i].first <= o->last) at = max_i64(at, o->end);
    }
    c[i].offset = at;
    peak = max_i64(peak, at + c[i].bytes);
    if (peak >= most) return most;
    int k = n_placed;
    while (k > 0 && placed[k - 1].offset > at) k--;
    memmove(&placed[k + 1], &placed[k], (size_t)(n_placed - k) * sizeof *placed);
    placed[k] = (Placed){at, at + c[i].bytes, c[i].first, c[i].last};
  }
  return peak;
}

typedef struct Change {
  int position;
  int64_t bytes;
} Change;

static int change_compare(const void *pa, const void *pb) {
  const Change *a = pa, *b = pb;
  return a->position < b->position ? -1 : a->position > b->position;
}

// The largest sum of bytes alive at one position, and the first such position.
static int64_t live_bound(const Candidate *c, int n, int *fullest) {
  Change *change = xmalloc((size_t)n * 2 * sizeof *change);
  for (int i = 0; i < n; i++) {
    change[2 * i] = (Change){c[i].first, c[i].bytes};
    change[2 * i + 1] = (Change){c[i].last + 1, -c[i].bytes};
  }
  qsort(change, (size_t)n * 2, sizeof *change, change_compare);
  int64_t live = 0, most = 0;
  *fullest = 0;
  for (int i = 0; i < 2 * n; i++) {
    live += change[i].bytes;
    if (i + 1 < 2 * n && change[i + 1].position == change[i].position) continue;
    if (live <= most) continue;
    most = live;
    *fullest = change[i].position;
  }
  free(change);
  return most;
}

int64_t arena_place(ArenaItem *items, int n, int64_t align, int64_t *live, int *fullest) {
  static int (*const orders[])(const void *, const void *) = {size_compare, start_compare};
  Candidate *c = xmalloc((size_t)n * sizeof *c); // the fixed ones last, which only live_bound looks at
  Placed *given = xmalloc((size_t)n * sizeof *given), *placed = xmalloc((size_t)n * sizeof *placed);
  int movable = 0, fixed = 0;
  for (int i = 0; i < n; i++) {
    const ArenaItem *x = &items[i];
    int64_t bytes = (x->bytes + align - 1) / align * align;
    c[x->is_fixed ? n - 1 - fixed : movable] =
        (Candidate){.bytes = bytes, .first = x->first, .last = x->last, .rank = i};
    if (x->is_fixed)
      given[fixed++] = (Placed){x->offset, x->offset + bytes, x->first, x->last};
    else
      movable++;
  }
  if (fixed) qsort(given, (size_t)fixed, sizeof *given, offset_compare);
  int at;
  int64_t bound = live_bound(c, n, &at);
  if (live) *live = bound;
  if (fullest) *fullest = at;
  int64_t best = INT64_MAX;
  for (size_t o = 0; o < sizeof orders / sizeof *orders && best > bound; o++) {
    if (movable) qsort(c, (size_t)movable, sizeof *c, orders[o]);
    if (fixed) memcpy(placed, given, (size_t)fixed * sizeof *placed);
    int64_t peak = candidates_place(c, movable, placed, fixed, best);
    if (peak >= best) continue;
    best = peak;
    for (int i = 0; i < movable; i++) items[c[i].rank].offset = c[i].offset;
  }
  free(placed);
  free(given);
  free(c);
  return best;
}
