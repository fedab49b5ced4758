#!/usr/bin/env python3
"""Writes the hand-made seeds of tests/fuzz/corpus (files named seed-*): one small valid input for every shape a format
can take, and a few that are wrong in one place. Run from the root of the repository. What fuzzing adds to the corpus
has other names and is left alone."""
import io, json, re, struct, tarfile, zlib
from pathlib import Path

ROOT = Path("tests/fuzz/corpus")


def seed(target, name, data):
    folder = ROOT / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed-{name}").write_bytes(data)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, extra=b"", interlace=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows, 9))
            + chunk(b"IEND", b""))


def jpegs():
    text = Path("tests/unit/jpeg_bytes.h").read_text()
    for name, body in re.findall(r"JPEG_(\w+)\[\d+\] = \{(.*?)\};", text, re.S):
        yield name.lower(), bytes(int(x, 16) for x in re.findall(r"0x[0-9a-f]{2}", body))


def images():
    rgb = bytes(b for y in range(6) for b in [y % 5] + [(x * 17 + y * 31) % 256 for x in range(3 * 7)])
    yield "rgb", png(7, 6, 8, 2, rgb)
    yield "grey", png(5, 3, 8, 0, bytes([0, 1, 2, 3, 4, 5] * 3))
    yield "grey-1bit", png(9, 2, 1, 0, bytes([0, 0xAA, 0x80] * 2))
    yield "grey-16", png(2, 2, 16, 0, bytes([0, 1, 2, 3, 4] * 2))
    yield "rgba", png(2, 2, 8, 6, bytes([0] + [10, 20, 30, 128] * 2) * 2)
    yield "palette", png(4, 2, 8, 3, bytes([0, 0, 1, 1, 0] * 2), chunk(b"PLTE", b"\1\2\3\7\x88\x99") +
                         chunk(b"tRNS", b"\0\xff"))
    yield "interlaced", png(3, 3, 8, 0, bytes([0, 9] * 4 + [0, 8, 7, 0, 1, 2, 3]), interlace=1)
    yield "huge", png(30000, 20000, 8, 2, b"\0\1\2\3")
    # Turned by EXIF, in both byte orders, and a directory that begins beyond the end.
    little, big = (struct.pack(f"{order}4sIHHHIHHI", magic, 8, 1, 0x112, 3, 1, value, 0, 8)
                   for order, magic, value in [("<", b"II*\0", 6), (">", b"MM\0*", 7)])
    yield "exif", png(7, 6, 8, 2, rgb, chunk(b"eXIf", little))
    yield "exif-far", png(7, 6, 8, 2, rgb, chunk(b"eXIf", big.replace(b"\0\0\0\x08", b"\xff\xff\xff\xfe", 1)))
    yield from jpegs()
    baseline = dict(jpegs())["baseline"]
    yield "exif-jpeg", baseline[:2] + b"\xff\xe1" + struct.pack(">H", 8 + len(big)) + b"Exif\0\0" + big + baseline[2:]
    yield "motion", baseline + b"\xff\xc4\1\0\0" + b"\xff" * 16 + baseline


def archive(members, form=tarfile.USTAR_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue().rstrip(b"\0") + bytes(1024)


def tensors(entries, metadata=None):
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, dtype, shape, raw in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def index(samples, unused=(), held_out_by=b"key"):
    """unused: a pair (count, the first of them) for some of the 13 reasons, by number."""
    unused = [dict(unused).get(i, (0, b"")) for i in range(13)]
    out = struct.pack("<8sQqqq", b"TESIDX3\n", 0, 0, 0, len(samples))
    out += struct.pack("<27q", *(n for n, _ in unused), *(len(first) for _, first in unused), len(held_out_by))
    out += held_out_by + b"\0" + b"".join(first + b"\0" for _, first in unused)
    for offset, size, width, height, *strings in samples:
        out += struct.pack("<qqiiIIII", offset, size, width, height, *map(len, strings))
        out += b"".join(s + b"\0" for s in strings)
    return out


def main():
    pictures = dict(images())
    for name, data in pictures.items():
        seed("image", name, bytes([7, 0, 1, 0]) + data)
        seed("image", name + "-aspect", bytes([3, 3, 3, 20]) + data)

    small, jpeg = pictures["rgb"], pictures["baseline"]
    seed("tar", "pairs", archive([("a/0.png", small), ("a/0.txt", b"a caption"), ("a/1.jpg", jpeg),
                                  ("a/1.json", b'{"caption": "two", "style": "x"}')]))
    seed("tar", "gnu", archive([("n" * 150 + ".png", small), ("n" * 150 + ".txt", b"long")], tarfile.GNU_FORMAT))
    seed("tar", "pax", archive([("\u00e4" * 80 + ".png", small), ("\u00e4" * 80 + ".txt", b"pax")],
                               tarfile.PAX_FORMAT))
    seed("tar", "climbing", archive([("../../etc/x.png", small), ("../../etc/x.txt", b"up"), ("/abs.txt", b"x")]))
    seed("tar", "cut", archive([("a.png", small), ("a.txt", b"cut")])[:1400])

    seed("index", "two", index([(512, 100, 7, 6, b"a", b"a", b"caption", b"a.png"),
                                (1024, 3072, 1, 1, b"b", b"g", b"x", b"b.png")]))
    seed("index", "skipped", index([(0, 4096, 3, 3, b"k", b"k", b"c\0d", b"m")],
                                    {0: (2, b"x is left out"), 11: (1, b"y.cls")}))
    seed("index", "outside", index([(4000, 200, 3, 3, b"k", b"k", b"c", b"m")]))
    seed("index", "caption", index([], {5: (1, b"y")}, b"caption"))

    f32 = struct.pack("<6f", *range(6))
    seed("safetensors", "two", tensors([("w", "F32", [2, 3], f32), ("i", "I32", [2], b"\1\0\0\0\2\0\0\0")],
                                       {"format": "pt", "step": "7"}))
    seed("safetensors", "kinds", tensors([("d", "F64", [1], bytes(8)), ("l", "I64", [], bytes(8)),
                                          ("b", "BF16", [3], bytes(6)), ("u", "U8", [5, 1], b"abcde"),
                                          ("e", "F32", [0, 4], b"")]))
    seed("safetensors", "overlap", tensors([("a", "U8", [4], b"abcd")]).replace(b"[0, 4]", b"[1, 4]"))
    seed("safetensors", "empty", tensors([]))

    merges = "#version: 0.2\nt h\nth e\n\u0120 the\n\u00c3 \u00a9\n".encode()
    text = "the thé, then 12 don't\n\n  the end 円".encode()
    for name, table, body in [("merges", merges, text), ("bytes", b"", text), ("crlf", merges.replace(b"\n", b"\r\n"), text),
                              ("latin1", merges, b"caf\xe9 \xff\xfe\xf0\x9f the"), ("order", b"th e\nt h\n", text),
                              ("blanks", merges, b" \t\n" * 20 + b"a" * 40 + "\u3000\u00a0".encode() * 5)]:
        seed("tokenizer", name, bytes([60]) + struct.pack(">H", len(table)) + table + body)

    tsv = b"\xef\xbb\xbffile\tcaption\na.png\t a thing \r\n\nno tab\nmissing.png\tx\na.png\ttabs\tare text\nb/../a.png\tup"
    jsonl = (b'{"file": "a.png", "caption": "one \\u00e9", "k": "g"}\n{"file": "a.png", "caption": "two", "k": 7}\n'
             b'{"file": 3}\n{"file": "a.png", "caption": "\\ud83d\\ude00", "k": null}\nnot json\n')
    docs = (b'{"text": "plain", "k": [1]}\n{"segments": [{"text": "see"}, {"image": "a.png"}, {"text": ""}], "key": "d",'
            b' "k": {"a": 1}}\n{"segments": []}\n{"segments": 3}\n')
    csv = (b'file_name,text,k\r\na.png,"one, ""quoted""\nand a line",g\r\na.png,two,h\n,x\na.png,a,b,c\n"a"b,c,d\n'
           b'missing.png,x,\n')
    txt = b"one line\ntwo lines\n\n \t\nsecond\r\n\r\nthird"
    for form, name, body in [(0, "tsv", tsv), (1, "jsonl", jsonl), (2, "docs", docs), (3, "txt", txt),
                             (4, "json", b'{"caption": "in json", "k": 1.5}'), (5, "plain", b" a caption \n"),
                             (6, "csv", csv), (6, "csv-semicolons", csv.replace(b",", b";")),
                             (6, "csv-open", b'a.png,"one\na.png,two\n'), (7, "metadata", jsonl.replace(b"caption", b"text")),
                             (8, "beside", b"\xef\xbb\xbf beside \r\n"), (8, "utf-16", b"\xff\xfea\0b\0"),
                             (9, "beside-json", b'{"prompt": "in json", "k": NaN}'),
                             (0, "tsv-quoted", b'file\tk\tcaption\na.png\tg\t"a ""quoted"" caption"\na.png\t"tis\tx\n')]:
        for by in range(3):
            seed("captions", f"{name}-{by}", bytes([form, by]) + body)
    seed("captions", "not-utf8", b"\0\0a.png\tcaf\xe9 \xff\xc0\xaf\n")
    seed("captions", "nul", b"\0\1a.png\ta\0b\na\0.png\tx\n")

    for path in sorted(Path("configs").glob("*.json")):
        seed("config", path.stem, path.read_bytes())
    keys = re.findall(r'^    \{"([a-z0-9_.]+)", KEY', Path("model/config/keys.c").read_text(), re.M)
    seed("config", "names", b"{}\0" + b"\0".join(k.encode() + b"=1" for k in keys[:8]))
    seed("config", "aspect", b'{"data": {"image_mode": "aspect", "max_image_tokens": 40, "micro_batch_tokens": 256}, '
         b'/* c */ "train": {"batch": 1000} // end\n}\0train.lr=1e-3\0memory.per_tensor={"qkv": "offload"}')
    seed("config", "sources", b'{"data": {"sources": [{"type": "folder", "path": "x", "weight": 2}, {"type": "text"}]}}')
    seed("config", "unknown", b'{"model": {"dimm": 4}}\0modle.dim=4')
    seed("config", "brackets", b"[" * 300)
    seed("config", "odd", b'{"run": {"name": "a/b", "seed": 9007199254740993}, "train": {"lr": -0, "ema": 1e999}}')


main()
