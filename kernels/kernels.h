// The contract between the program and its backends: every op once, with its formula, operands and shapes.
//
// kernels/cpu is the specification, in type `real`: float, or double when built with -DTESSERA_REAL=double. What is
// tuned there stands in kernels/cpu/reference as plain loops too. kernels/cuda is the fast one. An op is pure: it reads
// in[], writes every element of out[] it is said to write, and nothing else. Outputs that the table (op_table.h) marks
// are the exception: gradients and ADD's dst are added to with args.accumulate and overwritten without it; metrics are
// always added to; ADAMW and EMA update theirs in place.
//
// Shapes: T token slots, C dim, H query heads, G kv heads, D head_dim, P = 3p^2 patch elements, V vocab, Z cond_dim,
// L layers, M = 6CL + 2C columns of the modulation table, SEG its rows (capacity); for each modality m: E_m experts of
// width F_m, K_m of them per token, shared expert of width S_m. Kmax = max K_m.
//
// Row extents. n_text, n_image, n_segments come from batch->dims. Filler rows [n_text + n_image, T) of every [T, .]
// output are written as zeros. "Two-sided" buffers hold both modalities at different widths: with R_m rows a token and
// width W_m, the text view is [T R_0, W_0] from the front of the buffer and the image view [T R_1, W_1] ending at its
// end, of T * max(R_0 W_0, R_1 W_1) elements (two_sided_size, two_sided_base). Row r's entries are rows r R_m .. (r+1)
// R_m - 1 of its modality's view, so the used parts never meet. With equal widths and R = 1 it is an ordinary [T, W].
#ifndef TESSERA_KERNELS_H
#define TESSERA_KERNELS_H

#include "base/base.h"
#include "kernels/op_table.h"

#include <stddef.h>

// DT_ACT: activations and weights as the backend stores them (CPU: real; CUDA: bf16). DT_REAL: fp32 (CPU: real).
// DT_MOMENT: Adam's moments, as DT_REAL or as bf16 (moments.h).
typedef enum Dtype { DT_ACT, DT_REAL, DT_I32, DT_U8, DT_F64, DT_MOMENT, DT_COUNT } Dtype;

// Columns that a flow time becomes: cosines, then sines, of half as many frequencies.
enum { TIME_FEATURES = 256 };

// Sizes shared by every op of a program.
typedef struct Dims {
  int T, C, H, G, D, P, V, Z, L;
  int M;        // 6CL + 2C
  int segments; // SEG
  int E[MODALITIES], F[MODALITIES], K[MODALITIES], S[MODALITIES];
} Dims;

static inline int dims_kmax(const Dims *d) {
  return d->K[TEXT] > d->K[IMAGE] ? d->K[TEXT] : d->K[IMAGE];
}
static inline BatchShape dims_batch_shape(const Dims *d) {
  BatchShape s = {d->T, d->segments, d->P, d->V};
  return s;
}

// Elements of a two-sided buffer, and where modality m's view begins in it.
static inline int64_t two_sided_size(int T, const int rows[2], const int width[2]) {
  int64_t a = (int64_t)T * rows[0] * width[0], b = (int64_t)T * rows[1] * width[1];
  return a > b ? a : b;
}
static inline int64_t two_sided_base(int T, const int rows[2], const int width[2], int m) {
  return m == TEXT ? 0 : two_sided_size(T, rows, width) - (int64_t)T * rows[1] * width[1];
}

// Where a router has sent the assignments (token, j), j < K_m, of both modalities. Slots are rows of the two-sided
// per-assignment buffers: text slots are 0 .. n_text K_0 - 1 of the text view, image slots n_text K_1 ..
// (n_text + n_image) K_1 - 1 of the image view. Within a modality slots are sorted by (expert, row), stable.
// Expert e of modality m is group g = m ? E_0 + e : e; its slots are [begin[g], begin[g] + count[g]).
typedef struct Route {
  int32_t *begin;              // [E_0 + E_1]
  int32_t *count;              // [E_0 + E_1]
  int32_t *slot;               // [T][Kmax] row, j -> slot in its modality's view; -1 where unused
  int32_t *source[MODALITIES]; // [T K_m] slot -> row * Kmax + j
} Route;

// Lays a Route out from `base` (NULL to measure); returns its size in int32 elements.
static inline int64_t route_bind(Route *r, const Dims *d, int32_t *base) {
  int64_t groups = d->E[0] + d->E[1], at = 0, T = d->T;
#define ROUTE_TAKE(field, n)                                                                                           \
  do {                                                                                                                 \
    r->field = base ? base + at : NULL;                                                                                \
    at += (n);                                                                                                         \
  } while (0)
  ROUTE_TAKE(begin, groups);
  ROUTE_TAKE(count, groups);
  ROUTE_TAKE(slot, T * dims_kmax(d));
  ROUTE_TAKE(source[TEXT], T * d->K[TEXT]);
  ROUTE_TAKE(source[IMAGE], T * d->K[IMAGE]);
#undef ROUTE_TAKE
  return at;
}

// Sums over a step, accumulated by ops in fp64 and read by the trainer once a step. `load` follows: [L][E_0 + E_1]
// assignments counted per expert.
typedef struct Metrics {
  double nll[2];     // summed negative log likelihood by target_kind
  double targets[2]; // rows in those sums
  double flow;       // sum of squared velocity errors over elements
  double flow_elems; // elements in that sum
  double balance, z; // router losses, as they enter the total: coefficients and scales applied
} Metrics;
// Not finite where one of the step's losses is not. Device code asks too.
#ifdef __CUDACC__
#define METRICS_FN static __host__ __device__ inline
#else
#define METRICS_FN static inline
#endif
METRICS_FN double metrics_losses(const Metrics *m) {
  return m->nll[0] + m->nll[1] + m->flow + m->balance + m->z;
}
static inline int64_t metrics_size(const Dims *d) { // in doubles
  return (int64_t)(sizeof(Metrics) / sizeof(double)) + (int64_t)d->L * (d->E[0] + d->E[1]);
}

// Scalars the host sets before each update.
typedef struct StepScalars {
  double lr, beta1, beta2, eps, weight_decay, clip; // clip 0: none
  double bias1, bias2;                              // 1 - beta1^t, 1 - beta2^t, t = updates applied, this one included
  double ema_decay;
  double norm_limit; // a step whose gradient norm is beyond it is skipped, 0: none
  double step;       // its number, by which moments in bf16 are rounded
} StepScalars;

// What GRAD_DECIDE found; ADAMW and EMA do nothing when `skip` is set.
typedef struct UpdateStatus {
  double norm;  // global gradient norm before clipping
  double scale; // what gradients are multiplied by
  int32_t skip; // a gradient or the loss is not finite, or the norm is beyond scalars->norm_limit
  int32_t bad;  // n_params: the loss itself is not finite; else the first parameter whose gradient is not; -1: none
} UpdateStatus;

// Where a macro of its own takes the rows of the table for their names (and pack, flops) alone.
#define OP_SKIP(...)
#define OP_LIST(OP) OP_TABLE(OP, OP_SKIP, OP_SKIP, OP_SKIP, OP_SKIP)

typedef enum OpKind {
#define OP_ENUM(name, ...) OP_##name,
  OP_LIST(OP_ENUM)
#undef OP_ENUM
      OP_COUNT
} OpKind;

enum { OP_MAX_IN = 9, OP_MAX_OUT = 5 };

// The operands of a call, by op and name: in.ADALN_FWD.x, in.EXPERT_UP_FWD.w1[m]; or all of them, in the table's order.
#define OPERAND_STRUCT(name, pack, flops, in, out)                                                                     \
  struct {                                                                                                             \
    in out                                                                                                             \
  } name;
#define INPUT(name, ...) const void *name;
#define INPUT_PAIR(name, ...) const void *name[MODALITIES];
#define OUTPUT(name, ...) void *name;
#define OUTPUT_PAIR(name, ...) void *name[MODALITIES];
typedef union OpInputs {
  const void *at[OP_MAX_IN];
  OP_TABLE(OPERAND_STRUCT, INPUT, INPUT_PAIR, OP_SKIP, OP_SKIP)
} OpInputs;
typedef union OpOutputs {
  void *at[OP_MAX_OUT];
  OP_TABLE(OPERAND_STRUCT, OP_SKIP, OP_SKIP, OUTPUT, OUTPUT_PAIR)
} OpOutputs;
#undef OPERAND_STRUCT
#undef INPUT
#undef INPUT_PAIR
#undef OUTPUT
#undef OUTPUT_PAIR
// Their number in at[].
#define IN_AT(op, name) (offsetof(OpInputs, op.name) / sizeof(void *))
#define OUT_AT(op, name) (offsetof(OpOutputs, op.name) / sizeof(void *))

// One call. Optional operands that are absent are NULL.
typedef struct KernelCall {
  OpInputs in;
  OpOutputs out;
  const Batch *batch; // the live pack; its pointers are device pointers of the backend
  const Dims *dims;
  const OpArgs *args;
  void *stream;  // the lane's queue on the device (CUDA: cudaStream_t); NULL on the CPU
  void *scratch; // kernel_scratch() bytes that is this op's alone while it runs, of any content
  int takes;     // of the device's multiprocessors it makes do with that many, since the compute lane has the others;
                 //   0: all are its own
  int leaves;    // so many of them another lane's op has: what would fill the device leaves them
} KernelCall;

typedef void (*KernelFn)(const KernelCall *call);

// Queues of work, each in order. Nothing is ordered between them but by events.
typedef enum Lane { LANE_COMPUTE, LANE_D2H, LANE_H2D, LANE_UPDATE, LANE_COMM, LANE_COUNT } Lane;

enum { SLAB_SLOTS = 4 };

// Events of a device's queues, by number. A program's replay uses those from EVENT_REPLAY on.
enum {
  EVENT_PACK_READY,                            // the staged pack has arrived; two, in turn
  EVENT_PACK_TAKEN = EVENT_PACK_READY + 2,     // it was copied to its place: the next may be staged
  EVENT_RESULTS,                               // what the host reads of a step has arrived; two, in turn
  EVENT_SLAB_FREE = EVENT_RESULTS + 2,         // what was given before reads or writes the slabs no more
  EVENT_SLAB_SENT,                             // a piece of a slab has arrived; SLAB_SLOTS, in turn
  EVENT_STAGED = EVENT_SLAB_SENT + SLAB_SLOTS, // a piece of one has arrived on the host; two, in turn
  EVENT_TIMED = EVENT_STAGED + 2,              // where what is being timed begins and ends
  EVENT_REPLAY = EVENT_TIMED + 2
};

typedef struct Queues {
  void *(*stream)(Lane lane);           // what KernelCall.stream is for ops of the lane
  void (*record)(Lane lane, int event); // the event: all that the lane was given so far has run
  void (*wait)(Lane lane, int event);   // what the lane is given from here on runs after the event
  void (*finish)(int event);            // the host waits for it; at once where it was never recorded
  double (*seconds)(int from, int to);  // between two events that have happened; waits for the second
  void (*range)(const char *name);      // begins a range for profilers (NVTX), or ends it (NULL)
  void (*capture_begin)(void);          // from here to capture_end nothing runs: it goes into a graph
  void *(*capture_end)(void);           // the graph
  void (*graph_launch)(void *graph);    // on the compute lane
  void (*graph_free)(void *graph);
  void (*overlap)(int on); // kernels of a lane may begin while the one before ends; NULL: none ever does
} Queues;

// Bytes of KernelCall.scratch that a call needs, at most, given sizes and arguments.
typedef size_t (*ScratchFn)(OpKind kind, const Dims *dims, const OpArgs *args);

// A way of computing an op, equal to the others within rounding; they are there to be compared with. The config chooses
// by word ("unfused"): all of a backend's rows that have it.
typedef struct KernelWay {
  OpKind op;
  const char *word;             // of a kernels.* key; NULL: what the op is computed with unless another is chosen
  KernelFn fn;                  // NULL: the op is recorded as those that it is made of
  ScratchFn scratch;            // NULL: none
  int host_waits;               // for the device, inside: it cannot be captured into a graph
  const char *(*missing)(void); // what it needs and this machine lacks, or NULL. NULL: it needs nothing
} KernelWay;

// What a device can do a second: the floor that ops are held against.
typedef struct DeviceRates {
  double bytes;       // of a large copy, read and written; 0: there was no room to measure it
  double flops;       // dense bf16, of a large product that goes on for a while
  int flops_measured; // with a library's product; 0: there is none, it is a share of the data sheet's
} DeviceRates;

// What copies between a device and large pinned memory of the host carry, in bytes a second of one direction.
typedef struct LinkRates {
  double d2h, h2d;           // alone
  double both_d2h, both_h2d; // while the other direction is busy too
  double latency;            // seconds that a copy takes besides
} LinkRates;

// What a process sends to the others of its group in a collective, while it receives as much.
typedef struct GroupRates {
  double reduce, gather; // bytes a second of a reduce-scatter, of an all-gather; 0: nothing is known
  double latency;        // seconds that a collective takes besides
  double drag;           // seconds that ops which were not timed beside one lose to each second of it
  int measured;          // in this group; 0: assumed
} GroupRates;

struct Config; // model/config/config.h
typedef struct Backend Backend;
struct Backend {
  const char *name;
  size_t dtype_bytes[DT_COUNT];
  int gradient_per_micro; // each micro-step forms its gradient from zero and adds it (bit-equal to reducing processes)
  int head_chunk;         // rows of logits at a time (HEAD_CE)
  int remainder_bytes;    // of a weight, beside its DT_ACT value: the two are its master. 0: DT_ACT is the master
  KernelFn fn[OP_COUNT];
  ScratchFn scratch[OP_COUNT]; // NULL: none
  const KernelWay *ways;       // [n_ways] beside those in fn and scratch
  int n_ways;
  int host_waits[OP_COUNT]; // of fn: KernelWay.host_waits
  // How it computes an op of these sizes, for the profile, into note [size]; empty where there is nothing to say. NULL:
  // never.
  void (*note)(const Backend *b, OpKind kind, const Dims *dims, const OpArgs *args, char *note, size_t size);
  // Masters [n] of weights, as DT_REAL, from what is stored of them and back, in host memory. Without remainders
  // (NULL) those nearest to the weights are read. NULL: DT_ACT is the master.
  void (*weights_read)(const void *weights, const void *remainders, int64_t n, void *masters);
  void (*weights_write)(const void *masters, int64_t n, void *weights, void *remainders);
  const Queues *queues; // NULL: an op has run when its function returns (CPU)
  // -1 with *err naming what of the config's model it cannot run. NULL: any model.
  int (*accepts)(const struct Config *c, Error *err);
  int (*open)(Error *err); // before anything below; with *err: -1 there is no such device, -2 it cannot be used
  // Connects the open device to those of the group's other processes (base/ranks.h), which all do so together: before
  // collectives, and before memory is planned, of which it takes some. -1 with *err. NULL: they need no connection.
  int (*join)(const struct Config *c, Error *err);
  void (*leave)(void);          // the reverse, when the programs that had collectives are gone
  const char *(*kernels)(void); // whose kernels compute (OpenBLAS's name, the GPU's): only equal ones give equal bits
  // Dense bf16 FLOPs a second by the open device's data sheet, which MFU is a share of. NULL: not known.
  double (*sheet_flops)(void);
  DeviceRates (*rates)(void); // measures the open device; NULL: nothing is known
  // Measures copies, with all queues empty; zeros where no device is open. NULL: there is no link.
  LinkRates (*link)(void);
  DeviceRates assumed; // of the device that plans are made for where none is open
  int multiprocessors; // of that device, which lanes share (KernelCall.takes); 0: they do not
  LinkRates assumed_link;
  GroupRates assumed_group;
  int64_t (*cache_bytes)(void); // of the open device, its last level (L2); NULL: not known
  int64_t (*memory)(void);      // bytes that a run may plan with
  int64_t (*in_use)(void);      // of the open device, taken since it was opened; NULL: not known
  int64_t alloc_unit;           // device memory is taken in multiples of it; what is below half of it shares them
  int64_t host_bytes_mapped;    // of host_alloc, for which the device's page tables take a byte; 0: it has none
  void *(*alloc)(size_t bytes); // device memory of any content, aligned to 256; NULL when there is not enough
  void (*release)(void *p);
  void *(*host_alloc)(size_t bytes); // memory of the host that copy lanes reach at full speed, likewise
  void (*host_release)(void *p);
  void (*upload)(void *device, const void *host, size_t bytes);   // in order with the ops of the compute lane
  void (*download)(void *host, const void *device, size_t bytes); // after all ops so far
  void (*clear)(void *device, size_t bytes);                      // to zeros, in order with the ops of the compute lane
};

// A row of the table. Of a pair the operands are named "w_0" and "w_1".
typedef struct OperandInfo {
  const char *name;
  OperandExtent extent;
  int marks; // OPTIONAL, ADDS_ALWAYS, ADDS_IF_ASKED
} OperandInfo;
typedef struct OpInfo {
  const char *name;
  PackUse pack;
  int n_in, n_out;
  OperandInfo in[OP_MAX_IN], out[OP_MAX_OUT];
} OpInfo;
extern const OpInfo op_info[OP_COUNT];

// Output `out` of such an op is added to rather than overwritten, so that it is read too.
static inline int op_accumulates(OpKind kind, int out, const OpArgs *args) {
  int marks = op_info[kind].out[out].marks;
  return marks & ADDS_ALWAYS || (marks & ADDS_IF_ASKED && args->accumulate);
}

// Takes the ways of that word into b's tables; returns how many ops there are of it.
int kernels_choose(Backend *b, const char *word);
// Scratch memory that a call needs.
size_t kernel_scratch(const Backend *b, OpKind kind, const Dims *dims, const OpArgs *args);

// Elements of a backend's DT_ACT or DT_REAL on the host, by their size (2: bf16, 4: float, 8: double), to float and
// back; to bf16 rounded to nearest, ties to even.
void floats_from(const void *elements, size_t element, int64_t n, float *out);
void floats_to(const float *x, size_t element, int64_t n, void *elements);
uint16_t bf16_from_float(float x);

// Copies bytes on a lane of a backend with queues.
void queue_copy(const Backend *b, Lane lane, void *to, const void *from, size_t bytes);

extern const Backend backend_cpu;
extern const Backend backend_cuda; // where the build has it (TESSERA_CUDA)
#endif
