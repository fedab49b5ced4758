// Tensor maps by the encoder of the driver.
#include "kernels/cuda/tensor_map.h"

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, found at run time so that the program also starts where there is no driver; NULL if it has
// none.
static EncodeTiled find_encoder(void) {
  void *f = NULL;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) != cudaSuccess)
    return NULL;
  return found == cudaDriverEntryPointSuccess ? (EncodeTiled)f : NULL;
}

static EncodeTiled encoder(void) {
  static const EncodeTiled encode = find_encoder();
  return encode;
}

bool tensor_map_usable(void) {
  return encoder() != NULL;
}

void tensor_map_encode(CUtensorMap *map, const char *what, const bf16 *base, int x, int y, int z, int box_y,
                       int box_z) {
  const cuuint64_t dims[3] = {(cuuint64_t)x, (cuuint64_t)y, (cuuint64_t)z};
  const cuuint64_t strides[2] = {(cuuint64_t)x * 2, (cuuint64_t)x * 2 * y};
  const cuuint32_t box[3] = {64, (cuuint32_t)box_y, (cuuint32_t)box_z}, step[3] = {1, 1, 1};
  CUresult status = encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, z ? 3 : 2, (void *)base, dims, strides, box, step,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    panic("%s: no tensor map of bf16 [%d, %d, %d] at %p in boxes [%d, %d, 64] (CUresult %d)", what, z ? z : 1, y, x,
          (const void *)base, box_z, box_y, (int)status);
}
