// What the ops on assignments share (experts.cu: grouped products; experts_loop.cu: a library product an expert;
// combine.h): where an op's routes and per-assignment buffers lie.
#ifndef TESSERA_CUDA_EXPERTS_H
#define TESSERA_CUDA_EXPERTS_H

#include "kernels/cuda/cuda.h"

static inline Route route_of(const KernelCall *c, const void *route) {
  Route r;
  route_bind(&r, c->dims, (int32_t *)(uintptr_t)route);
  return r;
}

// First element of modality m's view of a per-assignment buffer, scale * width[m] elements a slot.
static inline int64_t slots_at(const Dims *d, const int width[MODALITIES], int scale, int m) {
  const int scaled[MODALITIES] = {scale * width[TEXT], scale * width[IMAGE]};
  return two_sided_base(d->T, d->K, scaled, m);
}

// The same ops with tiles of one kind for the experts of both modalities; and what is said of either way
// (Backend.note).
extern "C" void cuda_EXPERT_UP_FWD_grouped(const KernelCall *c);
extern "C" void cuda_EXPERT_DOWN_FWD_grouped(const KernelCall *c);
extern "C" void cuda_EXPERT_DOWN_BWD_grouped(const KernelCall *c);
extern "C" void cuda_EXPERT_DOWN_WGRAD_grouped(const KernelCall *c);
extern "C" void cuda_EXPERT_UP_DGRAD_grouped(const KernelCall *c);
extern "C" void cuda_EXPERT_UP_WGRAD_grouped(const KernelCall *c);
size_t expert_grouped_scratch(OpKind kind, const Dims *dims, const OpArgs *args);
void expert_note(const Backend *b, OpKind kind, const Dims *dims, const OpArgs *args, char *note, size_t size);

// The same ops with a cuBLASLt product for every expert. The host has to know how many rows an expert has, so these
// wait for the device and cannot be captured in a graph. EXPERT_COMBINE multiplies no matrices: there is one of it.
extern "C" void cuda_EXPERT_UP_FWD_loop(const KernelCall *c);
extern "C" void cuda_EXPERT_DOWN_FWD_loop(const KernelCall *c);
extern "C" void cuda_EXPERT_DOWN_BWD_loop(const KernelCall *c);
extern "C" void cuda_EXPERT_DOWN_WGRAD_loop(const KernelCall *c);
extern "C" void cuda_EXPERT_UP_DGRAD_loop(const KernelCall *c);
extern "C" void cuda_EXPERT_UP_WGRAD_loop(const KernelCall *c);
size_t expert_loop_scratch(OpKind kind, const Dims *dims, const OpArgs *args);
#endif
