// UTF-8 (RFC 3629): what is well formed, and what a terminal may be shown.
#ifndef TESSERA_UTF8_H
#define TESSERA_UTF8_H

#include <stddef.h>

// Bytes of the well-formed sequence at s, of which n are there; 0 if there is none (overlong forms and surrogates are
// none).
size_t utf8_length(const unsigned char *s, size_t n);

// A copy of any bytes on one line of well-formed text without control characters (C0, DEL and C1), which a terminal
// would obey: each becomes a space, each byte that is not UTF-8 U+FFFD. malloc'd.
char *utf8_printable(const char *s);

// Bytes of the byte order mark that a text of n bytes begins with, which is no part of it: 3, or 0.
size_t utf8_mark(const char *text, size_t n);

// "UTF-16" or "UTF-32", with the byte order, when a text begins as one: by its byte order mark, or by the zero bytes
// around its first letter; NULL for any other.
const char *text_encoding(const char *text, size_t n);
#endif
