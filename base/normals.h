// Many normals at once: those of philox_normal4, by vectors.
#ifndef TESSERA_NORMALS_H
#define TESSERA_NORMALS_H

#include <stdint.h>

enum { NORMALS_BLOCKS = 64, NORMALS_PAIRS = 2 * NORMALS_BLOCKS };

// Two normals from each pair of words, as philox_normal2 makes them. They have the bits of glibc 2.36's on every CPU
// and with every libm. words: [NORMALS_PAIRS][2]; out likewise.
void normals_of_words(const uint32_t *words, float *out);

// The normals of blocks [block, block + NORMALS_BLOCKS) of a stream: out [4 NORMALS_BLOCKS].
void normals_draw(uint64_t seed, uint64_t draw, uint32_t stream, uint32_t block, float *out);
#endif
