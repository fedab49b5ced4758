// Slabs with an element a parameter (weights, EMA, moments, gradients) to and from the host.
#ifndef TESSERA_SLAB_H
#define TESSERA_SLAB_H

#include "model/files/safetensors.h"
#include "trainer/engine.h"

// A whole slab as DT_REAL, the weights as their masters.
void engine_slab_read(const Engine *e, Space space, void *out);
// Parameter i of a slab as a file's tensor, as DT_REAL, without data.
SafeTensor slab_tensor(const Engine *e, int i, const char *name);
// Elements [first, first + count) of a slab that is not shared, as DT_REAL. `scratch` is used where engine_converts
// says so: a weight and its remainder for each, or a moment. May be called by any thread, one at a time.
void engine_slab_read_part(const Engine *e, Space space, int64_t first, int64_t count, void *out, void *scratch);
// Whether a slab's elements are stored as something else than DT_REAL: weights (Backend.weights_read), or moments.
int engine_converts(const Engine *e, Space space);
// Moments [count] of DT_REAL from such as are stored as something else.
void slab_moments_read(const Engine *e, const void *stored, int64_t count, void *out);

// Allocates what engine_slab_copy passes through beside a device, twice `bytes`, unless that was done before. -1 with
// *err when it cannot be had.
int engine_stage_open(Engine *e, int64_t bytes, Error *err);
// Copies a slab to host memory [bytes[space]] as it is stored, at the link's speed, by all threads.
void engine_slab_copy(Engine *e, Space space, void *out);

// What this process has to do with a slab in checkpoints. Of several, the one that writes a file that is whole, as the
// weights' and the EMA's are: the first and the last, so that the copies lie in the memory of two hosts.
int slab_is_written(const Engine *e, Space space);
// Whether it is in a file that is whole, though this process has a share of it: the EMA, and the weights' remainders.
int slab_is_gathered(const Engine *e, Space space);
// Bytes that it copies: of a share of the moments that one, of what is gathered the whole where it is written here.
int64_t slab_copy_bytes(const Engine *e, Space space);

// A slab of which this process has a share, put together from all: all call it, who wants it with memory for the whole,
// the others with NULL.
void engine_slab_gather(Engine *e, Space space, void *out);

// Writes slabs piece by piece: on a backend with queues a piece travels while the next ones are made, through a few
// pinned buffers, so that no whole slab lies in host memory.
typedef struct SlabWriter SlabWriter;

// For pieces of at most `piece` elements. Ops that were replayed before come first. NULL with *err set when there is no
// pinned memory.
SlabWriter *slab_writer_open(Engine *e, int64_t piece, Error *err);
// Elements [first, first + count) of a slab, as DT_REAL; the weights as their masters. Of one that is shared, those
// that are this process's are taken. `values` may be overwritten when this returns.
void slab_writer_put(SlabWriter *w, Space space, int64_t first, int64_t count, const void *values);
// Waits until all has arrived. NULL is allowed.
void slab_writer_close(SlabWriter *w);
#endif
