// XXH64 (Yann Collet's xxHash, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md): a fast 64-bit checksum.
// It detects damage; it is no protection against someone who means to deceive.
#ifndef TESSERA_HASH_H
#define TESSERA_HASH_H

#include <stdint.h>
#include <string.h>

#define XXH_P1 0x9E3779B185EBCA87ull
#define XXH_P2 0xC2B2AE3D27D4EB4Full
#define XXH_P3 0x165667B19E3779F9ull
#define XXH_P4 0x85EBCA77C2B2AE63ull
#define XXH_P5 0x27D4EB2F165667C5ull

static inline uint64_t hash64_rotate(uint64_t x, int bits) {
  return (x << bits) | (x >> (64 - bits));
}
static inline uint64_t hash64_round(uint64_t acc, uint64_t lane) {
  return hash64_rotate(acc + lane * XXH_P2, 31) * XXH_P1;
}
static inline uint64_t hash64_load(const uint8_t *p) { // little-endian hosts, like the files this guards
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}

// The hash of n bytes.
static inline uint64_t hash64(const void *data, size_t n, uint64_t seed) {
  const uint8_t *p = (const uint8_t *)data, *end = p + n;
  uint64_t h = seed + XXH_P5;
  if (n >= 32) {
    uint64_t acc[4] = {seed + XXH_P1 + XXH_P2, seed + XXH_P2, seed, seed - XXH_P1};
    for (; end - p >= 32; p += 32)
      for (int i = 0; i < 4; i++) acc[i] = hash64_round(acc[i], hash64_load(p + 8 * i));
    h = hash64_rotate(acc[0], 1) + hash64_rotate(acc[1], 7) + hash64_rotate(acc[2], 12) + hash64_rotate(acc[3], 18);
    for (int i = 0; i < 4; i++) h = (h ^ hash64_round(0, acc[i])) * XXH_P1 + XXH_P4;
  }
  h += n;
  for (; end - p >= 8; p += 8) h = hash64_rotate(h ^ hash64_round(0, hash64_load(p)), 27) * XXH_P1 + XXH_P4;
  if (end - p >= 4) {
    uint32_t v;
    memcpy(&v, p, 4);
    h = hash64_rotate(h ^ v * XXH_P1, 23) * XXH_P2 + XXH_P3;
    p += 4;
  }
  for (; p < end; p++) h = hash64_rotate(h ^ *p * XXH_P5, 11) * XXH_P1;
  h = (h ^ (h >> 33)) * XXH_P2;
  h = (h ^ (h >> 29)) * XXH_P3;
  return h ^ (h >> 32);
}
#endif
