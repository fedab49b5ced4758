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
#endif
