// Folders of pictures as people have them, and what is said about the part that cannot be used.
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "data/image.h"
#include "data/paths.h"
#include "data/sample_patches.h"
#include "data/tokenizer.h"
#include "tests/unit/archive.h"
#include "tests/unit/jpeg_bytes.h"
#include "tests/unit/png_bytes.h"
#include "tests/unit/slow.h"

#include <sys/stat.h>

static void write_png(const char *name, int width, int height) {
  Image image = {width, height, xcalloc(3 * (size_t)width, (size_t)height)};
  Error err;
  assert_int_equal(image_write_png(at(name), &image, &err), 0);
  image_free(&image);
}

static void make(const char *folder) {
  Error err;
  assert_int_equal(folder_make(at(folder), &err), 0);
}

static Source *open_good(const char *type, const char *path, const char *held_out_by) {
  Error err;
  Source *s = source_open(type, path, held_out_by, &err);
  if (!s) fail_msg("%s", err.text);
  return s;
}

// The samples as "key=caption (WxH); ..", in their order.
static void expect_samples(const Source *s, const char *want) {
  char *text = NULL;
  size_t n;
  FILE *f = open_memstream(&text, &n);
  for (int64_t i = 0; i < source_count(s); i++) {
    const Sample *sample = source_sample(s, i);
    fprintf(f, "%s%s=%s (%dx%d)", i ? "; " : "", sample->key, sample->part[0].text, sample->part[1].width,
            sample->part[1].height);
    uint8_t *bytes;
    size_t size;
    Error err;
    if (source_read_image(s, sample->part[1].image, &bytes, &size, &err) != 0) fail_msg("%s", err.text);
    free(bytes);
  }
  fclose(f);
  if (strcmp(text, want) != 0) fail_msg("%s\nand not %s", text, want);
  free(text);
}

// Counts by reason, and that the first of each is named: pairs of a reason and a count, -1 after the last.
static void expect_unused(const Source *s, const int *want) {
  SourceStats stats = source_stats(s);
  int64_t expected[UNUSED_REASONS] = {0}, total = 0;
  for (; *want >= 0; want += 2) expected[want[0]] = want[1];
  for (int i = 0; i < UNUSED_REASONS; i++) {
    if (stats.unused.count[i] != expected[i])
      fail_msg("reason %d: %d, not %d: %s", i, (int)stats.unused.count[i], (int)expected[i],
               stats.unused.first[i] ? stats.unused.first[i] : "");
    assert_true(!stats.unused.first[i] == !expected[i]);
    if (i != UNUSED_FILE) total += expected[i];
  }
  assert_int_equal(samples_left_out(s), total);
  assert_int_equal(stats.samples, source_count(s));
  char *printed = unused_print(&stats.unused);
  assert_true(!printed[0] == !total);
  free(printed);
}
#define NONE ((const int[]){-1})

static void expect_first(const Source *s, UnusedReason reason, const char *where, const char *why) {
  const char *first = source_stats(s).unused.first[reason];
  assert_non_null(first);
  if (!strstr(first, where) || !strstr(first, why)) fail_msg("%s", first);
}

static void expect_error(const char *type, const char *path, const char *says, const char *hint) {
  Error err = {0};
  Source *s = source_open(type, path, NULL, &err);
  assert_null(s);
  if (!strstr(err.text, says) || !strstr(err.hint, hint)) fail_msg("%s (%s)", err.text, err.hint);
}

// Hugging Face's ImageFolder, and every name for the two columns.
static void test_lists(void **state) {
  (void)state;
  make("lists/sub");
  write_png("lists/a.png", 5, 9);
  write_png("lists/sub/b.png", 3, 4);
  static const struct {
    const char *list, *text;
  } good[] = {
      {"metadata.jsonl", "{\"file_name\": \"a.png\", \"text\": \"one\", \"k\": \"g\"}\n"
                         "{\"file_name\": \"sub/b.png\", \"text\": \"two, \\\"quoted\\\"\", \"k\": \"h\"}\n"},
      {"metadata.csv", "file_name,text,k\r\na.png,one,g\r\nsub/b.png,\"two, \"\"quoted\"\"\",h\r\n"},
      {"metadata.csv", "\xef\xbb\xbfk;Text;File_Name\ng;one;a.png\nh;\"two, \"\"quoted\"\"\";sub/b.png"},
      {"metadata.csv", "file_name, text , k\na.png,one,g\nsub/b.png,\"two, \"\"quoted\"\"\",h\n"},
      {"metadata.tsv", "image\tk\tprompt\na.png\tg\tone\nsub/b.png\th\ttwo, \"quoted\"\n"},
      {"captions.csv", "k,path,description,title\ng,a.png, one ,x\nh,sub/b.png,\"two, \"\"quoted\"\"\",y\n"},
      {"captions.tsv", "file\tk\tcaption\na.png\tg\tone\nsub/b.png\th\t\"two, \"\"quoted\"\"\"\n"},
      {"captions.jsonl",
       "{\"image\": \"a.png\", \"prompt\": \"one\", \"k\": \"g\"}\r\n\r\n"
       "{\"file\": \"sub/b.png\", \"caption\": \"two, \\\"quoted\\\"\", \"text\": \"no\", \"k\": \"h\"}"},
  };
  for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
    char name[64];
    snprintf(name, sizeof name, "lists/%s", good[i].list);
    write_text(name, good[i].text);
    Source *s = open_good("folder", at("lists"), "k");
    expect_samples(s, "a.png=one (5x9); sub/b.png=two, \"quoted\" (3x4)");
    expect_unused(s, NONE);
    assert_string_equal(source_sample(s, 0)->group, "g");
    assert_string_equal(source_sample(s, 1)->group, "h");
    assert_int_equal(source_stats(s).images, 2);
    source_close(s);
    assert_int_equal(unlink(at(name)), 0);
  }
  // Without a heading.
  write_text("lists/captions.csv", "a.png,\"one\nand two\"\nsub/b.png,three\n");
  Source *s = open_good("folder", at("lists"), NULL);
  expect_samples(s, "a.png=one\nand two (5x9); sub/b.png=three (3x4)");
  source_close(s);
  // Two lists, a heading that names neither, a quote that swallows the rest.
  write_text("lists/metadata.jsonl", "{}\n");
  expect_error("folder", at("lists"), "both", "keep one");
  assert_int_equal(unlink(at("lists/metadata.jsonl")), 0);
  write_text("lists/captions.csv", "id,label\n1,a.png\n");
  expect_error("folder", at("lists"), "\"id,label\", names no columns", "file_name,text");
  write_text("lists/captions.csv", "file,text\na.png,\"one\nsub/b.png,two\n");
  expect_error("folder", at("lists"), "line 2 and never closed", "\"\"");
}

static void test_list_faults(void **state) {
  (void)state;
  make("faults");
  write_png("faults/a.png", 2, 2);
  write_png("faults/unlisted.png", 2, 2);
  write_text("faults/b.webp", "RIFF\x24___WEBPVP8 ");
  write_text("faults/c.jpg", "<!DOCTYPE html>");
  write_text("faults/d.png", "\x89PNG\r\n\x1a\n");
  write_text("faults/._a.png", "Mac OS X");
  write_text("faults/metadata.csv", "file_name,text\n"
                                    "a.png,good\n"
                                    "a.png,a cat, black\n" // 3: a comma that should be quoted
                                    "a.png,\"a\" cat\n"    // 4
                                    "b.webp,x\n"           // 5
                                    "c.jpg,x\n"            // 6
                                    "d.png,x\n"            // 7
                                    "gone.png,x\n"         // 8
                                    "a.png,\n"             // 9
                                    ",x\n"                 // 10
                                    "a.png\n");            // 11
  Source *s = open_good("folder", at("faults"), NULL);
  expect_samples(s, "a.png=good (2x2)");
  expect_unused(s, (const int[]){UNUSED_LINE, 4, UNUSED_FORMAT, 2, UNUSED_DAMAGED, 1, UNUSED_NO_IMAGE, 1,
                                 UNUSED_NO_CAPTION, 1, UNUSED_UNLISTED, 1, -1});
  expect_first(s, UNUSED_LINE, "metadata.csv line 3", "3 cells");
  expect_first(s, UNUSED_UNLISTED, "faults/unlisted.png", "does not name it");
  expect_first(s, UNUSED_FORMAT, "line 5", "WebP");
  expect_first(s, UNUSED_DAMAGED, "line 7", "d.png");
  expect_first(s, UNUSED_NO_IMAGE, "line 8", "gone.png");
  expect_first(s, UNUSED_NO_CAPTION, "line 9", "empty");
  source_log(s);
  source_close(s);
  // A list in an encoding that is not read, as a whole; JSON that is none, line by line.
  const char *const marks[] = {"\xff\xfe"
                               "a\0",
                               "\xfe\xff\0a", "a\0b\0", "\0a\0b"};
  for (int i = 0; i < 4; i++) {
    write_bytes("faults/metadata.csv", marks[i], 4);
    expect_error("folder", at("faults"), "UTF-16", "UTF-8");
    write_bytes("faults/text.txt", marks[i], 4);
    expect_error("text", at("faults/text.txt"), "UTF-16", "UTF-8");
  }
  assert_int_equal(unlink(at("faults/metadata.csv")), 0);
  write_text("faults/metadata.jsonl", "{\"file_name\": \"a.png\", \"text\": \"good\", \"aspect\": 1}\n"
                                      "{\"file_name\": \"a.png\", \"text\": \"x\", \"aspect\": NaN}\n"
                                      "{\"file_name\": \"a.png\", \"text\": \"x\", \"aspect\": -Infinity}\n"
                                      "{\"file_name\": \"unlisted.png\", \"words\": \"x\"}\n"
                                      "{\"name\": \"a.png\", \"text\": \"x\"}\n");
  s = open_good("folder", at("faults"), NULL);
  expect_samples(s, "a.png=good (2x2)");
  expect_unused(s, (const int[]){UNUSED_JSON, 2, UNUSED_NO_CAPTION, 1, UNUSED_UNLISTED, 3, UNUSED_LINE, 1, -1});
  expect_first(s, UNUSED_JSON, "line 2", "NaN");
  expect_first(s, UNUSED_LINE, "line 5", "file_name");
  source_close(s);
}

// Where nothing is usable, the fault in the list is named, and not that it therefore names no picture.
static void test_list_useless(void **state) {
  (void)state;
  make("useless/train");
  write_png("useless/train/a.png", 2, 2);
  static const struct {
    const char *list, *text, *says;
  } cases[] = {
      {"metadata.jsonl", "{\"file_name\": \"train/a.png\", \"text\": \"x\", \"score\": NaN}\n", "NaN"},
      {"metadata.jsonl", "[\n{\"file_name\": \"train/a.png\", \"text\": \"x\"},\n]\n", "line 1"},
      {"metadata.csv", "file_name,text\ntrain\\a.png,x\n", "cannot open"},
      {"metadata.csv", "file_name,text\ntrain/a.png,x,y\n", "3 cells"},
      {"captions.tsv", "train/a.png\n", "FILE<TAB>CAPTION"},
      {"captions.csv", "file,caption\n", "does not name it"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    char name[64];
    snprintf(name, sizeof name, "useless/%s", cases[i].list);
    write_text(name, cases[i].text);
    expect_error("folder", at("useless"), cases[i].says, "");
    assert_int_equal(unlink(at(name)), 0);
  }
}

// A .txt beside each picture, in folders nested as they like.
static void test_pairs(void **state) {
  (void)state;
  make("pairs/train/dogs");
  make("pairs/.thumbnails");
  make("pairs/__MACOSX");
  make("pairs/listed");
  write_png("pairs/b.png", 3, 3);
  write_text("pairs/b.txt", "\xef\xbb\xbf second\r\n");
  write_png("pairs/v1.0_3.png", 2, 5);
  write_text("pairs/v1.0_3.txt", "dots");
  write_png("pairs/train/dogs/a.png", 6, 2);
  write_text("pairs/train/dogs/a.json", "{\"prompt\": \"from json\", \"score\": 3}");
  write_png("pairs/train/c.png", 1, 1);
  write_text("pairs/train/c.png.txt", "named for the whole file");
  write_png("pairs/listed/d.png", 4, 4);
  write_text("pairs/listed/metadata.csv", "file_name,text\nd.png,from a list\n");
  // What is no data of theirs.
  const char *const hidden[] = {"pairs/.DS_Store",         "pairs/._b.txt",           "pairs/._b.png",
                                "pairs/.thumbnails/e.png", "pairs/.thumbnails/e.txt", "pairs/__MACOSX/f.png",
                                "pairs/__MACOSX/f.txt"};
  for (int i = 0; i < 7; i++) write_text(hidden[i], "\0\5\x16\7");
  Source *s = open_good("folder", at("pairs"), NULL);
  expect_samples(s, "b.png=second (3x3); v1.0_3.png=dots (2x5); listed/d.png=from a list (4x4); "
                    "train/c.png=named for the whole file (1x1); train/dogs/a.png=from json (6x2)");
  expect_unused(s, NONE);
  source_close(s);
  // What cannot be used, each named.
  write_png("pairs/lonely.png", 1, 1);
  write_text("pairs/words.txt", "no picture");
  write_text("pairs/blank.txt", " \n");
  write_png("pairs/blank.png", 1, 1);
  write_bytes("pairs/utf16.txt", "\xff\xfeh\0i\0", 6);
  write_png("pairs/utf16.png", 1, 1);
  write_text("pairs/nan.json", "{\"caption\": \"x\", \"loss\": NaN}");
  write_png("pairs/nan.png", 1, 1);
  write_text("pairs/b.jpg", "another picture of b");
  write_text("pairs/cat.gif", "GIF89a");
  write_text("pairs/cat.txt", "moves");
  write_text("pairs/notes.md", "notes");
  s = open_good("folder", at("pairs"), NULL);
  assert_int_equal(source_count(s), 4); // b has a .jpg, which comes first and is none
  expect_unused(s, (const int[]){UNUSED_NO_CAPTION, 2, UNUSED_NO_IMAGE, 1, UNUSED_ENCODING, 1, UNUSED_JSON, 1,
                                 UNUSED_TWICE, 1, UNUSED_FORMAT, 2, UNUSED_FILE, 1, -1});
  expect_first(s, UNUSED_NO_CAPTION, "pairs/blank.png", "empty");
  expect_first(s, UNUSED_NO_IMAGE, "pairs/words.txt", "no picture");
  expect_first(s, UNUSED_ENCODING, "pairs/utf16.png", "UTF-16 (little-endian)");
  expect_first(s, UNUSED_JSON, "pairs/nan.png", "NaN");
  expect_first(s, UNUSED_TWICE, "pairs/b.png", "is used");
  expect_first(s, UNUSED_FILE, "pairs/notes.md", "");
  source_log(s);
  source_close(s);
}

// Links that lead in a circle, and two ways to one folder.
static void test_circles(void **state) {
  (void)state;
  make("circle/a/b");
  write_png("circle/a/x.png", 1, 1);
  write_text("circle/a/x.txt", "x");
  assert_int_equal(symlink("..", at("circle/a/b/up")), 0);
  assert_int_equal(symlink("../..", at("circle/a/b/top")), 0);
  assert_int_equal(symlink("a", at("circle/again")), 0);
  assert_int_equal(symlink("nowhere", at("circle/broken")), 0);
  assert_int_equal(symlink("self", at("circle/self")), 0);
  assert_int_equal(mkfifo(at("circle/pipe.png"), 0666), 0);
  Source *s = open_good("folder", at("circle"), NULL);
  expect_samples(s, "a/x.png=x (1x1)");
  source_close(s);
  // A linked file is a file.
  assert_int_equal(symlink("a/x.png", at("circle/y.png")), 0);
  write_text("circle/y.txt", "y");
  s = open_good("folder", at("circle"), NULL);
  expect_samples(s, "y.png=y (1x1); a/x.png=x (1x1)");
  source_close(s);
}

static void test_unknown(void **state) {
  (void)state;
  make("unknown/empty");
  expect_error("folder", at("unknown/empty"), "it holds no files", "README.md");
  write_png("unknown/a.png", 1, 1);
  write_png("unknown/b.PNG", 1, 1);
  write_text("unknown/data.parquet", "PAR1");
  write_text("unknown/README", "x");
  expect_error("folder", at("unknown"), "metadata.jsonl", "a.txt beside each a.png");
  expect_error("folder", at("unknown"), "it holds 2 .png, 1 .parquet, 1 no extension", "README.md");
  write_text("unknown/000.tar", "x");
  expect_error("folder", at("unknown"), "1 .tar", "\"webdataset\"");
}

static void test_max_pixels(void **state) {
  (void)state;
  make("pixels");
  write_png("pixels/a.png", 10, 10);
  write_png("pixels/b.png", 10, 11);
  write_png("pixels/c.png", 2, 2);
  for (int i = 0; i < 3; i++) {
    char name[32];
    snprintf(name, sizeof name, "pixels/%c.txt", 'a' + i);
    write_text(name, "x");
  }
  Source *s = open_good("folder", at("pixels"), NULL);
  Error err;
  int64_t image = source_sample(s, 2)->part[1].image;
  assert_int_equal(source_limit_pixels(s, 100, &err), 0);
  expect_samples(s, "a.png=x (10x10); c.png=x (2x2)");
  expect_unused(s, (const int[]){UNUSED_PIXELS, 1, -1});
  expect_first(s, UNUSED_PIXELS, "b.png", "10 x 11 pixels");
  assert_int_equal(source_sample(s, 1)->part[1].image, image); // runs that go on know images by their numbers
  assert_int_equal(source_limit_pixels(s, 3, &err), -1);
  assert_non_null(strstr(err.text, "3 with too many pixels"));
  assert_non_null(strstr(err.hint, "data.max_pixels"));
  source_close(s);
}

// A photo that is kept lying on its side has the size that it is seen with: packs are formed from it.
static void test_turned(void **state) {
  (void)state;
  static const uint8_t exif[] = {0xFF, 0xE1, 0, 34,   'E', 'x', 'i', 'f', 0, 0, 'M', 'M', 0, 42, 0, 0, 0, 8,
                                 0,    1,    1, 0x12, 0,   3,   0,   0,   0, 1, 0,   6,   0, 0,  0, 0, 0, 0};
  make("turned");
  Bytes photo = {0};
  bytes_append(&photo, JPEG_BASELINE, 2);
  bytes_append(&photo, exif, sizeof exif);
  bytes_append(&photo, JPEG_BASELINE + 2, sizeof JPEG_BASELINE - 2);
  write_bytes("turned/a.jpg", photo.at, photo.n);
  write_text("turned/a.txt", "a photo");
  Source *s = open_good("folder", at("turned"), NULL);
  expect_samples(s, "a.jpg=a photo (13x19)");
  // As the loader reads it: rows and columns of patches in the right order.
  const SamplePart *part = &source_sample(s, 0)->part[1];
  ImageFit fit = {IMAGE_ASPECT, 12, 4, 0};
  ImageGrid grid = image_fit_grid(&fit, part->width, part->height);
  assert_true(grid.rows > grid.columns);
  uint8_t patches[9 * 48];
  Error err;
  if (sample_patches(s, part, &fit, 1 << 20, false, patches, &err) != 0) fail_msg("%s", err.text);
  source_close(s);
  free(photo.at);
}

// ---- paths

static void expect_paths(const char *path, const char *want) {
  PathList list;
  Error err;
  char *full = xasprintf("%s/%s", scratch, path), *text = xstrdup("");
  if (path_list_expand(full, ".tar", ".tar", &list, &err) != 0) fail_msg("%s", err.text);
  for (int i = 0; i < list.count; i++) {
    char *longer = xasprintf("%s%s%s", text, i ? " " : "", path_below(list.path[i], scratch));
    free(text);
    text = longer;
  }
  if (strcmp(text, want) != 0) fail_msg("%s: %s", path, text);
  path_list_free(&list);
  free(full);
  free(text);
}

static void expect_no_paths(const char *path, const char *says) {
  PathList list;
  Error err;
  char *full = xasprintf("%s/%s", scratch, path);
  assert_int_equal(path_list_expand(full, ".tar", ".tar", &list, &err), -1);
  assert_int_equal(list.count, 0);
  if (!strstr(err.text, says) && !strstr(err.hint, says)) fail_msg("%s (%s)", err.text, err.hint);
  free(full);
}

static void test_paths(void **state) {
  (void)state;
  make("p/q");
  const char *const names[] = {"p/s-008.tar",   "p/s-009.tar", "p/s-010.tar",  "p/s-8.tar", "p/q/s-1.tar",
                               "p/._s-008.tar", "p/.DS_Store", "p/x{1,2}.tar", "p/a.txt"};
  for (int i = 0; i < 9; i++) write_text(names[i], "x");
  expect_paths("p", "p/s-008.tar p/s-009.tar p/s-010.tar p/s-8.tar p/x{1,2}.tar");
  expect_paths("p/*.tar", "p/s-008.tar p/s-009.tar p/s-010.tar p/s-8.tar p/x{1,2}.tar");
  expect_paths("p/s-{008..010}.tar", "p/s-008.tar p/s-009.tar p/s-010.tar");
  expect_paths("p/s-{010..008}.tar", "p/s-008.tar p/s-009.tar p/s-010.tar");
  expect_paths("p/s-{8..8}.tar", "p/s-8.tar");
  expect_paths("p/{s-{008,010},s-8,s-8}.tar", "p/s-008.tar p/s-010.tar p/s-8.tar");
  expect_paths("p{,/q}/s-*1*.tar", "p/q/s-1.tar p/s-010.tar");
  expect_paths("{p/q,p}", "p/q/s-1.tar p/s-008.tar p/s-009.tar p/s-010.tar p/s-8.tar p/x{1,2}.tar");
  expect_paths("p/x{1,2}.tar", "p/x{1,2}.tar"); // it is there under this very name
  expect_no_paths("p/s-{008..012}.tar", "p/s-011.tar");
  expect_no_paths("p/{a}.tar", "p/{a}.tar");
  expect_no_paths("p/{a", "p/{a");
  expect_no_paths("{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}", "more than 1000000");
  expect_no_paths("{0..999999999999999999}", "more than 1000000");
  expect_no_paths("p/y*.tar", "no file matches");
  setenv("HOME", scratch, 1);
  PathList list;
  Error err;
  assert_int_equal(path_list_expand("~/p/s-{8,010}.tar", ".tar", ".tar", &list, &err), 0);
  assert_int_equal(list.count, 2);
  assert_string_equal(list.path[1], at("p/s-8.tar"));
  path_list_free(&list);
  assert_int_equal(path_list_expand("s3://bucket/{000..001}.tar", ".tar", ".tar", &list, &err), -1);
  assert_non_null(strstr(err.hint, "download"));
  // And for a folder of pictures.
  make("home/pets");
  write_png("home/pets/a.png", 1, 1);
  write_text("home/pets/a.txt", "x");
  setenv("HOME", at("home"), 1);
  Source *s = open_good("folder", "~/pets", NULL);
  expect_samples(s, "a.png=x (1x1)");
  source_close(s);
  write_text("home/vocab.bpe", "#version: 0.2\nt h\n");
  Tokenizer *tokenizer = tokenizer_load("~/vocab.bpe", 261, &err);
  if (!tokenizer) fail_msg("%s", err.text);
  tokenizer_free(tokenizer);
}

// ---- many files

static double index_seconds(const char *folder, int64_t samples) {
  double start = cpu_seconds();
  Source *s = open_good("folder", at(folder), NULL);
  double took = cpu_seconds() - start;
  assert_int_equal(source_count(s), samples);
  source_close(s);
  return took;
}

// Pairs in folders of `in_each`, or one list with names only.
static void many_make(const char *folder, int samples, int in_each) {
  static const uint8_t png[] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
  Bytes file = {0};
  bytes_append(&file, png, sizeof png);
  png_chunk(&file, "IHDR", "\0\0\0\1\0\0\0\1\x08\2\0\0\0", 13);
  png_chunk(&file, "IDAT", "", 0);
  char name[96];
  for (int i = 0; i < samples; i++) {
    snprintf(name, sizeof name, "%s/%05d", folder, i / in_each);
    if (i % in_each == 0) make(name);
    snprintf(name, sizeof name, "%s/%05d/%06d.png", folder, i / in_each, i);
    write_bytes(name, file.at, file.n);
    snprintf(name, sizeof name, "%s/%05d/%06d.txt", folder, i / in_each, i);
    write_text(name, "x");
  }
  free(file.at);
}

// The time is in proportion to the number of files: *state pictures in one folder, in as many folders as pictures, or
// in a list.
static void test_many_files(void **state) {
  int many = *(const int *)*state, few = many / 10;
  many_make("few", few, few);
  many_make("many", many, many);
  many_make("deep", few, 1);
  double base = index_seconds("few", few), large = index_seconds("many", many), deep = index_seconds("deep", few);
  // With a list, whose names are looked up.
  char *text = NULL;
  size_t n;
  FILE *f = open_memstream(&text, &n);
  for (int i = 0; i < many; i++) fprintf(f, "00000/%06d.png\tx\n", i);
  fclose(f);
  write_bytes("many/captions.tsv", text, n);
  free(text);
  double listed = index_seconds("many", many);
  print_message("seconds of the processor: %d pictures %.3f, in a folder each %.3f; %d %.3f, with a list %.3f\n", few,
                base, deep, many, large, listed);
  assert_true(large < 30 * base + 0.1);
  assert_true(listed < 30 * base + 0.1);
  assert_true(deep < 10 * base + 0.1);
}

// test_folder [PICTURES]: that many in the largest folder.
int main(int argc, char **argv) {
  int pictures = argc > 1 ? atoi(argv[1]) : 3000;
  if (pictures < 3000) panic("at least 3000 pictures, not %s", argv[1]);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_lists),        cmocka_unit_test(test_list_faults),
      cmocka_unit_test(test_list_useless), cmocka_unit_test(test_pairs),
      cmocka_unit_test(test_circles),      cmocka_unit_test(test_unknown),
      cmocka_unit_test(test_max_pixels),   cmocka_unit_test(test_turned),
      cmocka_unit_test(test_paths),        cmocka_unit_test_prestate(test_many_files, &pictures),
  };
  return cmocka_run_group_tests(tests, scratch_begin, scratch_end);
}
