// What the tests of the CUDA backend share: operands in both backends' types, one call on both, and the comparison.
//
// A CudaCase is an OpCase (sizes, pack, host memory) beside a piece of device memory. Host operands are `real`, which
// must be float; where the device stores bf16 they hold numbers that bf16 has. Every operand on the device lies between
// guards. A call runs twice there, outputs, guards, scratch and unused parts of the inputs filled with one pattern the
// first time (NaN) and another the second time (large numbers), when it also has few of the multiprocessors: the
// results must have the same bits, and inputs and guards must be as they were.
#ifndef TESSERA_CUDA_CASE_H
#define TESSERA_CUDA_CASE_H

#include "tests/ops/op_case.h"

// `count` rows of `width` elements, from element `at` of an operand.
typedef struct Rows {
  int64_t at, count, width;
} Rows;

// An operand. DT_ACT and DT_REAL: `real` numbers on the host; other types as they are.
typedef struct Value {
  void *data; // NULL: absent
  Dtype dtype;
  int64_t count;
  int64_t held;          // elements in data: the others repeat them (value_repeated), and are only timed
  Rows rows[MODALITIES]; // what is compared; [1] is empty but for two-sided buffers
  double tolerance;      // of the relative norm
  int64_t zero_from;     // rows from this one on that should be zero must be exactly so
  int64_t used;          // elements the op must touch, for the benchmark's bytes
  bool fresh;            // an output that holds nothing before the call
  bool anything;         // an output whose content nobody reads
} Value;

// Tolerances: outputs in bf16 and gradients that pass through bf16 on their way, and everything else.
#define ACT_TOLERANCE 4e-3
#define UNFUSED_TOLERANCE 5e-3 // outputs in bf16 of kernels with further bf16 tensors between them
#define LOOP_TOLERANCE 8e-3    // likewise, and of a gradient that is made of one
#define REAL_TOLERANCE 1e-4
// No row's error may exceed this part of the root mean square of the rows' norms, or of its own norm where that is
// larger (the gradient of a frequent token has far larger rows than the others).
#define ROW_TOLERANCE 2e-2

// What the table says about an op.
typedef struct OpReport {
  int cases, failures;
  double error[OP_MAX_OUT]; // worst relative norm by output
  double row;               // worst row
  double seconds;
  char failure[400]; // the first one
} OpReport;

// In memory that processes share, so that it outlives one that crashes.
typedef struct Report {
  OpKind running;         // op on the device now, or OP_COUNT
  char what[240];         // shape and variant of its case
  bool crashed[OP_COUNT]; // such an op is not called again
  OpReport of[OP_COUNT];
} Report;

typedef struct CudaCase {
  OpCase ops;
  const Backend *backend; // backend_cuda, as it is or with another choice of kernels
  double act_tolerance;   // of outputs in bf16
  Report *report;
  const bool *wanted; // [OP_COUNT]
  bool bench;         // calls are timed instead of compared
  char what[240];
  size_t shape_length; // of `what`: the shape's name, before the variant
  char *slab;          // device memory for one call
  size_t slab_bytes;
} CudaCase;

// Names the case whose calls follow: the shape, and what distinguishes calls at one shape.
void cuda_case_shape(CudaCase *c, const char *shape);
void cuda_case_variant(CudaCase *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
// Whether to go on with a variant: the benchmark runs only those that training runs most.
bool cuda_case_wants(const CudaCase *c, bool typical);
// Releases the device memory; host memory is op_case_free's.
void cuda_case_close(CudaCase *c);

// ---- operands, owned by the case ----

float bf16_round(float x); // to nearest, ties to even
void value_round(Value v); // DT_ACT: to what bf16 has
static const Value none = {0};
Value value_random(CudaCase *c, Dtype type, int64_t rows, int64_t width, double std);
// A weight with `fan_in` inputs: products stay of order one.
Value value_weight(CudaCase *c, int64_t rows, int64_t width, int fan_in);
Value value_out(CudaCase *c, Dtype type, int64_t rows, int64_t width);
// A DT_REAL output that accumulates: something to add to, or nothing.
Value value_sum(CudaCase *c, int64_t rows, int64_t width, int accumulate);
// Two-sided buffers: `each` rows a token, of width[m] elements; random in the used rows, or empty (std 0). `fillers`:
// the rows of filler tokens are used too.
Value value_sided(CudaCase *c, Dtype type, const int each[MODALITIES], const int width[MODALITIES], double std,
                  bool fillers);
// Large operands that are only timed, random or (std 0) an output: the host holds the first few million elements.
Value value_repeated(CudaCase *c, Dtype type, int64_t count, double std);
Value value_bytes(CudaCase *c, const void *data, size_t bytes);
Value value_metrics(CudaCase *c);
Value value_copy(CudaCase *c, Value v);

// ---- calls ----

#define VALUES_IN(...) ((const Value[OP_MAX_IN]){__VA_ARGS__})
#define VALUES_OUT(...) ((Value[OP_MAX_OUT]){__VA_ARGS__})
#define ARGS(...) ((OpArgs){__VA_ARGS__})

// A call on the CPU with DT_ACT outputs (as out[] describes them) rounded, also where the contract makes one output of
// another, rounded one: AdaLN's norm of xnew, the experts' activation of pre.
void cpu_call_rounded(OpKind kind, const KernelCall *call, const Value *out);
// The same with operands of the case.
void cuda_case_cpu(const CudaCase *c, OpKind kind, OpArgs args, const Value *in, Value *out);
// The op on both backends, all outputs compared. `out` is left as it was.
void cuda_case_call(CudaCase *c, OpKind kind, OpArgs args, const Value *in, const Value *out);
// The same where the expected outputs are given (absent ones are not compared).
void cuda_case_expect(CudaCase *c, OpKind kind, OpArgs args, const Value *in, const Value *out, const Value *want);
// The parts of it: the op on the device, whose outputs come back in got[]; false when it is not to be called.
bool cuda_case_run(CudaCase *c, OpKind kind, OpArgs args, const Value *in, const Value *out, Value *got);
// The same of an op that one which is wanted is compared with, wanted or not.
bool cuda_case_part(CudaCase *c, OpKind kind, OpArgs args, const Value *in, const Value *out, Value *got);
// And the comparison of one output, under a name.
void cuda_case_judge(CudaCase *c, OpKind kind, int out, const char *name, const Value *got, const Value *want);
// Counts a failure of the present case; the first one's text is kept.
void cuda_case_fail(CudaCase *c, OpKind kind, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

// A call with its operands on the device, in one piece of memory. `call` is what the backend sees.
typedef struct Region {
  size_t at, bytes; // guard bytes follow, to the next region
} Region;
typedef struct DeviceCall {
  KernelCall call;
  OpKind kind;
  OpArgs args;
  const Value *in, *out;
  Batch batch;
  Region in_at[OP_MAX_IN], out_at[OP_MAX_OUT], pack, scratch;
  size_t bytes; // all of it
} DeviceCall;
// Lays the operands out; then fills an image of that memory with what the host's hold, where `poison` is in every byte
// that holds nothing, and gives the call the addresses it has from `base` on. operand_image: of one operand's elements
// that the host holds, in the device's type.
void device_call_plan(DeviceCall *d, const CudaCase *c, OpKind kind, const OpArgs *args, const Value *in,
                      const Value *out);
void operand_image(const Value *v, char *image);
void device_call_image(const DeviceCall *d, const CudaCase *c, int poison, char *image);
void device_call_bind(DeviceCall *d, const CudaCase *c, char *base);
#endif
