// A model: its sizes, its backend, its parameters; and what a recording of it gives.
#ifndef TESSERA_MODEL_H
#define TESSERA_MODEL_H

#include "model/config/config.h"
#include "model/params.h"
#include "model/program/program.h"

enum { UPDATE_PART = 1 << 24 }; // what models are made with: 64 MB of fp32

// What a step's first micro-step opens with, each bucket ahead of what reads it.
typedef enum Opening {
  OPEN_WEIGHTS,   // weights that were updated in shares come together
  OPEN_UPDATE,    // weights are updated by the gradients of the step before, and come together
  OPEN_UPDATE_EMA // their moving average is, too
} Opening;

typedef struct Model {
  const Config *config;
  const Backend *backend;
  ParamTable params;
  MemoryState state;   // what lies on the host (placement.h); STATE_AUTO as STATE_DEVICE
  int64_t kept;        // elements, the last ones, that stay on the device of what `state` names last: a multiple of 64
  int shard;           // which of config_shards is this process's
  Opening opening;     // of the programs that are recorded
  int64_t update_part; // elements that travel at once, at most, where state passes through the arena
} Model;

// What a program computes.
//
// A training micro-step's forward and backward pass has two bits. First of its step: its gradients overwrite, those of
// later ones add to them. Last of its step: what begins when a step's gradients exist begins in it.
typedef enum Mode {
  MODE_TRAIN_MIDDLE = 0,
  MODE_TRAIN_FIRST = 1,
  MODE_TRAIN_LAST = 2,
  MODE_TRAIN_ONLY = MODE_TRAIN_FIRST | MODE_TRAIN_LAST,
  MODE_EVAL,     // forward: nll and seg_error, noise from the evaluation stream
  MODE_GENERATE, // forward: xhat of image rows, z fed through SPACE_INPUT
  MODE_WRITE     // forward: logits of the rows with a target, which must be fewer than `segments`
} Mode;
static inline int mode_trains(Mode m) {
  return m < MODE_EVAL;
}
static inline int mode_is_last(Mode m) {
  return mode_trains(m) && m & MODE_TRAIN_LAST;
}
static inline int mode_is_first(Mode m) {
  return mode_trains(m) && m & MODE_TRAIN_FIRST;
}

// A recorded program and the tensors to read after its replay; NO_TENSOR where the mode has none.
typedef struct ModelProgram {
  Program *program;
  TensorId z;         // [T, P] noised patches, row order (train, eval)
  TensorId xhat;      // [T, P] predicted clean patches, row order (all but write)
  TensorId nll;       // [T] DT_REAL negative log likelihoods, row order (train, eval)
  TensorId seg_error; // [SEG] DT_REAL mean squared error of x^ (train, eval)
  TensorId logits;    // [SEG, V] DT_REAL, first n_target rows (write)
} ModelProgram;
#endif
