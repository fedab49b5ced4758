// Lifetimes -> offsets. Pure: knows intervals and sizes, nothing of programs.
#ifndef TESSERA_ARENA_H
#define TESSERA_ARENA_H
#include <stdint.h>

typedef struct ArenaItem {
  int first, last; // inclusive op positions
  int64_t bytes;   // > 0
  int64_t offset;  // multiple of `align`: given for a fixed item, for others the result
  int is_fixed;    // fixed items must not overlap, whatever their lifetimes
} ArenaItem;

// Gives every item that is not fixed an offset so that no two items whose lifetimes meet overlap. Tries greedy by size
// and first fit by start, keeps the better; the same items always give the same offsets. Sizes count rounded up to
// `align`. Returns the peak: the largest offset + bytes (0 for no items). *live: the lower bound, the largest sum of
// bytes alive at one position; *fullest: the first such position (0 for no items). Either may be NULL.
int64_t arena_place(ArenaItem *items, int n, int64_t align, int64_t *live, int *fullest);
#endif
