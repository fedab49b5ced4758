// --dump: one step as safetensors, enough to rebuild it elsewhere.
//
//   config.json                   the resolved config
//   params.safetensors            every parameter by name
//   grads.safetensors             every gradient of the step, before clipping, by the same names
//   micro_K.safetensors           the arrays of kernels/batch.h by field name, trimmed to their used length: dims [5]
//                                 (n_text, n_image, n_segments, n_target, n_ids), and clean, noised [n_image, P] in row
//                                 order (pixel values in -1 .. 1, and what the model was fed)
//   losses.json                   means over the step, the gradient norm, and the counts they were divided by
#ifndef TESSERA_DUMP_H
#define TESSERA_DUMP_H

#include "trainer/engine.h"

// Runs one step over `n` packs (one per micro-batch, their scales set) and writes it to `folder`, which is created. The
// gradients stay in the engine. -1 with *err.
int dump_step(Engine *e, const Batch *const *packs, int n, const char *folder, Error *err);
#endif
