#include "data/image_header.h"

#include "data/orientation.h"
#include "data/file_chunks.h"

#include <limits.h>
#include <string.h>
#include <strings.h>

#define STBI_NO_STDIO
#include <stb/stb_image.h>

// ISO base media files say what they are by the brand of their first box.
static const char *box_format_name(const uint8_t *brand) {
  static const char *const heic[] = {"heic", "heix", "hevc", "hevx", "heim", "heis", "mif1", "msf1"};
  if (memcmp(brand, "avif", 4) == 0 || memcmp(brand, "avis", 4) == 0) return "AVIF";
  for (size_t i = 0; i < sizeof heic / sizeof heic[0]; i++)
    if (memcmp(brand, heic[i], 4) == 0) return "HEIC";
  return "a video or another ISO media file";
}

// The name of a format that is known but not decoded ("WebP"), or of what else people save under a picture's name ("an
// HTML page"), from its first bytes; NULL when it is none of them.
static const char *image_format_name(const uint8_t *bytes, size_t n) {
  static const struct {
    const char *magic, *name;
    size_t bytes;
  } known[] = {
      {"GIF8", "GIF", 4},
      {"II*\0", "TIFF", 4},
      {"MM\0*", "TIFF", 4},
      {"BM", "BMP", 2},
      {"\xFF\x0A", "JPEG XL", 2},
      {"\0\0\0\x0CJXL ", "JPEG XL", 8},
      {"\0\0\0\x0CjP  ", "JPEG 2000", 8},
      {"\xFF\x4F\xFF\x51", "JPEG 2000", 4},
      {"8BPS", "a Photoshop file", 4},
      {"\0\0\1\0", "an icon (ICO)", 4},
      {"%PDF", "PDF", 4},
      {"PK\3\4", "a ZIP archive", 4},
      {"\x1F\x8B", "a gzip file", 2},
      {"version https://git-lfs", "a pointer of Git LFS, not the file itself", 23},
  };
  for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
    if (n >= known[i].bytes && memcmp(bytes, known[i].magic, known[i].bytes) == 0) return known[i].name;
  if (n >= 12 && memcmp(bytes, "RIFF", 4) == 0 && memcmp(bytes + 8, "WEBP", 4) == 0) return "WebP";
  if (n >= 12 && memcmp(bytes + 4, "ftyp", 4) == 0) return box_format_name(bytes + 8);
  while (n > 0 && (bytes[0] <= ' ' || bytes[0] >= 0x80)) bytes++, n--; // blanks, a byte order mark
  const char *text = (const char *)bytes;
  if (n >= 4 && strncasecmp(text, "<svg", 4) == 0) return "SVG";
  if (n >= 5 && strncasecmp(text, "<?xml", 5) == 0) return "XML (perhaps SVG)";
  if ((n >= 5 && strncasecmp(text, "<html", 5) == 0) || (n >= 9 && strncasecmp(text, "<!doctype", 9) == 0))
    return "an HTML page";
  return NULL;
}

// Whether the tables of a DHT segment lie within it and name no more symbols than there can be.
static bool jpeg_tables_fit(const FileChunk *chunk) {
  HuffmanTable table;
  for (const uint8_t *p = chunk->data, *end = p + chunk->bytes; p < end;)
    if (!huffman_next(&p, end, &table)) return false;
  return true;
}

static int jpeg_header(const uint8_t *bytes, size_t n, ImageHeader *out, Error *err) {
  const uint8_t *at = bytes + 2;
  bool frame = false, exif = false;
  for (;;) {
    FileChunk chunk;
    ChunkState state = jpeg_next(&at, bytes + n, &chunk);
    if (state == CHUNK_NONE && !frame)
      return error_set(err, "the file is damaged; get it again", "the JPEG's segment at byte %td makes no sense",
                       chunk.start - bytes);
    if (state != CHUNK_WHOLE || chunk.type == JPEG_EOI) break;
    if (chunk.type >= 0xC0 && chunk.type <= 0xC2) frame = true;
    if (chunk.type == JPEG_DHT && !jpeg_tables_fit(&chunk))
      return error_set(err, IMAGE_FORMAT_HINT, "the JPEG has a Huffman table that is too long");
    bool is_exif = chunk.type == JPEG_APP1 && chunk.bytes >= 6 && memcmp(chunk.data, "Exif\0\0", 6) == 0;
    if (is_exif && !exif && !frame) out->orientation = exif_orientation(chunk.data, chunk.bytes);
    exif |= is_exif;
  }
  if (frame) return 0;
  error_set(err, "the file is damaged or incomplete; get it again", "the JPEG ends before its picture begins");
  return 1;
}

// The size a PNG claims, for the images so large that stb refuses to say.
static void png_huge_size(const FileChunk *header, ImageHeader *out) {
  uint32_t width = read_u32(header->data), height = read_u32(header->data + 4);
  if (width > INT_MAX || height > INT_MAX || (uint64_t)width * height <= IMAGE_MAX_PIXELS) return;
  out->width = (int)width;
  out->height = (int)height;
}

static int png_header(const uint8_t *bytes, size_t n, ImageHeader *out, Error *err) {
  const uint8_t *at = bytes + 8;
  bool exif = false;
  for (;;) {
    FileChunk chunk;
    ChunkState state = png_next(&at, bytes + n, &chunk);
    if (chunk.type == PNG_IDAT || (state == CHUNK_WHOLE && chunk.type == PNG_IEND)) return 0;
    if (state != CHUNK_WHOLE) break;
    if (chunk.type == PNG_IHDR && chunk.bytes == 13) png_huge_size(&chunk, out);
    if (chunk.type == PNG_EXIF && !exif) out->orientation = exif_orientation(chunk.data, chunk.bytes);
    exif |= chunk.type == PNG_EXIF;
  }
  error_set(err, "the file is damaged or incomplete; get it again", "the PNG ends before its pixels begin");
  return 1;
}

int image_header(const uint8_t *bytes, size_t n, ImageHeader *out, Error *err) {
  *out = (ImageHeader){.orientation = 1};
  if (n == 0) return error_set(err, IMAGE_FORMAT_HINT, "the image is empty");
  if (!is_png(bytes, n) && !is_jpeg(bytes, n)) {
    const char *name = image_format_name(bytes, n);
    return error_set(err, IMAGE_FORMAT_HINT, "it is neither a JPEG nor a PNG%s%s", name ? ", but " : "",
                     name ? name : "");
  }
  int rc = is_png(bytes, n) ? png_header(bytes, n, out, err) : jpeg_header(bytes, n, out, err);
  if (rc != 0 || out->width > 0) return rc;
  int channels, length = (int)min_i64((int64_t)n, INT_MAX);
  if (stbi_info_from_memory(bytes, length, &out->width, &out->height, &channels) && out->width > 0 && out->height > 0)
    return 0;
  return error_set(err, IMAGE_FORMAT_HINT, "the image's header cannot be read: %s", stbi_failure_reason());
}
