// A tiny engine on the CPU for tests of what uses a trained model: its weights are random, its parts can be rigged.
#ifndef TESSERA_ENGINE_CASE_H
#define TESSERA_ENGINE_CASE_H

#include "data/image.h"
#include "data/tokenizer.h"
#include "trainer/engine.h"

enum { PATCH = 4, P = 3 * PATCH * PATCH, VOCAB = 300 };

typedef struct World {
  Config config;
  Backend backend; // the CPU's, with ops a test may replace
  Engine engine;
  Tokenizer *tokenizer;
} World;

// Packs of `slots` slots and at most `max_images` images. Asserts: for cmocka tests.
void world_open(World *w, int slots, int max_images);
void world_close(World *w);
// The image head answers `value` everywhere.
void world_rig_image(World *w, real value);
// Random pixels, rows x columns patches.
Image image_random(int rows, int columns, uint64_t seed);
#endif
