// Attention over packed documents, backward. With p = exp(s - lse), s = q k^T / sqrt(D) and delta = rowsum(dO * O):
//
//   dv = p^T dO        ds = p * (dO v^T - delta)        dq = ds k / sqrt(D)        dk = ds^T q / sqrt(D)
//
// Every gradient is summed in a fixed order, in one of two ways: by two kernels (FlashAttention-2; Dao, 2023), of which
// the first takes tiles of queries, finds delta and dq, the second takes tiles of keys, finds dk and dv; or in one pass
// over tiles of keys (attention_pass.h), for five products of a tile instead of seven. Rows that lie together leave out
// the tiles that none of them sees and compare intervals only in those that some see in part.
#include "kernels/cuda/attention_bwd.h"

size_t attention_bwd_scratch(OpKind, const Dims *d, const OpArgs *) {
  return d->D == 128 ? attention_bwd_pass_scratch(d) : sizeof(float) * d->H * d->T; // there: delta
}

const float *attention_backward(const KernelCall *call, bf16 *dq, bf16 *dk, bf16 *dv, bool sums) {
  static_assert(IN_AT(ATTENTION_BWD, lse) == IN_AT(ATTENTION_ROPE_BWD, lse), "the inputs of both begin alike");
  const Dims *d = call->dims;
  BackwardCall c = {.dout = (const bf16 *)call->in.ATTENTION_BWD.dout,
                    .o = (const bf16 *)call->in.ATTENTION_BWD.o,
                    .q = (const bf16 *)call->in.ATTENTION_BWD.q,
                    .k = (const bf16 *)call->in.ATTENTION_BWD.k,
                    .v = (const bf16 *)call->in.ATTENTION_BWD.v,
                    .lse = (const float *)call->in.ATTENTION_BWD.lse,
                    .delta = (float *)call->scratch,
                    .dq = dq,
                    .dk = dk,
                    .dv = dv,
                    .shape = attention_shape(d),
                    .b = *call->batch};
  if (d->D == 128 && attention_bwd_sm90_usable()) {
    const float *left = attention_bwd_pass(&c, d, call->scratch, !sums, call_stream(call));
    return sums ? left : NULL;
  }
  if (d->D == 64 && attention_bwd_sm90_usable())
    attention_bwd_sm90(&c, call_stream(call));
  else
    attention_bwd_portable(&c, d->D, call_stream(call));
  return NULL;
}

extern "C" void cuda_ATTENTION_BWD(const KernelCall *call) {
  const auto &out = call->out.ATTENTION_BWD;
  attention_backward(call, (bf16 *)out.dq, (bf16 *)out.dk, (bf16 *)out.dv, false);
}
