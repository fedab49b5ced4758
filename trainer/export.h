// What a checkpoint says of itself to tools that know nothing of this program.
#ifndef TESSERA_EXPORT_H
#define TESSERA_EXPORT_H

#include "model/config/config.h"

// config.json beside model.safetensors, in the style of Hugging Face's transformers: model_type, architectures, sizes
// under the names they have there, ids of the special tokens, CHECKPOINT_FORMAT as tessera_version. Only what the
// weights depend on, so that equal weights give equal files. dtype: PyTorch's name of the weights' type. malloc'd.
char *export_config(const Config *c, const char *dtype);
#endif
