// The program: tensors and ops recorded by the model, placed in one arena, given their waits, and replayed every step.
//
//   record   program_op() appends ops; program_need() is how the backward pass asks for a saved activation
//   schedule reloads move earlier, offloaded ranges live on a little longer            (program_finish, in this order)
//   arena    lifetimes over op order -> an offset for every tensor, exact peak         (arena.c)
//   waits    what each op must wait for on other lanes, from overlaps of addresses     (waits.c)
//   replay   for each op: run it, or give it to its lane's queue; as a graph, once for all replays    (replay.c)
//
// Lanes are in order. Between lanes nothing is ordered but by waits, and waits follow from what ops read and write.
#ifndef TESSERA_PROGRAM_H
#define TESSERA_PROGRAM_H

#include "base/base.h"
#include "kernels/kernels.h"
#include "model/program/spaces.h"

typedef int32_t TensorId;
enum { NO_TENSOR = -1 };

// Activations the backward pass may ask for, one policy each per layer.
typedef enum Saved {
  SAVED_X,           // block input [T,C]: keep or offload only
  SAVED_NORM_STATS,  // mean, rstd [T] of both sites
  SAVED_H1,          // attention's input h [T,C]
  SAVED_QKV,         // before QK-norm [T,(H+2G)D]
  SAVED_QKV_ROTATED, // q, k, v in sequence order
  SAVED_ATTENTION,   // o [T,HD] and lse [H,T]
  SAVED_B1,          // attention branch o Wo [T,C]
  SAVED_X2,          // middle of the block [T,C]
  SAVED_H2,          // experts' input h [T,C]
  SAVED_ROUTER,      // logits, weights, route
  SAVED_SHARED_PRE,  // shared expert before its activation
  SAVED_EXPERT_PRE,  // experts before their activation
  SAVED_B2,          // expert branch [T,C]
  SAVED_COUNT
} Saved;
extern const char *const saved_name[SAVED_COUNT]; // "x", "norm_stats", "h1", ... as in memory.per_tensor

typedef enum Policy { POLICY_KEEP, POLICY_RECOMPUTE, POLICY_OFFLOAD, POLICY_COUNT } Policy;

typedef struct PolicyTable {
  int layers;
  uint8_t *of;               // [layers][SAVED_COUNT] Policy
  int64_t least_copy;        // bytes: what is smaller is kept where it would be offloaded
  const struct Costs *costs; // borrowed; what copies are scheduled by (schedule.h). NULL: nothing is known
  double slack;              // with costs: copies are reckoned to take 1 + slack times as long
} PolicyTable;

typedef struct Tensor {
  char name[48];
  Dtype dtype;
  Space space;
  int64_t count, bytes; // bytes rounded up to the arena's alignment is what it occupies
  int64_t offset;       // within its space
  int layer;            // -1: none
  int saved;            // Saved, or -1
  int producer;         // op that writes it, or -1
  int rebuild;          // index of the rebuild recipe that replaces its producer, or -1
  int first, last;      // op positions of its life, set by program_finish; -1: unused. Outputs live to n_ops
  int is_output;
} Tensor;

typedef struct Wait {
  int op; // index of the op, always earlier in recorded order and on another lane
} Wait;

typedef struct Op {
  OpKind kind;
  Lane lane;
  int layer; // -1: none
  TensorId in[OP_MAX_IN], out[OP_MAX_OUT];
  uint32_t acc; // bit i: out[i] is read as well (it accumulates)
  OpArgs args;
  int n_waits;
  Wait waits[LANE_COUNT];
  KernelCall call; // bound operands
} Op;

// Between the host and the device.
static inline int op_is_copy(const Op *op) {
  return op->lane == LANE_D2H || op->lane == LANE_H2D;
}

typedef struct Program Program;
typedef struct ProgramState ProgramState; // program_internal.h

struct Program {
  char name[32];
  const Backend *backend;
  Dims dims;
  PolicyTable policy; // borrowed
  Tensor *tensors;
  int n_tensors;
  Op *ops;
  int n_ops;
  int64_t arena_bytes, host_bytes; // exact, after program_finish
  int64_t live_bytes;              // the largest sum of live tensors: a lower bound of arena_bytes
  int fullest;                     // the op position at which they are alive
  int64_t scratch_bytes;           // the most that one of its ops uses
  int one_queue;                   // the other lanes' ops go to the compute lane's queue, in recorded order
  int update_share;                // multiprocessors of the update lane's ops beside the compute lane's (KernelCall)
  int use_graph;                   // replays launch a graph, captured at the first replay after program_bind
  int takes_pack;                  // its first op copies the staged pack to its place
  int shares_gradients;            // SPACE_GRADS is the arena's beginning, of which a layer's part may hold activations
                                   // until the first op of the layer's gradients; to be set before program_finish
  ProgramState *state;             // recorder's own: memo of rebuilt tensors, layer marks, capacities
  Batch batch;                     // live pack, bound
};

// The space whose bytes a tensor's are: shared gradients are the arena's.
static inline Space tensor_space(const Program *p, const Tensor *x) {
  return x->space == SPACE_GRADS && p->shares_gradients ? SPACE_ARENA : x->space;
}

// ---- record ----

// A new empty program. policy: [dims->L][SAVED_COUNT], borrowed until program_free; NULL: keep everything.
Program *program_new(const char *name, const Dims *dims, const Backend *backend, const PolicyTable *policy);
void program_free(Program *p);

// Whether one of its ops is a copy.
int program_has_copies(const Program *p);

// A tensor of the arena, `count` >= 0 elements. The name is for messages and the memory table.
TensorId program_tensor(Program *p, Dtype dtype, int64_t count, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
// A tensor of another space (not ARENA or HOST) at a byte offset. Asking again for the same (space, offset, dtype,
// count) returns the same tensor.
TensorId program_external(Program *p, Space space, int64_t offset, Dtype dtype, int64_t count, const char *name);

// All inputs, or all outputs, of an op in the table's order; NO_TENSOR where an optional one is absent.
typedef struct TensorList {
  const TensorId *of; // [n]
  int n;
} TensorList;
#define TENSORS(...)                                                                                                   \
  ((TensorList){(const TensorId[]){__VA_ARGS__}, (int)(sizeof((const TensorId[]){__VA_ARGS__}) / sizeof(TensorId))})

// Appends an op to the compute lane and returns its index, which program_finish may change. args NULL: zeros. The table
// says, with args, whether an output accumulates (op_accumulates), and whether the op reads the pack. Three bugs of the
// model code end in a panic that names op and operand: more or fewer operands than the table has, an absent one that is
// not optional, an output that is an input too.
int program_op(Program *p, OpKind kind, TensorList in, TensorList out, const OpArgs *args);
// The same on any lane.
int program_op_on(Program *p, Lane lane, OpKind kind, TensorList in, TensorList out, const OpArgs *args);

// Appends a copy of all of a tensor on any lane.
void program_copy(Program *p, Lane lane, TensorId from, TensorId to);

// Appends an op of the process group on all of a tensor of DT_REAL or F64, on the comm lane.
void program_collective(Program *p, OpKind kind, TensorId values);

// Ops and tensors recorded from here on belong to this layer (-1: none). A change of layer is a scheduling mark too:
// reloads move to the mark before (schedule.h).
void program_layer(Program *p, int layer);

// Declares that the backward pass may need t, under the policy of (current layer, saved); outside of layers it is kept.
// Called after t's producer was recorded: POLICY_OFFLOAD records the copy to the host slab here, on the d2h lane.
void program_save(Program *p, TensorId t, Saved saved);
// Says which op rebuilds tensors whose policy is recompute, in place of their producer: `kind` with inputs `in`; its
// output k rebuilds t_of_out[k]. Where t_of_out[k] is NO_TENSOR, an optional output is absent; any other is scratch of
// the shape that it has in the producer of a rebuilt tensor, which must then be of the same kind. A tensor in t_of_out
// with another policy is not rebuilt: its output is scratch.
void program_save_rebuild(Program *p, TensorList t_of_out, OpKind kind, TensorList in, const OpArgs *args);

// The tensor that the backward pass reads in place of t, recorded once per program:
//   kept, or saved nowhere   t itself
//   offloaded                its reload, recorded on the h2d lane
//   recomputed               the output of its producer, or of its rebuild recipe, recorded again with fresh outputs
// The inputs of what is recorded again go through program_need too; among them a layer's tensor that was never saved is
// recomputed, since nothing keeps it. Panics where an op to be recorded again accumulates or writes an external tensor.
TensorId program_need(Program *p, TensorId t);

// t is read after the replay: it lives to the end of the program.
void program_output(Program *p, TensorId t);
#endif
