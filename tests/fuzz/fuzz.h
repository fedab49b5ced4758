// What the fuzz targets share. Each target is one file with one LLVMFuzzerTestOneInput: `make fuzz` links it with
// libFuzzer, tests/fuzz/replay.c links all of them with plain C and feeds them the corpus.
#ifndef TESSERA_FUZZ_H
#define TESSERA_FUZZ_H

#include "base/base.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// What must hold for every input.
#define FUZZ_CHECK(what) ((what) ? (void)0 : fuzz_fail(#what, __FILE__, __LINE__))
_Noreturn void fuzz_fail(const char *what, const char *file, int line);

// The path of `name` in a folder of this process, which goes when the process ends. Free with free().
char *fuzz_path(const char *name);
// Writes a file there and returns its path (free with free()).
char *fuzz_file(const char *name, const void *bytes, size_t n);

// A path under which the bytes can be read until the next call, without touching a disk.
const char *fuzz_memory(const void *bytes, size_t n);

// A small valid PNG, 9 x 7 pixels; free with free().
uint8_t *fuzz_png(size_t *n);

// Opens a source and, where it opens, checks all that source.h promises about its samples and reads every image.
void fuzz_source(const char *type, const char *path, const char *held_out_by);
#endif
