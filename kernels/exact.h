// Sums of numbers that are not negative, exact, so that their bits depend neither on the order nor on who adds what.
//
// A number is cut into words of EXACT_BITS bits of one long fixed-point number, from 2^EXACT_LOW up: enough for sums of
// squares of floats. Words add up as doubles without rounding, 2^29 numbers of them and more, also over processes.
#ifndef TESSERA_EXACT_H
#define TESSERA_EXACT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define EXACT_FN static __host__ __device__ inline
#else
#define EXACT_FN static inline
#endif

enum {
  EXACT_BITS = 24,
  EXACT_LOW = -300,
  EXACT_BAD = 26, // the word that counts what is not finite, or from about 2^280 on
  EXACT_WORDS,
  EXACT_PARTS = 4 // words that one number falls into
};

// One number's words, from `first` on.
typedef struct ExactParts {
  int first;
  uint32_t word[EXACT_PARTS];
} ExactParts;

EXACT_FN ExactParts exact_parts(double x) {
  const ExactParts none = {0, {0}}, bad = {EXACT_BAD - EXACT_PARTS + 1, {0, 0, 0, 1}};
  const uint64_t mask = (1u << EXACT_BITS) - 1;
  uint64_t bits, digits;
  memcpy(&bits, &x, sizeof bits);
  int at = (int)(bits >> 52 & 0x7FF) - 1075 - EXACT_LOW; // of the last of its 53 digits
  digits = (bits & 0xFFFFFFFFFFFFFull) | 0x10000000000000ull;
  if (at >= (EXACT_BAD - EXACT_PARTS + 1) * EXACT_BITS) return bad;
  if (at < 0) {
    if (at <= -53) return none; // too small, or 0
    digits >>= -at;
    at = 0;
  }
  int shift = at % EXACT_BITS;
  uint64_t rest = digits >> (EXACT_BITS - shift);
  ExactParts p = {at / EXACT_BITS,
                  {(uint32_t)(digits << shift & mask), (uint32_t)(rest & mask), (uint32_t)(rest >> EXACT_BITS & mask),
                   (uint32_t)(rest >> 2 * EXACT_BITS)}};
  return p;
}

// words [EXACT_WORDS] += x
EXACT_FN void exact_add(double *words, double x) {
  ExactParts p = exact_parts(x);
  for (int i = 0; i < EXACT_PARTS; i++) words[p.first + i] += p.word[i];
}

// What the words stand for, within a few roundings; infinite where a number in them is not finite.
EXACT_FN double exact_value(const double *words) {
  double sum = 0;
  if (words[EXACT_BAD] > 0) return HUGE_VAL;
  for (int i = 0; i < EXACT_BAD; i++) sum += ldexp(words[i], EXACT_LOW + EXACT_BITS * i);
  return sum;
}

// Elements whose squares GRAD_SQUARES adds up first, as doubles; processes share parameters out by multiples of it.
enum { EXACT_LEAF = 64 };
#endif
