// A bounded, thread-safe cache of decoded and resized images. Nothing is ever evicted: epochs visit every image once,
// in changing orders, so that the newest is no likelier to be wanted than the oldest; what is cached may be read
// without a lock until cache_free.
#ifndef TESSERA_CACHE_H
#define TESSERA_CACHE_H

#include "base/base.h"

#include <stdbool.h>

typedef struct ImageCache ImageCache;

// Room for `bytes` of patches; 0 still remembers the images that cannot be decoded.
ImageCache *cache_new(size_t bytes);
void cache_free(ImageCache *cache);

typedef enum CacheAnswer { CACHE_UNKNOWN, CACHE_FOUND, CACHE_BAD } CacheAnswer;

// Looks image `image` of source `source` up; *patches is set when it is found.
CacheAnswer cache_get(ImageCache *cache, int source, int64_t image, const uint8_t **patches);
// Memory for the patches of an image that is to be put into the cache; NULL when there is no room.
uint8_t *cache_reserve(ImageCache *cache, size_t bytes);
// Puts them in and returns the image's patches: those of another thread, where it was faster; NULL when that one could
// not decode it.
const uint8_t *cache_put(ImageCache *cache, int source, int64_t image, uint8_t *patches, size_t bytes);
// Gives them back instead.
void cache_return(ImageCache *cache, uint8_t *patches, size_t bytes);
// Remembers that an image cannot be decoded; false when it was known.
bool cache_put_bad(ImageCache *cache, int source, int64_t image);
#endif
