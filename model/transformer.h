// The model: records its forward and backward pass as programs.
#ifndef TESSERA_TRANSFORMER_H
#define TESSERA_TRANSFORMER_H

#include "model/config/config.h"
#include "model/params.h"
#include "model/program/planner.h"
#include "model/program/program.h"

typedef struct Model {
  const Config *config;
  const Backend *backend;
  ParamTable params;
} Model;

// What a program computes.
typedef enum Mode {
  MODE_TRAIN_FIRST, // forward and backward; gradients overwrite
  MODE_TRAIN_LATER, // likewise, gradients add to those of the micro-steps before
  MODE_EVAL,        // forward: nll and seg_error, noise from the evaluation stream
  MODE_DRAW,        // forward: xhat of image rows, z fed through SPACE_INPUT
  MODE_WRITE        // forward: logits of the rows with a target, which must be fewer than `segments`
} Mode;

// A recorded program and the tensors to read after its replay; NO_TENSOR where the mode has none.
typedef struct ModelProgram {
  Program *program;
  TensorId z;         // [T, P] noised patches, row order (train, eval)
  TensorId xhat;      // [T, P] predicted clean patches, row order (all but write)
  TensorId nll;       // [T] DT_REAL negative log likelihoods, row order (train, eval)
  TensorId seg_error; // [SEG] DT_REAL mean squared error of x^ (train, eval)
  TensorId logits;    // [SEG, V] DT_REAL, first n_target rows (write)
} ModelProgram;

// Records, schedules and places the program for packs of `slots` tokens and `segments` modulation rows. `policy` is
// borrowed (NULL: keep).
ModelProgram transformer_record(const Model *model, Mode mode, int slots, int segments, const PolicyTable *policy);

// The update: gradient norm and decision, AdamW, and with `ema` the moving average.
Program *update_record(const Model *model, int ema);
// GRAD_HASH of all gradients; *hash is its output [params.n].
Program *hash_record(const Model *model, TensorId *hash);

// Puts the EMA in the place of the weights, which lie aside in the gradients' slab until the program with `enter` 0
// puts them back, bit for bit. Only between steps: a step's first micro-step overwrites the gradients.
Program *ema_record(const Model *model, int enter);

// Training FLOPs of a step as the field counts them for MFU: 6 x active parameters per token + 12 L H D per allowed
// (query, key) pair; recomputation earns nothing.
double transformer_flops(const Config *c, double text_tokens, double image_tokens, double pairs);
#endif
