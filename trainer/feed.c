#include "trainer/feed.h"

int feed_open(Feed *f, Engine *e, LoaderConfig config, const char *state, Error *err) {
  config.held = engine_packs_sent(e) + 1;
  *f = (Feed){.engine = e, .loader = loader_open(&config, state, err)};
  return f->loader ? 0 : -1;
}

// Gives back the packs that the device has: all but the last `keep`.
static void feed_give_back(Feed *f, int keep) {
  int taken = f->n > keep ? f->n - keep : 0;
  for (int i = 0; i < taken; i++) loader_release(f->loader, f->held[i]);
  for (int i = taken; i < f->n; i++) f->held[i - taken] = f->held[i];
  f->n -= taken;
}

double feed_next(Feed *f, Pack **pack, Error *err) {
  int sent = engine_packs_sent(f->engine);
  if (f->n > sent) {
    engine_await_packs(f->engine, false);
    feed_give_back(f, sent);
  }
  double waited = loader_next(f->loader, pack, err);
  if (waited >= 0) f->held[f->n++] = *pack;
  return waited;
}

void feed_close(Feed *f) {
  if (!f->loader) return;
  engine_await_packs(f->engine, true);
  feed_give_back(f, 0);
  loader_close(f->loader);
  *f = (Feed){0};
}
