#include "model/program/ops.h"

#include <string.h>

// Splits "x w0 w1? dw+?" into operands; returns how many.
static int operands_parse(const char *text, Operand *operand, int max) {
  int n = 0;
  for (const char *at = text; *at;) {
    size_t length = strcspn(at, " "), name = strcspn(at, " ?+");
    if (n == max || name >= sizeof operand->name) panic("op table: cannot hold operands \"%s\"", text);
    Operand *o = &operand[n++];
    *o = (Operand){.optional = memchr(at, '?', length) != NULL, .accumulates = memchr(at, '+', length) != NULL};
    memcpy(o->name, at, name);
    at += length;
    at += strspn(at, " ");
  }
  return n;
}

Operands op_operands(OpKind kind) {
  Operands o;
  memset(&o, 0, sizeof o);
  o.n_in = operands_parse(op_info[kind].in, o.in, OP_MAX_IN);
  o.n_out = operands_parse(op_info[kind].out, o.out, OP_MAX_OUT);
  return o;
}

int op_uses_batch(OpKind kind) {
  switch (kind) {
  case OP_COPY:
  case OP_ZERO:
  case OP_ADD:
  case OP_GRAD_NORM:
  case OP_GRAD_HASH:
  case OP_ADAMW:
  case OP_EMA:
  case OP_CAST:
    return 0;
  default:
    return 1;
  }
}

int op_accumulates(OpKind kind, int out, const OpArgs *args) {
  Operands o = op_operands(kind);
  if (out >= o.n_out || !o.out[out].accumulates) return 0;
  if (strcmp(o.out[out].name, "metrics") == 0) return 1;
  // `accumulate` comes first in every member of OpArgs that has it.
  return kind == OP_ADAMW || kind == OP_EMA || args->span.accumulate != 0;
}
