#include "trainer/forward.h"

#include <stdlib.h>

PackRoom forward_room(const Engine *e) {
  return (PackRoom){
      .slots = e->slots, .text = (int)min_i64(config_max_text(e->config), e->slots), .images = e->segments - 1};
}

static void forward_pack_reserve(ForwardPack *p, size_t block_bytes, int docs) {
  if (block_bytes > p->block_bytes) {
    free(p->block);
    p->block = aligned_alloc(64, block_bytes); // batch_bind rounds every array to 64
    if (!p->block) panic("out of memory: a pack of %zu bytes", block_bytes);
    p->block_bytes = block_bytes;
  }
  if (docs > p->doc_capacity) {
    p->doc_capacity = docs;
    p->text = xrealloc(p->text, ((size_t)docs + 1) * sizeof *p->text);
    p->segment = xrealloc(p->segment, ((size_t)docs + 1) * sizeof *p->segment);
  }
}

int forward_pack_fill(ForwardPack *p, const Engine *e, Mode mode, const Document *const *docs, int n, uint64_t seed,
                      Error *err) {
  int vocab = e->config->model.vocab, count = 0;
  PackRoom whole = forward_room(e), left = whole;
  DocumentSize size = document_size(docs[0], vocab);
  if (!pack_room_fits(left, size))
    return error_set(err, "raise data.micro_batch_tokens (--tokens), data.max_text or data.max_images",
                     "a document of %d text tokens and %d images, %d tokens in all, does not fit: there is room for "
                     "%d, %d and %d",
                     size.text, size.images, size.slots, whole.text, whole.images, whole.slots);
  for (; count < n && pack_room_fits(left, size); count++) {
    left = pack_room_left(left, size);
    if (count + 1 < n) size = document_size(docs[count + 1], vocab);
  }

  const ForwardProgram *f = engine_forward(e, mode, whole.slots - left.slots, whole.images - left.images);
  if (!f) return error_set(err, NULL, "no forward-only program for a pack of %d tokens", whole.slots - left.slots);
  BatchShape shape = dims_batch_shape(&f->m.program->dims);
  forward_pack_reserve(p, batch_bind(&p->batch, shape, NULL), count);
  batch_bind(&p->batch, shape, p->block);
  if (pack_layout(docs, count, shape, &p->batch, err) != 0) return -1;
  pack_scale(&p->batch, shape, 1, 1, 1, 1, seed); // no gradients: of this only the seed matters
  p->program = f;
  p->docs = count;
  p->text[0] = 0;
  p->segment[0] = 1;
  for (int i = 0; i < count; i++) {
    size = document_size(docs[i], vocab);
    p->text[i + 1] = p->text[i] + size.text;
    p->segment[i + 1] = p->segment[i] + size.images;
  }
  return count;
}

void forward_pack_free(ForwardPack *p) {
  free(p->block);
  free(p->text);
  free(p->segment);
  *p = (ForwardPack){0};
}

int forward_check_tokenizer(const Engine *e, const Tokenizer *t, Error *err) {
  if (tokenizer_vocab(t) == e->config->model.vocab) return 0;
  return error_set(err, "use the tokenizer the model was trained with, or set model.vocab",
                   "the tokenizer has %d ids, the model %d", tokenizer_vocab(t), e->config->model.vocab);
}
