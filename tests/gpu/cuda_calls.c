// What a run asks of the CUDA driver, step by step: a library that the driver loads into the program.
//
//   CUDA_INJECTION64_PATH=BUILD/tests/cuda_calls.so CUDA_CALLS=FILE ./train CONFIG ...
//
// FILE gets the names of all driver calls in their order, one a line, and of every graph when the GPU began and ended
// it ("graph BEGIN END" in nanoseconds), which CUPTI knows only later: these lines stand anywhere. tests/gpu/run_gpu.sh
// reads it.
#include <cupti.h>

#include <stdio.h>
#include <stdlib.h>

enum { BUFFER_BYTES = 1 << 20 };

static FILE *out;

static void call_noted(void *unused, CUpti_CallbackDomain domain, CUpti_CallbackId id, const CUpti_CallbackData *call) {
  (void)unused, (void)domain, (void)id;
  if (call->callbackSite == CUPTI_API_ENTER) fprintf(out, "%s\n", call->functionName);
}

static void buffer_wanted(uint8_t **buffer, size_t *bytes, size_t *most_records) {
  *buffer = aligned_alloc(8, BUFFER_BYTES);
  *bytes = *buffer ? BUFFER_BYTES : 0;
  *most_records = 0;
}

static void buffer_filled(CUcontext context, uint32_t stream, uint8_t *buffer, size_t bytes, size_t valid) {
  (void)context, (void)stream, (void)bytes;
  CUpti_Activity *record = NULL;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_GRAPH_TRACE) continue;
    const CUpti_ActivityGraphTrace *g = (const CUpti_ActivityGraphTrace *)record; // as later versions of it begin
    fprintf(out, "graph %llu %llu\n", (unsigned long long)g->start, (unsigned long long)g->end);
  }
  free(buffer);
}

static void calls_end(void) {
  cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  fflush(out); // left open: the program's own end may call the driver
}

// The driver calls this when it is first used.
int InitializeInjection(void) {
  static CUpti_SubscriberHandle subscriber;
  const char *path = getenv("CUDA_CALLS");
  out = path ? fopen(path, "w") : NULL;
  if (!out) {
    fprintf(stderr, "cuda_calls: CUDA_CALLS names no file that can be written\n");
    return 0;
  }
  if (cuptiSubscribe(&subscriber, (CUpti_CallbackFunc)call_noted, NULL) != CUPTI_SUCCESS ||
      cuptiEnableDomain(1, subscriber, CUPTI_CB_DOMAIN_DRIVER_API) != CUPTI_SUCCESS ||
      cuptiActivityRegisterCallbacks(buffer_wanted, buffer_filled) != CUPTI_SUCCESS ||
      cuptiActivityEnable(CUPTI_ACTIVITY_KIND_GRAPH_TRACE) != CUPTI_SUCCESS) {
    fprintf(stderr, "cuda_calls: CUPTI does not work here\n");
    return 0;
  }
  atexit(calls_end);
  return 1;
}
