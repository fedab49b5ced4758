// The key table behind model/config/config.h: one row a key, and functions that read and write one value of a Config.
// For load.c, history.c, and train.c, which must know where run.folder came from.
//
// A change of the table that affects saved configs raises CONFIG_VERSION (model/config/history.h).
#ifndef TESSERA_CONFIG_KEYS_H
#define TESSERA_CONFIG_KEYS_H

#include "base/json.h"
#include "model/config/config.h"

// KEY_WAY: a KEY_ENUM whose words name ways of computing ops (KernelWay in kernels/kernels.h); by its preset, the
// first, they are computed as a backend does of itself.
typedef enum KeyType { KEY_INT, KEY_FLOAT, KEY_BOOL, KEY_STRING, KEY_ENUM, KEY_WAY, KEY_SOURCES, KEY_POLICIES } KeyType;

typedef struct Key {
  const char *path;
  KeyType type;
  size_t offset, bytes; // of the field; KEY_INT is 4 or 8 bytes
  const char *preset;   // default value, written as after --set
  double min, max;      // numbers; KEY_STRING: fewest characters
  // KEY_ENUM, KEY_WAY: values in order, "a|b"; KEY_STRING: all that is allowed; KEY_POLICIES: the policies; KEY_BOOL:
  // other names of false and true; numbers: a name for 0.
  const char *words;
  const char *flag; // of the command line
  const char *help;
} Key;

extern const Key config_keys[];
extern const int config_key_count;

// Where a value stands, for messages.
typedef struct Place {
  const char *file; // NULL: the command line
  const char *path; // of the key
} Place;
// "file:line" or "command line".
void place_text(const Place *place, const cJSON *item, char *out, size_t room);

// Stores a value; -1 with *err set when the key does not allow it.
int key_set(Config *c, const Key *key, const Place *place, const cJSON *item, Error *err);
// Writes the value as JSON.
void key_write(const Config *c, const Key *key, FILE *f);
// What the key allows, in words: "an integer from 1 to 8".
void key_allowed(const Key *key, char *out, size_t room);
#endif
