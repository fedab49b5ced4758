// The configuration: one JSON file (comments allowed), every key in one table (keys.c) with its type, default,
// range and help. Loading, --set, flags, --print-config, --help and the saved config.json are loops over that table.
#ifndef TESSERA_CONFIG_H
#define TESSERA_CONFIG_H

#include "base/base.h"
#include "base/modality.h"

#include <stdbool.h>
#include <stdio.h>

enum {
  CONFIG_TEXT = 128,           // bytes of a name, its NUL included
  CONFIG_PATH = 1024,          // bytes of a path
  CONFIG_SOURCES = 16,         // most data sources
  CONFIG_PER_TENSOR = 16,      // most entries of memory.per_tensor
  CONFIG_MAX_PIXELS = 1 << 26, // of an image
  CONFIG_KEYS = 112,           // room for the origin of every key
};

typedef enum ImageMode {
  IMAGE_SQUARE, // shorter side to `size`, centre crop: [size, size]
  IMAGE_ASPECT, // aspect kept, both sides multiples of `patch`, at most `max_tokens` patches
} ImageMode;

// How documents are laid into the slots of a pack.
//   varlen   end to end, each with its own tokens
//   padded   each followed by padding up to the longest document of its pack: the baseline that varlen is measured
//            against. Padding is text without targets (document_pad), computed like any other.
typedef enum Packing { PACKING_VARLEN, PACKING_PADDED } Packing;

// What happens to activations that the backward pass needs.
typedef enum MemoryPolicy { MEMORY_AUTO, MEMORY_KEEP, MEMORY_RECOMPUTE, MEMORY_OFFLOAD } MemoryPolicy;
typedef enum MomentKind { MOMENTS_FP32, MOMENTS_BF16 } MomentKind;

// What of the optimizer's state lies in the host's memory and is streamed through the update; each has what those
// before it have. In the order of what they cost.
typedef enum MemoryState { STATE_AUTO, STATE_DEVICE, STATE_EMA, STATE_MOMENTS, STATE_GRADIENTS } MemoryState;
typedef enum DeviceKind { DEVICE_AUTO, DEVICE_CPU, DEVICE_CUDA } DeviceKind;
typedef enum SamplerKind { SAMPLER_HEUN, SAMPLER_EULER } SamplerKind;
// What a checkpoint that cannot be written does to the run.
typedef enum SaveError { SAVE_ERROR_STOP, SAVE_ERROR_CONTINUE } SaveError;
// Whether a checkpoint is copied to host memory, from where it is written while training goes on.
typedef enum SaveCopy { COPY_AUTO, COPY_ALWAYS, COPY_NEVER } SaveCopy;

// One data source: type and path as source_open takes them; weight is its share of the draws, > 0.
typedef struct SourceConfig {
  char type[16];
  char path[CONFIG_PATH];
  double weight;
} SourceConfig;

// The experts of one modality.
typedef struct ExpertConfig {
  int experts;    // E
  int expert_dim; // F
  int shared_dim; // S, 0 = no shared expert
  int top_k;      // k <= E
} ExpertConfig;

// An exception to memory.policy: one saved tensor in all layers, as policy_table_set takes it.
typedef struct TensorPolicy {
  char name[32];
  char policy[16];
} TensorPolicy;

// Where a value came from: > 0 the line of the file, otherwise one of these.
enum { ORIGIN_DEFAULT = 0, ORIGIN_FLAG = -1, ORIGIN_DERIVED = -2 };

typedef enum StreamKind { STREAMS_MULTI, STREAMS_SINGLE } StreamKind;
typedef enum UpdateKind { UPDATE_SEQUENTIAL, UPDATE_OVERLAPPED } UpdateKind;
typedef enum TileColumns { TILES_AUTO, TILES_128, TILES_256 } TileColumns;

// Plain data: may be copied and compared; nothing to free. Names as in the file.
typedef struct Config {
  struct {
    char name[CONFIG_TEXT];   // the run's folder is dir/name, see config_run_folder
    char dir[CONFIG_PATH];    //
    char folder[CONFIG_PATH]; // if not empty, the run's folder itself (--run-dir)
    int64_t seed;             // [0, 2^53]
    DeviceKind device;
    int threads; // compute threads, 0 = cores / local processes
  } run;
  struct {
    int dim, layers, heads, kv_heads, head_dim; // C, L, H, G, D
    int cond_dim;                               // Z
    int patch, patch_bottleneck;                // p; width of the linear bottleneck, 0 = none
    int vocab;                                  // V, at least 260
    bool attn_per_modality, tie_embeddings;
    ExpertConfig moe[MODALITIES]; // keys model.text.* and model.image.*
  } model;
  struct {
    int micro_batch_tokens; // T
    int image_size;         // pixels, a multiple of patch
    ImageMode image_mode;
    int max_image_tokens;          // image_mode aspect: most patches of an image, 0 = (image_size/patch)^2
    int64_t max_pixels;            // larger images are left out
    bool flip;                     // horizontal flip of half of the training images
    char tokenizer[CONFIG_PATH];   // path of a vocab.bpe; "train": learn V ids from the captions; "bytes": no merges
    double cfg_drop;               // probability that a caption-to-image document has no caption
    double caption_to_image;       // probability that a captioned image is generated rather than described
    double held_out;               // fraction of the samples held out
    char held_out_by[CONFIG_TEXT]; // "key", "caption" or a field of the sample
    int max_text;                  // text rows of a pack, 0 = T
    int max_images;                // image segments of a pack, 0 = see config_max_images
    int max_document;              // tokens of a text document, 0 = max_text
    int max_caption;               // tokens of a caption
    int cache_mb;                  // resized pixels kept in memory
    int max_bad;                   // images that cannot be decoded before the run is given up, 0 = no limit
    int sources;                   // how many of source[]
    SourceConfig source[CONFIG_SOURCES];
    int threads; // decode threads
  } data;
  struct {
    int steps;
    int micro_batches; // per step; from `batch` where that is given
    int64_t batch;     // tokens per step, 0 = T * micro_batches
    double lr;
    int warmup_steps;
    double decay_fraction; // of the steps; 0 = constant to the end
    double beta1, beta2;
    double weight_decay;
    double clip; // global norm, 0 = off
    MomentKind moments;
    double ema; // 0 = no EMA
    int ema_every;
    double ce_weight;
    int max_skipped;    // non-finite steps in a row before the run is given up
    double spike;       // a step is skipped whose gradient norm is beyond this times the median before it, 0 = off
    int spike_patience; // of them in a row before the run goes back to its newest checkpoint
    int spike_rewinds;  // how often it goes back before it is given up
    int verify_every;   // steps between replays whose gradients must have the same bits, 0 = never
  } train;
  struct {
    double t_mean, t_std, t_uniform, t_floor;
  } flow;
  struct {
    double balance, z;
    bool even; // experts in turn: to measure with
  } router;
  struct {
    int every;     // steps, 0 = only at the end
    int samples;   // images of the sample grid, 0 = none
    int documents; // held-out documents measured
    SamplerKind sampler;
    int sampler_steps;
    double t_end;                   // flow time the sampler jumps to x^ from, 0 = "auto"
    double guidance, guidance_from; // weight; smallest t at which it acts
    double temperature, top_p;      // of captions; temperature 0 = the most likely token
  } eval;
  struct {
    int every;          // steps, 0 = only at the end
    int keep_last;      // newest ones kept, at least 1
    int keep_every;     // those at multiples of this step are kept for good, 0 = none
    SaveCopy copy;      // auto: where the host has room
    SaveError on_error; // of any but the run's last one, whose failure is always an error
  } checkpoint;
  struct {
    MemoryPolicy policy;
    MemoryState state; // auto: what must, where activations' smallest need does not fit
    double budget_gb;  // 10^9 bytes, 0 = "auto": what the device has
    double host_gb;    // 10^9 bytes of pinned host memory, 0 = "auto": half of what the machine has left
    int per_tensors;   // how many of per_tensor[]
    TensorPolicy per_tensor[CONFIG_PER_TENSOR];
    bool share_gradients; // with the arena, in steps of one micro-batch
    bool arena;           // false: an allocation per tensor, so that sanitizers see every bound
  } memory;
  struct {
    int adaln, moe_gemm;           // ways of computing ops, by their number among the key's words (config_ways)
    TileColumns tiles[MODALITIES]; // of experts' products
    Packing packing;               // of training; packs of evaluation and sampling are varlen
    StreamKind streams;            // of the GPU, as are graph and pdl
    bool graph, pdl;
    UpdateKind update;
    int update_share; // multiprocessors of an overlapped one
  } kernels;          // what ablations switch
  struct {
    int zero;        // 0: every process has all of the optimizer's state, 1: a share of it, 2: of the gradients too
    int collectives; // a way of computing ops, by its number among the key's words
  } parallel;
  int processes;           // that train as one: those of the group (base/ranks.h)
  int version;             // "tessera" of the file, see model/config/history.h; 0 = it has none
  int origin[CONFIG_KEYS]; // by row of the key table
} Config;

// A key that chooses among ways of computing ops, and what was chosen.
typedef struct ConfigWay {
  const char *key; // "kernels.adaln"
  char word[24];   // "unfused"
  int is_own;      // as the backend computes them of itself
} ConfigWay;
enum { CONFIG_WAYS = 8 };
// All of them; returns how many there are.
int config_ways(const Config *c, ConfigWay ways[CONFIG_WAYS]);

// The run's folder: run.folder, else run.dir/run.name. malloc'd.
char *config_run_folder(const Config *c);
// Most tokens an image can have: (image_size/patch)^2, or data.max_image_tokens for aspect.
int config_max_image_tokens(const Config *c);
// data.max_text with 0 resolved to T, data.max_document with 0 resolved to that.
int config_max_text(const Config *c);
int config_max_document(const Config *c);
// data.max_images with 0 resolved: square: T / (tokens of an image + 1), which no pack exceeds, since every image has
// a boi; aspect: the same for images of half the cap. The modulation table has one row more.
int config_max_images(const Config *c);
// Processes that Adam's moments and the EMA are shared out to; 1: every one has all of them.
int config_shards(const Config *c);
// The same of the gradients.
int config_gradient_shards(const Config *c);
// checkpoint.copy, which is never where auto has nothing to gain: the only save is the one that ends the run.
SaveCopy config_save_copy(const Config *c);
#endif
