#include "tests/unit/queued_cpu.h"

#include "base/base.h"
#include "base/philox.h"
#include "kernels/cpu/cpu.h"
#include "kernels/master.h"

#include <stdlib.h>
#include <string.h>

enum { EVENTS = 1 << 14 };

// A record or a wait is of a version of its event: a wait is for the record that was the latest when it was queued.
typedef enum ItemKind { ITEM_OP, ITEM_RECORD, ITEM_WAIT, ITEM_GRAPH } ItemKind;

typedef struct Work Work;
typedef struct Item {
  ItemKind kind;
  OpKind op;
  KernelCall call; // as it was when queued, its args too
  OpArgs args;
  int event;
  int64_t version;
  Work *graph;
} Item;

typedef struct List {
  Item *of;
  int n, capacity, next; // next: the first that has not run
} List;

// Lanes with work, and how often each event was recorded, as queued and as run.
struct Work {
  List lane[LANE_COUNT];
  int64_t recorded[EVENTS], done[EVENTS];
};

static struct {
  Work work;
  Work *capture; // the graph that is being captured
  uint64_t seed, draws;
  QueuedFault fault;
  int favoured, held_back;    // held_back: 0 none, else the lane + 1
  int64_t forced;             // items of the lane held back that ran
  double clock, time[EVENTS]; // items run so far, and how many there were when an event was last recorded
  QueuedCounts counts;
  const Backend *group; // NULL: the CPU backend
} device;

static char lanes[LANE_COUNT]; // the addresses are the streams

static uint32_t draw(uint32_t below) {
  return philox4(device.seed, device.draws++, 0, 0).v[0] % below;
}

// ---- running ----

static void work_finish(Work *w);

static int item_ready(const Work *w, const Item *item) {
  return item->kind != ITEM_WAIT || device.fault == FAULT_WAIT || w->done[item->event] >= item->version;
}

static void item_run(Work *w, const Item *item) {
  device.clock++;
  if (item->kind == ITEM_OP) {
    KernelCall call = item->call;
    call.args = call.args ? &item->args : NULL;
    (device.group ? device.group : &backend_cpu)->fn[item->op](&call);
  } else if (item->kind == ITEM_RECORD) {
    w->done[item->event] = item->version;
    device.time[item->event] = device.clock;
  } else if (item->kind == ITEM_GRAPH) {
    Work *inner = item->graph;
    for (int l = 0; l < LANE_COUNT; l++) inner->lane[l].next = 0;
    memset(inner->done, 0, sizeof inner->done);
    work_finish(inner);
  }
}

// Runs the next item of some lane whose turn it may be; 0: there is none. A lane keeps its turn for a while, so that it
// sometimes runs far ahead of the others.
static int work_step(Work *w) {
  if (draw(4) == 0) device.favoured = (int)draw(LANE_COUNT);
  for (int i = 0; i < 2 * LANE_COUNT; i++) { // the second time round also the lane held back
    int number = (device.favoured + i) % LANE_COUNT, held_back = number + 1 == device.held_back;
    List *lane = &w->lane[number];
    if (lane->next == lane->n || !item_ready(w, &lane->of[lane->next]) || (held_back && i < LANE_COUNT)) continue;
    device.forced += held_back;
    item_run(w, &lane->of[lane->next++]);
    if (lane->next == lane->n && w == &device.work) lane->next = lane->n = 0; // a graph keeps what it has run
    return 1;
  }
  return 0;
}

static void work_finish(Work *w) {
  while (work_step(w)) {
  }
  for (int l = 0; l < LANE_COUNT; l++)
    if (w->lane[l].next != w->lane[l].n) panic("queued CPU: a lane waits for what never comes");
}

static void lane_finish(Lane lane) {
  List *l = &device.work.lane[lane];
  while (l->next != l->n)
    if (!work_step(&device.work)) panic("queued CPU: a lane waits for what never comes");
}

// ---- queueing ----

static Work *present_work(void) {
  return device.capture ? device.capture : &device.work;
}

static void push(Lane lane, Item item) {
  List *l = &present_work()->lane[lane];
  if (l->n == l->capacity) {
    l->capacity = 2 * l->capacity + 16;
    l->of = xrealloc(l->of, (size_t)l->capacity * sizeof *l->of);
  }
  l->of[l->n++] = item;
  if (device.capture || device.held_back || draw(3)) return; // all is given before a lane is the last to run
  for (uint32_t steps = draw(12); steps && work_step(&device.work); steps--) {
  }
}

static void push_op(OpKind op, const KernelCall *call) {
  if ((char *)call->stream < lanes || (char *)call->stream >= lanes + LANE_COUNT)
    panic("queued CPU: %s is in no lane", op_info[op].name);
  Item item = {.kind = ITEM_OP, .op = op, .call = *call};
  if (call->args) item.args = *call->args;
  push((Lane)((char *)call->stream - lanes), item);
}

#define QUEUED(name, ...)                                                                                              \
  static void queued_##name(const KernelCall *call) {                                                                  \
    push_op(OP_##name, call);                                                                                          \
  }
OP_LIST(QUEUED)
#undef QUEUED

static void *queue_stream(Lane lane) {
  return &lanes[lane];
}

static void queue_record(Lane lane, int event) {
  if (event >= EVENTS) panic("queued CPU: event %d", event);
  push(lane, (Item){.kind = ITEM_RECORD, .event = event, .version = ++present_work()->recorded[event]});
}

static void queue_wait(Lane lane, int event) {
  int64_t version = present_work()->recorded[event];
  if (device.capture && !version) panic("queued CPU: a captured lane waits for what was not captured");
  push(lane, (Item){.kind = ITEM_WAIT, .event = event, .version = version});
}

static void queue_finish(int event) {
  if (device.capture) panic("queued CPU: the host waits within a capture");
  while (device.fault != FAULT_FINISH && device.work.done[event] < device.work.recorded[event])
    if (!work_step(&device.work)) panic("queued CPU: event %d never comes", event);
}

static double queue_seconds(int from, int to) {
  queue_finish(from);
  queue_finish(to);
  return 1e-6 * (device.time[to] - device.time[from]);
}

static void queue_range(const char *name) {
  device.counts.open_ranges += name ? 1 : -1;
}

static void queue_capture_begin(void) {
  if (device.capture) panic("queued CPU: a capture within a capture");
  device.capture = xcalloc(1, sizeof *device.capture);
}

static void *queue_capture_end(void) {
  Work *graph = device.capture;
  device.capture = NULL;
  device.counts.captures++;
  return graph;
}

static void queue_graph_launch(void *graph) {
  device.counts.launches++;
  push(LANE_COMPUTE, (Item){.kind = ITEM_GRAPH, .graph = graph});
}

static void queue_graph_free(void *graph) {
  Work *work = graph;
  queued_cpu_drain();
  for (int l = 0; l < LANE_COUNT; l++) free(work->lane[l].of);
  free(work);
}

// ---- memory ----

// Filled with NaN bytes: nothing may be read before it is written.
static void *device_alloc(size_t bytes) {
  if (device.capture) panic("queued CPU: an allocation within a capture");
  device.counts.allocations++;
  void *p = backend_cpu.alloc(bytes);
  return p ? memset(p, 0xFF, bytes) : NULL;
}

static void device_release(void *p) {
  queued_cpu_drain();
  backend_cpu.release(p);
}

static void device_upload(void *to, const void *from, size_t bytes) {
  device.counts.uploads++;
  lane_finish(LANE_COMPUTE);
  memcpy(to, from, bytes);
}

static void device_download(void *to, const void *from, size_t bytes) {
  device.counts.downloads++;
  lane_finish(LANE_COMPUTE);
  memcpy(to, from, bytes);
}

static void device_clear(void *at, size_t bytes) {
  lane_finish(LANE_COMPUTE);
  memset(at, 0, bytes);
}

// ---- for tests ----

void queued_cpu_start(uint64_t seed, QueuedFault fault) {
  for (int l = 0; l < LANE_COUNT; l++) free(device.work.lane[l].of);
  memset(&device, 0, sizeof device);
  device.seed = seed;
  device.fault = fault;
}

void queued_cpu_fault(QueuedFault fault) {
  device.fault = fault;
}

int64_t queued_cpu_hold_back(Lane lane) {
  int64_t forced = device.forced;
  device.held_back = lane == LANE_COUNT ? 0 : (int)lane + 1;
  device.forced = 0;
  return forced;
}

void queued_cpu_group(const Backend *group) {
  device.group = group;
}

void queued_cpu_drain(void) {
  work_finish(&device.work);
}

QueuedCounts queued_cpu_counts(void) {
  QueuedCounts counts = device.counts;
  counts.seconds = 1e-6 * device.clock;
  return counts;
}

static const Queues queues = {.stream = queue_stream,
                              .record = queue_record,
                              .wait = queue_wait,
                              .finish = queue_finish,
                              .seconds = queue_seconds,
                              .range = queue_range,
                              .capture_begin = queue_capture_begin,
                              .capture_end = queue_capture_end,
                              .graph_launch = queue_graph_launch,
                              .graph_free = queue_graph_free};

static int64_t device_memory(void) {
  return backend_cpu.memory();
}

static int device_open(Error *err) {
  (void)err;
  return 0;
}

const Backend backend_queued_cpu = {
    .name = "queued cpu",
    .dtype_bytes = {[DT_ACT] = sizeof(real),
                    [DT_REAL] = sizeof(real),
                    [DT_I32] = 4,
                    [DT_U8] = 1,
                    [DT_F64] = 8,
                    [DT_MOMENT] = sizeof(real)},
    .gradient_per_micro = 1,
    .head_chunk = 256,
    .queues = &queues,
    .open = device_open,
    .kernels = blas_kernels,
    .assumed = {.bytes = 1e10, .flops = 1e11},
    .assumed_link = {.d2h = 1e9, .h2d = 1e9, .both_d2h = 8e8, .both_h2d = 8e8},
    .memory = device_memory,
    .alloc_unit = 1,
    .alloc = device_alloc,
    .release = device_release,
    .host_alloc = device_alloc,
    .host_release = device_release,
    .upload = device_upload,
    .download = device_download,
    .clear = device_clear,
    .fn =
        {
#define OP_ROW(name, ...) [OP_##name] = queued_##name,
            OP_LIST(OP_ROW)
#undef OP_ROW
        },
};

void backend_store_bf16(Backend *b) {
  b->dtype_bytes[DT_ACT] = sizeof(uint16_t);
  b->remainder_bytes = sizeof(uint16_t);
  b->weights_read = masters_join;
  b->weights_write = masters_split;
}
