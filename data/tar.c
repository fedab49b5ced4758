// Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax, and GNU tar's extensions (info tar, "Basic Tar Format").
#include "data/tar.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TAR_BLOCK = 512, TAR_MAX_EXTENDED = 1 << 20 };

typedef struct TarHeader {
  char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100], magic[6], version[2],
      user[32], group[32], major[8], minor[8], prefix[155], pad[12];
} TarHeader;
_Static_assert(sizeof(TarHeader) == TAR_BLOCK, "a tar header is one block");

// Where the reader stands, and what extended headers said about the next member.
typedef struct TarReader {
  int fd;
  const char *archive;
  int64_t end, at;   // bytes of the file; of the next header
  char *long_name;   // NULL when the header's own name holds
  int64_t long_size; // -1 likewise
} TarReader;

#define TAR_HINT "the archive is damaged or is not an uncompressed tar; make it again"

static int tar_error(const TarReader *r, Error *err, const char *what) {
  return error_set(err, TAR_HINT, "%s: %s at byte %lld", r->archive, what, (long long)r->at);
}

// Reads [at, at+n) of the file, or fails.
static int tar_read(const TarReader *r, int64_t at, void *to, size_t n, Error *err) {
  int64_t got = file_read_at(r->fd, at, to, (int64_t)n);
  if (got < 0) return error_set(err, NULL, "%s: cannot read: %s", r->archive, strerror(errno));
  return got == (int64_t)n ? 0 : tar_error(r, err, "it ends early");
}

// Octal digits with blanks around them, or GNU's base 256 (first bit set); -1 when it is neither or exceeds 2^62.
static int64_t tar_number(const char *field, int n) {
  const unsigned char *p = (const unsigned char *)field;
  int64_t value = 0;
  if (p[0] & 0x80) {
    if (p[0] & 0x40) return -1; // negative
    for (int i = 0; i < n; i++) {
      if (value >> 54) return -1;
      value = value << 8 | (i == 0 ? p[0] & 0x3f : p[i]);
    }
    return value;
  }
  int i = 0, digits = 0;
  while (i < n && p[i] == ' ') i++;
  for (; i < n && p[i] >= '0' && p[i] <= '7'; i++, digits++) value = value << 3 | (p[i] - '0');
  while (i < n && (p[i] == ' ' || p[i] == 0)) i++;
  return digits == 0 || i < n ? -1 : value;
}

// The checksum counts its own field as blanks. Some old writers summed signed bytes.
static bool tar_checksum_holds(const TarHeader *h) {
  const unsigned char *p = (const unsigned char *)h;
  int64_t field = (int64_t)offsetof(TarHeader, checksum), sum = 0, signed_sum = 0;
  for (int64_t i = 0; i < TAR_BLOCK; i++) {
    unsigned char c = i >= field && i < field + 8 ? ' ' : p[i];
    sum += c;
    signed_sum += (signed char)c;
  }
  int64_t said = tar_number(h->checksum, 8);
  return said == sum || said == signed_sum;
}

static bool tar_block_is_zero(const TarHeader *h) {
  const char *p = (const char *)h;
  for (int i = 0; i < TAR_BLOCK; i++)
    if (p[i]) return false;
  return true;
}

static char *tar_header_name(const TarHeader *h) {
  int name = (int)strnlen(h->name, sizeof(h->name)), prefix = 0;
  // GNU's own header format ("ustar  ") keeps times where ustar keeps the prefix.
  if (memcmp(h->magic, "ustar\0", 6) == 0) prefix = (int)strnlen(h->prefix, sizeof(h->prefix));
  if (prefix == 0) return xasprintf("%.*s", name, h->name);
  return xasprintf("%.*s/%.*s", prefix, h->prefix, name, h->name);
}

// Records of a pax header: "LENGTH KEY=VALUE\n", LENGTH counting the whole record. text[n] is NUL.
static int tar_pax(TarReader *r, const char *text, size_t n, Error *err) {
  for (size_t at = 0; at < n;) {
    size_t length = 0, i = at;
    for (; i < n && text[i] >= '0' && text[i] <= '9' && length <= n; i++)
      length = length * 10 + (size_t)(text[i] - '0');
    if (i == at || i >= n || text[i] != ' ' || length > n - at || length < i - at + 2 || text[at + length - 1] != '\n')
      return tar_error(r, err, "a bad pax record");
    const char *key = text + i + 1, *end = text + at + length - 1;
    const char *equals = memchr(key, '=', (size_t)(end - key));
    if (!equals) return tar_error(r, err, "a bad pax record");
    size_t key_bytes = (size_t)(equals - key), value_bytes = (size_t)(end - equals - 1);
    if (key_bytes == 4 && memcmp(key, "path", 4) == 0) {
      free(r->long_name);
      r->long_name = xasprintf("%.*s", (int)value_bytes, equals + 1);
    } else if (key_bytes == 4 && memcmp(key, "size", 4) == 0) {
      int64_t size = 0;
      for (const char *p = equals + 1; p < end; p++) {
        if (*p < '0' || *p > '9' || size > INT64_MAX / 10 - 1) return tar_error(r, err, "a bad pax size");
        size = size * 10 + (*p - '0');
      }
      r->long_size = size;
    }
    at += length;
  }
  return 0;
}

// An extended header of `size` bytes of data at r->at + 512: 'L' a long name, 'x' pax records.
static int tar_extended(TarReader *r, char type, int64_t size, Error *err) {
  if (size > TAR_MAX_EXTENDED) return tar_error(r, err, "an extended header of more than 1 MiB");
  char *text = xmalloc((size_t)size + 1);
  int rc = tar_read(r, r->at + TAR_BLOCK, text, (size_t)size, err);
  text[size] = 0;
  if (rc == 0 && type == 'x') rc = tar_pax(r, text, (size_t)size, err);
  if (rc == 0 && type == 'L') {
    free(r->long_name);
    r->long_name = xstrdup(text);
  }
  free(text);
  return rc;
}

// Reads the header at r->at, appends the member if it is a regular file, and moves on. 1 at the end of the archive.
static int tar_next(TarReader *r, TarIndex *out, int64_t *capacity, Error *err) {
  TarHeader h;
  if (r->at >= r->end) return 1; // no closing zero blocks: common, and harmless at a member's end
  if (r->end - r->at < TAR_BLOCK) return tar_error(r, err, "a truncated header");
  if (tar_read(r, r->at, &h, sizeof(h), err) != 0) return -1;
  if (tar_block_is_zero(&h)) return 1;
  if (!tar_checksum_holds(&h)) return tar_error(r, err, "a header whose checksum is wrong");
  int64_t size = tar_number(h.size, sizeof(h.size));
  if (h.type == 'x' || h.type == 'L' || h.type == 'K' || h.type == 'g') {
    if (size < 0 || size > r->end - r->at - TAR_BLOCK) return tar_error(r, err, "an extended header of absurd size");
    // 'K' is a long link target and 'g' holds defaults: neither concerns the names and sizes of regular files.
    if ((h.type == 'x' || h.type == 'L') && tar_extended(r, h.type, size, err) != 0) return -1;
  } else {
    if (r->long_size >= 0) size = r->long_size;
    bool regular = h.type == '0' || h.type == 0 || h.type == '7';
    bool no_data = h.type >= '1' && h.type <= '6'; // links, devices, folders, fifos
    if (no_data) size = 0;
    if (size < 0 || size > r->end - r->at - TAR_BLOCK)
      return tar_error(r, err, "a member whose size exceeds the archive (is it truncated?)");
    char *name = r->long_name ? r->long_name : tar_header_name(&h);
    r->long_name = NULL;
    r->long_size = -1;
    size_t length = strlen(name);
    if (regular && length > 0 && name[length - 1] != '/') { // before ustar a folder was a file named "x/"
      if (out->count == *capacity) {
        *capacity = max_i64(256, 2 * *capacity);
        out->member = xrealloc(out->member, (size_t)*capacity * sizeof(TarMember));
      }
      out->member[out->count++] = (TarMember){.name = name, .offset = r->at + TAR_BLOCK, .size = size};
    } else {
      free(name);
    }
  }
  r->at += TAR_BLOCK + (size + TAR_BLOCK - 1) / TAR_BLOCK * TAR_BLOCK;
  return 0;
}

int tar_index(int fd, const char *name, TarIndex *out, Error *err) {
  *out = (TarIndex){0};
  struct stat st;
  if (fstat(fd, &st) != 0) return error_set(err, NULL, "%s: %s", name, strerror(errno));
  TarReader r = {.fd = fd, .archive = name, .end = st.st_size, .long_size = -1};
  int64_t capacity = 0;
  int rc = 0;
  while (rc == 0) rc = tar_next(&r, out, &capacity, err);
  free(r.long_name);
  if (rc < 0) tar_index_free(out);
  return rc < 0 ? -1 : 0;
}

void tar_index_free(TarIndex *index) {
  for (int64_t i = 0; i < index->count; i++) free(index->member[i].name);
  free(index->member);
  *index = (TarIndex){0};
}
