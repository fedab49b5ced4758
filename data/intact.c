#include "data/intact.h"

#include "data/file_chunks.h"

#include <stdbool.h>

#define DAMAGED "the file is damaged or incomplete; get it again"

// ---- PNG

// CRC-32 (polynomial 0xEDB88320), four bits at a time.
static uint32_t crc32_of(const uint8_t *bytes, size_t n) {
  static const uint32_t table[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
                                     0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                     0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
  uint32_t crc = ~0u;
  for (size_t i = 0; i < n; i++) {
    crc ^= bytes[i];
    crc = crc >> 4 ^ table[crc & 15];
    crc = crc >> 4 ^ table[crc & 15];
  }
  return ~crc;
}

static int png_check(const uint8_t *bytes, size_t n, Error *err) {
  FileChunk chunk;
  for (const uint8_t *at = bytes + 8; png_next(&at, bytes + n, &chunk) == CHUNK_WHOLE;) {
    if (crc32_of(chunk.data - 4, chunk.bytes + 4) != read_u32(chunk.data + chunk.bytes))
      return error_set(err, DAMAGED, "the checksum of the PNG's chunk at byte %td is wrong", chunk.start - bytes);
    if (chunk.type == PNG_IEND) return 0;
  }
  return error_set(err, DAMAGED, "the PNG ends before its last chunk");
}

// ---- JPEG

enum { MAX_SCANS = 100, MAX_COMPONENTS = 4, TABLES = 4 };

typedef struct JpegComponent {
  uint8_t id, quantizer;
  bool scanned;
} JpegComponent;

// What the segments so far have defined.
typedef struct Jpeg {
  bool quantizer[TABLES], dc[TABLES], ac[TABLES]; // tables
  JpegComponent component[MAX_COMPONENTS];
  int components, scans;
  bool progressive;
} Jpeg;

static bool jpeg_quantizers(Jpeg *j, const uint8_t *p, const uint8_t *end) {
  for (size_t bytes; p < end; p += bytes) { // precision and number, then 64 values
    bytes = p[0] >> 4 ? 129 : 65;
    if ((p[0] & 15) >= TABLES || (size_t)(end - p) < bytes) return false;
    j->quantizer[p[0] & 15] = true;
  }
  return true;
}

static bool jpeg_huffman(Jpeg *j, const uint8_t *p, const uint8_t *end) {
  while (p < end) {
    HuffmanTable table;
    if (!huffman_next(&p, end, &table) || table.of_ac > 1 || table.number >= TABLES) return false;
    (table.of_ac ? j->ac : j->dc)[table.number] = table.symbols > 0;
  }
  return true;
}

static bool jpeg_frame(Jpeg *j, const uint8_t *p, const uint8_t *end) {
  if (end - p < 6 || j->components) return false; // precision, height, width, components; one frame
  int n = p[5];
  if (n < 1 || n > MAX_COMPONENTS || end - p < 6 + 3 * n) return false;
  for (int i = 0; i < n; i++) j->component[i] = (JpegComponent){.id = p[6 + 3 * i], .quantizer = p[8 + 3 * i]};
  j->components = n;
  return true;
}

// A scan of n components, then (progressive files only) the band of coefficients [from, to] and the bits it brings.
static bool jpeg_scan(Jpeg *j, const uint8_t *p, const uint8_t *end) {
  int n = end > p ? p[0] : 0;
  if (n < 1 || n > MAX_COMPONENTS || end - p < 4 + 2 * n) return false;
  int from = j->progressive ? p[1 + 2 * n] : 0, to = j->progressive ? p[2 + 2 * n] : 63;
  bool refines = j->progressive && p[3 + 2 * n] >> 4; // bits of DC refinements are not coded
  for (int i = 0; i < n; i++) {
    int c = 0, dc = p[2 + 2 * i] >> 4, ac = p[2 + 2 * i] & 15;
    while (c < j->components && j->component[c].id != p[1 + 2 * i]) c++;
    if (c == j->components || dc >= TABLES || ac >= TABLES) return false;
    JpegComponent *component = &j->component[c];
    if (component->quantizer >= TABLES || !j->quantizer[component->quantizer]) return false;
    if ((from == 0 && !refines && !j->dc[dc]) || (to > 0 && !j->ac[ac])) return false;
    component->scanned |= from == 0;
  }
  j->scans++;
  return true;
}

// One segment [p, end) with its marker.
static bool jpeg_segment(Jpeg *j, uint32_t marker, const uint8_t *p, const uint8_t *end) {
  if (marker == JPEG_DQT) return jpeg_quantizers(j, p, end);
  if (marker == JPEG_DHT) return jpeg_huffman(j, p, end);
  if (marker >= 0xC0 && marker <= 0xC2) {
    j->progressive = marker == 0xC2;
    return jpeg_frame(j, p, end);
  }
  if (marker == JPEG_SOS) return jpeg_scan(j, p, end);
  return true;
}

static int jpeg_check(const uint8_t *bytes, size_t n, Error *err) {
  Jpeg j = {0};
  const uint8_t *at = bytes + 2;
  for (;;) {
    FileChunk chunk;
    ChunkState state = jpeg_next(&at, bytes + n, &chunk);
    if (state == CHUNK_CUT) return error_set(err, DAMAGED, "the JPEG ends early: its end marker is missing");
    if (state == CHUNK_WHOLE && chunk.type == JPEG_EOI) break;
    if (state == CHUNK_NONE || !jpeg_segment(&j, chunk.type, chunk.data, chunk.data + chunk.bytes))
      return error_set(err, DAMAGED, "the JPEG's segment at byte %td makes no sense", chunk.start - bytes);
    if (j.scans > MAX_SCANS) return error_set(err, DAMAGED, "the JPEG has more than %d scans", MAX_SCANS);
  }
  bool all = j.components > 0;
  for (int i = 0; i < j.components; i++) all = all && j.component[i].scanned;
  if (all) return 0;
  return error_set(err, DAMAGED, "the JPEG ends at byte %td without all of its picture", at - 2 - bytes);
}

int image_check_intact(const uint8_t *bytes, size_t n, Error *err) {
  if (is_png(bytes, n)) return png_check(bytes, n, err);
  if (is_jpeg(bytes, n)) return jpeg_check(bytes, n, err);
  return 0;
}
