// The index of a tar shard, kept beside it as FOLDER/.NAME.index, so that a large shard is walked once and not at every
// start. It holds for one size and time of the shard and one `held_out_by`; anything else, damage included, and the
// shard is indexed again. Where the folder cannot be written there is no cache.
#ifndef TESSERA_INDEX_CACHE_H
#define TESSERA_INDEX_CACHE_H

#include "data/source_internal.h"

// Shards with fewer members are not worth a file.
enum { INDEX_CACHE_MEMBERS = 1000 };

// Appends the samples of `shard` to the source and sets s->unused to what the shard leaves out. False, the source as it
// was, when there is no valid cache.
bool index_cache_read(Source *s, const DataFile *shard);

// Keeps what indexing `shard` has added to the source since it held `samples` samples, and s->unused, which is what the
// shard leaves out. Fails without a message.
void index_cache_write(const Source *s, const DataFile *shard, int64_t samples);
#endif
