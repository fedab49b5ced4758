// The activations and their slopes. SiLU: the conditions and the image rows of an AdaLN. SwiGLU: the experts and the
// shared expert; a row of pre-activations interleaves gate (2f) and up (2f + 1), so that whoever holds one holds the
// other.
#ifndef TESSERA_CUDA_ACTIVATION_H
#define TESSERA_CUDA_ACTIVATION_H

#include "kernels/cuda/cuda.h"

// With an approximate division, 2 ulp: an exact one would be most of the work of an activation.
static __device__ inline float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

static __device__ inline float silu(float x) {
  return x * sigmoid(x);
}

// The derivative of silu.
static __device__ inline float silu_slope(float x) {
  float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// silu(gate) * up.
static __device__ inline float swiglu(float gate, float up) {
  return gate * sigmoid(gate) * up;
}

typedef struct SwigluGrad {
  float a, dgate, dup; // the activation again, and the gradients of the pair
} SwigluGrad;

// From da, the gradient of the activation.
static __device__ inline SwigluGrad swiglu_backward(float gate, float up, float da) {
  float s = sigmoid(gate), silu = gate * s;
  SwigluGrad g = {silu * up, da * up * (s + silu * (1 - s)), da * silu};
  return g;
}

// ---- four pairs at a time: 16 bytes of pre, 8 of the activation, so that both are accessed without gaps ----

static __device__ inline void load4(const bf16 *p, float x[4]) {
  const uint2 v = *reinterpret_cast<const uint2 *>(p);
  x[0] = __uint_as_float(v.x << 16);
  x[1] = __uint_as_float(v.x & 0xffff0000u);
  x[2] = __uint_as_float(v.y << 16);
  x[3] = __uint_as_float(v.y & 0xffff0000u);
}
static __device__ inline void store4(bf16 *p, const float x[4]) {
  *reinterpret_cast<uint2 *>(p) = make_uint2(pack2(x[0], x[1]), pack2(x[2], x[3]));
}

// From pre [8] and da [4]: dpre [8] and wa [4] = the activation, both times w; returns <da, activation>, the gradient
// of w.
static __device__ inline float swiglu_backward4(const float pre[8], const float da[4], float w, float dpre[8],
                                                float wa[4]) {
  float dot = 0;
#pragma unroll
  for (int f = 0; f < 4; f++) {
    SwigluGrad g = swiglu_backward(pre[2 * f], pre[2 * f + 1], da[f]);
    dot += da[f] * g.a;
    wa[f] = w * g.a;
    dpre[2 * f] = w * g.dgate;
    dpre[2 * f + 1] = w * g.dup;
  }
  return dot;
}
#endif
