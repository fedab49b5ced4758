// What a pack has to be.
#ifndef TESSERA_TESTS_PACK_CHECK_H
#define TESSERA_TESTS_PACK_CHECK_H

#include "base/base.h"
#include "kernels/batch.h"

// Verifies a pack against the meaning of its arrays, the mask pair by pair, sharing no code with pack_layout. -1 with
// *err naming what is wrong and where.
int pack_check(const Batch *b, BatchShape shape, Error *err);
#endif
