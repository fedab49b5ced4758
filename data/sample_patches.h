// The patches of a sample's image, from its file to what a pack holds.
#ifndef TESSERA_SAMPLE_PATCHES_H
#define TESSERA_SAMPLE_PATCHES_H

#include "data/image.h"
#include "data/source.h"

// Decodes an image of a sample, fits it and cuts it, mirrored left to right if `mirror`, into patches [rows * columns,
// 3p^2] of the grid that image_fit_grid gives for its size. -1 with *err set, nothing written, when it cannot be
// decoded or has another size than its header said, SOURCE_CHANGED as source_read_image. Thread-safe.
int sample_patches(const Source *source, const SamplePart *part, const ImageFit *fit, int64_t max_pixels, bool mirror,
                   uint8_t *patches, Error *err);
#endif
