// Data as it comes: captions no one checked, archives that climb or are cut, a folder that changes under the run,
// shards of very many members and their cached indexes.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/philox.h"
#include "data/loader.h"
#include "tests/unit/archive.h"
#include "tests/unit/bytes.h"
#include "tests/unit/pack_check.h"
#include "tests/unit/picture.h"
#include "tests/unit/slow.h"

#include <sys/stat.h>
#include <utime.h>

enum { PATCH = 4, VALUES = 3 * PATCH * PATCH, VOCAB = 300, MAX_CAPTION = 20 };

static uint32_t rng_count;

static uint32_t rng(void) {
  return philox4(21, rng_count++, 99, 0).v[0];
}

static void write_png(const char *name, int width, int height, int salt) {
  size_t n;
  uint8_t *png = png_make(width, height, salt, &n);
  write_bytes(name, png, n);
  free(png);
}

static Source *open_source(const char *type, const char *name, const char *held_out_by) {
  Error err;
  Source *s = source_open(type, at(name), held_out_by, &err);
  if (!s) fail_msg("%s", err.text);
  return s;
}

// ---- captions

static char *caption_long; // 1 MB, of words and of one endless word
static size_t caption_bytes;

static void caption_make(void) {
  caption_bytes = 1 << 20;
  caption_long = xmalloc(caption_bytes + 1);
  for (size_t i = 0; i < caption_bytes; i++)
    caption_long[i] = (char)(i % 9 == 8 && i < caption_bytes / 2 ? ' ' : 'a' + i * 7 % 26);
  caption_long[caption_bytes] = 0;
}

static void *block_alloc(size_t bytes) {
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static LoaderConfig loader_config(Source *const *source, int sources, const Tokenizer *tokenizer) {
  static const double weight[4] = {1, 1, 1, 1};
  return (LoaderConfig){.stream = {.source = source,
                                   .weight = weight,
                                   .sources = sources,
                                   .tokenizer = tokenizer,
                                   .shape = {128, 17, VALUES, VOCAB},
                                   .max_text = 128,
                                   .max_document = 100,
                                   .max_caption = MAX_CAPTION,
                                   .fit = {IMAGE_SQUARE, 8, PATCH, 0},
                                   .max_pixels = 1 << 20,
                                   .caption_to_image = 0.5,
                                   .flow_times = {.mean = -0.8, .std = 0.8},
                                   .seed = 3},
                        .ce_weight = 1,
                        .packs_per_step = 1,
                        .world = 1,
                        .threads = 2,
                        .held = 1,
                        .host_alloc = block_alloc,
                        .host_release = free};
}

static void test_captions(void **state) {
  (void)state;
  static const char odd[] =
      "caf\xe9 \xff\xfe \xc0\xaf \xed\xa0\x80 \xf0\x9f\x98 end"; // latin 1, overlong, half an emoji
  Error err;
  caption_make();
  assert_int_equal(folder_make(at("captions"), &err), 0);
  assert_int_equal(folder_make(at("captions-json"), &err), 0);
  write_png("captions/a.png", 9, 9, 0);
  write_png("captions-json/a.png", 9, 9, 0);
  char *tsv = xasprintf("a.png\t%s\na.png\t \t \na.png\t\na.png\t%s\n\t\n\t\t\t\n", odd, caption_long);
  write_text("captions/captions.tsv", tsv);
  char *jsonl = xasprintf("{\"file\":\"a.png\",\"caption\":\"%s\"}\n{\"file\":\"a.png\",\"caption\":\"\"}\n"
                          "{\"file\":\"a.png\",\"caption\":\"%s\"}\n{\"file\":\"a.png\",\"caption\":\"a\\u0000b\"}\n",
                          odd, caption_long);
  write_text("captions-json/captions.jsonl", jsonl);
  Archive a = {0};
  size_t n;
  uint8_t *png = png_make(9, 9, 0, &n);
  const char *names[] = {"odd", "empty", "long", "json"}, *texts[] = {odd, "", caption_long, NULL};
  for (int i = 0; i < 4; i++) {
    char name[32];
    snprintf(name, sizeof name, "%s.png", names[i]);
    archive_file(&a, name, png, n);
    snprintf(name, sizeof name, "%s.%s", names[i], texts[i] ? "txt" : "json");
    if (texts[i]) archive_text(&a, name, texts[i]);
  }
  char *json = xasprintf("{\"caption\": \"%s\"}", odd);
  archive_text(&a, "json.json", json);
  archive_end(&a);
  archive_write(&a, "captions/shard.tar");

  // JSON must be UTF-8 and cannot say NUL in a string; lines and .txt files may hold any bytes.
  Source *source[3] = {open_source("folder", "captions", NULL), open_source("folder", "captions-json", NULL),
                       open_source("webdataset", "captions/shard.tar", NULL)};
  const int64_t usable[3] = {2, 1, 2}, skipped[3] = {4, 3, 2};
  for (int i = 0; i < 3; i++) {
    assert_int_equal(source_count(source[i]), usable[i]);
    assert_int_equal(samples_left_out(source[i]), skipped[i]);
    for (int64_t k = 0; k < usable[i]; k++) {
      const SamplePart *text = &source_sample(source[i], k)->part[0];
      bool is_long = text->text_bytes == caption_bytes;
      assert_string_equal(text->text, is_long ? caption_long : odd);
    }
  }
  Tokenizer *tokenizer = tokenizer_load(NULL, VOCAB, &err);
  LoaderConfig config = loader_config(source, 3, tokenizer);
  double start = cpu_seconds();
  Loader *loader = loader_open(&config, NULL, &err);
  if (!loader) fail_msg("%s", err.text);
  for (int i = 0; i < 5; i++) {
    Pack *pack;
    if (loader_next(loader, &pack, &err) < 0) fail_msg("%s", err.text);
    if (pack_check(&pack->batch, config.stream.shape, &err) != 0) fail_msg("%s", err.text);
    assert_int_equal(pack->lost, 0);
    assert_true(pack->documents >= 3);
    loader_release(loader, pack);
  }
  assert_true(loader_stats(loader).stream.truncated > 0);
  assert_true(cpu_seconds() - start < 20 * TIMES_SLOWER);
  loader_close(loader);
  for (int i = 0; i < 3; i++) source_close(source[i]);
  tokenizer_free(tokenizer);
  free(tsv);
  free(jsonl);
  free(json);
  free(png);
  free(caption_long);
}

// ---- archives

// Names are only names: nothing outside the archive is opened for them.
static void test_climbing_names(void **state) {
  (void)state;
  Error err;
  Archive a = {0};
  size_t n;
  uint8_t *png = png_make(5, 6, 1, &n);
  const char *keys[] = {"../../etc/up", "/etc/root", "a/../../b", "./c"};
  for (int i = 0; i < 4; i++) {
    char name[64];
    snprintf(name, sizeof name, "%s.png", keys[i]);
    archive_file(&a, name, png, n);
    snprintf(name, sizeof name, "%s.txt", keys[i]);
    archive_text(&a, name, "caption");
  }
  archive_end(&a);
  archive_write(&a, "climb.tar");
  Source *s = open_source("webdataset", "climb.tar", NULL);
  assert_int_equal(source_count(s), 4);
  for (int i = 0; i < 4; i++) {
    uint8_t *bytes;
    size_t got;
    assert_int_equal(source_read_image(s, source_sample(s, i)->part[1].image, &bytes, &got, &err), 0);
    assert_int_equal(got, n);
    assert_memory_equal(bytes, png, n);
    free(bytes);
  }
  source_close(s);
  free(png);
}

// Cut after any byte: an error that names the archive, or the samples that are whole.
static void test_cut_anywhere(void **state) {
  (void)state;
  Archive a = {0};
  size_t n;
  uint8_t *png = png_make(5, 6, 1, &n);
  archive_file(&a, "a.png", png, n);
  archive_text(&a, "a.txt", "one");
  archive_file(&a, "b.png", png, n);
  archive_text(&a, "b.txt", "two");
  archive_end(&a);
  int opened = 0, refused = 0;
  for (size_t cut = 0; cut <= a.n; cut += 1 + cut % 7) {
    write_bytes("cut.tar", a.bytes, cut);
    Error err = {0};
    Source *s = source_open("webdataset", at("cut.tar"), NULL, &err);
    refused += s == NULL;
    opened += s != NULL;
    if (!s) assert_non_null(strstr(err.text, "cut.tar"));
    if (s) assert_in_range(source_count(s), 1, 2);
    source_close(s);
  }
  assert_true(opened > 100 && refused > 100);
  free(a.bytes);
  free(png);
}

// ---- a folder that changes under the run

enum { IMAGES = 24, SHARD_IMAGES = 8 };

static void set_time(const char *path, time_t seconds) {
  struct utimbuf times = {seconds, seconds};
  assert_int_equal(utime(path, &times), 0);
}

static void shard_write(const char *name, int salt) {
  Archive a = {0};
  for (int i = 0; i < SHARD_IMAGES; i++) {
    char member[32];
    size_t n;
    uint8_t *png = png_make(8, 8, 0, &n); // of one size, whatever the salt: only time tells the shards apart
    snprintf(member, sizeof member, "%d.png", salt ? SHARD_IMAGES - 1 - i : i);
    archive_file(&a, member, png, n);
    snprintf(member, sizeof member, "%d.txt", salt ? SHARD_IMAGES - 1 - i : i);
    archive_text(&a, member, "in a shard");
    free(png);
  }
  archive_end(&a);
  archive_write(&a, name);
}

static void changing_make(const char *folder) {
  Error err;
  char name[64];
  assert_int_equal(folder_make(at(folder), &err), 0);
  char *list = xstrdup("");
  for (int i = 0; i < IMAGES; i++) {
    snprintf(name, sizeof name, "%s/%02d.png", folder, i);
    write_png(name, 8, 8, i);
    char *longer = xasprintf("%s%02d.png\tpicture %d\n", list, i, i);
    free(list);
    list = longer;
  }
  snprintf(name, sizeof name, "%s/captions.tsv", folder);
  write_text(name, list);
  free(list);
  snprintf(name, sizeof name, "%s/shard.tar", folder);
  shard_write(name, 0);
  set_time(at(name), 1000000000);
}

// Breaks image i of the folder in one of five ways.
static void break_image(const char *folder, int i) {
  char name[64];
  snprintf(name, sizeof name, "%s/%02d.png", folder, i);
  if (i % 5 == 0) {
    assert_int_equal(unlink(at(name)), 0);
  } else if (i % 5 == 1) {
    assert_int_equal(truncate(at(name), 60), 0);
  } else if (i % 5 == 2) {
    write_png(name, 40, 30, i); // another size
  } else if (i % 5 == 3) {
    write_text(name, "no picture any more");
  } else {
    assert_int_equal(unlink(at(name)), 0);
    assert_int_equal(mkdir(at(name), 0777), 0);
  }
}

// Takes packs until every image has been read; documents without loss. -1 and *err when the loader gives up.
static int64_t take_packs(Loader *loader, int packs, const LoaderConfig *config, Error *err) {
  int64_t silent = 0;
  for (int i = 0; i < packs; i++) {
    Pack *pack;
    Error wrong;
    if (loader_next(loader, &pack, err) < 0) return -1;
    if (pack_check(&pack->batch, config->stream.shape, &wrong) != 0) fail_msg("%s", wrong.text);
    silent += pack->lost;
    loader_release(loader, pack);
  }
  return silent;
}

static void test_changing_folder(void **state) {
  (void)state;
  Error err;
  changing_make("live");
  Source *source[2] = {open_source("folder", "live", NULL), open_source("webdataset", "live/shard.tar", NULL)};
  Tokenizer *tokenizer = tokenizer_load(NULL, VOCAB, &err);
  LoaderConfig config = loader_config(source, 2, tokenizer);
  Loader *loader = loader_open(&config, NULL, &err);
  if (!loader) fail_msg("%s", err.text);
  assert_int_equal(take_packs(loader, 20, &config, &err), 0);
  for (int i = 0; i < 10; i++) break_image("live", i);
  assert_true(take_packs(loader, 60, &config, &err) > 0);
  struct stat st;
  assert_int_equal(stat(at("live/shard.tar"), &st), 0);
  shard_write("live/shard.tar", 1); // the same bytes under other names: every image decodes, with a wrong caption
  assert_int_equal(take_packs(loader, 60, &config, &err), -1);
  char was[80];
  snprintf(was, sizeof was, "live/shard.tar has changed since it was indexed: it had %lld bytes",
           (long long)st.st_size);
  assert_non_null(strstr(err.text, was));
  assert_non_null(strstr(err.text, "written 2001-09-0")); // as changing_make set it
  Pack *pack;
  assert_true(loader_next(loader, &pack, &err) < 0); // and it stays so
  assert_non_null(strstr(err.text, was));
  char *state_then = loader_state(loader);
  loader_close(loader);
  free(state_then);

  uint8_t *bytes;
  size_t n;
  for (int i = 0; i < IMAGES; i++) {
    int rc = source_read_image(source[0], source_sample(source[0], i)->part[1].image, &bytes, &n, &err);
    assert_int_equal(rc, i < 10 ? -1 : 0);
    free(bytes);
  }
  for (int i = 0; i < SHARD_IMAGES; i++) {
    assert_int_equal(source_read_image(source[1], source_sample(source[1], i)->part[1].image, &bytes, &n, &err),
                     SOURCE_CHANGED);
    assert_non_null(strstr(err.text, "has changed"));
    assert_non_null(strstr(err.text, "shard.tar"));
  }
  source_close(source[0]);
  source_close(source[1]);
  tokenizer_free(tokenizer);
}

static void test_too_many_bad(void **state) {
  (void)state;
  Error err;
  enum { BROKEN = 12 };
  changing_make("bad");
  Source *source[1] = {open_source("folder", "bad", NULL)};
  for (int i = 0; i < BROKEN; i++) break_image("bad", i);
  Tokenizer *tokenizer = tokenizer_load(NULL, VOCAB, &err);
  const int most[4] = {0, 1, BROKEN - 1, BROKEN};
  for (int i = 0; i < 4; i++)
    for (int threads = 1; threads <= 3; threads += 2) {
      LoaderConfig config = loader_config(source, 1, tokenizer);
      config.max_bad = most[i];
      config.threads = threads;
      Loader *loader = loader_open(&config, NULL, &err);
      if (!loader) fail_msg("%s", err.text);
      err = (Error){0};
      int64_t silent = take_packs(loader, 60, &config, &err);
      bool enough = most[i] == 0 || most[i] >= BROKEN; // 0: no limit
      assert_int_equal(silent > 0, enough);
      assert_int_equal(silent == -1, !enough);
      if (!enough) {
        char says[80];
        snprintf(says, sizeof says, "%d images cannot be decoded, more than data.max_bad = %d: ", most[i] + 1, most[i]);
        assert_non_null(strstr(err.text, says));
        int listed = 0;
        for (const char *p = err.text; (p = strstr(p, ".png")); p++) listed++;
        assert_int_equal(listed, most[i] + 1 < 5 ? most[i] + 1 : 5);
        assert_non_null(strstr(err.hint, "data.max_bad"));
        bool changed = strstr(err.hint, "has changed since") || strstr(err.hint, "cannot open") ||
                       strstr(err.hint, "is not a file");
        assert_true(changed);
        Pack *pack;
        assert_true(loader_next(loader, &pack, &err) < 0); // and it stays so
      }
      loader_close(loader);
    }
  LoaderConfig config = loader_config(source, 1, tokenizer);
  config.max_bad = -1;
  assert_null(loader_open(&config, NULL, &err));
  source_close(source[0]);
  tokenizer_free(tokenizer);
}

// ---- indexes of shards

static void expect_same_source(const Source *a, const Source *b) {
  assert_int_equal(source_count(a), source_count(b));
  assert_int_equal(samples_left_out(a), samples_left_out(b));
  SourceStats x_stats = source_stats(a), y_stats = source_stats(b);
  for (int i = 0; i < UNUSED_REASONS; i++) {
    assert_int_equal(x_stats.unused.count[i], y_stats.unused.count[i]);
    const char *x = x_stats.unused.first[i], *y = y_stats.unused.first[i];
    assert_true(!x == !y);
    if (x) assert_string_equal(x, y);
  }
  for (int64_t i = 0; i < source_count(a); i++) {
    const Sample *x = source_sample(a, i), *y = source_sample(b, i);
    assert_string_equal(x->key, y->key);
    assert_string_equal(x->group, y->group);
    assert_int_equal(x->kind, y->kind);
    assert_int_equal(x->parts, y->parts);
    assert_int_equal(x->part[0].text_bytes, y->part[0].text_bytes);
    assert_memory_equal(x->part[0].text, y->part[0].text, x->part[0].text_bytes + 1);
    assert_int_equal(x->part[1].width, y->part[1].width);
    assert_int_equal(x->part[1].height, y->part[1].height);
    if (i % 100) continue;
    uint8_t *p, *q;
    size_t m, n;
    Error err;
    assert_int_equal(source_read_image(a, x->part[1].image, &p, &m, &err), 0);
    assert_int_equal(source_read_image(b, y->part[1].image, &q, &n, &err), 0);
    assert_int_equal(m, n);
    assert_memory_equal(p, q, n);
    char *name_x = source_image_name(a, x->part[1].image), *name_y = source_image_name(b, y->part[1].image);
    assert_string_equal(name_x, name_y);
    free(name_x);
    free(name_y);
    free(p);
    free(q);
  }
}

// `samples` of them, every seventh without a caption, written straight to the file.
static void big_shard_write(const char *name, int samples) {
  FILE *f = fopen(at(name), "wb");
  assert_non_null(f);
  size_t n;
  uint8_t *png = png_make(6, 5, 0, &n);
  for (int i = 0; i < samples; i++) {
    Archive a = {0};
    char member[64], text[64];
    snprintf(member, sizeof member, "part/%06d.png", i);
    archive_file(&a, member, png, n);
    snprintf(member, sizeof member, "part/%06d.%s", i, i % 7 == 6 ? "nothing" : i % 2 ? "json" : "txt");
    snprintf(text, sizeof text, i % 2 ? "{\"caption\": \"picture %d\", \"style\": 3}" : "picture %d", i);
    archive_text(&a, member, text);
    assert_int_equal(fwrite(a.bytes, 1, a.n, f), a.n);
    free(a.bytes);
  }
  uint8_t zeros[1024] = {0};
  fwrite(zeros, 1, sizeof zeros, f);
  assert_int_equal(fclose(f), 0);
  free(png);
}

static void test_index_cache(void **state) {
  (void)state;
  Error err;
  assert_int_equal(folder_make(at("idx"), &err), 0);
  big_shard_write("idx/a.tar", 700);
  Source *young = open_source("webdataset", "idx/a.tar", NULL);
  assert_int_equal(access(at("idx/.a.tar.index"), F_OK), -1); // it may still be being written
  set_time(at("idx/a.tar"), 1000000000);
  Source *first = open_source("webdataset", "idx", NULL); // reads the archive: the time is part of what it goes by
  assert_int_equal(access(at("idx/.a.tar.index"), F_OK), 0);
  assert_int_equal(source_count(first), 600);
  assert_int_equal(samples_left_out(first), 100);
  assert_int_equal(source_count(young), 600);
  Source *cached = open_source("webdataset", "idx", NULL);
  expect_same_source(first, cached);
  source_close(cached);
  // That it was the cache which answered shows when the archive's captions change behind its back.
  size_t n;
  Error ignored;
  char *cache = file_read(at("idx/.a.tar.index"), 1 << 30, &n, &ignored), *tar;
  size_t tar_bytes;
  tar = file_read(at("idx/a.tar"), 1 << 30, &tar_bytes, &ignored);
  assert_non_null(cache);
  char *caption = memmem(tar, tar_bytes, "picture 0", 9);
  assert_non_null(caption);
  memcpy(caption, "PICTURE 0", 9);
  write_bytes("idx/a.tar", tar, tar_bytes);
  set_time(at("idx/a.tar"), 1000000000);
  cached = open_source("webdataset", "idx", NULL);
  assert_string_equal(source_sample(cached, 0)->part[0].text, "picture 0");
  source_close(cached);
  set_time(at("idx/a.tar"), 1000000001); // another time: walked again
  cached = open_source("webdataset", "idx", NULL);
  assert_string_equal(source_sample(cached, 0)->part[0].text, "PICTURE 0");
  source_close(cached);
  memcpy(caption, "picture 0", 9);
  write_bytes("idx/a.tar", tar, tar_bytes);
  set_time(at("idx/a.tar"), 1000000000);
  // Damaged anywhere, or cut: as if there were none, and it is written anew.
  for (int trial = 0; trial < 60; trial++) {
    char *damaged = xmalloc(n);
    memcpy(damaged, cache, n);
    size_t length = trial % 3 ? n : rng() % n, place = trial < 20 ? (size_t)trial * 4 : rng() % n;
    damaged[place] = (char)(damaged[place] ^ (1 + (int)(rng() % 255)));
    write_bytes("idx/.a.tar.index", damaged, length);
    free(damaged);
    cached = open_source("webdataset", "idx", NULL);
    expect_same_source(first, cached);
    source_close(cached);
    size_t again_bytes;
    char *again = file_read(at("idx/.a.tar.index"), 1 << 30, &again_bytes, &ignored);
    assert_int_equal(again_bytes, n);
    assert_memory_equal(again, cache, n);
    free(again);
  }
  // Another field to split by is another index.
  cached = open_source("webdataset", "idx", "caption");
  assert_string_equal(source_sample(cached, 1)->group, "picture 1");
  source_close(cached);
  assert_null(source_open("webdataset", at("idx"), "style", &err)); // .txt samples have none, cached or not
  // Where the cache cannot be written there is none, and nothing is left behind.
  assert_int_equal(unlink(at("idx/.a.tar.index")), 0);
  assert_int_equal(mkdir(at("idx/.a.tar.index"), 0777), 0);
  cached = open_source("webdataset", "idx", NULL);
  expect_same_source(first, cached);
  source_close(cached);
  assert_int_equal(rmdir(at("idx/.a.tar.index")), 0);
  assert_int_equal(unlink(at("idx/a.tar")), 0);
  assert_int_equal(rmdir(at("idx")), 0);
  source_close(first);
  source_close(young);
  free(cache);
  free(tar);
}

static void test_many_members(void **state) {
  (void)state;
  big_shard_write("many.tar", 50000);
  set_time(at("many.tar"), 1000000000);
  double start = cpu_seconds();
  Source *walked = open_source("webdataset", "many.tar", NULL);
  double walk = cpu_seconds() - start;
  start = cpu_seconds();
  Source *cached = open_source("webdataset", "many.tar", NULL);
  double again = cpu_seconds() - start;
  print_message("100,000 members: indexed in %.2f s of the processor, from the cache in %.3f s\n", walk, again);
  assert_int_equal(access(at(".many.tar.index"), F_OK), 0);
  assert_int_equal(source_count(walked), 50000 - 50000 / 7);
  expect_same_source(walked, cached);
  assert_true(walk < 5 * TIMES_SLOWER);
  assert_true(again < walk);
  source_close(walked);
  source_close(cached);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_captions),     cmocka_unit_test(test_climbing_names),
      cmocka_unit_test(test_cut_anywhere), cmocka_unit_test(test_changing_folder),
      cmocka_unit_test(test_too_many_bad), cmocka_unit_test(test_index_cache),
      cmocka_unit_test(test_many_members),
  };
  return cmocka_run_group_tests(tests, scratch_begin, scratch_end);
}
