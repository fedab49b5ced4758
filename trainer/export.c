#include "trainer/export.h"

#include "base/json.h"
#include "base/text_out.h"
#include "data/document.h"
#include "model/files/checkpoint.h"

static void write_experts(FILE *f, const char *modality, const ExpertConfig *e) {
  fprintf(f,
          "  \"%s\": {\"num_experts\": %d, \"num_experts_per_tok\": %d, \"moe_intermediate_size\": %d, "
          "\"shared_expert_intermediate_size\": %d},\n",
          modality, e->experts, e->top_k, e->expert_dim, e->shared_dim);
}

char *export_config(const Config *c, const char *dtype) {
  SpecialIds id = special_ids(c->model.vocab);
  const struct {
    const char *name;
    int value;
  } sizes[] = {{"vocab_size", c->model.vocab},
               {"bos_token_id", id.bos},
               {"eos_token_id", id.eos},
               {"boi_token_id", id.boi},
               {"eoi_token_id", id.eoi},
               {"hidden_size", c->model.dim},
               {"num_hidden_layers", c->model.layers},
               {"num_attention_heads", c->model.heads},
               {"num_key_value_heads", c->model.kv_heads},
               {"head_dim", c->model.head_dim},
               {"condition_size", c->model.cond_dim},
               {"image_size", c->data.image_size},
               {"patch_size", c->model.patch},
               {"patch_bottleneck_size", c->model.patch_bottleneck},
               {"max_caption_tokens", c->data.max_caption}};
  TextOut out;
  FILE *f = text_begin(&out);
  fprintf(f,
          "{\n  \"model_type\": \"tessera\",\n  \"architectures\": [\"TesseraForConditionalGeneration\"],\n"
          "  \"tessera_version\": \"%d\",\n  \"torch_dtype\": \"%s\",\n",
          CHECKPOINT_FORMAT, dtype);
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    fprintf(f, "  \"%s\": %d,\n", sizes[i].name, sizes[i].value);
  write_experts(f, "text", &c->model.moe[TEXT]);
  write_experts(f, "image", &c->model.moe[IMAGE]);
  fprintf(f, "  \"attention_per_modality\": %s,\n  \"tie_word_embeddings\": %s,\n",
          c->model.attn_per_modality ? "true" : "false", c->model.tie_embeddings ? "true" : "false");
  fputs("  \"hidden_act\": \"silu\",\n  \"norm_eps\": 1e-06,\n  \"rope_theta\": 10000,\n  \"flow_time_floor\": ", f);
  json_write_number(f, c->flow.t_floor);
  fputs("\n}\n", f);
  return text_end(&out);
}
