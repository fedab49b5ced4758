#include "model/config/config.h"

char *config_run_folder(const Config *c) {
  return c->run.folder[0] ? xstrdup(c->run.folder) : xasprintf("%s/%s", c->run.dir, c->run.name);
}

int config_max_image_tokens(const Config *c) {
  int side = c->data.image_size / c->model.patch;
  return c->data.max_image_tokens ? c->data.max_image_tokens : side * side;
}

int config_max_text(const Config *c) {
  return c->data.max_text ? c->data.max_text : c->data.micro_batch_tokens;
}

int config_max_document(const Config *c) {
  return c->data.max_document ? c->data.max_document : config_max_text(c);
}

int config_max_images(const Config *c) {
  if (c->data.max_images) return c->data.max_images;
  int tokens = config_max_image_tokens(c);
  if (c->data.image_mode == IMAGE_ASPECT) tokens = (tokens + 1) / 2;
  return c->data.micro_batch_tokens / (tokens + 1);
}

SaveCopy config_save_copy(const Config *c) {
  return c->checkpoint.copy == COPY_AUTO && !c->checkpoint.every ? COPY_NEVER : c->checkpoint.copy;
}

int config_shards(const Config *c) {
  return c->parallel.zero && c->processes > 1 ? c->processes : 1;
}

int config_gradient_shards(const Config *c) {
  return c->parallel.zero == 2 ? config_shards(c) : 1;
}
