#include "data/tokenizer_samples.h"

#include <stdlib.h>

typedef struct Texts {
  const char **text; // [n], the sources'
  size_t *bytes;     // [n]
  int64_t n, room;
} Texts;

static void texts_add(Texts *t, const Sample *sample) {
  for (int k = 0; k < sample->parts; k++) {
    const SamplePart *s = &sample->part[k];
    if (s->kind != PART_TEXT) continue;
    if (t->n == t->room) {
      t->room = t->room ? 2 * t->room : 1024;
      t->text = xrealloc(t->text, (size_t)t->room * sizeof *t->text);
      t->bytes = xrealloc(t->bytes, (size_t)t->room * sizeof *t->bytes);
    }
    t->text[t->n] = s->text;
    t->bytes[t->n++] = s->text_bytes;
  }
}

Tokenizer *tokenizer_train_samples(Source *const *source, int sources, double held_out, int vocab, Error *err) {
  Texts texts = {0};
  for (int s = 0; s < sources; s++)
    for (int64_t i = 0; i < source_count(source[s]); i++) {
      const Sample *sample = source_sample(source[s], i);
      if (!sample_is_held_out(sample->group, held_out)) texts_add(&texts, sample);
    }
  Tokenizer *tokenizer = tokenizer_train(texts.text, texts.bytes, texts.n, vocab, err);
  free(texts.text);
  free(texts.bytes);
  return tokenizer;
}
