// libm takes logarithm, sine and cosine one by one. Here they are in loops without calls or branches, which compilers
// turn into vectors. Constants and order of operations are those of Arm's optimized routines (copyright 2017-2018 Arm
// Limited, MIT license), which are glibc's logf, sinf and cosf too: the weights that a run begins with have the bits
// that they had with libm.
#include "base/normals.h"

#include "base/philox.h"

#include <string.h>

// ln z = ln c + ln(z / c), with a c for each sixteenth of [.7, 1.4).
enum { LOG_BITS = 4, LOG_PARTS = 1 << LOG_BITS, MANTISSA_BITS = 23 };
static const uint32_t log_origin = 0x3f330000; // the bits of .7
static const double log_inverse[LOG_PARTS] = {
    0x1.661ec79f8f3bep+0, 0x1.571ed4aaf883dp+0, 0x1.49539f0f010bp+0,  0x1.3c995b0b80385p+0, 0x1.30d190c8864a5p+0,
    0x1.25e227b0b8eap+0,  0x1.1bb4a4a1a343fp+0, 0x1.12358f08ae5bap+0, 0x1.0953f419900a7p+0, 0x1p+0,
    0x1.e608cfd9a47acp-1, 0x1.ca4b31f026aap-1,  0x1.b2036576afce6p-1, 0x1.9c2d163a1aa2dp-1, 0x1.886e6037841edp-1,
    0x1.767dcf5534862p-1};
static const double log_center[LOG_PARTS] = {
    -0x1.57bf7808caadep-2, -0x1.2bef0a7c06ddbp-2, -0x1.01eae7f513a67p-2, -0x1.b31d8a68224e9p-3, -0x1.6574f0ac07758p-3,
    -0x1.1aa2bc79c81p-3,   -0x1.a4e76ce8c0e5ep-4, -0x1.1973c5a611cccp-4, -0x1.252f438e10c1ep-5, 0,
    0x1.aa5aa5df25984p-5,  0x1.c5e53aa362eb4p-4,  0x1.526e57720db08p-3,  0x1.bc2860d22477p-3,   0x1.1058bc8a07ee1p-2,
    0x1.4043057b6ee09p-2};

// sqrt(-2 ln u) of the uniforms that words stand for. The look-ups have a loop of their own, for few CPUs gather fast.
static void radii(const uint32_t *words, float *out) {
  double inverse[NORMALS_PAIRS], center[NORMALS_PAIRS];
  uint32_t bits[NORMALS_PAIRS];
  for (int i = 0; i < NORMALS_PAIRS; i++) {
    float u = philox_uniform(words[2 * i]);
    memcpy(&bits[i], &u, sizeof u);
  }
  for (int i = 0; i < NORMALS_PAIRS; i++) {
    uint32_t part = (bits[i] - log_origin) >> (MANTISSA_BITS - LOG_BITS) & (LOG_PARTS - 1);
    inverse[i] = log_inverse[part];
    center[i] = log_center[part];
  }
  for (int i = 0; i < NORMALS_PAIRS; i++) {
    int exponent = (int32_t)(bits[i] - log_origin) >> MANTISSA_BITS;
    uint32_t mantissa = bits[i] - ((uint32_t)exponent << MANTISSA_BITS);
    float z;
    memcpy(&z, &mantissa, sizeof z);
    double r = (double)z * inverse[i] - 1, whole = center[i] + (double)exponent * 0x1.62e42fefa39efp-1, r2 = r * r;
    double y = -0x1.00ea348b88334p-2 * r2 + (0x1.5575b0be00b6ap-2 * r + -0x1.ffffef20a4123p-2);
    out[i] = sqrtf(-2.0f * (float)(y * r2 + (whole + r)));
  }
}

void normals_of_words(const uint32_t *words, float *out) {
  float radius[NORMALS_PAIRS];
  radii(words, radius);
  for (int i = 0; i < NORMALS_PAIRS; i++) {
    double angle = (double)(6.2831853071795864769f * philox_uniform(words[2 * i + 1]));
    int quarter = ((int32_t)(angle * 0x1.45F306DC9C883p+23) + 0x800000) >> 24; // of a turn, to nearest
    double x = angle - quarter * 0x1.921FB54442D18p0, x2 = x * x, x3 = x * x2, x4 = x2 * x2;
    double s = x + x3 * -0x1.555545995a603p-3 + x3 * x2 * (0x1.1107605230bc4p-7 + x2 * -0x1.994eb3774cf24p-13);
    double c = 1 + x2 * -0x1.ffffffd0c621cp-2 + x4 * 0x1.55553e1068f19p-5 +
               x4 * x2 * (-0x1.6c087e89a359dp-10 + x2 * 0x1.99343027bf8c3p-16);
    float even = (float)c, odd = (float)s;
    float cosine = quarter & 1 ? odd : even, sine = quarter & 1 ? even : odd;
    out[2 * i] = radius[i] * ((quarter + 1) & 2 ? -cosine : cosine);
    out[2 * i + 1] = radius[i] * (quarter & 2 ? -sine : sine);
  }
}

void normals_draw(uint64_t seed, uint64_t draw, uint32_t stream, uint32_t block, float *out) {
  uint32_t words[4 * NORMALS_BLOCKS];
  for (int b = 0; b < NORMALS_BLOCKS; b++) {
    Philox4 r = philox4(seed, draw, stream, block + (uint32_t)b);
    for (int k = 0; k < 4; k++) words[4 * b + k] = r.v[k];
  }
  normals_of_words(words, out);
}
