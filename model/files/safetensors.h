// The safetensors format (https://github.com/huggingface/safetensors#format): u64 header length, a JSON header
// {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {string: string}}, then the data,
// little-endian, without holes. Reading trusts nothing in the file.
#ifndef TESSERA_SAFETENSORS_H
#define TESSERA_SAFETENSORS_H

#include "base/base.h"

#include <stdatomic.h>
#include <stdbool.h>

enum { SAFE_MAX_RANK = 8 };

typedef enum SafeDtype { SAFE_F32, SAFE_F64, SAFE_I32, SAFE_I64, SAFE_U8, SAFE_BF16, SAFE_DTYPES } SafeDtype;

typedef struct SafeTensor {
  const char *name;
  SafeDtype dtype;
  int rank;                     // 0 = a scalar
  int64_t shape[SAFE_MAX_RANK]; // [rank]
  const void *data;             // row-major; aligned to the element in files that safetensors_write wrote
} SafeTensor;

typedef struct SafePair {
  const char *key, *value;
} SafePair;

enum { SAFE_CHUNK = 32 << 20 }; // bytes of a tensor at a time

// Where the data comes from of tensors that are to be written and have none (data NULL): fill puts bytes [at, at + n)
// of tensor i into `out`, n at most SAFE_CHUNK and both multiples of the element's size.
typedef struct SafeSource {
  void (*fill)(void *context, int i, size_t at, size_t n, void *out);
  void *context;
  void *buffer; // [SAFE_CHUNK]
} SafeSource;

// What goes into a file.
typedef struct SafeContent {
  const SafeTensor *tensors; // [n]
  int n, n_metadata;
  const SafePair *metadata; // [n_metadata]
  const SafeSource *source; // NULL: every tensor has its data
} SafeContent;

// A file as it was written: its size and checksum (hash64).
typedef struct SafeSum {
  uint64_t bytes, hash;
} SafeSum;

// An open file; plain to read, freed as a whole.
typedef struct SafeFile {
  int n, n_metadata;
  SafeTensor *tensor; // [n], in the order of the header
  SafePair *metadata; // [n_metadata]
  struct SafeMap *map;
} SafeFile;

size_t safe_bytes(const SafeTensor *t); // elements times their size

// Maps a file and checks its header: length, JSON, dtypes, shapes (overflow included), and that the tensors cover the
// data exactly, without overlap or hole. NULL with *err set naming the file and the tensor. The names, strings and
// data of the result live until safetensors_close.
SafeFile *safetensors_open(const char *path, Error *err);
void safetensors_close(SafeFile *f);
// Gives back the address space of the tensors, which may be as scarce as memory (ulimit -v): their data can no longer
// be read here, its addresses only tell the order.
void safetensors_unmap_data(SafeFile *f);
// Its size, and where its first tensor's data begins.
uint64_t safetensors_size(const SafeFile *f);
uint64_t safetensors_header(const SafeFile *f);

// A tensor by name; NULL when there is none.
const SafeTensor *safetensors_find(const SafeFile *f, const char *name);

// The same with dtype and shape demanded: NULL with *err set saying what is there instead. rank < 0: any shape.
const SafeTensor *safetensors_get(const SafeFile *f, const char *name, SafeDtype dtype, int rank, const int64_t *shape,
                                  Error *err);

// Writes a file of n tensors with distinct names (UTF-8); wide dtypes come first, so that every tensor is aligned.
// `sync`: on the disk before it returns. 0, or -1 with *err set and no file left behind.
int safetensors_write(const char *path, const SafeTensor *tensors, int n, const SafePair *metadata, int n_metadata,
                      bool sync, Error *err);
// The same on the disk, with the sum of what was written. Ends early, -1 with *err, once *stop is set.
int safetensors_stream(const char *path, const SafeContent *content, const atomic_bool *stop, SafeSum *sum, Error *err);
#endif
