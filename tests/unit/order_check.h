// Proof of a program's order, by another algorithm than the one that made it.
#ifndef TESSERA_TESTS_ORDER_CHECK_H
#define TESSERA_TESTS_ORDER_CHECK_H

#include "model/program/program.h"

// (1) Any two ops with overlapping ranges, one writing, are ordered by lanes and waits; (2) every read of the arena and
// the host slab, and every output, sees its own tensor: since that tensor's first write nothing else has written to its
// range. Returns 0, or -1 with the two ops and tensors named in *err.
int order_check(const Program *p, Error *err);
#endif
