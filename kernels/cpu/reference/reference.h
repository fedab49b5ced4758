// The specification as code: ops as plain loops in double, in the order of their formulas (kernels/op_table.h). Read an
// op here first; the kernels beside, which train, are tested against these. An op without one here reads like its
// formula there.
//
// Operands are as the table says, with doubles for elements of DT_ACT and DT_REAL. One thread, no blocks.
#ifndef TESSERA_REFERENCE_H
#define TESSERA_REFERENCE_H

#include "kernels/kernels.h"

#define REFERENCE_LIST(OP)                                                                                             \
  OP(LINEAR_FWD)                                                                                                       \
  OP(LINEAR_DGRAD)                                                                                                     \
  OP(LINEAR_WGRAD)                                                                                                     \
  OP(ADALN_FWD)                                                                                                        \
  OP(ADALN_BWD)                                                                                                        \
  OP(QKNORM_ROPE_FWD)                                                                                                  \
  OP(QKNORM_ROPE_BWD)                                                                                                  \
  OP(ATTENTION_FWD)                                                                                                    \
  OP(ATTENTION_BWD)                                                                                                    \
  OP(ROUTER_FWD)                                                                                                       \
  OP(ROUTER_LOSS)                                                                                                      \
  OP(ROUTER_BWD)                                                                                                       \
  OP(EXPERT_UP_FWD)                                                                                                    \
  OP(EXPERT_DOWN_FWD)                                                                                                  \
  OP(EXPERT_COMBINE)                                                                                                   \
  OP(EXPERT_DOWN_BWD)                                                                                                  \
  OP(EXPERT_DOWN_WGRAD)                                                                                                \
  OP(EXPERT_UP_DGRAD)                                                                                                  \
  OP(EXPERT_UP_WGRAD)                                                                                                  \
  OP(COMBINE_ADALN_FWD)                                                                                                \
  OP(COMBINE_ADALN_BWD)                                                                                                \
  OP(SHARED_UP_FWD)                                                                                                    \
  OP(SHARED_DOWN_BWD)                                                                                                  \
  OP(HEAD_CE)                                                                                                          \
  OP(HEAD_LOGITS)                                                                                                      \
  OP(FLOW_LOSS)
#define REFERENCE_DECLARE(name) void reference_##name(const KernelCall *c);
REFERENCE_LIST(REFERENCE_DECLARE)
#undef REFERENCE_DECLARE

extern const KernelFn reference[OP_COUNT]; // NULL: none
#endif
