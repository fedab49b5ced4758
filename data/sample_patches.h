// The patches of a sample's image, from its file to what a pack holds.
#ifndef TESSERA_SAMPLE_PATCHES_H
#define TESSERA_SAMPLE_PATCHES_H

#include "data/image.h"
#include "data/source.h"

// Decodes an image segment of a sample, fits it and cuts it into patches [rows * columns, 3p^2] of the grid that
// image_fit_grid gives for the segment's size. -1 with *err set when it cannot be decoded or has another size than its
// header said, SOURCE_CHANGED as source_read_image. Thread-safe; for evaluation and sampling too.
int sample_patches(const Source *source, const SampleSegment *segment, const ImageFit *fit, int64_t max_pixels,
                   uint8_t *patches, Error *err);

// Mirrors an image left to right: from and to [rows * columns, p, p, 3], not overlapping.
void patches_mirror(const uint8_t *from, int rows, int columns, int p, uint8_t *to);
#endif
