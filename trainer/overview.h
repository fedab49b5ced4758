// What a run is, in the few lines that it begins with.
#ifndef TESSERA_OVERVIEW_H
#define TESSERA_OVERVIEW_H

#include "data/source.h"
#include "data/tokenizer.h"
#include "trainer/engine.h"

// Logs model, data, device with memory, and steps `from` to `end`, and warns of a warm-up that outlasts the schedule.
// Tokens are estimates: texts are encoded of a few samples only.
void overview_log(const Engine *e, Source *const *source, int sources, const Tokenizer *t, int64_t from, int64_t end);
#endif
