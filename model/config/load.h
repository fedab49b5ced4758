// A Config from a file and the command line, and back to text.
#ifndef TESSERA_CONFIG_LOAD_H
#define TESSERA_CONFIG_LOAD_H

#include "model/config/config.h"

// Loads `path` (NULL: defaults only), then applies `sets` in order, each "key.path=value" with the value as JSON or as
// a bare word; checks everything, values that depend on one another included. 0, or -1 with *err naming the key path,
// the value, what is allowed and the nearest known key, or what became of a key of an older version, and *c undefined.
// Touches no file but `path`.
int config_load(Config *c, const char *path, const char *const *sets, int n_sets, Error *err);

// The key that a flag of the command line sets ("--steps" -> "train.steps"), NULL when it is not such a flag. Pass
// "KEY=VALUE" to config_load.
const char *config_flag_key(const char *flag);
// The key somebody means by a name: its path or the last part of it ("lr"), or words of its help ("learning-rate").
// NULL: none.
const char *config_key_meant(const char *name);

// The configuration as a JSON text with every key and the format's version, which loads back to the same values.
// malloc'd.
char *config_to_json(const Config *c);
// --print-config: every key, its value, and its origin (default, line of the file, flag).
void config_print(const Config *c, FILE *f);
// What `after` has other than `before`: "train.lr 0.003 -> 0.001, data.sources[0] text a.txt ->
// text b.txt", in the table's order; where a run lies (run.name, dir, folder) is left out. malloc'd, NULL: nothing.
char *config_changes(const Config *before, const Config *after);
// --help: the key table.
void config_help(FILE *f);
#endif
