// Tensor maps: what the copy engine's boxes are cut from (tma_load_2d, tma_load_3d of ptx.h).
#ifndef TESSERA_TENSOR_MAP_H
#define TESSERA_TENSOR_MAP_H

#include <cuda.h>

#include "kernels/cuda/cuda.h"

// Whether the driver can make them.
bool tensor_map_usable(void);
// A bf16 tensor [z, y, x] to be read in boxes [box_z, box_y, 64], swizzled by 128 bytes; z = 0: [y, x], whose boxes are
// [box_y, 64]. base is aligned to 16 bytes, x a multiple of 8. Panics where the driver refuses; what: named then.
void tensor_map_encode(CUtensorMap *map, const char *what, const bf16 *base, int x, int y, int z, int box_y, int box_z);
#endif
