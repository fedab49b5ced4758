#include "data/file_set.h"

#include "base/hash.h"

#include <stdlib.h>

// Where the file is, or the free place for it. At least a quarter of the places is free.
static FileId *file_set_place(const FileSet *set, FileId id) {
  uint64_t mask = (uint64_t)set->capacity - 1, at = hash64(&id, sizeof id, 0) & mask;
  while (set->of[at].device | set->of[at].inode) {
    if (set->of[at].device == id.device && set->of[at].inode == id.inode) break;
    at = (at + 1) & mask;
  }
  return &set->of[at];
}

static void file_set_grow(FileSet *set) {
  FileSet larger = {.n = set->n, .capacity = set->capacity ? 2 * set->capacity : 256};
  larger.of = xcalloc((size_t)larger.capacity, sizeof *larger.of);
  for (int64_t i = 0; i < set->capacity; i++)
    if (set->of[i].device | set->of[i].inode) *file_set_place(&larger, set->of[i]) = set->of[i];
  free(set->of);
  *set = larger;
}

bool file_set_has(const FileSet *set, FileId id) {
  if (!set->n) return false;
  const FileId *place = file_set_place(set, id);
  return place->device | place->inode;
}

bool file_set_add(FileSet *set, FileId id) {
  if (4 * set->n >= 3 * set->capacity) file_set_grow(set);
  FileId *place = file_set_place(set, id);
  if (place->device | place->inode) return false;
  *place = id;
  set->n++;
  return true;
}

void file_set_free(FileSet *set) {
  free(set->of);
  *set = (FileSet){0};
}
