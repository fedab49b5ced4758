// What the tests of the data side share: a folder of captioned images of many sizes, texts from one byte to 400, and
// interleaved stories, opened as three sources. All of it asserts: it is for cmocka tests.
#ifndef TESSERA_DATA_CASE_H
#define TESSERA_DATA_CASE_H

#include "data/loader.h"

#include <stdio.h>

enum { IMAGES = 40, TEXTS = 25, STORIES = 12, PATCH = 4, VALUES = 3 * PATCH * PATCH, VOCAB = 300 };

typedef struct Data {
  char folder[64];
  Source *source[3]; // captioned, text, stories
  Tokenizer *tokenizer;
} Data;

// A group's set-up and tear-down: *state is a Data.
int data_make(void **state);
int data_remove(void **state);
// Opens folder/name for writing.
FILE *data_file(const char *folder, const char *name);

// Memory for a loader's packs, as host_alloc; free releases it.
void *pack_alloc(size_t bytes);
// All three sources in packs of 256 slots, three a step.
LoaderConfig data_config(Data *d);
Loader *open_loader(const LoaderConfig *config, const char *state);
Pack *next_pack(Loader *loader);
#endif
