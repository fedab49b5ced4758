#include "trainer/overview.h"

#include "data/image.h"

#include <omp.h>
#include <stdlib.h>

enum {
  PROBED_SAMPLES = 256, // of each source whose texts are encoded
  PROBED_BYTES = 4096   // of a text
};

// One pass over all training samples.
typedef struct Epoch {
  int64_t samples, held_out, images;
  int64_t probed, cut; // captions looked at, and those of them that are longer than data.max_caption
  double tokens;       // about
} Epoch;

// Tokens of a text, by its beginning; a caption is cut as in training, and counted.
static double text_tokens(Epoch *epoch, const Config *c, const Tokenizer *t, const Sample *sample,
                          const SamplePart *text) {
  int32_t ids[PROBED_BYTES];
  size_t n = (size_t)min_i64((int64_t)text->text_bytes, PROBED_BYTES);
  double tokens = (double)tokenizer_encode(t, text->text, n, ids) * (double)text->text_bytes / (double)n;
  if (sample->kind != SAMPLE_CAPTIONED) return tokens;
  epoch->probed++;
  if (tokens <= c->data.max_caption) return tokens;
  epoch->cut++;
  return c->data.max_caption;
}

// Adds what one source has.
static void count_source(Epoch *epoch, const Config *c, const Source *source, const Tokenizer *t) {
  ImageFit fit = image_fit_of(c);
  int64_t n = source_count(source), every = n / PROBED_SAMPLES + 1, probed = 0, used = 0;
  double probed_tokens = 0;
  for (int64_t i = 0; i < n; i++) {
    const Sample *sample = source_sample(source, i);
    if (sample_is_held_out(sample->group, c->data.held_out)) {
      epoch->held_out++;
      continue;
    }
    bool probe = used++ % every == 0;
    probed += probe;
    epoch->tokens += 2; // bos, and eos or boi
    for (int k = 0; k < sample->parts; k++) {
      const SamplePart *s = &sample->part[k];
      if (s->kind == PART_IMAGE) {
        ImageGrid grid = image_fit_grid(&fit, s->width, s->height);
        epoch->images++;
        epoch->tokens += (double)grid.rows * grid.columns + 1; // eoi and one more where it is described, else none
      } else if (probe) {
        probed_tokens += text_tokens(epoch, c, t, sample, s);
      }
    }
  }
  epoch->samples += used;
  if (probed) epoch->tokens += probed_tokens / (double)probed * (double)used;
}

// 950, 12.3k, 4.56M, 7.89B
static const char *short_number(char text[16], double v) {
  static const char unit[] = "\0kMB";
  int u = 0;
  for (; v >= 999.5 && unit[u + 1]; u++) v /= 1000;
  if (u)
    snprintf(text, 16, "%.3g%c", v, unit[u]);
  else
    snprintf(text, 16, "%.0f", v);
  return text;
}

static void log_device(const Engine *e) {
  const Backend *b = e->model.backend;
  char *memory = engine_memory_text(e), *what;
  if (b->queues) {
    double rate = b->sheet_flops ? b->sheet_flops() : 0;
    what = rate > 0 ? xasprintf("%.0f TFLOP/s by its data sheet", rate / 1e12) : xstrdup("of unknown rate");
  } else {
    what = xasprintf("%d threads, OpenBLAS's %s kernels", omp_get_max_threads(), b->kernels());
  }
  log_info("device: %s, %s; memory: %s", b->name, what, memory);
  free(what);
  free(memory);
}

void overview_log(const Engine *e, Source *const *source, int sources, const Tokenizer *t, int64_t from, int64_t end) {
  const Config *c = e->config;
  Epoch epoch = {0};
  char a[16], b[16], d[16];
  for (int s = 0; s < sources; s++) count_source(&epoch, c, source[s], t);
  log_info("model: %s parameters, of which %s work on a text token, %s on an image token",
           short_number(a, (double)e->model.params.parameters), short_number(b, (double)params_active(c, TEXT)),
           short_number(d, (double)params_active(c, IMAGE)));
  log_info("data: %lld samples with %lld images, about %s tokens; held out: %lld samples", (long long)epoch.samples,
           (long long)epoch.images, short_number(a, epoch.tokens), (long long)epoch.held_out);
  if (c->router.even) log_warn("router.even: tokens go to experts in turn, whatever the routers learn");
  if (epoch.cut)
    log_warn("%lld of %lld captions looked at are longer than data.max_caption = %d tokens: training cuts them",
             (long long)epoch.cut, (long long)epoch.probed, c->data.max_caption);
  log_device(e);
  double step = (double)c->processes * c->train.micro_batches * e->slots;
  char *group = c->processes > 1 ? xasprintf("%d processes x ", c->processes) : xstrdup("");
  log_info("steps %lld to %lld of %d: %s%d x %d = %s token slots each, %.3g epochs in all", (long long)from + 1,
           (long long)end, c->train.steps, group, c->train.micro_batches, e->slots, short_number(a, step),
           c->train.steps * step / epoch.tokens);
  free(group);
  if (c->train.warmup_steps >= c->train.steps)
    log_warn("train.warmup_steps = %d is not over within the %d steps of the run: train.lr is never reached",
             c->train.warmup_steps, c->train.steps);
}
