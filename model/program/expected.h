// How full packs of a config are, estimated from the config alone: what a plan uses before the data are read.
#ifndef TESSERA_EXPECTED_H
#define TESSERA_EXPECTED_H

#include "model/config/config.h"
#include "model/program/cost.h"

// The mean pack of `slots` token slots: filled by the documents of data.sources at their weights (captioned images
// where there are none), captions half as long as data.max_caption allows, texts as long as data.max_document.
Extents extents_expected(const Config *c, int slots);
#endif
