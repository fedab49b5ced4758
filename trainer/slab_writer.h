// Writes slabs with an element a parameter (weights, EMA, moments) from host memory piece by piece: on a backend with
// queues a piece travels while the next ones are made, through a few pinned buffers, so that no whole slab lies in host
// memory.
#ifndef TESSERA_SLAB_WRITER_H
#define TESSERA_SLAB_WRITER_H

#include "trainer/engine.h"

typedef struct SlabWriter SlabWriter;

// For pieces of at most `piece` elements. Ops that were replayed before come first. NULL with *err set when there is no
// pinned memory.
SlabWriter *slab_writer_open(Engine *e, int64_t piece, Error *err);
// Elements [first, first + count) of a slab, as DT_REAL; the weights as their masters. `values` may be overwritten when
// this returns.
void slab_writer_put(SlabWriter *w, Space space, int64_t first, int64_t count, const void *values);
// Waits until all has arrived. NULL is allowed.
void slab_writer_close(SlabWriter *w);
#endif
