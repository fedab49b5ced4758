// Runs every op of kernels/kernels.h on random packs and writes operands and results, for tests/ops/parity_ops.py to
// compute again with PyTorch.
//
//   dump_ops DIR [CASES]    writes DIR/ops.txt (the name of every op) and DIR/case_N.safetensors
//
// A case's file has dims/NAME, batch/NAME and for its n-th call n.OP/in/NAME, n.OP/out/NAME, n.OP/arg/NAME and
// n.OP/before/NAME (an accumulating output before the call). All are flat; parity_ops.py knows the shapes.
#include "tests/ops/op_calls.h"
#include "base/base.h"

#include <stdio.h>
#include <stdlib.h>

// A safetensors file while it is made, of the calls of one case.
typedef struct Dump {
  OpCalls w; // first: a call is handed it
  char *header, *data;
  size_t header_len, data_len;
  int calls;
} Dump;

static void dump_add(Dump *d, const char *name, Value v) {
  size_t bytes = value_bytes(&v);
  char *entry =
      xasprintf("%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld],\"data_offsets\":[%zu,%zu]}", d->header_len ? "," : "{",
                name, v.type, (long long)v.count, d->data_len, d->data_len + bytes);
  size_t length = strlen(entry);
  d->header = xrealloc(d->header, d->header_len + length + 16);
  memcpy(d->header + d->header_len, entry, length);
  d->header_len += length;
  free(entry);
  d->data = xrealloc(d->data, d->data_len + bytes + 1);
  if (bytes) memcpy(d->data + d->data_len, v.data, bytes);
  d->data_len += bytes;
}

// dump_add(d, "prefix/name", v)
static void dump_named(Dump *d, const char *prefix, const char *name, Value v) {
  char *full = xasprintf("%s/%s", prefix, name);
  dump_add(d, full, v);
  free(full);
}

static void dump_number(Dump *d, const char *prefix, const char *name, double number) {
  dump_named(d, prefix, name, (Value){&number, 1, "F64"});
}

static void dump_write(Dump *d, const char *path) {
  d->header[d->header_len++] = '}';
  while (d->header_len % 8) d->header[d->header_len++] = ' ';
  uint64_t length = d->header_len;
  FILE *f = fopen(path, "wb");
  if (!f || fwrite(&length, 8, 1, f) != 1 || fwrite(d->header, 1, d->header_len, f) != d->header_len ||
      fwrite(d->data, 1, d->data_len, f) != d->data_len || fclose(f))
    panic("dump_ops: cannot write %s", path);
  free(d->header);
  free(d->data);
}

static void dump_args(Dump *d, const char *prefix, OpKind kind, const OpArgs *a) {
#define NUMBER(member, field) dump_number(d, prefix, #field, (double)a->member.field)
  dump_number(d, prefix, "accumulate", a->accumulate);
  switch (kind) {
  case OP_LINEAR_FWD:
  case OP_LINEAR_DGRAD:
  case OP_LINEAR_WGRAD:
    NUMBER(linear, extent);
    NUMBER(linear, in_dim[0]);
    NUMBER(linear, in_dim[1]);
    NUMBER(linear, out_dim[0]);
    NUMBER(linear, out_dim[1]);
    break;
  case OP_ADALN_FWD:
  case OP_ADALN_BWD:
  case OP_COMBINE_ADALN_FWD:
  case OP_COMBINE_ADALN_BWD:
    NUMBER(adaln, gate);
    NUMBER(adaln, shift);
    NUMBER(adaln, scale);
    NUMBER(adaln, silu_image);
    NUMBER(adaln, x_is_new);
    break;
  case OP_ROUTER_FWD:
    NUMBER(router, even);
    break;
  case OP_ROUTER_LOSS:
  case OP_ROUTER_BWD:
    NUMBER(router, balance);
    NUMBER(router, z);
    NUMBER(router, layer);
    break;
  case OP_FLOW_LOSS:
    NUMBER(flow, t_floor);
    break;
  case OP_NOISE:
    NUMBER(noise, stream);
    break;
  case OP_GRAD_SQUARES:
  case OP_GRAD_DECIDE:
  case OP_GRAD_HASH:
  case OP_ADAMW:
    for (int i = 0; i < a->params.n; i++) {
      const ParamSpan *s = &a->params.spans[i];
      double span[3] = {(double)s->offset, (double)s->count, s->decay};
      char name[24];
      snprintf(name, sizeof name, "span%d", i);
      dump_named(d, prefix, name, (Value){span, 3, "F64"});
    }
    break;
  default:
    break;
  }
#undef NUMBER
}

// Runs an op and writes all there is about the call. Operands in the order of op_info, absent ones `none`.
static void call_dumped(OpCalls *w, OpKind kind, OpArgs args, const Value *in, Value *out) {
  Dump *d = (Dump *)w;
  const void *in_data[OP_MAX_IN] = {0};
  void *out_data[OP_MAX_OUT] = {0};
  for (int i = 0; i < OP_MAX_IN; i++) in_data[i] = in[i].data;
  for (int i = 0; i < OP_MAX_OUT; i++) out_data[i] = out[i].data;
  char *prefix = xasprintf("%d.%s", d->calls++, op_info[kind].name);
  char *part[4];
  const char *const part_name[4] = {"in", "before", "out", "arg"};
  for (int i = 0; i < 4; i++) part[i] = xasprintf("%s/%s", prefix, part_name[i]);

  dump_args(d, part[3], kind, &args);
  for (int pass = 0; pass < 3; pass++) { // inputs, accumulating outputs before the call, outputs after it
    if (pass == 2) op_run(&w->c, kind, args, in_data, out_data);
    const OperandInfo *operand = pass == 0 ? op_info[kind].in : op_info[kind].out;
    for (int i = 0; i < (pass == 0 ? op_info[kind].n_in : op_info[kind].n_out); i++) {
      const Value *v = pass == 0 ? &in[i] : &out[i];
      int wanted = pass != 1 || operand[i].marks & (ADDS_ALWAYS | ADDS_IF_ASKED);
      if (v->data && wanted) dump_named(d, part[pass], operand[i].name, *v);
    }
  }
  for (int i = 0; i < 4; i++) free(part[i]);
  free(prefix);
}

static void dump_pack(Dump *f) {
  const OpCase *c = &f->w.c;
  const Dims *d = &c->dims;
  const Batch *b = &c->batch;
  const BatchDims *n = b->dims;
#define DIM(name) dump_number(f, "dims", #name, (double)d->name)
  DIM(T), DIM(C), DIM(H), DIM(G), DIM(D), DIM(P), DIM(V), DIM(Z), DIM(L), DIM(M), DIM(segments);
  DIM(E[0]), DIM(E[1]), DIM(F[0]), DIM(F[1]), DIM(K[0]), DIM(K[1]), DIM(S[0]), DIM(S[1]);
#undef DIM
#define SCALE(name) dump_number(f, "batch", #name, (double)n->name)
  SCALE(ce_scale), SCALE(flow_scale), SCALE(router_scale), SCALE(seed_lo), SCALE(seed_hi);
#undef SCALE
  dump_add(f, "batch/dims", (Value){&b->dims->n_text, 5, "I32"});
#define ARRAY(name, count, type) dump_add(f, "batch/" #name, (Value){b->name, count, type})
  int T = d->T, G = d->segments;
  ARRAY(row, T, "I32"), ARRAY(seq, T, "I32"), ARRAY(token, T, "I32"), ARRAY(target, T, "I32");
  ARRAY(target_kind, T, "I32"), ARRAY(target_row, T, "I32"), ARRAY(segment, T, "I32"), ARRAY(position, 2 * T, "I32");
  ARRAY(doc_start, T, "I32"), ARRAY(kv_end, T, "I32"), ARRAY(q_start, T, "I32"), ARRAY(q_end, T, "I32");
  ARRAY(pool_segment, T, "I32"), ARRAY(seg_kind, G, "I32"), ARRAY(seg_start, G, "I32"), ARRAY(seg_len, G, "I32");
  ARRAY(seg_ordinal, G, "I32"), ARRAY(cap_start, G, "I32"), ARRAY(cap_end, G, "I32"), ARRAY(seg_doc, G, "I64");
  ARRAY(seg_time, G, "F32"), ARRAY(patch, (int64_t)n->n_image * d->P, "U8");
#undef ARRAY
}

int main(int argc, char **argv) {
  if (argc < 2 || argc > 3) {
    fprintf(stderr, "usage: dump_ops DIR [CASES]\n");
    return 2;
  }
  Error err;
  if (folder_make(argv[1], &err)) fatal(&err);
  char *path = xasprintf("%s/ops.txt", argv[1]);
  FILE *names = fopen(path, "w");
  if (!names) panic("dump_ops: cannot write %s", path);
  for (int i = 0; i < OP_COUNT; i++) fprintf(names, "%s\n", op_info[i].name);
  if (fclose(names)) panic("dump_ops: cannot write %s", path);
  free(path);

  int cases = argc == 3 ? atoi(argv[2]) : 15;
  for (int i = 0; i < cases; i++) {
    Dump d = {.w.call = call_dumped};
    op_case_init(&d.w.c, (uint64_t)i + 1);
    op_case_pack(&d.w.c, (PackKind)(i % PACK_KINDS));
    dump_pack(&d);
    op_calls_run(&d.w);
    path = xasprintf("%s/case_%d.safetensors", argv[1], i);
    dump_write(&d, path);
    free(path);
    op_case_free(&d.w.c);
  }
  return 0;
}
