// Hashes. XXH64 (Yann Collet's xxHash, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md): a fast 64-bit
// checksum. It detects damage; it is no protection against someone who means to deceive.
#ifndef TESSERA_HASH_H
#define TESSERA_HASH_H

#include <stddef.h>
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

// Hashes bytes that come piece by piece: hash64_begin, hash64_add in order, hash64_end for the hash of all.
typedef struct Hash64 {
  uint64_t acc[4];
  uint64_t bytes;   // so far
  uint8_t tail[32]; // [bytes % 32] that no whole stripe has taken yet
} Hash64;

static inline Hash64 hash64_begin(uint64_t seed) {
  Hash64 h = {.acc = {seed + XXH_P1 + XXH_P2, seed + XXH_P2, seed, seed - XXH_P1}};
  return h;
}

// Adds the whole stripes of 32 bytes in [p, end); returns the first byte that is left.
static inline const uint8_t *hash64_stripes(Hash64 *h, const uint8_t *p, const uint8_t *end) {
  uint64_t a = h->acc[0], b = h->acc[1], c = h->acc[2], d = h->acc[3];
  for (; end - p >= 32; p += 32) {
    a = hash64_round(a, hash64_load(p));
    b = hash64_round(b, hash64_load(p + 8));
    c = hash64_round(c, hash64_load(p + 16));
    d = hash64_round(d, hash64_load(p + 24));
  }
  h->acc[0] = a;
  h->acc[1] = b;
  h->acc[2] = c;
  h->acc[3] = d;
  return p;
}

static inline void hash64_add(Hash64 *h, const void *data, size_t n) {
  const uint8_t *p = (const uint8_t *)data, *end = p + n;
  size_t have = h->bytes % 32;
  h->bytes += n;
  if (have) {
    size_t take = 32 - have < n ? 32 - have : n;
    memcpy(h->tail + have, p, take);
    p += take;
    if (have + take < 32) return;
    hash64_stripes(h, h->tail, h->tail + 32);
  }
  p = hash64_stripes(h, p, end);
  if (p < end) memcpy(h->tail, p, (size_t)(end - p));
}

static inline uint64_t hash64_end(const Hash64 *state) {
  const uint64_t *acc = state->acc;
  const uint8_t *p = state->tail, *end = p + state->bytes % 32;
  uint64_t h = acc[2] + XXH_P5; // acc[2] is the seed still
  if (state->bytes >= 32) {
    h = hash64_rotate(acc[0], 1) + hash64_rotate(acc[1], 7) + hash64_rotate(acc[2], 12) + hash64_rotate(acc[3], 18);
    for (int i = 0; i < 4; i++) h = (h ^ hash64_round(0, acc[i])) * XXH_P1 + XXH_P4;
  }
  h += state->bytes;
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

// The hash of n bytes.
static inline uint64_t hash64(const void *data, size_t n, uint64_t seed) {
  Hash64 h = hash64_begin(seed);
  hash64_add(&h, data, n);
  return hash64_end(&h);
}

// ---- hashes of short keys, for tables and for splits that must stay the same ----

// The finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
static inline uint64_t hash_u64(uint64_t v) {
  v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9u;
  v = (v ^ v >> 27) * 0x94d049bb133111ebu;
  return v ^ v >> 31;
}

// FNV-1a of n bytes, finalised.
static inline uint64_t hash_bytes(const void *data, size_t n) {
  uint64_t h = 0xcbf29ce484222325u;
  for (const uint8_t *p = (const uint8_t *)data, *end = p + n; p < end; p++) h = (h ^ *p) * 0x100000001b3u;
  return hash_u64(h);
}
#endif
