// Whether a PNG or JPEG file is whole. stb_image decodes many damaged files into pictures with grey, green or black
// parts without a word; a training set must not take those for images.
#ifndef TESSERA_INTACT_H
#define TESSERA_INTACT_H

#include "base/base.h"

// PNG: every chunk up to IEND is there and has the CRC it claims (PNG specification, section 5.3). JPEG: the segments
// up to EOI follow each other, every scan has the tables it needs, and every component has a scan (ITU T.81, annex B);
// at most 100 scans, since each of them costs a walk over the whole image. What a JPEG's entropy-coded bytes say
// cannot be checked. Files of other formats pass. -1 with *err set, naming what is wrong and where.
int image_check_intact(const uint8_t *bytes, size_t n, Error *err);
#endif
