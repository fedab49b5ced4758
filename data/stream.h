// The stream of packs: samples are drawn from the sources, made into documents and put into packs, from texts and image
// sizes alone; no pixel is read here. One global, endless order that depends on the configuration and the data only.
//
// Mixing: the next sample comes from the source with the smallest (samples drawn + 1/2) / weight. Within a source the
// order is a seeded permutation per epoch. A text longer than max_document - 2 tokens is cut into documents; only the
// last one ends in eos. An interleaved sample that is too long is cut between its parts. Captions are truncated.
//
// Packing: documents pass through a window. A pack takes them in order until it is nearly full, then the subset of the
// window that fills what is left best (pack_choose). Padded, it takes them strictly in order, as many as fit when all
// of them are as long as the longest; the documents themselves, and their numbers, are those of varlen packing.
#ifndef TESSERA_STREAM_H
#define TESSERA_STREAM_H

#include "data/flow_time.h"
#include "data/packer.h"
#include "data/source.h"
#include "data/tokenizer.h"

enum {
  STREAM_SOURCES = 64, // most sources
  STREAM_WINDOW = 128  // documents looked ahead
};

typedef struct StreamConfig {
  Source *const *source; // [sources]
  const double *weight;  // [sources], > 0: share of the samples drawn
  int sources;
  const Tokenizer *tokenizer;
  BatchShape shape; // of a pack
  Packing packing;
  int max_text;     // text rows of a pack
  int max_document; // tokens of a text document, specials included
  int max_caption;  // tokens of a caption
  ImageFit fit;
  int64_t max_pixels; // an image that turns out to be larger is not decoded; see source_limit_pixels
  double held_out;    // fraction of the samples left out for evaluation
  double cfg_drop;
  double caption_to_image;
  FlowTimes flow_times;
  uint64_t seed;
} StreamConfig;

// Where a document comes from: enough to make it again.
typedef struct Origin {
  int source;       // -1: none
  int piece;        // which document of the sample
  uint64_t ordinal; // samples drawn from the source before this one
  uint64_t draw;    // the document's number in the run
} Origin;

// A document on its way into a pack.
typedef struct Draft {
  Document document; // image parts: tag is the part of the sample; patch is to be set
  DocumentSize size; // without padding
  Origin origin;
  const Sample *sample;
} Draft;

typedef struct DraftList {
  Draft **draft; // [count]
  int count, capacity;
} DraftList;

// All that decides what the stream gives next. Plain data.
typedef struct StreamState {
  uint64_t draw;                  // documents made
  uint64_t drawn[STREAM_SOURCES]; // samples drawn by source
  Origin pending;                 // a sample some of whose documents are still to come: piece is the next one
  int count;                      // documents in the window
  Origin window[STREAM_WINDOW];
} StreamState;

typedef struct StreamStats {
  int64_t truncated; // captions truncated to max_caption
  int64_t cut;       // samples cut into several documents
  int64_t dropped;   // samples, or images of interleaved samples, that no pack can hold
} StreamStats;

typedef struct Stream Stream;

// Takes a copy of *config; what it points to must live as long as the stream. NULL with *err set when it does not fit
// together, or a source has no sample left for training.
Stream *stream_open(const StreamConfig *config, Error *err);
void stream_close(Stream *s);

// The documents of the next pack, in order; they stay valid until given back with stream_recycle, which empties the
// list. list starts zeroed. -1 with *err set when a source has no sample that fits into a pack.
int stream_pack(Stream *s, DraftList *list, Error *err);
void stream_recycle(Stream *s, DraftList *list);
// Frees the memory of an empty list.
void draft_list_free(DraftList *list);

void stream_save(const Stream *s, StreamState *state);
// -1 with *err set when the state does not belong to these sources.
int stream_restore(Stream *s, const StreamState *state, Error *err);

StreamStats stream_stats(const Stream *s);
// Training samples of a source.
int64_t stream_samples(const Stream *s, int source);

// The place in [0, n) of position i of a pseudo-random permutation of n: a Feistel network with Philox as its round
// function, walked until it lands inside [0, n).
int64_t stream_permute(uint64_t seed, uint64_t epoch, int source, int64_t n, int64_t i);

typedef struct HeldOut {
  int source;
  int64_t sample;
} HeldOut;
// The held-out samples of all sources, in an order that depends on their number only; returns how many. *list is
// malloc'd.
int64_t stream_held_out(Source *const *source, int sources, double held_out, HeldOut **list);
#endif
