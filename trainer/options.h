// The command line: everything that is not a key of the config.
#ifndef TESSERA_OPTIONS_H
#define TESSERA_OPTIONS_H

#include "base/base.h"

#include <stdbool.h>

typedef struct Options {
  char *config;      // a JSON file, or a run folder: its config and newest checkpoint
  const char **sets; // "key.path=value", in order: --set and the flags that stand for keys
  int n_sets;
  bool resume;          // newest valid checkpoint of the run, or step 0
  const char *from;     // resume from this checkpoint
  const char *init;     // weights of this checkpoint, everything else fresh
  int64_t stop_at;      // stop after this many steps and save; 0: train.steps
  const char *dump;     // folder for one step's packs, weights, losses and gradients
  const char *sample;   // caption to draw, "-": one per line of standard input
  int64_t count;        // drawings per caption
  const char *describe; // image file to caption
  const char *out;      // where drawings go: a .png file, or a folder (options_out_is_file)
  bool tokens_max;      // --tokens max: the largest micro-batch that the memory policy fits
  bool eval, plan, print_config, profile, help;
  const char *trace; // file for a Chrome trace
} Options;

// Parses argv. -1 with *err on an unknown flag, a missing value, or flags that exclude each other.
int options_parse(Options *o, int argc, char **argv, Error *err);
void options_free(Options *o);
// Whether --out names a file, by its ending, or a folder.
bool options_out_is_file(const char *out);
// Refuses, before any work is done and with nothing created, a path of --dump, --out or --trace that cannot be written.
// `run`: the run's folder, which training makes. -1 with *err naming flag, path and reason.
int options_check_outputs(const Options *o, const char *run, Error *err);
// The flags of --help; the key table follows it.
extern const char options_help[];
#endif
