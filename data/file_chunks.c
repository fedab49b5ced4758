#include "data/file_chunks.h"

#include <string.h>

bool is_png(const uint8_t *bytes, size_t n) {
  return n >= 8 && memcmp(bytes, "\x89PNG\r\n\x1a\n", 8) == 0;
}

bool is_jpeg(const uint8_t *bytes, size_t n) {
  return n >= 2 && bytes[0] == 0xFF && bytes[1] == JPEG_SOI;
}

ChunkState png_next(const uint8_t **at, const uint8_t *end, FileChunk *chunk) {
  const uint8_t *p = *at; // length, type, data, CRC of type and data
  *chunk = (FileChunk){.start = p};
  if (end - p < 8) return CHUNK_CUT;
  chunk->type = read_u32(p + 4);
  chunk->data = p + 8;
  chunk->bytes = read_u32(p);
  if (end - p < 12 || chunk->bytes > (size_t)(end - p) - 12) return CHUNK_CUT;
  *at = p + 12 + chunk->bytes;
  return CHUNK_WHOLE;
}

// The end of the entropy-coded bytes at p: the next marker that is no restart, or `end`.
static const uint8_t *jpeg_skip_coded(const uint8_t *p, const uint8_t *end) {
  for (; (p = memchr(p, 0xFF, (size_t)(end - p))) && end - p >= 2; p++)
    if (p[1] != 0 && p[1] != 0xFF && (p[1] < 0xD0 || p[1] > 0xD7)) return p;
  return end;
}

ChunkState jpeg_next(const uint8_t **at, const uint8_t *end, FileChunk *chunk) {
  const uint8_t *p = *at;
  *chunk = (FileChunk){.start = p};
  while (end - p >= 2 && p[0] == 0xFF && p[1] == 0xFF) p++; // fill bytes
  if (end - p < 2) return CHUNK_CUT;
  if (p[0] != 0xFF) return CHUNK_NONE;
  chunk->type = p[1];
  if (chunk->type == JPEG_EOI) {
    *at = p + 2;
    return CHUNK_WHOLE;
  }
  if (end - p < 4) return CHUNK_CUT;
  int64_t length = p[2] << 8 | p[3]; // counts itself
  if (length < 2) return CHUNK_NONE;
  chunk->data = p + 4;
  chunk->bytes = (size_t)length - 2;
  if (length > end - p - 2) return CHUNK_CUT;
  *at = p + 2 + length;
  if (chunk->type == JPEG_SOS) *at = jpeg_skip_coded(*at, end);
  return CHUNK_WHOLE;
}

bool huffman_next(const uint8_t **at, const uint8_t *end, HuffmanTable *table) {
  const uint8_t *p = *at; // class and number, how many codes there are of 1 .. 16 bits, then their symbols
  if (end - p < 17) return false;
  *table = (HuffmanTable){.of_ac = p[0] >> 4, .number = p[0] & 15};
  for (int i = 1; i <= 16; i++) table->symbols += p[i];
  if (table->symbols > 256 || end - p < 17 + table->symbols) return false;
  *at = p + 17 + table->symbols;
  return true;
}
