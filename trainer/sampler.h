// The sampler: a caption becomes an image, an image becomes a caption. Both use the weights that engine_use_ema chose,
// and depend on (seed, index) of a sample, not on what else is sampled with it.
#ifndef TESSERA_SAMPLER_H
#define TESSERA_SAMPLER_H

#include "data/image.h"
#include "data/tokenizer.h"
#include "trainer/engine.h"

typedef struct SamplerOptions {
  SamplerKind kind;
  int steps;            // of the grid: uniform over t in [0, 1], or up to t_end and then to 1
  double t_end;         // no later time is given to the network
  double guidance;      // w of v_u + w (v_c - v_u); 1: the conditional velocity alone
  double guidance_from; // guidance acts for t in (guidance_from, 1); below it the velocity is the conditional one
} SamplerOptions;

// As the config's eval says. t_end "auto": .99 of the training times lie below, and at most 1 - t_floor, so that the
// last step is a whole jump to x^.
SamplerOptions sampler_options(const Config *c);

// Generates n images of grid.rows x grid.columns patches from their captions (cut to data.max_caption tokens; an empty
// one generates unconditionally). z starts as normals of (seed, image index, STREAM_SAMPLE) and follows v = (x^ - z) /
// max(1 - t, t_floor), with Heun's method and a last Euler step, or Euler's. out [n] is filled with new images (free
// with image_free). -1 with *err set, out untouched, when an image and its caption do not fit the engine, or when a
// signal asks to stop (trainer/signals.h).
int sampler_generate(Engine *e, const Tokenizer *t, const char *const *captions, int n, ImageGrid grid, uint64_t seed,
                     const SamplerOptions *options, Image *out, Error *err);

typedef struct WriterOptions {
  double temperature; // 0: the likeliest token
  double top_p;       // the smallest set of tokens with this probability is drawn from
  int max_tokens;     // of a caption; fewer where the engine has no room for more
} WriterOptions;

WriterOptions writer_options(const Config *c);

// Writes captions for n images, whose sides are multiples of the patch (image_fit). out [n] receives malloc'd strings.
// -1 with *err set, out untouched, when an image does not fit or a signal asks to stop.
int sampler_describe(Engine *e, const Tokenizer *t, const Image *images, int n, uint64_t seed,
                     const WriterOptions *options, char **out, Error *err);

// The next token from its logits [V] and u in (0, 1): eos or an id that stands for text, never bos, boi, eoi or an
// unused id. A logit that is not a number is never chosen while there is another.
int32_t sampler_choose(const float *logits, const Tokenizer *t, double temperature, double top_p, float u);
#endif
