#include "data/intact.h"

#include <stdbool.h>
#include <string.h>

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

static uint32_t read_u32(const uint8_t *p) {
  return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static int png_check(const uint8_t *bytes, size_t n, Error *err) {
  for (size_t at = 8; n - at >= 12;) {
    const uint8_t *chunk = bytes + at; // length, type, data, CRC of type and data
    size_t length = read_u32(chunk);
    if (length > n - at - 12) break;
    if (crc32_of(chunk + 4, length + 4) != read_u32(chunk + 8 + length))
      return error_set(err, DAMAGED, "the checksum of the PNG's chunk at byte %zu is wrong", at);
    if (memcmp(chunk + 4, "IEND", 4) == 0) return 0;
    at += 12 + length;
  }
  return error_set(err, DAMAGED, "the PNG ends before its last chunk");
}

// ---- JPEG

enum { MAX_SCANS = 100, MAX_COMPONENTS = 4, TABLES = 4 };
enum { SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, DQT = 0xDB, DHT = 0xC4 };

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
  for (size_t bytes; p < end; p += bytes) { // class and number, 16 counts, their symbols
    if (end - p < 17 || p[0] >> 4 > 1 || (p[0] & 15) >= TABLES) return false;
    size_t symbols = 0;
    for (int i = 1; i <= 16; i++) symbols += p[i];
    bytes = 17 + symbols;
    if ((size_t)(end - p) < bytes) return false;
    (p[0] >> 4 ? j->ac : j->dc)[p[0] & 15] = symbols > 0;
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
static bool jpeg_segment(Jpeg *j, int marker, const uint8_t *p, const uint8_t *end) {
  if (marker == DQT) return jpeg_quantizers(j, p, end);
  if (marker == DHT) return jpeg_huffman(j, p, end);
  if (marker >= 0xC0 && marker <= 0xC2) {
    j->progressive = marker == 0xC2;
    return jpeg_frame(j, p, end);
  }
  if (marker == SOS) return jpeg_scan(j, p, end);
  return true;
}

// The end of the entropy-coded bytes at p: the next marker that is no restart, or `end`.
static const uint8_t *jpeg_skip_coded(const uint8_t *p, const uint8_t *end) {
  for (; (p = memchr(p, 0xFF, (size_t)(end - p))) && end - p >= 2; p++)
    if (p[1] != 0 && p[1] != 0xFF && (p[1] < 0xD0 || p[1] > 0xD7)) return p;
  return end;
}

static int jpeg_check(const uint8_t *bytes, size_t n, Error *err) {
  Jpeg j = {0};
  const uint8_t *end = bytes + n, *p = bytes + 2;
  for (;;) {
    const uint8_t *start = p;
    while (end - p >= 2 && p[0] == 0xFF && p[1] == 0xFF) p++; // fill bytes
    if (end - p < 2) break;
    int marker = p[1];
    if (p[0] == 0xFF && marker == EOI) {
      bool all = j.components > 0;
      for (int i = 0; i < j.components; i++) all = all && j.component[i].scanned;
      if (all) return 0;
      return error_set(err, DAMAGED, "the JPEG ends at byte %td without all of its picture", p - bytes);
    }
    int64_t length = end - p >= 4 ? p[2] << 8 | p[3] : 0;
    if (end - p < 4 || length > end - p - 2) break;
    if (p[0] != 0xFF || length < 2 || !jpeg_segment(&j, marker, p + 4, p + 2 + length))
      return error_set(err, DAMAGED, "the JPEG's segment at byte %td makes no sense", start - bytes);
    p += 2 + length;
    if (marker == SOS) p = jpeg_skip_coded(p, end);
    if (j.scans > MAX_SCANS) return error_set(err, DAMAGED, "the JPEG has more than %d scans", MAX_SCANS);
  }
  return error_set(err, DAMAGED, "the JPEG ends early: its end marker is missing");
}

int image_check_intact(const uint8_t *bytes, size_t n, Error *err) {
  if (n >= 8 && memcmp(bytes, "\x89PNG\r\n\x1a\n", 8) == 0) return png_check(bytes, n, err);
  if (n >= 2 && bytes[0] == 0xFF && bytes[1] == SOI) return jpeg_check(bytes, n, err);
  return 0;
}
