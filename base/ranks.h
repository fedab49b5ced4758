// The process group: this process alone, or those that mpirun or srun started together (MPI).
//
// A process alone never calls MPI; every function below then does what a group of one does. All processes of a group
// call the same functions in the same order, each from its main thread. Processes that wait give up their processor. A
// process that ends with an error, or is killed, ends all of them: nobody waits for it for long.
#ifndef TESSERA_RANKS_H
#define TESSERA_RANKS_H

#include "base/base.h"

// What a launcher says in the environment of a process.
typedef struct Launch {
  const char *launcher; // its name, NULL: none
  int rank, size;       // 0, 1 without one
} Launch;
Launch ranks_launched(void);

// Joins the group. From here on log lines are those of the process's rank (log_set_rank). -1 with *err when this
// process was started as one of several that cannot work together: this build has no MPI, or the launcher's is another
// one.
int ranks_open(Error *err);
// Leaves it: the end of processes that all did what they should.
void ranks_close(void);

int ranks_rank(void);    // from 0
int ranks_size(void);    // 1: this process is alone
int ranks_on_host(void); // processes on this host
int ranks_local(void);   // which of them this one is, from 0

// Waits until all have come here, however long that takes.
void ranks_wait(void);
// `bytes` of rank 0's become everybody's.
void ranks_broadcast(void *data, size_t bytes);
// A text of rank 0's, which others need not have; NULL stays NULL. malloc'd for everybody.
char *ranks_broadcast_text(const char *text);
// all: [size][bytes], what each rank has.
void ranks_gather(const void *mine, size_t bytes, void *all);
// Each value becomes its sum over the ranks, added in their order, so that it is the same everywhere.
void ranks_sum_i64(int64_t *value, int n);
void ranks_sum_f64(double *value, int n);
// Whether it is so in any of them.
int ranks_any(int mine);

// What collectives of tensors are made of. out, in: [size][bytes]; in[r] becomes what rank r has in its out[own rank].
void ranks_exchange(const void *out, void *in, size_t bytes);
// all: [size][bytes], of which every rank has its own and gets the others'.
void ranks_share(void *all, size_t bytes);

// The lowest rc of all, on every rank, with the *err of the first rank that has it; 0 leaves *err alone.
int ranks_worst(int rc, Error *err);
// -1 with *err naming the ranks that have another value than rank 0, on every rank. what: "another config".
int ranks_agree(uint64_t value, const char *what, const char *hint, Error *err);
#endif
