#include "model/program/expected.h"

#include <math.h>
#include <string.h>

// `of` becomes itself and `times` of another.
static void add(Extents *of, double times, const Extents *x) {
  of->text += times * x->text;
  of->image += times * x->image;
  of->segments += times * x->segments;
  of->targets += times * x->targets;
  of->pairs += times * x->pairs;
}

// Pairs of n tokens that see each other causally, and all of what stands before them.
static double causal_pairs(double n, double before) {
  return n * before + n * (n + 1) / 2;
}

// The three kinds of documents of captioned images (data/document.h), at their probabilities.
static Extents captioned_expected(const Config *c) {
  double image = config_max_image_tokens(c), caption = c->data.max_caption / 2.0;
  if (c->data.image_mode == IMAGE_ASPECT) image *= .75;
  const Extents generated = {caption + 2, image, 1, caption + 1,
                             causal_pairs(caption + 2, 0) + image * (caption + 2 + image)};
  const Extents unconditional = {2, image, 1, 1, causal_pairs(2, 0) + image * (2 + image)};
  const Extents described = {caption + 4, image, 1, caption + 2,
                             causal_pairs(2, 0) + image * (2 + image) + causal_pairs(caption + 2, 2 + image)};
  double share = c->data.caption_to_image, drops = c->data.cfg_drop;
  Extents mean = {0};
  add(&mean, share * (1 - drops), &generated);
  add(&mean, share * drops, &unconditional);
  add(&mean, 1 - share, &described);
  return mean;
}

Extents extents_expected(const Config *c, int slots) {
  enum { LONG_TEXT = 1024 };
  double n = fmin(config_max_document(c), LONG_TEXT), captioned = c->data.sources ? 0 : 1, texts = 0;
  const Extents text = {n, 0, 0, n - 1, causal_pairs(n, 0)}, image = captioned_expected(c);
  for (int i = 0; i < c->data.sources; i++)
    *(strcmp(c->data.source[i].type, "text") == 0 ? &texts : &captioned) += c->data.source[i].weight;
  Extents mean = {0}, pack = {0};
  add(&mean, captioned / (captioned + texts), &image);
  add(&mean, texts / (captioned + texts), &text);
  double documents = slots / (mean.text + mean.image);
  if (mean.segments > 0) documents = fmin(documents, config_max_images(c) / mean.segments);
  documents = fmin(documents, config_max_text(c) / mean.text);
  add(&pack, documents, &mean);
  return pack;
}
