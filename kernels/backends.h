// The backends of this build: the one place outside of their own rooms that names them.
#ifndef TESSERA_BACKENDS_H
#define TESSERA_BACKENDS_H

#include "kernels/kernels.h"
#include "model/config/config.h"

// The backend for run.device, opened; "auto": the GPU where the build has its backend and the machine has one whose
// backend can run this model, else the CPU. NULL with *err where the named one cannot be used.
//
// Where several processes train as one, all call it, their devices are connected, and must be of one kind;
// backend_leave takes them apart again.
const Backend *backend_for_run(const Config *c, Error *err);
void backend_leave(void);
// The same for a plan: a device that the config names need not be there.
const Backend *backend_for_plan(const Config *c, Error *err);
// Connects the devices of a plan's processes, which all call it, so that they can be measured: 1; 0 where one is
// alone, where they have no devices and, with a message, where these cannot be connected. backend_leave as above.
int backend_join_for_plan(const Backend *b, const Config *c);
// Takes into b, a copy of a backend, the ways of computing ops and the type of the moments that the config chooses.
void backend_choose(Backend *b, const Config *c);
// Whether this machine has what they need: 0, or -1 with *err. Says which choices change nothing on this backend.
int backend_check_ways(const Backend *b, const Config *c, Error *err);
// The one that computes in host memory, for copies and for what the machine has.
const Backend *backend_of_host(void);
#endif
