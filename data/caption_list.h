// Lists of pictures with their captions, as people have them: one in a folder, for the pictures of that folder.
#ifndef TESSERA_CAPTION_LIST_H
#define TESSERA_CAPTION_LIST_H

#include "data/source_internal.h"

// The names that a list may have, NULL after the last.
extern const char *const caption_list_names[];

// Adds the samples of folder/name: a .jsonl (an object a line), a .csv or a .tsv, whose first line may name its
// columns. The picture's file and its caption are under one of the names of data/caption.h (columns in upper or lower
// case). Without a heading a .tsv has the file, then the caption, tabs and all; a .csv likewise if its first line looks
// so. Files are relative to the folder; `key` of a sample is the file below the source's own folder. -1 with *err set
// when the list as a whole cannot be read. named(context, path) is called for every picture that the list names, used
// or not.
int caption_list_index(Source *s, const char *folder, const char *name, void (*named)(void *context, const char *path),
                       void *context, Error *err);
#endif
