#include "trainer/start.h"

#include "base/base.h"

#include <stdio.h>

static const double noticed = 2, named = 0.05; // seconds

static const char *const part_name[START_PARTS] = {[START_DEVICE] = "opening the device",
                                                   [START_CHECKPOINT] = "checking the checkpoint",
                                                   [START_DATA] = "indexing data",
                                                   [START_TOKENIZER] = "tokenizer",
                                                   [START_PLAN] = "planning",
                                                   [START_MEMORY] = "allocating memory",
                                                   [START_WEIGHTS] = "weights",
                                                   [START_RUN] = "run folder and loader",
                                                   [START_PACK] = "first pack",
                                                   [START_TIMES] = "timing ops",
                                                   [START_LAUNCH] = "loading kernels and capturing graphs"};

void start_begin(StartTimes *s) {
  *s = (StartTimes){.last = time_now()};
}

void start_mark(StartTimes *s, StartPart part) {
  double now = time_now();
  s->seconds[part] += now - s->last;
  s->last = now;
}

void start_end(StartTimes *s) {
  char text[512] = "";
  double total = 0;
  size_t n = 0;
  for (int p = 0; p < START_PARTS; p++) total += s->seconds[p];
  s->ended = 1;
  if (total < noticed) return;
  for (int p = 0; p < START_PARTS; p++)
    if (s->seconds[p] >= named)
      n += (size_t)snprintf(text + n, sizeof text - n, "%s %s %.1f", n ? "," : ":", part_name[p], s->seconds[p]);
  log_info("the first step begins after %.1f s%s", total, text);
}
