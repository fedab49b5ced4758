// Signals that ask a run to end. The first one is only remembered: the run finishes its step, saves and closes
// everything, and then dies by that signal, so that a shell loop and a scheduler see what happened. SIGUSR1, which
// mpirun hands on and waits for, asks for nothing but an early end, and is none of failure.
#ifndef TESSERA_SIGNALS_H
#define TESSERA_SIGNALS_H

#include "base/base.h"

// From here on SIGINT, SIGTERM, SIGUSR1, SIGHUP and SIGPIPE are remembered, but for those that are ignored already: a
// job in the background, or under nohup. A second SIGINT or SIGTERM ends the process at once.
void signals_catch(void);
// The signal that came, 0: none.
int signals_stop(void);
// What takes long and may be left half done asks this on its way: -1 with *err once a signal came, else 0.
int signals_check(Error *err);
// Dies by the signal that came; returns where none did.
void signals_die(void);
#endif
