// What samples and documents consist of.
#ifndef TESSERA_PART_H
#define TESSERA_PART_H

typedef enum PartKind { PART_TEXT, PART_IMAGE } PartKind;
#endif
