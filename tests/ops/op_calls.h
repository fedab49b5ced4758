// Calls of every op, with operands on random packs, for whoever runs them: dump_ops, which writes them for PyTorch to
// compute again, and test_formulas, which compares them with the formulas as loops.
#ifndef TESSERA_OP_CALLS_H
#define TESSERA_OP_CALLS_H

#include "tests/ops/op_case.h"

// One operand: `count` elements of a type named as safetensors does.
typedef struct Value {
  void *data; // NULL: absent
  int64_t count;
  const char *type; // "F32", "F64", "I32", "U8"
} Value;
extern const char *const real_type; // of `real`
size_t value_bytes(const Value *v);

typedef struct OpCalls OpCalls;
struct OpCalls {
  OpCase c; // sizes and pack
  // Runs the op: what it writes goes into later calls. Operands in the order of op_info, absent ones without data;
  // outputs hold NaN, or what is to be added to.
  void (*call)(OpCalls *w, OpKind kind, OpArgs args, const Value *in, Value *out);
};

// Calls every op in every way that the model uses it and some more. The case has its pack.
void op_calls_run(OpCalls *w);
#endif
