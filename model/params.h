// The parameter table: every weight once, with name, shape, initialisation and weight decay. Allocation,
// initialisation, optimiser, checkpoint and dump are loops over it.
#ifndef TESSERA_PARAMS_H
#define TESSERA_PARAMS_H

#include "kernels/kernels.h"
#include "model/config/config.h"

typedef enum ParamInit { INIT_ZERO, INIT_ONE, INIT_NORMAL, INIT_TRUNCATED, INIT_TEXT_GATES } ParamInit;

typedef struct Param {
  char name[56];
  int rank;
  int64_t shape[3];
  int64_t count;  // elements
  int64_t offset; // elements into every slab (weights, gradients, moments, EMA)
  ParamInit init;
  double std;
  int decay; // weight decay applies
} Param;

// Indices into the table; -1 where the model has no such parameter. [m]: by modality; where projections are shared
// [IMAGE] is -1.
typedef struct LayerParams {
  int qkv[MODALITIES];     // [(H+2G)D, C]
  int out[MODALITIES];     // [C, HD]
  int q_norm, k_norm;      // [2, D]
  int router[MODALITIES];  // [E, C]
  int w1[MODALITIES];      // [E, 2F, C], rows 2f gate, 2f+1 up
  int w2[MODALITIES];      // [E, C, F]
  int shared1[MODALITIES]; // [2S, C]
  int shared2[MODALITIES]; // [C, S]
} LayerParams;

// Neighbours in the slabs, updated and moved together. In the slabs' order: what stands before the layers, a bucket a
// layer, the heads, and the modulation table's U alone.
typedef struct ParamBucket {
  int first, n;       // parameters
  int64_t begin, end; // elements, padding included: a multiple of 64, with shards (config_shards) of 64 each
  int layer;          // -1: none
} ParamBucket;

typedef struct ParamTable {
  Param *of;
  int n;
  int64_t total;                            // elements of a slab, padding included
  int64_t parameters;                       // without padding
  int embed, head;                          // [V, C]; head -1 when tied
  int patch_down;                           // [B, P], -1 without a bottleneck
  int patch_in, patch_in_bias;              // [C, B or P], [C]
  int image_head, image_head_bias;          // [P, C], [P]
  int time1, time1_bias, time2, time2_bias; // [Z, 256], [Z], [Z, Z], [Z]
  int cond_pool;                            // [Z, C]
  int cond_kind;                            // [2, Z]
  int mod_base;                             // S [2, M]
  int mod_weight;                           // U [M, Z]
  LayerParams *layer;                       // [L]
  ParamSpan *spans;                         // [n], for the update ops
  ParamBucket *bucket;                      // [buckets]
  int buckets;
} ParamTable;

// Sizes of the model at `slots` token slots with `segments` modulation rows.
Dims dims_from_config(const Config *c, int slots, int segments);

ParamTable params_build(const Config *c);
const ParamBucket *bucket_of(const ParamTable *t, int param);
const ParamBucket *layer_bucket(const ParamTable *t, int layer);
// Whether a pass reads it at once: what stands before the layers, the modulation table, the first layer.
int bucket_opens(const ParamTable *t, const ParamBucket *b);
void params_free(ParamTable *t);

// Values to begin with, or every parameter random, N(0, scale / sqrt(fan_in)) for matrices and about 1 or 0 +- 0.3
// elsewhere: for tests of gradients, since at initialisation almost every gradient is zero.
typedef enum ParamValues { PARAMS_INITIAL, PARAMS_RANDOM } ParamValues;

// Takes the values of `count` elements of a slab from `offset` on, which it must not keep: at most PARAMS_PIECE of
// them.
typedef void (*ParamSink)(void *arg, int64_t offset, int64_t count, const void *values);
enum { PARAMS_PIECE = 1 << 22 };

// Hands the whole slab to `sink` piece by piece, in order, as fp32 or fp64 elements (bytes per element given); padding
// is zero. A parameter's normals are one Philox stream: key = seed, document = index of the parameter, so its values do
// not depend on the others', nor on the number of threads that draw them.
void params_stream(const ParamTable *t, ParamValues which, uint64_t seed, size_t element_bytes, ParamSink sink,
                   void *arg);

// Parameters a token of the modality multiplies with: attention projections + 3C(kF+S) per layer + input + output.
int64_t params_active(const Config *c, int modality);
#endif
