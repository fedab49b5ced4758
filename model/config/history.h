// The config format's versions, and what to say of a config that another version wrote.
//
// Every config that the program writes carries CONFIG_VERSION as "tessera"; a file without it is taken as it is. The
// number is raised whenever the key table changes so that a saved config is affected: a key is added, renamed or
// removed, a value is removed, a default or a meaning changes. A key or value that is removed gets a row in
// config_former: a config that still has it is refused, and the message says what became of it. A key that is new takes
// its default in a run's older config, and config_new_keys names it.
//
//   1   run folders without "tessera"
//   2   "tessera"
//   3   flow.t_uniform, eval.t_end
//   4   flow.t_std is 1 where nothing is said (0.8 before), eval.t_end auto (1), which is the quantile .99 (.999)
//   5   memory.state, memory.host_gb
//   6   parallel.zero
//   7   memory.share_gradients
#ifndef TESSERA_CONFIG_HISTORY_H
#define TESSERA_CONFIG_HISTORY_H

#include "model/config/keys.h"

enum { CONFIG_VERSION = 7 };

// A key or a value that versions before `since` had.
typedef struct FormerKey {
  const char *path;    // of the key, or of a group of keys that is gone whole
  const char *value;   // the word that is gone from its values; NULL: the key itself is
  int since;           // the first version without it
  const char *now;     // what became of it: "it is train.lr now"
  const char *instead; // what to do: "write train.lr"
} FormerKey;

// All of them; the row after the last has no path.
extern const FormerKey config_former[];

// -1 with *err when `item` stands under a key, or is a value, of the table; 0 otherwise.
int former_refuse(const FormerKey *table, const Place *place, const cJSON *item, Error *err);

// Takes "tessera" out of the object of a whole config: 0 with its value in *version, 0 where it has none; -1 with *err
// when it is no version or that of a newer program. `file` is for messages.
int config_version_take(cJSON *root, const char *file, int *version, Error *err);

// The keys that a run's config.json of an older version does not have, with the defaults they took: "a.b=1 c.d=x".
// malloc'd; NULL when there are none.
char *config_new_keys(const Config *c);
#endif
