#include "trainer/options.h"

#include "data/paths.h"
#include "data/sample_files.h"
#include "model/config/config.h"
#include "model/config/load.h"

#include <errno.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const char options_help[] =
    "usage: ./train CONFIG.json [flags]     CONFIG may be a run folder: its config and newest checkpoint\n"
    "\n"
    "  --resume              go on from the run's newest valid checkpoint, or start at step 0\n"
    "  --from DIR            go on from this checkpoint\n"
    "  --init DIR            start with this checkpoint's weights, everything else fresh (fine-tuning)\n"
    "  --stop-at N           stop after step N and save; the schedule still runs to train.steps\n"
    "  --eval                print the quality figures of a checkpoint; --out FOLDER: held-out captions drawn, and "
    "the\n"
    "                        real images in FOLDER/real\n"
    "  --sample CAPTION      draw a caption; -: captions from standard input, one a line, or as they are typed\n"
    "    --count N           N images of each caption, from seeds run.seed, run.seed + 1, ...\n"
    "    --out FILE.png      where to; of several drawings a sheet. A FOLDER gets a PNG each and captions.tsv\n"
    "  --describe IMAGE      caption an image file\n"
    "                        keys that steer both: eval.guidance, eval.sampler_steps, eval.temperature, eval.top_p\n"
    "  --plan                print the memory table and exit; needs neither data nor tokenizer\n"
    "  --dump DIR            write one step (packs, noise, weights, losses, every gradient) as safetensors and exit\n"
    "  --tokens max          the largest micro-batch that fits memory.budget_gb under the memory policy\n"
    "  --profile             print time and rate per kind of op when training ends\n"
    "  --trace FILE          write a Chrome trace of one step (Perfetto opens it): ops by lane\n"
    "  --print-config        print the resolved config with where each value came from\n"
    "  --set KEY=VALUE       set any key of the config, e.g. --set train.lr=1e-3\n"
    "  --help                this text\n";

static int add_set(Options *o, char *text) {
  o->sets = xrealloc(o->sets, (size_t)(o->n_sets + 1) * sizeof *o->sets);
  o->sets[o->n_sets++] = text;
  return 0;
}

static int count_set(int n, const bool *flags) {
  int sum = 0;
  for (int i = 0; i < n; i++) sum += flags[i];
  return sum;
}

static int parse_number(const char *flag, const char *value, int64_t *out, Error *err) {
  char *end;
  *out = strtoll(value, &end, 10);
  if (end > value && !*end && *out >= 1 && *out <= INT32_MAX) return 0;
  return error_set(err, "./train --help shows what it counts", "%s %s is not a positive number", flag, value);
}

static int unknown_flag(const char *flag, Error *err) {
  char hint[sizeof err->hint] = "./train --help lists all of them; --set KEY=VALUE reaches any key";
  const char *key = config_key_meant(flag + strspn(flag, "-"));
  const char *equals = strchr(flag, '=');
  if (equals)
    snprintf(hint, sizeof hint, "a flag and its value are two words: %.*s %.100s", (int)min_i64(equals - flag, 100),
             flag, equals + 1);
  else if (key)
    snprintf(hint, sizeof hint, "--set %s=VALUE sets that key; ./train --help lists flags and keys", key);
  return error_set(err, hint, "unknown flag %s", flag);
}

int options_parse(Options *o, int argc, char **argv, Error *err) {
  *o = (Options){.count = 1};
  const struct {
    const char *flag;
    const char **text;
    bool *on;
    int64_t *number;
  } table[] = {{"--resume", NULL, &o->resume, NULL},   {"--from", &o->from, NULL, NULL},
               {"--init", &o->init, NULL, NULL},       {"--stop-at", NULL, NULL, &o->stop_at},
               {"--dump", &o->dump, NULL, NULL},       {"--sample", &o->sample, NULL, NULL},
               {"--count", NULL, NULL, &o->count},     {"--describe", &o->describe, NULL, NULL},
               {"--out", &o->out, NULL, NULL},         {"--eval", NULL, &o->eval, NULL},
               {"--plan", NULL, &o->plan, NULL},       {"--print-config", NULL, &o->print_config, NULL},
               {"--profile", NULL, &o->profile, NULL}, {"--trace", &o->trace, NULL, NULL},
               {"--help", NULL, &o->help, NULL},       {"-h", NULL, &o->help, NULL}};
  for (int i = 1; i < argc; i++) {
    const char *arg = argv[i];
    if (arg[0] != '-' || !arg[1]) {
      if (o->config)
        return error_set(err, "--sample and --describe take one argument each: a caption of several words in quotes",
                         "a second config on the command line: %s", arg);
      o->config = xstrdup(arg);
      continue;
    }
    const char *value = i + 1 < argc ? argv[i + 1] : NULL;
    const char *key = config_flag_key(arg);
    size_t t = 0;
    while (t < sizeof table / sizeof *table && strcmp(table[t].flag, arg) != 0) t++;
    bool known = t < sizeof table / sizeof *table;
    if (known && table[t].on) {
      *table[t].on = true;
      continue;
    }
    if (!known && !key && strcmp(arg, "--set") != 0) return unknown_flag(arg, err);
    if (!value) return error_set(err, "./train --help shows what it takes", "%s needs a value", arg);
    if (value[0] == '-' && value[1] == '-') // a forgotten value, not a file of that name
      return error_set(err, "./train --help shows what it takes; a path may begin with ./",
                       "%s needs a value, and got %s", arg, value);
    i++;
    if (known && table[t].text) {
      *table[t].text = value;
    } else if (known) {
      if (parse_number(arg, value, table[t].number, err) != 0) return -1;
    } else if (strcmp(arg, "--tokens") == 0 && strcmp(value, "max") == 0) {
      o->tokens_max = true;
    } else if (key) {
      add_set(o, xasprintf("%s=%s", key, value));
    } else {
      add_set(o, xstrdup(value));
    }
  }
  if (count_set(3, (bool[]){o->resume, o->from != NULL, o->init != NULL}) > 1)
    return error_set(err, "--resume takes the newest, --from one given checkpoint, --init only its weights",
                     "--resume, --from and --init exclude each other");
  int uses = count_set(5, (bool[]){o->plan, o->dump != NULL, o->sample != NULL, o->describe != NULL, o->eval});
  if (uses > 1)
    return error_set(err, "run them one after the other",
                     "--plan, --dump, --sample, --describe and --eval exclude each other");
  if (uses && (o->profile || o->trace))
    return error_set(err, "they time the steps of a run that trains", "--profile and --trace go with training alone");
  if (o->out && !o->sample && !o->eval)
    return error_set(err, "--sample \"a caption\" --out FILE.png", "--out goes with --sample or --eval");
  FileKind kind = o->out ? file_kind(o->out) : FILE_OTHER;
  if ((kind == FILE_PICTURE || kind == FILE_PICTURE_OTHER) && !options_out_is_file(o->out))
    return error_set(err, "name a .png, or a folder, which gets a PNG for each drawing",
                     "--out %s: drawings are PNG files", o->out);
  if (o->count > 1 && !o->sample)
    return error_set(err, "--sample \"a caption\" --count 8", "--count goes with --sample");
  return 0;
}

bool options_out_is_file(const char *out) {
  return path_ends(out, ".png");
}

// What is in the way of writing a file, or of making a folder with its parents and files in it; 0: nothing. `made`: a
// folder that will be there by then, or NULL.
static int write_obstacle(const char *path, bool is_folder, const char *made) {
  struct stat st;
  if (stat(path, &st) == 0) {
    if (S_ISDIR(st.st_mode) != is_folder) return is_folder ? ENOTDIR : EISDIR;
    return access(path, is_folder ? W_OK | X_OK : W_OK) == 0 ? 0 : errno;
  }
  if (errno != ENOENT) return errno;
  if (!*path) return ENOENT;
  char *copy = xstrdup(path), *parent = dirname(copy);
  int obstacle = ENOENT;
  if (is_folder || (made && strcmp(parent, made) == 0) || access(parent, F_OK) == 0)
    obstacle = write_obstacle(parent, true, NULL);
  free(copy);
  return obstacle;
}

int options_check_outputs(const Options *o, const char *run, Error *err) {
  const struct {
    const char *flag, *path, *made;
    bool is_folder;
  } outputs[] = {{"--dump", o->dump, NULL, true},
                 {"--out", o->out, NULL, o->out && !options_out_is_file(o->out)},
                 {"--trace", o->trace, run, false}};
  for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
    if (!outputs[i].path) continue;
    int obstacle = write_obstacle(outputs[i].path, outputs[i].is_folder, outputs[i].made);
    if (obstacle)
      return error_set(err,
                       outputs[i].is_folder ? "name a folder that can be written, or made"
                                            : "name a file that can be written, in a folder that is there",
                       "%s: cannot write %s: %s", outputs[i].flag, outputs[i].path, strerror(obstacle));
  }
  return 0;
}

void options_free(Options *o) {
  for (int i = 0; i < o->n_sets; i++) free((char *)o->sets[i]);
  free(o->sets);
  free(o->config);
}
