// Measured costs in a file, so that a run that starts again need not measure.
//
//   {"device": "NVIDIA H200", "build": "0123..", "sizes": "T 16384, ..", "processes": "2, 2 of a host",
//    "extents": {"text": .., ..}, "rates": {..}, "link": {..}, "collectives": {..},
//    "classes": [{"class": "89ab..", "op": "LINEAR_FWD", "seconds": .., "model": .., "measured": 20}, ..]}
#ifndef TESSERA_SECONDS_FILE_H
#define TESSERA_SECONDS_FILE_H

#include "model/program/seconds.h"

// What times depend on besides the classes: costs are of no use where one of these is another. NULL, of costs that are
// loaded: any.
typedef struct CostsKey {
  const char *device, *build, *sizes, *processes;
} CostsKey;

// Writes PATH.new and puts it in the place of PATH. -1 with *err where it cannot.
int costs_save(const Costs *c, const CostsKey *key, const char *path, Error *err);
// Replaces what *c has by the file's, all but the numbers of processes and of multiprocessors. 1 when it did; 0 where
// there is no file, and with a message where it has another key or is damaged: *c is as it was.
int costs_load(Costs *c, const CostsKey *key, const char *path);
#endif
