// The chunks that image files are made of; a JPEG's are its marker segments. Nothing is decoded here, and no length is
// believed that goes beyond the bytes there are.
#ifndef TESSERA_FILE_CHUNKS_H
#define TESSERA_FILE_CHUNKS_H

#include "base/base.h"

#include <stdbool.h>

// What png_next and jpeg_next found.
typedef enum ChunkState {
  CHUNK_WHOLE, // it is there
  CHUNK_CUT,   // the bytes end within it
  CHUNK_NONE,  // none begins here (JPEG only)
} ChunkState;

// `type` is right for a chunk that is cut, too, where its type lies within the bytes; else it is 0.
typedef struct FileChunk {
  const uint8_t *start, *data; // its first byte; what it holds
  size_t bytes;                // of `data`
  uint32_t type;               // JPEG: its marker, 0xC0 ..; PNG: four letters, the first in the highest byte
} FileChunk;

enum { JPEG_SOI = 0xD8, JPEG_EOI = 0xD9, JPEG_SOS = 0xDA, JPEG_DQT = 0xDB, JPEG_DHT = 0xC4, JPEG_APP1 = 0xE1 };
enum { PNG_IHDR = 0x49484452, PNG_IDAT = 0x49444154, PNG_IEND = 0x49454E44, PNG_EXIF = 0x65584966 };

bool is_png(const uint8_t *bytes, size_t n);  // by its first eight bytes
bool is_jpeg(const uint8_t *bytes, size_t n); // by its first two

// The chunk at *at (the first begins behind the eight bytes of the signature), its CRC unchecked. Moves *at behind a
// whole one.
ChunkState png_next(const uint8_t **at, const uint8_t *end, FileChunk *chunk);

// The segment at *at (the first begins behind SOI), fill bytes before it passed over; one without data for EOI.
// Moves *at behind a whole one and, for a scan, behind its coded bytes.
ChunkState jpeg_next(const uint8_t **at, const uint8_t *end, FileChunk *chunk);

// A Huffman table of a DHT segment.
typedef struct HuffmanTable {
  int of_ac, number; // class and number as they stand there, 0 .. 15
  int symbols;       // at most 256
} HuffmanTable;
// The table at *at, and *at moves behind it; false when it does not lie within the segment, or has more symbols.
bool huffman_next(const uint8_t **at, const uint8_t *end, HuffmanTable *table);

static inline uint32_t read_u32(const uint8_t *p) { // big-endian
  return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}
#endif
