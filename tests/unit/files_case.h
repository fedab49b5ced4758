// What the tests of written files share: random numbers and tensors, whole files, and a process without rights. All of
// it asserts: it is for cmocka tests.
#ifndef TESSERA_TESTS_FILES_CASE_H
#define TESSERA_TESTS_FILES_CASE_H

#include "model/files/safetensors.h"

// Number i of a stream that `draw` and `stream` name.
uint32_t random_number(uint64_t draw, uint32_t stream, uint32_t i);

// The path of a file or folder inside another; the caller frees it.
char *path_in(const char *folder, const char *name);
void write_bytes(const char *path, const void *data, size_t n);
char *read_bytes(const char *path, size_t *n);
int entries(const char *path); // of a folder, hidden ones too

// Runs `test` in a child without root's rights, which may read `folder`: its exit code.
int as_nobody(const char *folder, int (*test)(void));

enum { MAX_TENSORS = 12 };
typedef struct Tensors {
  int n;
  SafeTensor t[MAX_TENSORS];
  char name[MAX_TENSORS][48];
} Tensors;

// Tensors of every dtype with random shapes: scalars, empty ones and odd sizes among them.
void tensors_random(Tensors *m, uint64_t draw, int max_dim);
void tensors_free(Tensors *m);
// Requires that a file holds just these.
void assert_same_tensors(const SafeFile *f, const Tensors *want);
// A value of a file's metadata; NULL when there is none.
const char *metadata_value(const SafeFile *f, const char *key);
#endif
