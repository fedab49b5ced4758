// What a power failure at any moment leaves: the order of writes, flushes, renames and removals of a save, which this
// program sees in the place of the C library's; and that a flush or rename that fails loses nothing.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "model/config/load.h"
#include "tests/unit/checkpoint_case.h"
#include "tests/unit/temp_folder.h"
#include "trainer/run_folder.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CALLS = 4096 };

typedef enum CallKind { WRITE, FLUSH, RENAME, REMOVE } CallKind;

typedef struct Call {
  CallKind kind;
  char path[256]; // RENAME: what was named so before
} Call;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // of all below: files are written by several threads
static Call call[CALLS];
static int calls, watching;
static CallKind failing; // the call that fails with EIO
static int fail_at = -1; // which of its kind; -1: none

// Notes a call; whether it shall fail.
static int note(CallKind kind, const char *path) {
  pthread_mutex_lock(&lock);
  int fails = 0;
  if (watching && strncmp(path, folder, strlen(folder)) == 0) {
    if (calls < CALLS) {
      call[calls].kind = kind;
      snprintf(call[calls++].path, sizeof call->path, "%s", path);
    }
    fails = kind == failing && fail_at >= 0 && fail_at-- == 0;
  }
  pthread_mutex_unlock(&lock);
  if (fails) errno = EIO;
  return fails;
}

static void path_of(int fd, char *path, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, size - 1);
  path[n < 0 ? 0 : n] = 0;
}

// ---- in the place of the C library's ----

ssize_t write(int fd, const void *data, size_t bytes) {
  char path[256];
  path_of(fd, path, sizeof path);
  return note(WRITE, path) ? -1 : syscall(SYS_write, fd, data, bytes);
}

int fsync(int fd) {
  char path[256];
  path_of(fd, path, sizeof path);
  return note(FLUSH, path) ? -1 : (int)syscall(SYS_fsync, fd);
}

int rename(const char *from, const char *to) {
  return note(RENAME, from) ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
  return note(RENAME, from) ? -1 : (int)syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
}

int unlink(const char *path) {
  return note(REMOVE, path) ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int unlinkat(int dir, const char *name, int flags) {
  char path[256], full[520];
  path_of(dir, path, sizeof path);
  snprintf(full, sizeof full, "%s/%s", path, name);
  return note(REMOVE, full) ? -1 : (int)syscall(SYS_unlinkat, dir, name, flags);
}

// ---- tests ----

// Where a call on FOLDER/path is in the order, the first or the last; -1: there was none.
static int first(CallKind kind, const char *path) {
  char *full = xasprintf("%s%s%s", folder, path[0] ? "/" : "", path);
  int at = 0;
  while (at < calls && !(call[at].kind == kind && strcmp(call[at].path, full) == 0)) at++;
  free(full);
  return at < calls ? at : -1;
}

static int last(CallKind kind, const char *path) {
  char *full = xasprintf("%s%s%s", folder, path[0] ? "/" : "", path);
  int at = calls - 1;
  while (at >= 0 && !(call[at].kind == kind && strcmp(call[at].path, full) == 0)) at--;
  free(full);
  return at;
}

static const char *const names[] = {"model.safetensors", "optimizer-0x1.safetensors", "config.json"};

static int save(int64_t step, Error *err) {
  static const float numbers[1000] = {1, 2, 3};
  SafeTensor weight = {"w", SAFE_F32, 1, {1000}, numbers}, text = {"text", SAFE_U8, 1, {2}, "{}"};
  CheckpointFile files[] = {
      {names[0], &weight, 1, NULL, false}, {names[1], &weight, 1, NULL, false}, {names[2], &text, 1, NULL, false}};
  return checkpoint_save(folder, step, files, 3, "{}", (CheckpointKeep){1, 0}, err);
}

static int save_watched(int64_t step, Error *err) {
  calls = 0;
  watching = 1;
  int rc = save(step, err);
  watching = 0;
  return rc;
}

static int is_whole(int64_t step) {
  char *dir = xasprintf("%s/ckpt-%lld", folder, (long long)step);
  Error err;
  Checkpoint *c = checkpoint_open(dir, &err);
  int whole = c && checkpoint_verify(c, &err) == 0;
  checkpoint_close(c);
  free(dir);
  return whole;
}

// The order of a save into `temp` that takes the place of what is removed from `old`.
static void assert_order(const char *temp, const char *old) {
  char *state = xasprintf("%s/state.json", temp), *old_state = xasprintf("%s/state.json", old);
  int renamed = first(RENAME, temp), durable = last(FLUSH, "");
  for (int i = 0; i < 3; i++) {
    char *path = xasprintf("%s/%s", temp, names[i]), *gone = xasprintf("%s/%s", old, names[i]);
    assert_true(last(WRITE, path) >= 0);
    assert_true(first(FLUSH, path) > last(WRITE, path));         // what was written is on the disk
    assert_true(first(WRITE, state) > first(FLUSH, path));       // before anything vouches for it
    assert_true(first(REMOVE, gone) > first(REMOVE, old_state)); // what is going looks whole no more
    free(path);
    free(gone);
  }
  assert_true(first(FLUSH, state) > last(WRITE, state));
  assert_true(first(FLUSH, temp) > first(FLUSH, state)); // the names of the files
  assert_true(renamed > first(FLUSH, temp));
  assert_true(durable > last(RENAME, temp));       // the name of the checkpoint
  assert_true(first(REMOVE, old_state) > durable); // only then nothing needs the old one
  free(state);
  free(old_state);
}

static void order_of_a_save(void **state) {
  (void)state;
  Error err;
  assert_int_equal(save(1, &err), 0);
  char *note = xasprintf("%s/ckpt-1/note", folder); // a folder may be listed from its newest entry on
  close(open(note, O_CREAT | O_WRONLY, 0600));
  free(note);
  if (save_watched(2, &err)) fail_msg("%s", err.text);
  assert_order(".tmp-ckpt-2", "ckpt-1");
  assert_true(first(REMOVE, "ckpt-1/note") > first(REMOVE, "ckpt-1/state.json"));
  // The same step again: the old one has the temporary name then.
  if (save_watched(2, &err)) fail_msg("%s", err.text);
  assert_order(".tmp-ckpt-2", ".tmp-ckpt-2");
  assert_true(is_whole(2));
}

// Whichever write, flush or rename fails, the save says so and the checkpoint before it is whole.
static void failures_lose_nothing(void **state) {
  (void)state;
  static const CallKind kinds[] = {WRITE, FLUSH, RENAME};
  Error err;
  for (int k = 0; k < 3; k++) {
    int count = 0;
    empty_folder(NULL);
    assert_int_equal(save(1, &err), 0);
    for (;; count++) {
      failing = kinds[k];
      fail_at = count;
      int rc = save_watched(2, &err), tried = fail_at < 0;
      fail_at = -1;
      if (!tried) {
        if (rc) fail_msg("%s", err.text); // as many succeeded as there are
        break;
      }
      assert_int_equal(rc, -1);
      assert_non_null(strstr(err.text, "checkpoint of step 2 not saved"));
      assert_non_null(strstr(err.text, strerror(EIO)));
      assert_true(is_whole(1));
    }
    assert_true(count >= (kinds[k] == RENAME ? 1 : 6));
    assert_true(is_whole(2) && !is_whole(1));
  }
  // A file system that cannot exchange two names takes two steps.
  failing = RENAME;
  fail_at = 1;
  if (save_watched(2, &err)) fail_msg("%s", err.text);
  assert_true(fail_at < 0 && is_whole(2));
  char *aside = xasprintf("%s/.tmp-ckpt-2-old", folder);
  assert_int_equal(access(aside, F_OK), -1);
  free(aside);
}

// --from an earlier checkpoint: where a later one keeps its name, nothing is trained.
static void what_is_given_up_is_renamed_or_refused(void **state) {
  (void)state;
  Error err;
  Config *config = xcalloc(1, sizeof *config);
  assert_int_equal(config_load(config, NULL, NULL, 0, &err), 0);
  Tokenizer *tokenizer = tokenizer_load(NULL, config->model.vocab, &err);
  assert_non_null(tokenizer);
  assert_int_equal(save(40, &err), 0);
  assert_int_equal(save(20, &err), 0);
  char *from = xasprintf("%s/ckpt-20", folder);
  Options options = {.from = from};
  for (int fails = 1; fails >= 0; fails--) {
    failing = RENAME;
    fail_at = fails ? 0 : -1;
    watching = 1;
    assert_int_equal(run_folder_begin(folder, config, &options, tokenizer, 20, &err), -fails);
    watching = 0;
    assert_int_equal(is_whole(40), fails);
    char *file = xasprintf("%s/config.json", folder);
    assert_int_equal(access(file, F_OK), fails ? -1 : 0);
    free(file);
    if (fails) assert_non_null(strstr(err.text, "ckpt-40 aside"));
  }
  free(from);
  free(config);
  tokenizer_free(tokenizer);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(order_of_a_save, empty_folder),
      cmocka_unit_test_setup(failures_lose_nothing, empty_folder),
      cmocka_unit_test_setup(what_is_given_up_is_renamed_or_refused, empty_folder),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
