// TensorBoard event files, written without its libraries. A file is a sequence of TFRecords
//
//   u64 length | u32 masked_crc32c(length) | payload [length] | u32 masked_crc32c(payload)      little-endian
//   masked_crc32c(x) = rotate_right(crc32c(x), 15) + 0xa282ead8
//
// each holding one Event in protocol buffer encoding. The field numbers are those of event.proto, summary.proto and
// histogram.proto of TensorBoard (https://github.com/tensorflow/tensorboard/tree/master/tensorboard/compat/proto).
#ifndef TESSERA_TENSORBOARD_H
#define TESSERA_TENSORBOARD_H

#include "base/base.h"

typedef struct EventWriter EventWriter;

// Begins a new event file in `folder`, named so that it sorts after those that are there, in which order TensorBoard
// reads them. Its first records say that the run (re)starts at `first_step`: whatever older files hold of this and
// later steps is superseded. NULL with *err set.
EventWriter *events_open(const char *folder, int64_t first_step, Error *err);

// Adds a value to the event that the next events_write writes. A tag is UTF-8; its part before the first '/' groups
// charts. Scalars are stored as fp32.
void events_scalar(EventWriter *w, const char *tag, double value);
// The distribution of values [n], in up to 30 buckets of equal width from the smallest to the largest. Values that are
// not finite are left out; without any other nothing is added.
void events_histogram(EventWriter *w, const char *tag, const double *values, int64_t n);
// An RGB picture, encoded as PNG.
void events_image(EventWriter *w, const char *tag, int width, int height, const void *png, size_t bytes);
// Writes what was added since the last call as one event of `step`, in one piece; nothing added: nothing written. A
// write that fails is a warning (append.h) and loses the event.
void events_write(EventWriter *w, int64_t step);

// NULL is allowed.
void events_close(EventWriter *w);
#endif
