// The data sources built on files and archives.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "data/image.h"
#include "data/source.h"
#include "tests/unit/archive.h"
#include "tests/unit/jpeg_bytes.h"
#include "tests/unit/slow.h"

#include <math.h>
#include <pthread.h>

static uint8_t *png_make(int width, int height, size_t *n) {
  Image image = {width, height, xmalloc(3 * (size_t)width * (size_t)height)};
  for (int i = 0; i < 3 * width * height; i++) image.rgb[i] = (uint8_t)(i * 7 + width);
  Error err;
  uint8_t *png = image_encode_png(&image, n, &err);
  assert_non_null(png);
  image_free(&image);
  return png;
}

static void write_png(const char *name, int width, int height) {
  size_t n;
  uint8_t *png = png_make(width, height, &n);
  write_bytes(name, png, n);
  free(png);
}

static void archive_png(Archive *a, const char *name, int width, int height) {
  size_t n;
  uint8_t *png = png_make(width, height, &n);
  archive_file(a, name, png, n);
  free(png);
}

// ---- sources

static const Sample *find(const Source *s, const char *key) {
  for (int64_t i = 0; i < source_count(s); i++)
    if (strcmp(source_sample(s, i)->key, key) == 0) return source_sample(s, i);
  return NULL;
}

static void expect_captioned(const Source *s, const char *key, const char *caption, int width, int height) {
  const Sample *sample = find(s, key);
  assert_non_null(sample);
  assert_int_equal(sample->kind, SAMPLE_CAPTIONED);
  assert_int_equal(sample->parts, 2);
  assert_int_equal(sample->part[0].kind, PART_TEXT);
  assert_string_equal(sample->part[0].text, caption);
  assert_int_equal(sample->part[0].text_bytes, strlen(caption));
  assert_int_equal(sample->part[1].kind, PART_IMAGE);
  assert_int_equal(sample->part[1].width, width);
  assert_int_equal(sample->part[1].height, height);
  uint8_t *bytes;
  size_t n;
  Error err;
  Image image;
  assert_int_equal(source_read_image(s, sample->part[1].image, &bytes, &n, &err), 0);
  assert_int_equal(image_decode(bytes, n, IMAGE_MAX_PIXELS, &image, &err), 0);
  assert_int_equal(image.width, width);
  assert_int_equal(image.height, height);
  image_free(&image);
  free(bytes);
}

static void expect_no_source(const char *type, const char *path, const char *held_out_by, const char *says) {
  Error err = {0};
  assert_null(source_open(type, path, held_out_by, &err));
  assert_non_null(strstr(err.text, says));
}

// A JPEG whose header comes after `extra` bytes of application data.
static void write_late_jpeg(const char *name, size_t extra) {
  FILE *f = fopen(at(name), "wb");
  assert_non_null(f);
  fwrite(JPEG_BASELINE, 1, 2, f);
  for (size_t n; extra > 0; extra -= n) {
    n = extra < 60000 ? extra : 60000;
    uint8_t marker[4] = {0xff, 0xe1, (uint8_t)((n + 2) >> 8), (uint8_t)(n + 2)};
    fwrite(marker, 1, 4, f);
    for (size_t i = 0; i < n; i++) putc('e', f);
  }
  fwrite(JPEG_BASELINE + 2, 1, sizeof(JPEG_BASELINE) - 2, f);
  fclose(f);
}

static void test_folder_tsv(void **state) {
  (void)state;
  Error err;
  assert_int_equal(folder_make(at("tsv/deep"), &err), 0);
  write_png("tsv/a.png", 5, 9);
  write_png("tsv/deep/b.PNG", 31, 2);
  write_late_jpeg("tsv/late.jpg", 5000);
  write_late_jpeg("tsv/later.jpg", 200000);
  write_text("tsv/broken.png", "\x89PNG\r\n\x1a\nnothing");
  write_text("tsv/empty.png", "");
  write_text("tsv/captions.tsv", "\xef\xbb\xbf"
                                 "file\tcaption\n"
                                 "a.png\t  a red thing \r\n"
                                 "\n"
                                 "deep/b.PNG\ttabs\tare text\n"
                                 "late.jpg\tlate\n"
                                 "later.jpg\tlater\n"
                                 "broken.png\tbroken\n"
                                 "empty.png\tempty\n"
                                 "missing.png\tmissing\n"
                                 "deep\ta folder\n"
                                 "no tab here\n"
                                 "a.png\t \n"
                                 "a.png\tlast, without an end of line");
  Source *s = source_open("folder", at("tsv"), NULL, &err);
  assert_non_null(s);
  assert_int_equal(source_count(s), 5);
  assert_int_equal(samples_left_out(s), 6);
  expect_captioned(s, "a.png", "a red thing", 5, 9);
  expect_captioned(s, "deep/b.PNG", "tabs\tare text", 31, 2);
  expect_captioned(s, "late.jpg", "late", 19, 13);
  expect_captioned(s, "later.jpg", "later", 19, 13);
  assert_string_equal(source_sample(s, 4)->part[0].text, "last, without an end of line");
  assert_string_equal(source_sample(s, 4)->group, "a.png");
  char *name = source_image_name(s, source_sample(s, 0)->part[1].image);
  assert_string_equal(name, at("tsv/a.png"));
  free(name);
  // A file that shrinks or goes is an error when it is read, not a crash.
  uint8_t *bytes;
  size_t n;
  write_text("tsv/a.png", "short");
  assert_int_equal(source_read_image(s, source_sample(s, 0)->part[1].image, &bytes, &n, &err), -1);
  assert_null(bytes);
  assert_non_null(strstr(err.text, "a.png"));
  unlink(at("tsv/a.png"));
  assert_int_equal(source_read_image(s, source_sample(s, 0)->part[1].image, &bytes, &n, &err), -1);
  source_close(s);
  s = source_open("folder", at("tsv"), "caption", &err);
  assert_non_null(s);
  assert_string_equal(source_sample(s, 0)->group, "tabs\tare text");
  source_close(s);
  expect_no_source("folder", at("tsv"), "concept", "concept");
}

static void test_folder_jsonl(void **state) {
  (void)state;
  Error err;
  assert_int_equal(folder_make(at("jsonl"), &err), 0);
  write_png("jsonl/a.png", 4, 4);
  char line[512];
  snprintf(line, sizeof(line),
           "{\"file\": \"a.png\", \"caption\": \"one \\u00e9\", \"concept\": \"dog\", \"n\": 7}\n"
           "not json\n"
           "{\"file\": \"a.png\"}\n"
           "{\"file\": 3, \"caption\": \"x\"}\n"
           "{\"file\": \"%s\", \"caption\": \"two\", \"concept\": \"cat\", \"n\": 8}\n",
           at("jsonl/a.png"));
  write_text("jsonl/captions.jsonl", line);
  Source *s = source_open("folder", at("jsonl"), "concept", &err);
  assert_non_null(s);
  assert_int_equal(source_count(s), 2);
  assert_int_equal(samples_left_out(s), 3);
  expect_captioned(s, "a.png", "one \xc3\xa9", 4, 4);
  expect_captioned(s, at("jsonl/a.png"), "two", 4, 4);
  assert_string_equal(source_sample(s, 0)->group, "dog");
  assert_string_equal(source_sample(s, 1)->group, "cat");
  source_close(s);
  s = source_open("folder", at("jsonl"), "n", &err);
  assert_string_equal(source_sample(s, 1)->group, "8");
  source_close(s);
  expect_no_source("folder", at("jsonl"), "style", "style");
  write_text("jsonl/captions.tsv", "a.png\tx\n");
  expect_no_source("folder", at("jsonl"), NULL, "both");
}

// A header of 600 megapixels costs a skip, not memory.
static void test_pixel_cap(void **state) {
  (void)state;
  Error err;
  assert_int_equal(folder_make(at("cap"), &err), 0);
  write_png("cap/a.png", 3, 3);
  size_t n;
  uint8_t *png = png_make(3, 3, &n);
  memcpy(png + 16, "\x00\x00\x75\x30\x00\x00\x4e\x20", 8); // 30000 x 20000
  write_bytes("cap/b.png", png, n);
  free(png);
  write_text("cap/captions.tsv", "b.png\tb\na.png\ta\n");
  double start = cpu_seconds();
  Source *s = source_open("folder", at("cap"), NULL, &err);
  assert_true(cpu_seconds() - start < 1);
  assert_non_null(s);
  assert_int_equal(source_count(s), 1);
  assert_int_equal(samples_left_out(s), 1);
  source_close(s);
}

static void shard_make(const char *name, int salt) {
  Archive a = {0};
  char key[64], file[80], text[80];
  for (int i = 0; i < 5; i++) {
    snprintf(key, sizeof(key), "set/%d-%03d", salt, i);
    snprintf(file, sizeof(file), "%s.png", key);
    archive_png(&a, file, 3 + i, 4 + salt);
    snprintf(file, sizeof(file), "%s.%s", key, i % 2 ? "json" : "txt");
    snprintf(text, sizeof(text), i % 2 ? "{\"caption\": \"caption %d\", \"style\": \"s%d\"}" : "caption %d\n", i, salt);
    archive_text(&a, file, text);
    snprintf(file, sizeof(file), "%s.seg.png", key); // another role, not the image
    archive_text(&a, file, "mask");
  }
  archive_end(&a);
  archive_write(&a, name);
}

static void test_webdataset(void **state) {
  (void)state;
  Error err;
  assert_int_equal(folder_make(at("wds"), &err), 0);
  shard_make("wds/b.tar", 2);
  shard_make("wds/a.tar", 1);
  write_text("wds/readme.md", "not a shard");
  const char *paths[] = {at("wds"), at("wds/*.tar"), at("wds/[ab].tar")};
  for (int k = 0; k < 3; k++) {
    Source *s = source_open("webdataset", paths[k], NULL, &err);
    assert_non_null(s);
    assert_int_equal(source_count(s), 10);
    assert_int_equal(samples_left_out(s), 0);
    assert_string_equal(source_sample(s, 0)->key, "set/1-000"); // shards by name
    assert_string_equal(source_sample(s, 9)->key, "set/2-004");
    for (int i = 0; i < 10; i++) {
      char key[64], caption[64];
      snprintf(key, sizeof(key), "set/%d-%03d", 1 + i / 5, i % 5);
      snprintf(caption, sizeof(caption), "caption %d", i % 5);
      expect_captioned(s, key, caption, 3 + i % 5, 5 + i / 5);
    }
    char *name = source_image_name(s, source_sample(s, 0)->part[1].image);
    assert_non_null(strstr(name, "wds/a.tar:set/1-000.png"));
    free(name);
    source_close(s);
  }
  Source *one = source_open("webdataset", at("wds/a.tar"), "caption", &err);
  assert_int_equal(source_count(one), 5);
  assert_string_equal(source_sample(one, 2)->group, "caption 2");
  source_close(one);
  expect_no_source("webdataset", at("wds"), "style", "style"); // the .txt samples have none
}

static void test_webdataset_odd(void **state) {
  (void)state;
  Error err;
  Archive a = {0};
  archive_png(&a, "split.png", 6, 6);
  archive_text(&a, "lonely.txt", "no image");
  archive_png(&a, "bare.png", 2, 2);
  archive_text(&a, "both.json", "{\"caption\": \"from json\", \"style\": \"x\"}");
  archive_file(&a, "both.JPEG", JPEG_BASELINE, sizeof(JPEG_BASELINE));
  archive_text(&a, "both.txt", "from txt");
  archive_text(&a, "split.txt", "parts far apart");
  archive_png(&a, "badjson.png", 2, 2);
  archive_text(&a, "badjson.json", "{\"caption\": ");
  archive_text(&a, "garbage.jpg", "garbage");
  archive_text(&a, "garbage.txt", "garbage");
  archive_text(&a, "._split.txt", "a file system's own");
  archive_text(&a, "README", "no extension");
  archive_text(&a, "notes.csv", "1,2");
  archive_png(&a, "dotted.name.png", 2, 2); // a picture without a caption
  archive_end(&a);
  archive_write(&a, "odd.tar");
  Source *s = source_open("webdataset", at("odd.tar"), NULL, &err);
  assert_non_null(s);
  assert_int_equal(source_count(s), 2);
  assert_int_equal(samples_left_out(s), 5); // lonely, bare, badjson, garbage, dotted.name
  expect_captioned(s, "split", "parts far apart", 6, 6);
  expect_captioned(s, "both", "from txt", 19, 13);
  source_close(s);
}

static void expect_first(const Source *s, UnusedReason reason, int count, const char *where, const char *why) {
  SourceStats stats = source_stats(s);
  assert_int_equal(stats.unused.count[reason], count);
  if (!count) return;
  const char *first = stats.unused.first[reason];
  if (!strstr(first, where) || !strstr(first, why)) fail_msg("%s", first);
}

// Keys with dots, WebDataset's further parts of a sample, and what Apple's tar and zip leave behind.
static void test_webdataset_names(void **state) {
  (void)state;
  Error err;
  Archive a = {0};
  archive_text(&a, "set/._v1.0_3.png", "AppleDouble");
  archive_png(&a, "set/v1.0_3.png", 3, 4);
  archive_text(&a, "set/._v1.0_3.txt", "AppleDouble");
  archive_text(&a, "set/v1.0_3.txt", "dots");
  archive_png(&a, "set/v1.0_4.png", 5, 6);
  archive_text(&a, "set/v1.0_4.json", "{\"text\": \"more dots\"}");
  archive_png(&a, "000.png", 7, 8);
  archive_png(&a, "000.seg.png", 1, 1);
  archive_text(&a, "000.meta.json", "{}");
  archive_text(&a, "000.txt", "parts");
  archive_text(&a, "000.cls", "4");
  archive_png(&a, "b.jpg.png", 2, 2);
  archive_text(&a, "b.jpg.txt", "beside a file with two extensions");
  archive_text(&a, "__MACOSX/000.txt", "AppleDouble");
  archive_text(&a, ".DS_Store", "x");
  archive_png(&a, "lost.v2.png", 9, 9);
  archive_text(&a, "words.v2.txt", "no picture");
  archive_text(&a, "two.png", "first");
  archive_png(&a, "two.jpg", 1, 1);
  archive_text(&a, "two.txt", "two pictures");
  archive_text(&a, "w.webp", "RIFF____WEBPVP8 ");
  archive_text(&a, "w.txt", "a format");
  archive_text(&a, "u.txt", "\xfe\xff_");
  archive_png(&a, "u.png", 1, 1);
  archive_end(&a);
  archive_write(&a, "names.tar");
  Source *s = source_open("webdataset", at("names.tar"), NULL, &err);
  assert_non_null(s);
  assert_int_equal(source_count(s), 4);
  expect_captioned(s, "b", "beside a file with two extensions", 2, 2);
  expect_captioned(s, "set/v1.0_3", "dots", 3, 4);
  expect_captioned(s, "set/v1.0_4", "more dots", 5, 6);
  expect_captioned(s, "000", "parts", 7, 8);
  expect_first(s, UNUSED_NO_CAPTION, 1, "sample lost.v2 of", "no .txt");
  expect_first(s, UNUSED_NO_IMAGE, 1, "sample words.v2 of", "no picture");
  expect_first(s, UNUSED_TWICE, 1, "two.jpg of", "is used");
  expect_first(s, UNUSED_FORMAT, 2, "two.png", "neither a JPEG nor a PNG"); // w
  expect_first(s, UNUSED_ENCODING, 1, "sample u", "UTF-16 (big-endian)");
  expect_first(s, UNUSED_FILE, 3, "000.cls", ""); // 000.meta.json, 000.seg.png
  assert_int_equal(samples_left_out(s), 6);
  source_close(s);
}

// JSON that cannot be parsed is called that, also where the split goes by one of its fields; where nothing of it is
// needed it does no harm.
static void test_webdataset_json(void **state) {
  (void)state;
  Error err;
  Archive a = {0};
  archive_png(&a, "a.png", 1, 1);
  archive_text(&a, "a.txt", "one");
  archive_text(&a, "a.json", "{\"style\": \"x\"}");
  archive_png(&a, "b.png", 1, 1);
  archive_text(&a, "b.txt", "two");
  archive_text(&a, "b.json", "{\"style\": \"x\", \"loss\": NaN}");
  archive_end(&a);
  archive_write(&a, "json.tar");
  Source *s = source_open("webdataset", at("json.tar"), NULL, &err);
  assert_int_equal(source_count(s), 2);
  assert_int_equal(samples_left_out(s), 0);
  source_close(s);
  s = source_open("webdataset", at("json.tar"), "style", &err);
  if (!s) fail_msg("%s", err.text);
  assert_int_equal(source_count(s), 1);
  expect_first(s, UNUSED_JSON, 1, "sample b", "NaN");
  source_close(s);
}

static void test_text(void **state) {
  (void)state;
  Error err;
  assert_int_equal(folder_make(at("text"), &err), 0);
  write_text("text/b.txt", "\n\nfirst line\nsecond line\n\n \t\nsecond paragraph\r\n\r\nthird");
  Source *s = source_open("text", at("text/b.txt"), NULL, &err);
  assert_non_null(s);
  assert_int_equal(source_count(s), 3);
  const char *want[] = {"first line\nsecond line", "second paragraph", "third"};
  const char *keys[] = {"b.txt:3", "b.txt:7", "b.txt:9"};
  for (int i = 0; i < 3; i++) {
    const Sample *sample = source_sample(s, i);
    assert_int_equal(sample->kind, SAMPLE_TEXT);
    assert_int_equal(sample->parts, 1);
    assert_string_equal(sample->part[0].text, want[i]);
    assert_int_equal(sample->part[0].text_bytes, strlen(want[i]));
    assert_string_equal(sample->key, keys[i]);
    assert_string_equal(sample->group, keys[i]);
  }
  source_close(s);
  write_text("text/._b.txt", "AppleDouble");
  write_text("text/.hidden.jsonl", "{");
  write_text("text/a.jsonl",
             "{\"text\": \" kept as it is\\n\"}\n{\"text\": \"\"}\nnonsense\n{\"key\": \"k2\", \"text\": \"two\"}\n");
  s = source_open("text", at("text"), "caption", &err);
  assert_non_null(s);
  assert_int_equal(source_count(s), 5);
  assert_int_equal(samples_left_out(s), 2);
  assert_string_equal(source_sample(s, 0)->part[0].text, " kept as it is\n");
  assert_string_equal(source_sample(s, 0)->key, "a.jsonl:1");
  assert_string_equal(source_sample(s, 1)->key, "k2");
  assert_string_equal(source_sample(s, 1)->group, "two");
  assert_string_equal(source_sample(s, 2)->part[0].text, "first line\nsecond line");
  source_close(s);
}

static void test_interleaved(void **state) {
  (void)state;
  Error err;
  assert_int_equal(folder_make(at("mixed/images"), &err), 0);
  write_png("mixed/images/a.png", 8, 5);
  write_png("mixed/b.png", 2, 3);
  write_text("mixed/docs.jsonl",
             "{\"segments\":[{\"text\":\"see\"},{\"image\":\"images/a.png\"},{\"text\":\"\"},{\"text\":\"and\"},"
             "{\"image\":\"b.png\"},{\"image\":\"b.png\"}],\"key\":\"doc\",\"topic\":\"x\"}\n"
             "{\"segments\":[{\"image\":\"b.png\"}],\"topic\":\"y\"}\n"
             "{\"segments\":[]}\n{\"segments\":[{\"image\":\"missing.png\"}]}\n{\"segments\":[{\"sound\":\"x\"}]}\n"
             "{\"segments\":3}\n{\"text\":\"plain\",\"topic\":\"z\"}\n");
  Source *s = source_open("text", at("mixed/docs.jsonl"), "topic", &err);
  assert_non_null(s);
  assert_int_equal(source_count(s), 3);
  assert_int_equal(samples_left_out(s), 4);
  const Sample *doc = source_sample(s, 0);
  assert_int_equal(doc->kind, SAMPLE_INTERLEAVED);
  assert_string_equal(doc->key, "doc");
  assert_int_equal(doc->parts, 5);
  const PartKind kinds[] = {PART_TEXT, PART_IMAGE, PART_TEXT, PART_IMAGE, PART_IMAGE};
  for (int i = 0; i < 5; i++) assert_int_equal(doc->part[i].kind, kinds[i]);
  assert_string_equal(doc->part[2].text, "and");
  assert_int_equal(doc->part[1].width, 8);
  assert_int_equal(doc->part[1].height, 5);
  assert_int_equal(doc->part[4].height, 3);
  uint8_t *bytes;
  size_t n, png_bytes;
  assert_int_equal(source_read_image(s, doc->part[1].image, &bytes, &n, &err), 0);
  uint8_t *png = png_make(8, 5, &png_bytes);
  assert_int_equal(n, png_bytes);
  assert_memory_equal(bytes, png, n);
  free(png);
  free(bytes);
  assert_string_equal(source_sample(s, 1)->key, "docs.jsonl:2");
  assert_int_equal(source_sample(s, 2)->kind, SAMPLE_TEXT);
  source_close(s);
}

static void test_wrong_paths(void **state) {
  (void)state;
  Error err;
  assert_int_equal(folder_make(at("void"), &err), 0);
  write_text("void.csv", "x");
  write_text("void.txt", "\n \n");
  write_text("no.tar", "x");
  expect_no_source("folder", at("nowhere"), NULL, "nowhere");
  expect_no_source("folder", at("void"), NULL, "neither captions.tsv");
  expect_no_source("folder", at("void.csv"), NULL, "void.csv");
  expect_no_source("webdataset", at("nowhere.tar"), NULL, "nowhere.tar");
  expect_no_source("webdataset", at("void"), NULL, ".tar");
  expect_no_source("webdataset", at("void/*.tar"), NULL, "void/*.tar");
  expect_no_source("webdataset", at("no.tar"), NULL, "no.tar");
  expect_no_source("text", at("void.csv"), NULL, "neither a .txt");
  expect_no_source("text", at("void.txt"), NULL, "no usable sample");
  expect_no_source("text", at("nowhere.txt"), NULL, "nowhere.txt");
  expect_no_source("parquet", at("void"), NULL, "parquet");
  write_text("void/captions.tsv", "gone.png\tgone\n");
  expect_no_source("folder", at("void"), NULL, "no usable sample");
}

typedef struct Reader {
  const Source *source;
  int wrong;
} Reader;

static void *read_all(void *argument) {
  Reader *r = argument;
  for (int round = 0; round < 20; round++)
    for (int64_t i = 0; i < source_count(r->source); i++) {
      const SamplePart *image = &source_sample(r->source, i)->part[1];
      uint8_t *bytes;
      size_t n;
      Error err;
      int width = 0, height = 0;
      if (source_read_image(r->source, image->image, &bytes, &n, &err) != 0 ||
          image_info(bytes, n, &width, &height, &err) != 0 || width != image->width || height != image->height)
        r->wrong++;
      free(bytes);
    }
  return NULL;
}

static void test_threads(void **state) {
  (void)state;
  shard_make("threads.tar", 3);
  Error err;
  Source *s = source_open("webdataset", at("threads.tar"), NULL, &err);
  assert_non_null(s);
  Reader reader[4];
  pthread_t thread[4];
  for (int i = 0; i < 4; i++) {
    reader[i] = (Reader){.source = s};
    assert_int_equal(pthread_create(&thread[i], NULL, read_all, &reader[i]), 0);
  }
  for (int i = 0; i < 4; i++) pthread_join(thread[i], NULL);
  for (int i = 0; i < 4; i++) assert_int_equal(reader[i].wrong, 0);
  source_close(s);
}

static void test_held_out(void **state) {
  (void)state;
  int count[4] = {0};
  const double fraction[4] = {0, 0.05, 0.5, 1};
  for (int i = 0; i < 20000; i++) {
    char value[32];
    snprintf(value, sizeof(value), "%06d", i);
    bool before = false;
    for (int k = 0; k < 4; k++) {
      bool held = sample_is_held_out(value, fraction[k]);
      assert_true(held || !before); // growing the fraction only adds
      count[k] += held;
      before = held;
    }
  }
  assert_int_equal(count[0], 0);
  assert_true(fabs(count[1] / 20000.0 - 0.05) < 0.006);
  assert_true(fabs(count[2] / 20000.0 - 0.5) < 0.012);
  assert_int_equal(count[3], 20000);
  // The split must stay what it is: checkpoints and reports depend on it.
  const char *values[] = {"", "a", "red circle", "000001", "grinning face"};
  uint64_t bits = 0;
  for (int i = 0; i < 5; i++)
    for (int k = 1; k < 8; k++) bits = bits << 1 | sample_is_held_out(values[i], k / 8.0);
  assert_int_equal(bits, 0xfe3c3ff);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_folder_tsv),      cmocka_unit_test(test_folder_jsonl),
      cmocka_unit_test(test_pixel_cap),       cmocka_unit_test(test_webdataset),
      cmocka_unit_test(test_webdataset_odd),  cmocka_unit_test(test_webdataset_names),
      cmocka_unit_test(test_webdataset_json), cmocka_unit_test(test_text),
      cmocka_unit_test(test_interleaved),     cmocka_unit_test(test_wrong_paths),
      cmocka_unit_test(test_threads),         cmocka_unit_test(test_held_out),
  };
  return cmocka_run_group_tests(tests, scratch_begin, scratch_end);
}
