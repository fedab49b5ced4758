// Which way up an image is: EXIF's orientation (EXIF 2.32, tag 0x0112), 1 to 8. Cameras store
// pixels in the order of the sensor, and this tag says how to turn them; 1: not at all.
#ifndef TESSERA_ORIENTATION_H
#define TESSERA_ORIENTATION_H

#include "base/base.h"

#include <stdbool.h>

// From the TIFF structure at `tiff`, as a PNG's eXIf chunk holds it and a JPEG's APP1 segment behind "Exif\0\0" (which
// is passed over); 1 when there is none, or none that makes sense.
int exif_orientation(const uint8_t *tiff, size_t n);

// Whether rows are seen as columns: width and height change places.
static inline bool orientation_turns(int orientation) {
  return orientation >= 5;
}

// The pixels [height, width, 3] as they are to be seen: [width, height, 3] where they turn. Takes `rgb`, which is
// malloc'd, and returns it or other memory to be freed.
uint8_t *pixels_orient(uint8_t *rgb, int width, int height, int orientation);
#endif
