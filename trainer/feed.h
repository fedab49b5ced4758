// The feed: packs from the loader to the device. A pack's memory goes back to the loader, which decodes the next ones
// into it, when the device has the pack and no sooner.
#ifndef TESSERA_FEED_H
#define TESSERA_FEED_H

#include "data/loader.h"
#include "trainer/engine.h"

enum { FEED_HELD = 2 };

typedef struct Feed {
  Loader *loader;
  Engine *engine;
  Pack *held[FEED_HELD]; // [n] handed out and not given back, the oldest first
  int n;
} Feed;

// Opens the loader, whose config's `held` is set here; its memory is that of the engine's backend. -1 with *err as
// loader_open.
int feed_open(Feed *f, Engine *e, LoaderConfig config, const char *state, Error *err);
// The next pack, for one engine_run: it is the caller's until the next feed_next or feed_close. Returns the seconds
// that the loader was waited for, or -1 with *err as loader_next.
double feed_next(Feed *f, Pack **pack, Error *err);
// Waits until the device has every pack, and closes the loader. Nothing to do for a zeroed feed.
void feed_close(Feed *f);
#endif
