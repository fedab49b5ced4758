// The one place where the stb libraries are compiled. Only JPEG and PNG are decoded; the other formats' readers
// would be attack surface without use.
#include "data/image.h"

#include <stdlib.h>

// A few kilobytes of compressed zeros can unpack to gigabytes whatever the header says, so no single allocation of
// stb's may exceed what the largest allowed image needs (16-bit RGBA, twice for the doubling of a growing buffer).
// New memory is zeroed: a damaged JPEG can leave tables and coefficients unset that stb_image 2.27 then uses.
static void *stb_allocate(void *p, size_t bytes) {
  if (bytes > (size_t)IMAGE_MAX_PIXELS * 16) return NULL;
  return p ? realloc(p, bytes ? bytes : 1) : calloc(1, bytes ? bytes : 1);
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wcast-function-type"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wstringop-overflow"

#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_NO_HDR
#define STBI_MALLOC(bytes) stb_allocate(NULL, bytes)
#define STBI_REALLOC(p, bytes) stb_allocate(p, bytes)
#define STBI_FREE(p) free(p)
#define STB_IMAGE_IMPLEMENTATION
#include <stb/stb_image.h>

#define STB_IMAGE_RESIZE_IMPLEMENTATION
#if __has_include(<stb/stb_image_resize2.h>)
#include <stb/stb_image_resize2.h>
#else
#include <stb/stb_image_resize.h>
#endif

#define STBI_WRITE_NO_STDIO
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image_write.h>
#pragma GCC diagnostic pop
