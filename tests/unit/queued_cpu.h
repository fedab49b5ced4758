// The CPU backend behind queues that behave as a GPU's: what is given to a lane runs later, lanes run against each
// other in a random order that only events limit, graphs are captured and launched. For tests of what the engine and a
// replay must order; one thread, no device.
#ifndef TESSERA_QUEUED_CPU_H
#define TESSERA_QUEUED_CPU_H

#include "kernels/kernels.h"

#include <stdint.h>

// What does not work, so that a test can see that it would notice.
typedef enum QueuedFault {
  FAULT_NONE,
  FAULT_WAIT,  // lanes do not wait for events
  FAULT_FINISH // the host does not
} QueuedFault;

// Forgets all queues and counts. Work given to a lane now and then makes some lane run on, as `seed` says.
void queued_cpu_start(uint64_t seed, QueuedFault fault);
// What does not work from here on.
void queued_cpu_fault(QueuedFault fault);
// From here on the lane runs only when no other can: what waits for it is waited for as long as may be. LANE_COUNT:
// none is held back. Returns how often it had to run since the last call, for the others could not.
int64_t queued_cpu_hold_back(Lane lane);
// Whose kernels ops run from here on: the CPU backend's, with others for the ops of a group.
void queued_cpu_group(const Backend *group);
// Runs everything, as a synchronization of the device does.
void queued_cpu_drain(void);

typedef struct QueuedCounts {
  int64_t allocations; // of device and pinned host memory
  int64_t captures, launches;
  int64_t uploads, downloads; // for which the host waits
  int64_t open_ranges;        // begun and not ended
  double seconds;             // its time: each item of a lane, when it runs, takes a millionth
} QueuedCounts;
QueuedCounts queued_cpu_counts(void);

extern const Backend backend_queued_cpu;

// Makes a backend store a weight as bf16 and a remainder, as a GPU does. Nothing can be computed with it.
void backend_store_bf16(Backend *b);
#endif
