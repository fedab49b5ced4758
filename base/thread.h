// Threads beside the main one.
#ifndef TESSERA_THREAD_H
#define TESSERA_THREAD_H

#include <pthread.h>

// Creates a thread that blocks the signals to end and to hang up, which the main thread takes. Returns pthread_create's
// result.
int thread_start(pthread_t *thread, void *(*run)(void *), void *argument);
#endif
