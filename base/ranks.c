#include "base/ranks.h"

#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef TESSERA_MPI
#include "base/thread.h"

#include <dlfcn.h>
#include <errno.h>
#include <mpi.h>
#include <semaphore.h>
#include <unistd.h>
#endif

static struct {
  int rank, size, on_host, local;
  int joined; // MPI knows this process, and will be told when it leaves
} group = {.size = 1, .on_host = 1};

int ranks_rank(void) {
  return group.rank;
}

int ranks_size(void) {
  return group.size;
}

int ranks_on_host(void) {
  return group.on_host;
}

int ranks_local(void) {
  return group.local;
}

Launch ranks_launched(void) {
  // Slurm's SLURM_NTASKS stands in the environment of a batch script too, which is one process.
  static const struct {
    const char *size, *rank, *launcher;
  } known[] = {{"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"},
               {"PMI_SIZE", "PMI_RANK", "mpiexec"},
               {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    const char *size = getenv(known[i].size), *rank = getenv(known[i].rank);
    if (size && atoi(size) > 1) return (Launch){known[i].launcher, rank ? atoi(rank) : 0, atoi(size)};
  }
  return (Launch){NULL, 0, 1};
}

#ifdef TESSERA_MPI

// ---- the library ----

// Loaded when several processes are started together: one binary runs where there is none too, and a process alone does
// not pay for it.
// clang-format off
#define MPI_FUNCTIONS(F) F(Init_thread) F(Finalize) F(Abort) F(Comm_size) F(Comm_rank) F(Comm_split_type) F(Comm_free) \
  F(Test) F(Ibarrier) F(Ibcast) F(Ialltoall) F(Iallgather) F(Type_contiguous) F(Type_create_resized) F(Type_commit)    \
  F(Type_free)
// clang-format on
static struct {
#define POINTER(name) __typeof__(&MPI_##name) name;
  MPI_FUNCTIONS(POINTER)
#undef POINTER
  void *comm_world, *byte, *info_null, *datatype_null;
  int (*abort)(MPI_Comm comm, int code); // what MPI_Abort calls after its own message; NULL: not in this version
} mpi;

// Open MPI's handles are addresses of objects in its library.
#ifdef OPEN_MPI
#define ompi_mpi_comm_world (*(char *)mpi.comm_world)
#define ompi_mpi_byte (*(char *)mpi.byte)
#define ompi_mpi_info_null (*(char *)mpi.info_null)
#define ompi_mpi_datatype_null (*(char *)mpi.datatype_null)
#endif

static int library_open(Error *err) {
  static const struct {
    const char *name;
    void *at;
  } symbols[] = {
#define SYMBOL(name) {"MPI_" #name, &mpi.name},
      MPI_FUNCTIONS(SYMBOL)
#undef SYMBOL
#ifdef OPEN_MPI
          {"ompi_mpi_comm_world", &mpi.comm_world},
      {"ompi_mpi_byte", &mpi.byte},
      {"ompi_mpi_info_null", &mpi.info_null},
      {"ompi_mpi_datatype_null", &mpi.datatype_null},
#endif
  };
  void *library = dlopen(TESSERA_MPI, RTLD_NOW | RTLD_GLOBAL); // its plugins look for it among the global ones
  if (!library)
    return error_set(err, "install the MPI that this program was built with, or build it here", "cannot load MPI: %s",
                     dlerror());
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
    void *found = dlsym(library, symbols[i].name);
    if (!found) return error_set(err, "build this program again", "%s has no %s", TESSERA_MPI, symbols[i].name);
    memcpy(symbols[i].at, &found, sizeof found);
  }
  void *quiet = dlsym(library, "ompi_mpi_abort");
  memcpy(&mpi.abort, &quiet, sizeof quiet);
  return 0;
}

// ---- messages ----

// A wait that takes long leaves the processor to others: ranks may be more than processors, and one of them may
// evaluate for minutes.
static void finish(MPI_Request request) {
  enum { EAGER = 2000, NAP = 50000, LONG_NAP = 1000000 }; // tests, nanoseconds
  int done = 0;
  for (int i = 0;; i++) {
    mpi.Test(&request, &done, MPI_STATUS_IGNORE);
    if (done) return;
    if (i < EAGER)
      sched_yield();
    else
      nanosleep(&(struct timespec){.tv_nsec = i < 2 * EAGER ? NAP : LONG_NAP}, NULL);
  }
}

void ranks_wait(void) {
  MPI_Request request;
  if (group.size == 1) return;
  mpi.Ibarrier(MPI_COMM_WORLD, &request);
  finish(request);
}

// MPI counts in int; pieces keep every count and every product with the number of ranks below that.
static size_t piece_of(size_t bytes) {
  size_t most = (size_t)INT_MAX / (size_t)group.size;
  return bytes < most ? bytes : most;
}

void ranks_broadcast(void *data, size_t bytes) {
  for (size_t at = 0, n; group.size > 1 && at < bytes; at += n) {
    MPI_Request request;
    n = piece_of(bytes - at);
    mpi.Ibcast((char *)data + at, (int)n, MPI_BYTE, 0, MPI_COMM_WORLD, &request);
    finish(request);
  }
}

// Types of `bytes` that lie `stride` bytes apart, so that a piece of each rank's part goes in one call.
static MPI_Datatype piece_type(size_t bytes, size_t stride) {
  MPI_Datatype plain, spaced;
  mpi.Type_contiguous((int)bytes, MPI_BYTE, &plain);
  mpi.Type_create_resized(plain, 0, (MPI_Aint)stride, &spaced);
  mpi.Type_commit(&spaced);
  mpi.Type_free(&plain);
  return spaced;
}

void ranks_exchange(const void *out, void *in, size_t bytes) {
  if (group.size == 1) {
    memcpy(in, out, bytes);
    return;
  }
  for (size_t at = 0, n; at < bytes; at += n) {
    MPI_Request request;
    n = piece_of(bytes - at);
    MPI_Datatype type = piece_type(n, bytes);
    mpi.Ialltoall((const char *)out + at, 1, type, (char *)in + at, 1, type, MPI_COMM_WORLD, &request);
    finish(request);
    mpi.Type_free(&type);
  }
}

void ranks_share(void *all, size_t bytes) {
  for (size_t at = 0, n; group.size > 1 && at < bytes; at += n) {
    MPI_Request request;
    n = piece_of(bytes - at);
    MPI_Datatype type = piece_type(n, bytes);
    mpi.Iallgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, (char *)all + at, 1, type, MPI_COMM_WORLD, &request);
    finish(request);
    mpi.Type_free(&type);
  }
}

#else

void ranks_wait(void) {}

void ranks_broadcast(void *data, size_t bytes) {
  (void)data, (void)bytes;
}

void ranks_exchange(const void *out, void *in, size_t bytes) {
  memcpy(in, out, bytes);
}

void ranks_share(void *all, size_t bytes) {
  (void)all, (void)bytes;
}

#endif

void ranks_gather(const void *mine, size_t bytes, void *all) {
  memcpy((char *)all + (size_t)group.rank * bytes, mine, bytes);
  ranks_share(all, bytes);
}

char *ranks_broadcast_text(const char *text) {
  int64_t bytes = group.rank == 0 && text ? (int64_t)strlen(text) : -1;
  ranks_broadcast(&bytes, sizeof bytes);
  if (bytes < 0) return NULL;
  char *copy = xcalloc((size_t)bytes + 1, 1);
  if (group.rank == 0) memcpy(copy, text, (size_t)bytes);
  ranks_broadcast(copy, (size_t)bytes);
  return copy;
}

void ranks_sum_i64(int64_t *value, int n) {
  if (group.size == 1) return;
  int64_t *all = xmalloc((size_t)group.size * (size_t)n * sizeof *all);
  ranks_gather(value, (size_t)n * sizeof *all, all);
  memset(value, 0, (size_t)n * sizeof *value);
  for (int i = 0; i < group.size * n; i++) value[i % n] += all[i];
  free(all);
}

void ranks_sum_f64(double *value, int n) {
  if (group.size == 1) return;
  double *all = xmalloc((size_t)group.size * (size_t)n * sizeof *all);
  ranks_gather(value, (size_t)n * sizeof *all, all);
  memcpy(value, all, (size_t)n * sizeof *value);
  for (int i = n; i < group.size * n; i++) value[i % n] += all[i];
  free(all);
}

int ranks_any(int mine) {
  int64_t sum = mine != 0;
  ranks_sum_i64(&sum, 1);
  return sum > 0;
}

int ranks_worst(int rc, Error *err) {
  if (group.size == 1) return rc;
  typedef struct Result {
    int rc;
    Error err;
  } Result;
  Result mine = {.rc = rc}, *all = xmalloc((size_t)group.size * sizeof *all);
  int worst = 0;
  if (rc) mine.err = *err;
  ranks_gather(&mine, sizeof mine, all);
  for (int r = 1; r < group.size; r++)
    if (all[r].rc < all[worst].rc) worst = r;
  rc = all[worst].rc;
  if (rc) *err = all[worst].err;
  if (rc && worst) error_prefix(err, "rank %d", worst);
  free(all);
  return rc;
}

int ranks_agree(uint64_t value, const char *what, const char *hint, Error *err) {
  char ranks[128] = "";
  size_t at = 0;
  int others = 0;
  uint64_t *all = xmalloc((size_t)group.size * sizeof *all);
  ranks_gather(&value, sizeof value, all);
  for (int r = 1; r < group.size; r++) {
    if (all[r] == all[0]) continue;
    if (at + 16 < sizeof ranks) at += (size_t)snprintf(ranks + at, sizeof ranks - at, "%s%d", others ? ", " : "", r);
    others++;
  }
  free(all);
  if (!others) return 0;
  return error_set(err, hint, "%d of %d processes, of rank %s, %s %s than rank 0", others, group.size, ranks,
                   others == 1 ? "has" : "have", what);
}

// ---- joining and leaving ----

#ifdef TESSERA_MPI

// Whatever ends this process before ranks_close ends all.
static void end_all(int code, void *unused) {
  (void)unused;
  if (!group.joined) return;
  if (!code) code = 1;
  if (mpi.abort) mpi.abort(MPI_COMM_WORLD, code); // the cause was said already, and nothing else need be
  mpi.Abort(MPI_COMM_WORLD, code);
}

// ---- processes that never come ----

enum { PATIENCE_S = 20 };

typedef struct Arrival {
  Launch launch;
  sem_t complete; // posted once all are here
} Arrival;

// Ends this process, and by that all, when they are not complete in time: MPI itself would wait for ever.
static void *watch_arrival(void *argument) {
  Arrival *a = argument;
  struct timespec until;
  Error err;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += PATIENCE_S;
  int rc;
  while ((rc = sem_timedwait(&a->complete, &until)) != 0 && errno == EINTR) {
  }
  if (rc == 0) return NULL;
  error_set(&err,
            "does each host start the program, and does its network let them meet? what a process says before this "
            "may tell",
            "not all of the %d processes that %s started have come within %d s", a->launch.size, a->launch.launcher,
            PATIENCE_S);
  error_print(&err);
  _exit(2);
}

int ranks_open(Error *err) {
  Launch launch = ranks_launched();
  int threads;
  if (launch.size == 1) return 0;
  log_set_rank(launch.rank);
  if (library_open(err) != 0) return -1;
  Arrival arrival = {.launch = launch};
  pthread_t watch;
  sem_init(&arrival.complete, 0, 0);
  int watched = thread_start(&watch, watch_arrival, &arrival) == 0;
  mpi.Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &threads);
  mpi.Comm_size(MPI_COMM_WORLD, &group.size);
  mpi.Comm_rank(MPI_COMM_WORLD, &group.rank);
  if (group.size != launch.size) {
    int found = group.size;
    mpi.Finalize();
    group.size = 1;
    sem_post(&arrival.complete);
    if (watched) pthread_join(watch, NULL);
    return error_set(err, "srun --mpi=pmix, or the mpirun of the MPI that this program was built with",
                     "%s started %d processes, but this one finds %d", launch.launcher, launch.size, found);
  }
  MPI_Comm host;
  mpi.Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, group.rank, MPI_INFO_NULL, &host);
  mpi.Comm_size(host, &group.on_host);
  mpi.Comm_rank(host, &group.local);
  mpi.Comm_free(&host);
  sem_post(&arrival.complete);
  if (watched) pthread_join(watch, NULL);
  group.joined = 1;
  on_exit(end_all, NULL);
  log_set_rank(group.rank);
  return 0;
}

void ranks_close(void) {
  if (!group.joined) return;
  group.joined = 0;
  mpi.Finalize();
}

#else

int ranks_open(Error *err) {
  Launch launch = ranks_launched();
  if (launch.size == 1) return 0;
  log_set_rank(launch.rank);
  return error_set(err, "'make deps' installs Open MPI, and make then builds with it; or start one process",
                   "%s started %d processes, and this program was built without MPI", launch.launcher, launch.size);
}

void ranks_close(void) {}

#endif
