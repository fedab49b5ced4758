// From what was recorded to what can be bound and replayed.
#ifndef TESSERA_COMPILE_H
#define TESSERA_COMPILE_H

#include "model/program/program.h"

// Schedules, lays out the arena, derives the waits. The program is fixed from here on.
void program_finish(Program *p);
#endif
