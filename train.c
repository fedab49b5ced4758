// ./train CONFIG.json: arguments, config, threads, and the one thing that the command is for.
#include "base/hash.h"
#include "base/machine.h"
#include "base/ranks.h"
#include "base/standard.h"
#include "kernels/backends.h"
#include "model/config/config.h"
#include "model/config/history.h"
#include "model/config/load.h"
#include "trainer/alternatives.h"
#include "trainer/costs.h"
#include "trainer/engine.h"
#include "trainer/options.h"
#include "trainer/predict.h"
#include "trainer/signals.h"
#include "trainer/trainer.h"

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// Compute threads: as configured, or as many as this process has processors.
static void set_threads(const Config *c) {
  if (c->run.threads)
    omp_set_num_threads(c->run.threads);
  else if (!getenv("OMP_NUM_THREADS"))
    omp_set_num_threads(machine_threads(""));
}

// The backend to measure a config for: a plan needs no device.
static const Backend *backend_for(const Options *o, const Config *c, Error *err) {
  return o->plan ? backend_for_plan(c, err) : backend_for_run(c, err);
}

// 1 when a micro-batch of `tokens` slots fits the backend, 0 when it does not, -1 when no config may have it; *err is
// set unless it fits. *c becomes the config with `tokens`.
static int tokens_fit(const Options *o, const char *file, const Backend *b, int64_t tokens, Config *c, Error *err) {
  const char **sets = xmalloc((size_t)(o->n_sets + 1) * sizeof *sets);
  char *last = xasprintf("data.micro_batch_tokens=%lld", (long long)tokens);
  for (int i = 0; i < o->n_sets; i++) sets[i] = o->sets[i];
  sets[o->n_sets] = last;
  int bad = config_load(c, file, sets, o->n_sets + 1, err), fits = 0;
  if (!bad) {
    Engine e = {0};
    bad = engine_record(&e, c, b, 1, err) != 0;
    fits = !bad && engine_check_budget(&e, err) == 0;
    engine_free(&e);
  }
  free(last);
  free(sets);
  return bad ? -1 : fits;
}

// --tokens max: doubles the configured T while it fits, or halves it until it does; then bisects down to TOKEN_STEP.
static int find_tokens(const Options *o, const char *file, Config *c, Error *err) {
  enum { TOKEN_STEP = 64, FREE_SHARE = 256 };
  int64_t low = c->data.micro_batch_tokens,
          high = low; // low: the most that is known to fit, or what the config refuses as too few
  Config tried;
  Error why;
  const Backend *b = backend_for(o, c, err);
  if (!b) return -1;
  if (!(c->memory.budget_gb > 0) && b->memory() == INT64_MAX) // a plan for a device that is not there
    return error_set(err, "--set memory.budget_gb=80 is an H100", "--tokens max: there is no %s device to be filled",
                     b->name);
  int fits = tokens_fit(o, file, b, low, &tried, err);
  if (fits < 0) return -1;
  if (fits) {
    for (high = 2 * low; tokens_fit(o, file, b, high, &tried, &why) == 1; high *= 2) low = high;
  } else {
    for (low = high / 2; low > 0 && (fits = tokens_fit(o, file, b, low, &tried, &why)) == 0; low /= 2) {
      *err = why;
      high = low;
    }
    fits = fits == 1;
  }
  while (high - low > TOKEN_STEP) {
    int64_t middle = (low + high) / 2 / TOKEN_STEP * TOKEN_STEP;
    if (middle <= low) break;
    int one = tokens_fit(o, file, b, middle, &tried, &why);
    if (one == 1 || (one < 0 && !fits)) {
      low = middle;
      fits = one == 1;
    } else {
      high = middle;
      *err = why;
    }
  }
  if (!fits) {
    snprintf(err->hint, sizeof err->hint, "raise memory.budget_gb; smaller images and captions need fewer slots");
    return error_prefix(err, "--tokens max: nothing fits; with %lld slots", (long long)high);
  }
  // What is free changes by some MB until the run has its memory; but the config may refuse fewer than were found.
  int64_t less = c->memory.budget_gb > 0 ? low : (low - low / FREE_SHARE) / TOKEN_STEP * TOKEN_STEP;
  fits = less > 0 && tokens_fit(o, file, b, less, c, err) == 1;
  if (!fits && less < low) fits = tokens_fit(o, file, b, less = low, c, err) == 1;
  if (!fits) return -1;
  log_info("--tokens max: %lld token slots a micro-batch", (long long)less);
  return 0;
}

// Sets what libraries read from the environment when they are loaded, and starts the program again.
//
// OpenMP threads that wait for each other spin for milliseconds by default: on cores shared with anything else a step
// then takes ten times as long (measured in docs/LOG.md); whoever sets a policy keeps it. OpenBLAS starts a thread a
// core that nothing here uses, and hangs at once where the address space is too small for all their buffers (ulimit
// -v).
static void set_environment(char **argv) {
  const char *blas = getenv("OPENBLAS_NUM_THREADS");
  int spins = !getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY"), bad = 0;
  if (!spins && blas && strcmp(blas, "1") == 0) return;
  if (spins) bad |= setenv("GOMP_SPINCOUNT", "1000", 1);
  bad |= setenv("OPENBLAS_NUM_THREADS", "1", 1);
  if (bad) return;
  char path[4096]; // by its own name, which ps shows
  ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
  if (n > 0) {
    path[n] = 0;
    execv(path, argv);
  }
  execv("/proc/self/exe", argv); // it was moved; returns only where /proc is missing: then it goes on as it is
}

// Called before the libraries are initialised, when the C library does not know the environment yet.
static void before_libraries(int argc, char **argv, char **environment) {
  (void)argc;
  environ = environment;
  set_environment(argv);
}
__attribute__((section(".preinit_array"), used)) static void (*const before_all)(int, char **,
                                                                                 char **) = before_libraries;

// Whether the command line names the run's folder, rather than a saved config, which names where the run was.
static bool run_dir_given(const Config *c) {
  for (int k = 0; k < config_key_count; k++)
    if (strcmp(config_keys[k].path, "run.folder") == 0) return c->origin[k] == ORIGIN_FLAG && c->run.folder[0];
  return false;
}

// Whether the folder is a checkpoint: its config.json describes an exported model.
static int refuse_checkpoint(const char *folder, Error *err) {
  char *state = xasprintf("%s/state.json", folder);
  int found = access(state, F_OK) == 0;
  free(state);
  if (!found) return 0;
  return error_set(err, "give its run's folder; with --from the run uses this checkpoint rather than the newest",
                   "%s is a checkpoint, not a run", folder);
}

// A folder that holds no config.
static void refuse_folder(const char *folder, Error *err) {
  error_set(err,
            "CONFIG is a JSON file as in configs/, or the folder of a run, which ./train makes (runs/NAME) and "
            "where it keeps config.json, tokenizer.bpe and its checkpoints",
            "%s is a folder, but not that of a run: it has no config.json", folder);
}

// Names the keys that a run's config of an older version lacks, with the defaults that they take.
static void name_new_keys(const Config *c, const char *file) {
  char *keys = config_new_keys(c);
  // Before its first mention the version was 1.
  if (keys) log_info("%s was written by version %d; new since: %s", file, c->version ? c->version : 1, keys);
  free(keys);
}

// CONFIG is a file, or a run's folder with the config.json it was trained with.
static int load_config(const Options *o, Config *c, char **run, Error *err) {
  struct stat st;
  int folder = o->config && stat(o->config, &st) == 0 && S_ISDIR(st.st_mode);
  if (folder && refuse_checkpoint(o->config, err) != 0) return -1;
  char *file = folder ? xasprintf("%s/config.json", o->config) : o->config ? xstrdup(o->config) : NULL;
  if (folder && access(file, F_OK) != 0) {
    free(file);
    refuse_folder(o->config, err);
    return -1;
  }
  int bad = config_load(c, file, o->sets, o->n_sets, err);
  if (!bad) set_threads(c);
  if (!bad && folder) name_new_keys(c, file);
  if (!bad && o->tokens_max) bad = find_tokens(o, file, c, err);
  free(file);
  if (!bad) *run = folder && !run_dir_given(c) ? xstrdup(o->config) : config_run_folder(c);
  return bad;
}

// Prints the table even of what does not fit: rank 0 does, while the others measure with it.
static int print_plan(const Config *c, const char *run, Error *err) {
  Engine e = {0};
  const Backend *b = backend_for_plan(c, err);
  if (!b) return -1;
  Costs costs = costs_open_plan(c, b, run);
  if (ranks_rank() > 0) {
    costs_free(&costs);
    return 0;
  }
  int bad = engine_record_with(&e, c, b, 1, costs, NULL, err) != 0;
  if (!bad) {
    engine_print_plan(&e, stdout);
    if (b->link) {
      alternatives_print(&e, stdout);
      predict_print(&e, stdout);
    }
    if (c->processes > 1) predict_print_group(&e, stdout);
    bad = standard_flush(err) != 0;
    Error small; // this machine's memory: the run may be for another
    if (!bad && engine_check_host(&e, &small) != 0) log_warn("%s", small.text);
    if (!bad) bad = engine_check_budget(&e, err) != 0;
  }
  engine_free(&e);
  return bad ? -1 : 0;
}

// Checks what needs neither data nor the machine: memory.per_tensor names tensors, and a budget in the config is
// enough.
static int check_memory(const Config *c, Error *err) {
  Engine e = {0};
  Error no_device;
  const Backend *b = backend_for_plan(c, &no_device);
  int bad = engine_record(&e, c, b ? b : backend_of_host(), 1, err) != 0;
  if (!bad && b && c->memory.budget_gb > 0) bad = engine_check_budget(&e, err) != 0;
  engine_free(&e);
  return bad ? -1 : 0;
}

// ---- several processes ----

// Work that is done once: by rank 0, as if alone, while the other processes wait.
static bool is_for_one(const Options *o) {
  return o->help || !o->config || o->print_config || o->dump || o->sample || o->describe || o->eval;
}

// --dump writes a step of all processes' packs. --print-config is each process's own.
static void take_all(const Options *o, Config *c) {
  if (o->print_config) return;
  if (o->dump) c->train.micro_batches *= c->processes;
  c->processes = 1;
}

// Checks that all processes run the same program with the same settings, or their steps would differ. -1 with *err
// naming those that do not.
static int check_group(const Options *o, const Config *c, Error *err) {
  if (c->processes == 1) return 0;
  size_t bytes;
  char *program = file_read("/proc/self/exe", SIZE_MAX, &bytes, err);
  if (!program) return -1;
  uint64_t build = hash64(program, bytes, 0);
  char *config = config_to_json(c);
  char *text = xasprintf("%s %d %s %s %lld", config, o->resume, o->from ? o->from : "", o->init ? o->init : "",
                         (long long)o->stop_at);
  uint64_t settings = hash64(text, strlen(text), 0);
  free(text);
  free(config);
  free(program);
  return ranks_agree(build, "another build of this program", "start the same ./train on every host", err) != 0
             ? -1
             : ranks_agree(settings, "other settings", "start all of them with the same config and flags", err);
}

// The end of a process that did what it should.
static int leave(void) {
  ranks_wait();
  backend_leave();
  ranks_close();
  signals_die();
  return 0;
}

int main(int argc, char **argv) {
  Options o;
  Config c;
  Error err;
  char *run = NULL;
  standard_open();
  set_environment(argv); // again, for C libraries that call nothing before
  if (ranks_open(&err) != 0 || options_parse(&o, argc, argv, &err) != 0) fatal(&err);
  bool waits = ranks_rank() > 0 && is_for_one(&o);
  if (o.help || (!o.config && !o.print_config)) {
    if (waits) return leave();
    fputs(options_help, stdout);
    fputs("\n", stdout);
    config_help(stdout);
    if (standard_flush(&err) != 0) fatal(&err);
    options_free(&o);
    return o.help ? leave() : 2;
  }
  if (load_config(&o, &c, &run, &err) != 0 || check_group(&o, &c, &err) != 0) fatal(&err);
  if (waits) return leave();
  if (is_for_one(&o)) take_all(&o, &c);
  int bad = 0, code = 2;
  if (o.print_config) {
    config_print(&c, stdout);
    bad = standard_flush(&err) != 0 || check_memory(&c, &err) != 0;
  } else if (o.plan) {
    bad = print_plan(&c, run, &err);
  } else {
    if (options_check_outputs(&o, run, &err) != 0) fatal(&err);
    Trainer *t = trainer_open(&c, &o, run, &err);
    if (!t)
      bad = -1;
    else if (o.dump)
      bad = trainer_dump(t, o.dump, &err);
    else if (o.eval)
      bad = trainer_evaluate(t, &err);
    else if (o.sample)
      bad = trainer_sample(t, o.sample, o.out, &err);
    else if (o.describe)
      bad = trainer_describe(t, o.describe, &err);
    else if ((bad = trainer_train(t, &err)) > 0)
      code = 1;
    trainer_close(t);
  }
  if (bad) fatal_code(&err, code);
  if (standard_flush(&err) != 0) fatal(&err);
  free(run);
  options_free(&o);
  return leave();
}
