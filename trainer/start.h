// Where the time goes between ./train and its first step.
#ifndef TESSERA_START_H
#define TESSERA_START_H

typedef enum StartPart {
  START_DEVICE,     // driver and context
  START_CHECKPOINT, // finding and checking one
  START_DATA,       // indices of the sources
  START_TOKENIZER,
  START_PLAN,    // recording the programs, laying out their memory
  START_MEMORY,  // allocation, pinning
  START_WEIGHTS, // initial values, or those of a checkpoint
  START_RUN,     // run folder, loader
  START_PACK,    // waiting for the first packs
  START_TIMES,   // of ops, measured
  START_LAUNCH,  // on a device with queues: loading kernels, capturing graphs
  START_PARTS
} StartPart;

typedef struct StartTimes {
  double last; // when the last part ended
  double seconds[START_PARTS];
  int ended;
} StartTimes;

void start_begin(StartTimes *s);
// What passed since the last mark was `part`.
void start_mark(StartTimes *s, StartPart part);
// The first step is under way: one line that names the parts, where a user would have noticed them.
void start_end(StartTimes *s);
#endif
