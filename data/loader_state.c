#include "data/loader_state.h"

#include "base/json.h"
#include "base/text_out.h"

#include <stdio.h>
#include <string.h>

// {"pack":..,"given":..,"packs_per_step":..,"draw":..,"samples":[..],"drawn":[..],"pending":ORIGIN,"window":[ORIGIN..],
// "bad":[[source, image]..]} with ORIGIN = [source, piece, ordinal, draw]. All numbers stay below 2^53, which JSON
// readers keep exact.

// Far above any run; restoring a state takes time in proportion to it.
enum { MAX_PACKS_PER_STEP = 1 << 20 };

static void print_origin(FILE *f, const Origin *origin) {
  fprintf(f, "[%d,%d,%llu,%llu]", origin->source, origin->piece, (unsigned long long)origin->ordinal,
          (unsigned long long)origin->draw);
}

char *loader_state_print(const LoaderState *state) {
  TextOut out;
  FILE *f = text_begin(&out);
  const StreamState *stream = &state->stream;
  fprintf(f, "{\"pack\":%lld,\"given\":%lld,\"packs_per_step\":%lld,\"draw\":%llu", (long long)state->pack,
          (long long)state->given, (long long)state->packs_per_step, (unsigned long long)stream->draw);
  fprintf(f, ",\"samples\":[");
  for (int i = 0; i < state->sources; i++) fprintf(f, "%s%lld", i ? "," : "", (long long)state->samples[i]);
  fprintf(f, "],\"drawn\":[");
  for (int i = 0; i < state->sources; i++) fprintf(f, "%s%llu", i ? "," : "", (unsigned long long)stream->drawn[i]);
  fprintf(f, "],\"pending\":");
  print_origin(f, &stream->pending);
  fprintf(f, ",\"window\":[");
  for (int i = 0; i < stream->count; i++) {
    if (i) fputc(',', f);
    print_origin(f, &stream->window[i]);
  }
  fprintf(f, "],\"bad\":[");
  for (int64_t i = 0; i < state->bad.n; i++)
    fprintf(f, "%s[%d,%lld]", i ? "," : "", state->bad.of[i].source, (long long)state->bad.of[i].image);
  fprintf(f, "]}");
  return text_end(&out);
}

// A whole number in [low, 2^53]; -1 sets *bad.
static int64_t read_whole(const cJSON *item, int64_t low, bool *bad) {
  const double most = 9007199254740992.0;
  if (!cJSON_IsNumber(item) || !(item->valuedouble >= (double)low) || item->valuedouble > most ||
      item->valuedouble != (double)(int64_t)item->valuedouble) {
    *bad = true;
    return 0;
  }
  return (int64_t)item->valuedouble;
}

static int64_t read_field(const cJSON *object, const char *name, bool *bad) {
  return read_whole(cJSON_GetObjectItemCaseSensitive(object, name), 0, bad);
}

static Origin read_origin(const cJSON *item, bool *bad) {
  if (!cJSON_IsArray(item) || cJSON_GetArraySize(item) != 4) {
    *bad = true;
    return (Origin){.source = -1};
  }
  int64_t source = read_whole(cJSON_GetArrayItem(item, 0), -1, bad);
  int64_t piece = read_whole(cJSON_GetArrayItem(item, 1), 0, bad);
  if (source >= STREAM_SOURCES || piece > INT32_MAX) *bad = true;
  return (Origin){.source = (int)source,
                  .piece = (int)piece,
                  .ordinal = (uint64_t)read_whole(cJSON_GetArrayItem(item, 2), 0, bad),
                  .draw = (uint64_t)read_whole(cJSON_GetArrayItem(item, 3), 0, bad)};
}

static void read_bad_image(const cJSON *item, BadImages *list, bool *bad) {
  bool wrong = !cJSON_IsArray(item) || cJSON_GetArraySize(item) != 2;
  int64_t source = wrong ? 0 : read_whole(cJSON_GetArrayItem(item, 0), 0, &wrong);
  int64_t image = wrong ? 0 : read_whole(cJSON_GetArrayItem(item, 1), 0, &wrong);
  if (wrong || source >= STREAM_SOURCES)
    *bad = true;
  else
    bad_images_restore(list, (ImageId){(int)source, image});
}

int loader_state_parse(const char *text, LoaderState *state, Error *err) {
  *state = (LoaderState){0};
  cJSON *root = json_parse(text, strlen(text), "data state", JSON_PLAIN, err);
  if (!root) return -1;
  StreamState *stream = &state->stream;
  bool bad = !cJSON_IsObject(root);
  state->pack = read_field(root, "pack", &bad);
  state->given = read_field(root, "given", &bad);
  state->packs_per_step = read_field(root, "packs_per_step", &bad);
  stream->draw = (uint64_t)read_field(root, "draw", &bad);
  const cJSON *samples = cJSON_GetObjectItemCaseSensitive(root, "samples");
  const cJSON *drawn = cJSON_GetObjectItemCaseSensitive(root, "drawn");
  const cJSON *window = cJSON_GetObjectItemCaseSensitive(root, "window");
  const cJSON *bad_images = cJSON_GetObjectItemCaseSensitive(root, "bad");
  bad = bad || !cJSON_IsArray(samples) || !cJSON_IsArray(drawn) || !cJSON_IsArray(window) ||
        cJSON_GetArraySize(samples) > STREAM_SOURCES || cJSON_GetArraySize(drawn) != cJSON_GetArraySize(samples) ||
        cJSON_GetArraySize(window) > STREAM_WINDOW || state->given > state->packs_per_step ||
        state->packs_per_step > MAX_PACKS_PER_STEP || (bad_images && !cJSON_IsArray(bad_images));
  if (!bad) {
    stream->pending = read_origin(cJSON_GetObjectItemCaseSensitive(root, "pending"), &bad);
    const cJSON *item;
    cJSON_ArrayForEach(item, samples) state->samples[state->sources++] = read_whole(item, 1, &bad);
    int sources = 0;
    cJSON_ArrayForEach(item, drawn) stream->drawn[sources++] = (uint64_t)read_whole(item, 0, &bad);
    cJSON_ArrayForEach(item, window) stream->window[stream->count++] = read_origin(item, &bad);
    cJSON_ArrayForEach(item, bad_images) read_bad_image(item, &state->bad, &bad);
  }
  cJSON_Delete(root);
  if (!bad) return 0;
  bad_images_free(&state->bad);
  return error_set(err, "the checkpoint was changed, or written by another version", "the data state is not one");
}
