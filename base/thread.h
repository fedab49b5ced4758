// Threads beside the main one.
#ifndef TESSERA_THREAD_H
#define TESSERA_THREAD_H

#include <pthread.h>

// pthread_create for a thread that takes no signals to end or hang up: they are the main thread's. 0, or what
// pthread_create says.
int thread_start(pthread_t *thread, void *(*run)(void *), void *argument);
#endif
