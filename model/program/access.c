#include "model/program/access.h"

static void access_add(const Program *p, Access *access, int *n, TensorId t, int read, int write) {
  if (t == NO_TENSOR) return;
  const Tensor *x = &p->tensors[t];
  access[(*n)++] = (Access){tensor_space(p, x), x->offset, x->offset + x->bytes, read, write, t};
}

int op_access(const Program *p, const Op *op, Access access[OP_MAX_ACCESS]) {
  int n = 0;
  for (int i = 0; i < OP_MAX_IN; i++) access_add(p, access, &n, op->in[i], 1, 0);
  for (int i = 0; i < OP_MAX_OUT; i++) access_add(p, access, &n, op->out[i], op->acc >> i & 1, 1);
  if (op_info[op->kind].pack != READS_NONE) {
    int64_t bytes = (int64_t)batch_bind(&(Batch){0}, dims_batch_shape(&p->dims), NULL);
    access[n++] = (Access){SPACE_BATCH, 0, bytes, 1, 0, NO_TENSOR};
  }
  return n;
}
