// Attention over packed documents, forward: FlashAttention-2 (Dao, 2023) with the mask of kernels/batch.h. Queries
// whose rows lie together leave out the tiles that none of them sees and compare intervals only in those that some see
// in part.
#include "kernels/cuda/attention_fwd.h"

size_t attention_fwd_scratch(OpKind, const Dims *d, const OpArgs *) {
  return d->D == 128 ? ATTENTION_WIDE_SCRATCH : 0;
}

extern "C" void cuda_ATTENTION_FWD(const KernelCall *call) {
  const Dims *d = call->dims;
  ForwardCall c = {.q = (const bf16 *)call->in.ATTENTION_FWD.q,
                   .k = (const bf16 *)call->in.ATTENTION_FWD.k,
                   .v = (const bf16 *)call->in.ATTENTION_FWD.v,
                   .o = (bf16 *)call->out.ATTENTION_FWD.o,
                   .lse = (float *)call->out.ATTENTION_FWD.lse,
                   .shape = attention_shape(d),
                   .b = *call->batch};
  if (d->D == 32 || !attention_fwd_sm90_usable())
    attention_fwd_portable(&c, d->D, call_stream(call));
  else if (d->D == 64)
    attention_fwd_sm90(&c, call_stream(call));
  else
    attention_fwd_wide(&c, call->scratch, call_stream(call));
}
