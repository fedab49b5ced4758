#include "data/cache.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct CacheEntry {
  uint64_t key;     // 0: free
  uint8_t *patches; // NULL: cannot be decoded
} CacheEntry;

struct ImageCache {
  pthread_mutex_t lock;
  size_t room;       // bytes left
  CacheEntry *entry; // [capacity], open addressing
  size_t count, capacity;
};

ImageCache *cache_new(size_t bytes) {
  ImageCache *cache = xcalloc(1, sizeof *cache);
  pthread_mutex_init(&cache->lock, NULL);
  cache->room = bytes;
  cache->capacity = 256;
  cache->entry = xcalloc(cache->capacity, sizeof *cache->entry);
  return cache;
}

void cache_free(ImageCache *cache) {
  if (!cache) return;
  for (size_t i = 0; i < cache->capacity; i++) free(cache->entry[i].patches);
  free(cache->entry);
  pthread_mutex_destroy(&cache->lock);
  free(cache);
}

static uint64_t cache_key(int source, int64_t image) {
  return (uint64_t)(source + 1) << 48 ^ (uint64_t)image;
}

// The entry of a key, or the free one where it belongs.
static CacheEntry *cache_find(const ImageCache *cache, uint64_t key) {
  uint64_t hash = key * 0x9E3779B97F4A7C15u;
  size_t i = (size_t)(hash ^ hash >> 32) & (cache->capacity - 1);
  while (cache->entry[i].key && cache->entry[i].key != key) i = (i + 1) & (cache->capacity - 1);
  return &cache->entry[i];
}

static void cache_insert(ImageCache *cache, uint64_t key, uint8_t *patches) {
  *cache_find(cache, key) = (CacheEntry){key, patches};
  if (++cache->count <= cache->capacity / 2) return;
  CacheEntry *old = cache->entry;
  size_t n = cache->capacity;
  cache->capacity *= 2;
  cache->entry = xcalloc(cache->capacity, sizeof *cache->entry);
  for (size_t i = 0; i < n; i++)
    if (old[i].key) *cache_find(cache, old[i].key) = old[i];
  free(old);
}

CacheAnswer cache_get(ImageCache *cache, int source, int64_t image, const uint8_t **patches) {
  pthread_mutex_lock(&cache->lock);
  CacheEntry entry = *cache_find(cache, cache_key(source, image));
  pthread_mutex_unlock(&cache->lock);
  if (!entry.key) return CACHE_UNKNOWN;
  *patches = entry.patches;
  return entry.patches ? CACHE_FOUND : CACHE_BAD;
}

uint8_t *cache_reserve(ImageCache *cache, size_t bytes) {
  pthread_mutex_lock(&cache->lock);
  bool fits = bytes <= cache->room;
  if (fits) cache->room -= bytes;
  pthread_mutex_unlock(&cache->lock);
  return fits ? xmalloc(bytes) : NULL;
}

void cache_return(ImageCache *cache, uint8_t *patches, size_t bytes) {
  free(patches);
  pthread_mutex_lock(&cache->lock);
  cache->room += bytes;
  pthread_mutex_unlock(&cache->lock);
}

const uint8_t *cache_put(ImageCache *cache, int source, int64_t image, uint8_t *patches, size_t bytes) {
  uint64_t key = cache_key(source, image);
  pthread_mutex_lock(&cache->lock);
  const CacheEntry before = *cache_find(cache, key);
  if (!before.key) cache_insert(cache, key, patches);
  pthread_mutex_unlock(&cache->lock);
  if (!before.key) return patches;
  cache_return(cache, patches, bytes);
  return before.patches;
}

bool cache_put_bad(ImageCache *cache, int source, int64_t image) {
  uint64_t key = cache_key(source, image);
  pthread_mutex_lock(&cache->lock);
  bool news = !cache_find(cache, key)->key;
  if (news) cache_insert(cache, key, NULL);
  pthread_mutex_unlock(&cache->lock);
  return news;
}
