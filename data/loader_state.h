// The loader's position as JSON text.
#ifndef TESSERA_LOADER_STATE_H
#define TESSERA_LOADER_STATE_H

#include "data/bad_images.h"
#include "data/stream.h"

// The stream at the beginning of a step, and how far into that step the packs have been handed out.
typedef struct LoaderState {
  int64_t pack;  // number of the step's first pack
  int64_t given; // packs of the step handed out, over all processes
  int64_t packs_per_step;
  int sources;
  int64_t samples[STREAM_SOURCES]; // training samples by source, to know the data by
  StreamState stream;
  BadImages bad; // of the steps begun
} LoaderState;

char *loader_state_print(const LoaderState *state); // malloc'd
// -1 with *err set on anything that loader_state_print does not write, state->bad empty; else that is the caller's to
// free. A state without bad images, as older versions wrote it, has none.
int loader_state_parse(const char *text, LoaderState *state, Error *err);
#endif
