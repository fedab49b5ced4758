// Random programs shaped like a model (layers forward, layers backward, saved activations), and a backend whose kernels
// hash bytes: one wrong byte of an input changes every byte of every output.
#ifndef TESSERA_TESTS_SKETCH_H
#define TESSERA_TESTS_SKETCH_H
#include "model/program/program.h"
#include "model/program/replay.h"
#include "model/program/seconds.h"

typedef struct Rng {
  uint64_t state;
} Rng;
uint64_t rng_next(Rng *r);
int rng_below(Rng *r, int n); // in [0, n)
int rng_chance(Rng *r, int percent);

// What a kernel must know of its operands; its address travels in args.span.count.
typedef struct Shape {
  int64_t in[OP_MAX_IN], out[OP_MAX_OUT];   // bytes
  int64_t from[OP_MAX_OUT], to[OP_MAX_OUT]; // part of the output that is written
  uint64_t salt;
} Shape;

extern const Backend backend_hash; // an op's args.span.count is the address of its Shape; COPY copies
extern const Dims sketch_dims;

#define NONE NO_TENSOR

enum { MAX_LAYERS = 6, MAX_LAYER_TENSORS = 40, MAX_SHAPES = 1000, SLAB = 4096 };

typedef struct Layer {
  TensorId x, mean, rstd, branch;
  TensorId saved[MAX_LAYER_TENSORS];
  int n_saved;
} Layer;

typedef struct Sketch {
  Rng rng;
  Program *p;
  Shape *shapes;
  int n_shapes;
  TensorId mod, dmod;
  int64_t grads; // bytes of the gradient slab used
  int layers, accumulate;
  Layer layer[MAX_LAYERS];
} Sketch;

// The program of a seed under a policy table of MAX_LAYERS layers (NULL: keep everything). Everything but the policy's
// effects is the seed's. Where it is odd, gradients share the arena.
Sketch sketch_new(uint64_t seed, const PolicyTable *policy);
// The same where it is said whether they do.
Sketch sketch_sharing(uint64_t seed, const PolicyTable *policy, int shares);
void sketch_free(Sketch *k);

// MAX_LAYERS layers of random policies; x is kept or offloaded. Free with policy_table_free.
PolicyTable random_policy(uint64_t seed);

// Rates by which a copy takes anything from far less than an op to longer than all of them.
Costs random_costs(uint64_t seed);

// Memory for the spaces of one program.
typedef struct Memory {
  Bases bases;
  int64_t pack;
} Memory;
Memory memory_new(const Program *p, int separate);
void memory_free(Memory *m);
uint64_t hash_bytes(uint64_t h, const void *at, int64_t n);

// Hash of everything a bound program leaves behind, gradients and outputs, starting from the same weights, pack and
// gradients every time. order 0: as recorded; otherwise the random order of that seed.
uint64_t program_result(Program *p, Memory *m, uint64_t order);
// The same with memory of its own.
uint64_t sketch_result(Sketch *k, int separate, uint64_t order);
#endif
