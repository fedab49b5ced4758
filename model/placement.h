// Where slabs with an element for each parameter lie: what memory.state moves to the host, and where on the device
// gradients that leave are formed.
#ifndef TESSERA_PLACEMENT_H
#define TESSERA_PLACEMENT_H

#include "model/model.h"

// Elements of a slab of the optimizer's state that lie on the host, from its beginning on. They pass through the arena
// where they are computed with.
int64_t state_host_count(const Model *m, Space space);

// Adam's moments, the EMA and the weights' remainders are shared out: of every bucket each process has one of
// config_shards equal shares, which lie one after the other in its slabs.
typedef struct Shard {
  int64_t begin, end; // elements of the weights that it is of
  int64_t at;         // its first element in the slabs of a share
} Shard;
Shard bucket_shard(const Model *m, const ParamBucket *b);
int space_is_shared(const Model *m, Space space);

// With STATE_GRADIENTS the gradients of a layer that is not kept are formed in turn in at most this many slots, and
// leave for SPACE_HOST_GRADS while the layers below are computed. Those outside of layers stay.
enum { GRADIENT_SLOTS = 3 };
int bucket_leaves(const Model *m, const ParamBucket *b);
// Elements of SPACE_HOST_GRADS, where those that leave lie as in the slabs.
int64_t gradients_host_count(const Model *m);
// Where gradients are shared out (parallel.zero 2), SPACE_GRADS has this process's shares of the step's. Those of a
// micro-step are formed whole in SPACE_MICRO_GRADS, as above where they leave: of layers in turn, in one slot while the
// processes sum the other.
int gradients_are_shared(const Model *m);
Space gradients_space(const Model *m);
// Elements of gradients_space: gradients that stay, in the slabs' order, then the slots.
int64_t gradients_count(const Model *m);
// The element of it that a bucket's gradients begin at while they are formed.
int64_t gradients_begin(const Model *m, const ParamBucket *b);
// Whether the gradients of a step's only micro-step may lie where its activations have lain (Program.shares_gradients):
// where no update of the step before reads them beside its forward pass, and they do not leave.
int gradients_share_arena(const Model *m);
// A bucket's gradients in gradients_space, or in another space as in the slabs.
TensorId bucket_gradients(Program *p, const Model *m, const ParamBucket *b, Space space);
// This process's share of them there, and of the step's.
TensorId bucket_gradient_share(Program *p, const Model *m, const ParamBucket *b, Space space);

// Where weights are updated in shares: all of a bucket's, from all processes.
void bucket_gather(Program *p, const Model *m, const ParamBucket *b);

// Sums over the gradients of n parameters from `first` on, in SPACE_PARAM_SUMS: of their squares ([n, EXACT_WORDS] F64,
// GRAD_SQUARES), or of their mixed bits ([n] U64, GRAD_HASH).
typedef enum ParamSums { SUMS_OF_SQUARES, SUMS_OF_BITS, PARAM_SUMS } ParamSums;
TensorId param_sums(Program *p, const ParamTable *t, ParamSums which, int first, int n);
// Bytes of that space before the sums of a kind; with PARAM_SUMS all of it.
int64_t param_sums_offset(const ParamTable *t, ParamSums which);

#endif
