// Checkpoints: round trips, damaged ones, saves that fail or are killed, pruning, the lock.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/hash.h"
#include "model/files/checkpoint.h"
#include "tests/unit/assert_text.h"
#include "tests/unit/checkpoint_case.h"
#include "tests/unit/files_case.h"
#include "tests/unit/temp_folder.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

static void names_of_checkpoints(void **state) {
  (void)state;
  static const struct {
    const char *name;
    int64_t step;
  } cases[] = {{"ckpt-0", 0},
               {"ckpt-7", 7},
               {"ckpt-120", 120},
               {"ckpt-999999999999999999", 999999999999999999},
               {"ckpt-", -1},
               {"ckpt-007", -1},
               {"ckpt-00", -1},
               {"ckpt--7", -1},
               {"ckpt-+7", -1},
               {"ckpt- 7", -1},
               {"ckpt-7x", -1},
               {"ckpt-7 ", -1},
               {".tmp-ckpt-7", -1},
               {"set-aside-ckpt-7", -1},
               {"ckpt-1000000000000000000", -1}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    if (checkpoint_step(cases[i].name) != cases[i].step) fail_msg("%s", cases[i].name);
}

static const CheckpointKeep keep_all = {1000, 0};

// Opens a checkpoint and reads all of it; NULL with *err naming what is wrong.
static Checkpoint *open_whole(const char *dir, Error *err) {
  Checkpoint *c = checkpoint_open(dir, err);
  if (!c || checkpoint_verify(c, err) == 0) return c;
  checkpoint_close(c);
  return NULL;
}

// The newest that is whole, as a run finds it: checkpoint_find's results.
static int find_whole(const char *run, Checkpoint **c, Error *err) {
  int64_t below = INT64_MAX;
  int rc;
  while ((rc = checkpoint_find(run, &below, c, err)) == 1 && checkpoint_verify(*c, err) != 0) checkpoint_close(*c);
  return rc;
}

// Two files of random tensors and a state that depend on the step.
static int save(const char *run, int64_t step, CheckpointKeep keep, Error *err) {
  Tensors a, b;
  tensors_random(&a, (uint64_t)step, 9);
  tensors_random(&b, (uint64_t)step + 1000, 5);
  CheckpointFile files[] = {{"model.safetensors", a.t, a.n, NULL, false},
                            {"optimizer-0x1.safetensors", b.t, b.n, NULL, false}};
  char *text = xasprintf("{\"loader\": {\"draw\": \"%lld\"}, \"list\": [1, 2.5, \"]}\"]}", (long long)step * 3);
  int rc = checkpoint_save(run, step, files, 2, text, keep, err);
  free(text);
  tensors_free(&a);
  tensors_free(&b);
  return rc;
}

static void take_part(void *context, int i, size_t at, size_t n, const void *data) {
  memcpy(((char **)context)[i] + at, data, n);
}

// A file of a checkpoint with its data.
static SafeFile *open_file(const Checkpoint *c, const char *name) {
  Error err;
  char *path = xasprintf("%s/%s", c->dir, name);
  SafeFile *f = safetensors_open(path, &err);
  if (!f) fail_msg("%s", err.text);
  free(path);
  return f;
}

static void assert_file_holds(const Checkpoint *c, const char *name, const Tensors *m) {
  SafeFile *f = open_file(c, name);
  assert_same_tensors(f, m);
  safetensors_close(f);
}

// A file as it is read, tensor by tensor.
static void assert_reads(const Checkpoint *c, const char *name) {
  SafeFile *f = open_file(c, name);
  Error err;
  char **taken = xcalloc((size_t)f->n, sizeof *taken), *memory = xmalloc(checkpoint_memory(c));
  for (int i = 0; i < f->n; i++) taken[i] = xmalloc(safe_bytes(&f->tensor[i]));
  if (checkpoint_read(c, name, memory, take_part, taken, &err) != 0) fail_msg("%s", err.text);
  for (int i = 0; i < f->n; i++) {
    assert_memory_equal(taken[i], f->tensor[i].data, safe_bytes(&f->tensor[i]));
    free(taken[i]);
  }
  free(taken);
  free(memory);
  safetensors_close(f);
}

static void assert_holds(const Checkpoint *c, int64_t step) {
  assert_int_equal(c->step, step);
  Tensors a, b;
  tensors_random(&a, (uint64_t)step, 9);
  tensors_random(&b, (uint64_t)step + 1000, 5);
  assert_file_holds(c, "model.safetensors", &a);
  assert_file_holds(c, "optimizer-0x1.safetensors", &b);
  assert_reads(c, "model.safetensors");
  assert_reads(c, "optimizer-0x1.safetensors");
  assert_null(checkpoint_file(c, "ema.safetensors"));
  const cJSON *loader = cJSON_GetObjectItemCaseSensitive(c->state, "loader");
  const cJSON *draw = cJSON_GetObjectItemCaseSensitive(loader, "draw");
  assert_int_equal(atoll(draw->valuestring), step * 3);
  tensors_free(&a);
  tensors_free(&b);
}

static void assert_newest(int64_t step) {
  Checkpoint *c;
  Error err;
  if (find_whole(folder, &c, &err) != 1) fail_msg("%s", err.text);
  assert_holds(c, step);
  checkpoint_close(c);
}

static void assert_steps(const char *expected) {
  char *command = xasprintf("ls -A %s | grep -v lock | sort -V | tr '\\n' ' '", folder), found[256] = "";
  FILE *f = popen(command, "r");
  if (!fgets(found, sizeof found, f)) found[0] = 0;
  pclose(f);
  free(command);
  assert_string_equal(found, expected);
}

static void checkpoint_round_trip(void **state) {
  (void)state;
  Checkpoint *c;
  Error err;
  assert_int_equal(find_whole("/nonexistent/run", &c, &err), 0);
  assert_int_equal(find_whole(folder, &c, &err), 0);
  for (int64_t step = 0; step < 12; step += 3) {
    if (save(folder, step, keep_all, &err)) fail_msg("%s", err.text);
    assert_newest(step);
  }
  if (save(folder, 9, keep_all, &err)) fail_msg("%s", err.text); // over the one that is there
  assert_newest(9);
  assert_steps("ckpt-0 ckpt-3 ckpt-6 ckpt-9 ");
  // One folder by name, also when it was moved elsewhere.
  char *from = path_in(folder, "ckpt-6"), *to = path_in(folder, "best");
  assert_int_equal(rename(from, to), 0);
  c = open_whole(to, &err);
  assert_non_null(c);
  assert_holds(c, 6);
  checkpoint_close(c);
  assert_null(open_whole(from, &err));
  free(from);
  free(to);
}

static void pruning(void **state) {
  (void)state;
  Error err;
  for (int64_t step = 10; step <= 70; step += 10)
    assert_int_equal(save(folder, step, (CheckpointKeep){2, 30}, &err), 0);
  assert_steps("ckpt-30 ckpt-60 ckpt-70 ");
  // A run that went back keeps what it has just saved and leaves later steps alone.
  assert_int_equal(save(folder, 40, (CheckpointKeep){1, 0}, &err), 0);
  assert_steps("ckpt-40 ckpt-60 ckpt-70 ");
  // A damaged one does not count as kept.
  char *file = path_in(folder, "ckpt-70/model.safetensors");
  assert_int_equal(truncate(file, 20), 0);
  assert_int_equal(save(folder, 80, (CheckpointKeep){2, 0}, &err), 0);
  assert_steps("ckpt-60 ckpt-70 ckpt-80 ");
  assert_int_equal(save(folder, 90, (CheckpointKeep){2, 0}, &err), 0);
  assert_steps("ckpt-80 ckpt-90 ");
  free(file);
}

// Every damage to any file of the newest checkpoint is found, and the one before is taken.
static void damage_is_found(void **state) {
  (void)state;
  static const char *const names[] = {"state.json", "model.safetensors", "optimizer-0x1.safetensors"};
  Error err;
  assert_int_equal(save(folder, 1, keep_all, &err), 0);
  assert_int_equal(save(folder, 2, keep_all, &err), 0);
  char *dir = path_in(folder, "ckpt-2");
  for (int file = 0; file < 3; file++) {
    char *path = xasprintf("%s/%s", dir, names[file]);
    size_t n;
    char *bytes = read_bytes(path, &n);
    for (uint64_t i = 0; i < 150; i++) {
      size_t at = random_number(i, 9, (uint32_t)file) % n;
      char kept = bytes[at];
      bytes[at] ^= (char)(1 << random_number(i, 10, 0) % 8);
      write_bytes(path, bytes, i % 3 ? n : at); // a flip, or cut off
      bytes[at] = kept;
      memset(&err, 0, sizeof err);
      Checkpoint *c = open_whole(dir, &err);
      if (c) fail_msg("byte %zu of %s: damage not seen", at, names[file]);
      assert_contains(err.text, names[file]);
    }
    assert_int_equal(unlink(path), 0);
    assert_null(open_whole(dir, &err));
    assert_newest(1);
    assert_int_equal(mkfifo(path, 0600), 0); // nobody ever writes into it
    alarm(20);
    assert_newest(1);
    alarm(0);
    assert_int_equal(unlink(path), 0);
    write_bytes(path, bytes, n);
    assert_newest(2);
    free(bytes);
    free(path);
  }
  // A checksum that is right does not make hostile content right.
  char *path = xasprintf("%s/state.json", dir);
  static const char *const bodies[] = {
      "\"format\": 2, \"step\": 2, \"files\": {}, \"state\": {}}",
      "\"format\": 1, \"step\": 2, \"files\": [], \"state\": {}}",
      "\"format\": 1, \"step\": 2, \"files\": {}, \"state\": 1}",
      "\"format\": 1",
      "\"format\": 1, \"step\": 2, \"files\": {\"../ckpt-1/model.safetensors\": {\"bytes\": 1, \"xxh64\": \"\"}}, "
      "\"state\": {}}",
      "\"format\": 1, \"step\": 2, \"files\": {\"model.safetensors\": 1}, \"state\": {}}"};
  for (size_t i = 0; i < sizeof bodies / sizeof bodies[0]; i++) {
    char *text = xasprintf("{\"xxh64\": \"%016llx\",\n%s", (unsigned long long)hash64(bodies[i], strlen(bodies[i]), 0),
                           bodies[i]);
    write_bytes(path, text, strlen(text));
    assert_null(open_whole(dir, &err));
    assert_contains(err.text, "state.json");
    free(text);
  }
  char *first = path_in(folder, "ckpt-1/state.json");
  assert_int_equal(unlink(first), 0);
  Checkpoint *c;
  assert_int_equal(find_whole(folder, &c, &err), -1);
  assert_contains(err.text, "none of the 2 checkpoints");
  free(first);
  free(path);
  free(dir);
}

static size_t address_space(void) {
  size_t pages = 0;
  FILE *f = fopen("/proc/self/statm", "r");
  if (!f || fscanf(f, "%zu", &pages) != 1) fail();
  fclose(f);
  return pages * (size_t)sysconf(_SC_PAGESIZE);
}

// A run that fits into ulimit -v must be able to go on there: while its slabs are taken, its checkpoint is open.
static void open_checkpoints_take_no_room(void **state) {
  (void)state;
  enum { BYTES = 32 << 20 };
  Error err;
  SafeTensor t = {.name = "w", .dtype = SAFE_U8, .rank = 1, .shape = {BYTES}, .data = xcalloc(BYTES, 1)};
  CheckpointFile file = {"model.safetensors", &t, 1, NULL, false};
  assert_int_equal(checkpoint_save(folder, 1, &file, 1, "{}", keep_all, &err), 0);
  free((void *)t.data);
  char *dir = path_in(folder, "ckpt-1");
  size_t before = address_space();
  Checkpoint *c = checkpoint_open(dir, &err);
  size_t after = address_space();
  assert_non_null(c);
  assert_in_range(after, 0, before + BYTES / 2);
  assert_int_equal(checkpoint_verify(c, &err), 0);
  checkpoint_close(c);
  free(dir);
}

// Who uses a run that is being trained finds a checkpoint although older ones go all the time.
static void pruned_ones_are_not_damage(void **state) {
  (void)state;
  enum { LOOKS = 1000 };
  Error err;
  CheckpointKeep keep_one = {1, 0};
  assert_int_equal(save(folder, 1, keep_one, &err), 0);
  pid_t trainer = fork();
  for (int64_t step = 2; trainer == 0; step++)
    if (save(folder, step, keep_one, &err) != 0 || getppid() == 1) _exit(1);
  for (int i = 0; i < LOOKS; i++) {
    int64_t below = INT64_MAX;
    Checkpoint *c;
    int rc = checkpoint_find(folder, &below, &c, &err);
    if (rc == 1) {
      checkpoint_close(c);
      continue;
    }
    kill(trainer, SIGKILL);
    fail_msg("look %d: %d, %s", i, rc, err.text);
  }
  assert_int_equal(kill(trainer, SIGKILL), 0);
  assert_int_equal(waitpid(trainer, NULL, 0), trainer);
}

static int finds_one_that_may_not_be_read(void) {
  int64_t below = INT64_MAX;
  Checkpoint *c;
  Error err = {0};
  if (checkpoint_find(folder, &below, &c, &err) != -1) return 1;
  return strstr(err.text, "ckpt-2") && strstr(err.text, "Permission denied") && strstr(err.hint, "owner") ? 0 : 2;
}

// Who may not read the newest checkpoint must not go on from the one before as if it were damaged.
static void unreadable_is_not_damaged(void **state) {
  (void)state;
  Error err;
  for (int step = 1; step <= 2; step++) assert_int_equal(save(folder, step, keep_all, &err), 0);
  char *paths[] = {path_in(folder, "ckpt-2"), path_in(folder, "ckpt-2/state.json"),
                   path_in(folder, "ckpt-2/model.safetensors")};
  for (int i = 0; i < 3; i++) {
    mode_t mode = i ? 0644 : 0755;
    assert_int_equal(chmod(paths[i], 0), 0);
    assert_int_equal(as_nobody(folder, finds_one_that_may_not_be_read), 0);
    assert_int_equal(chmod(paths[i], mode), 0);
  }
  assert_int_equal(as_nobody(folder, finds_one_that_may_not_be_read), 1);
  for (int i = 0; i < 3; i++) free(paths[i]);
}

// A save that runs out of room: an error, no temporary folder, the old checkpoint as it was.
static void failed_save_loses_nothing(void **state) {
  (void)state;
  Error err;
  assert_int_equal(save(folder, 1, keep_all, &err), 0);
  SafeTensor t = {"a", SAFE_U8, 0, {0}, "x"};
  CheckpointFile small = {"small.safetensors", &t, 1, NULL, false};
  signal(SIGXFSZ, SIG_IGN);
  struct rlimit old, limit;
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
  // About 80 bytes for small.safetensors and 160 for state.json: room for neither, for the first, for both.
  for (int i = 0; i < 3; i++) {
    limit = (struct rlimit){(rlim_t[]){40, 120, 1000}[i], old.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    int second = checkpoint_save(folder, 2, &small, 1, "{}", (CheckpointKeep){1, 0}, &err);
    char text[sizeof err.text];
    memcpy(text, err.text, sizeof text);
    int first = i == 2 ? 0 : checkpoint_save(folder, 1, &small, 1, "{}", (CheckpointKeep){1, 0}, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_int_equal(second, i == 2 ? 0 : -1);
    assert_int_equal(first, i == 2 ? 0 : -1);
    assert_steps(i == 2 ? "ckpt-2 " : "ckpt-1 ");
    if (i == 2) break;
    assert_contains(text, "checkpoint of step 2 not saved: cannot write");
    assert_contains(text, i ? "state.json" : "small.safetensors");
    assert_newest(1);
  }
  CheckpointFile files[] = {small, {"../b.safetensors", &t, 1, NULL, false}};
  assert_int_equal(checkpoint_save(folder, 3, files, 2, "{}", keep_all, &err), -1);
  assert_contains(err.text, "\"../b.safetensors\" is no name");
  assert_int_equal(checkpoint_save(folder, 3, files, 1, "{\"a\":", keep_all, &err), -1);
  assert_int_equal(checkpoint_save(folder, 3, files, 1, "3", keep_all, &err), -1);
  assert_contains(err.text, "must be a JSON object");
  assert_int_equal(checkpoint_save("/nonexistent/run", 3, files, 1, "{}", keep_all, &err), -1);
  assert_steps("ckpt-2 ");
}

// Savers killed at random moments: the newest valid checkpoint is always one that was being saved, or the one before.
static void killed_save_loses_nothing(void **state) {
  (void)state;
  Error err;
  assert_int_equal(save(folder, 100, keep_all, &err), 0);
  int64_t last = 100;
  for (uint32_t round = 0; round < 25; round++) {
    pid_t child = fork();
    if (child == 0) {
      for (int64_t step = last + 1;; step++) save(folder, step, (CheckpointKeep){2, 0}, &err);
    }
    assert_true(child > 0);
    usleep(random_number(round, 11, 0) % 20000);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    Checkpoint *c;
    if (find_whole(folder, &c, &err) != 1) fail_msg("%s", err.text);
    assert_true(c->step >= last);
    last = c->step;
    assert_holds(c, last);
    checkpoint_close(c);
  }
  assert_true(last > 100);
  assert_int_equal(save(folder, last + 1, (CheckpointKeep){1, 0}, &err), 0);
  assert_int_equal(entries(folder), 1); // nothing is left of those that were cut short
}

static void one_run_per_folder(void **state) {
  (void)state;
  Error err;
  int fd = run_lock(folder, &err);
  assert_true(fd >= 0);
  char *expected = xasprintf("another run uses %s (process %ld)", folder, (long)getpid());
  pid_t child = fork();
  if (child == 0) _exit(run_lock(folder, &err) == -1 && strstr(err.text, expected) ? 0 : 1);
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(status, 0);
  close(fd);
  fd = run_lock(folder, &err);
  assert_true(fd >= 0);
  close(fd);
  assert_int_equal(run_lock("/nonexistent/run", &err), -1);
  free(expected);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(names_of_checkpoints, empty_folder),
      cmocka_unit_test_setup(checkpoint_round_trip, empty_folder),
      cmocka_unit_test_setup(pruning, empty_folder),
      cmocka_unit_test_setup(damage_is_found, empty_folder),
      cmocka_unit_test_setup(open_checkpoints_take_no_room, empty_folder),
      cmocka_unit_test_setup(pruned_ones_are_not_damage, empty_folder),
      cmocka_unit_test_setup(unreadable_is_not_damaged, empty_folder),
      cmocka_unit_test_setup(failed_save_loses_nothing, empty_folder),
      cmocka_unit_test_setup(killed_save_loses_nothing, empty_folder),
      cmocka_unit_test_setup(one_run_per_folder, empty_folder),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
