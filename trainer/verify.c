#include "trainer/verify.h"

#include "base/json.h"
#include "base/ranks.h"
#include "base/text_out.h"
#include "trainer/dump.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { REPLAYS = 3, FIRST = 0, SECOND = 1, THIRD = 2 };

// hash[replay]: of every parameter's gradient [params.n].
typedef struct Hashes {
  uint64_t *of[REPLAYS];
} Hashes;

static int differs(const Hashes *h, int param) {
  return h->of[FIRST][param] != h->of[SECOND][param];
}

// What hashes.json says; malloc'd.
static char *hashes_json(const Engine *e, const Hashes *h, int64_t step) {
  const ParamTable *p = &e->model.params;
  TextOut out;
  FILE *f = text_begin(&out);
  const char *between = "";
  fprintf(f, "{\"step\": %" PRId64 ", \"backend\": \"%s\", \"parameters\": {", step + 1, e->model.backend->name);
  for (int i = 0; i < p->n; i++) {
    if (!differs(h, i)) continue;
    fputs(between, f);
    json_write_string(f, p->of[i].name);
    fprintf(f, ": [\"%016" PRIx64 "\", \"%016" PRIx64 "\", \"%016" PRIx64 "\"]", h->of[FIRST][i], h->of[SECOND][i],
            h->of[THIRD][i]);
    between = ", ";
  }
  fputs("}}\n", f);
  return text_end(&out);
}

// What dump_step writes of one more replay, and the hashes of all three.
static int save_apart(Engine *e, const Batch *pack, Hashes *h, int64_t step, const char *folder, Error *err) {
  if (dump_step(e, &pack, 1, folder, err) != 0) return -1;
  engine_hash(e, h->of[THIRD]);
  char *path = xasprintf("%s/hashes.json", folder), *text = hashes_json(e, h, step);
  int bad = file_write(path, text, strlen(text), err);
  free(text);
  free(path);
  return bad;
}

// "block.0.wqkv, block.1.wo and 3 more".
static void name_parameters(const Engine *e, const Hashes *h, char *text, size_t size) {
  enum { NAMED = 3 };
  const ParamTable *p = &e->model.params;
  int n = 0;
  size_t at = 0;
  for (int i = 0; i < p->n; i++) {
    if (!differs(h, i) || n++ >= NAMED) continue;
    at += (size_t)snprintf(text + at, size - at, "%s%s", n > 1 ? ", " : "", p->of[i].name);
  }
  if (n > NAMED) snprintf(text + at, size - at, " and %d more", n - NAMED);
}

static int report(Engine *e, const Batch *pack, Hashes *h, int64_t step, const char *run, Error *err) {
  char names[3 * sizeof e->model.params.of[0].name + 64], *folder = xasprintf("%s/corrupted-%06" PRId64, run, step + 1);
  Error unsaved = {0};
  name_parameters(e, h, names, sizeof names);
  // Another replay would wait for processes that have found nothing, and go on.
  int alone = ranks_size() == 1, saved = alone && save_apart(e, pack, h, step, folder, &unsaved) == 0;
  if (alone && !saved) log_warn("what was computed is not saved apart: %s", unsaved.text);
  error_set(err,
            "nothing was updated by it. The hardware computed wrong, or a kernel has a race: test the device and its "
            "memory; --resume goes on from the newest checkpoint, which is from before this was seen",
            "step %" PRId64 ": a replay of its first micro-step gave other gradients on the %s: silent data corruption "
            "in %s%s%s",
            step + 1, e->model.backend->name, names, saved ? "; see " : "", saved ? folder : "");
  free(folder);
  return -1;
}

int verify_micro_step(Engine *e, const Batch *pack, int64_t step, const char *run, Error *err) {
  size_t bytes = (size_t)e->model.params.n * sizeof(uint64_t);
  Hashes h;
  for (int i = 0; i < REPLAYS; i++) h.of[i] = xcalloc(1, bytes);
  engine_hash(e, h.of[FIRST]);
  engine_run(e, &e->first, pack->dims, NULL);
  engine_hash(e, h.of[SECOND]);
  int bad = memcmp(h.of[FIRST], h.of[SECOND], bytes) != 0 ? report(e, pack, &h, step, run, err) : 0;
  for (int i = 0; i < REPLAYS; i++) free(h.of[i]);
  return bad;
}
