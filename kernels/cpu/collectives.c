// Ops of the process group.
#include "kernels/cpu/cpu.h"

#include "base/base.h"
#include "base/ranks.h"
#include "kernels/group.h"

// Elements of a rank's share that travel at a time: bounds the memory that they travel through.
enum { SHARE = 1 << 16 };

static void copy(void *to, const void *from, size_t bytes, void *stream) {
  (void)stream;
  memcpy(to, from, bytes);
}

static void sum(const KernelCall *c, void *values, void (*collective)(const GroupTensor *)) {
  int64_t count = c->args->group.count, each = (count + ranks_size() - 1) / ranks_size();
  if (ranks_size() == 1) return;
  GroupTensor t = {.values = values,
                   .count = count,
                   .element = c->args->group.is_f64 ? sizeof(double) : sizeof(real),
                   .share = min_i64(each, SHARE),
                   .copy = copy};
  Scratch scratch = scratch_take((int64_t)group_room(t.element, t.share));
  t.room = scratch_own(&scratch);
  collective(&t);
}

void cpu_ALL_REDUCE(const KernelCall *c) {
  sum(c, c->out.ALL_REDUCE.values, group_all_reduce);
}

void cpu_REDUCE_SCATTER(const KernelCall *c) {
  sum(c, c->out.REDUCE_SCATTER.values, group_reduce_scatter);
}

// In place: what is only copied needs no room.
void cpu_ALL_GATHER(const KernelCall *c) {
  ranks_share(c->out.ALL_GATHER.values, (size_t)(c->args->group.count / ranks_size()) * sizeof(real));
}
