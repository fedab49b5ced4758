#!/usr/bin/python3
"""Judges drawings of the shapes set: the template nearest to a drawing (mean squared error) says what it shows.

    scripts/nearest_template.py DRAWINGS [TEMPLATES]

DRAWINGS is a folder of PNG files with captions.tsv (a line "file<TAB>caption" each) or a tar of NNNNNN.png with
NNNNNN.json ("caption"). TEMPLATES is what scripts/make_shapes.py --templates draws (default
.cache/shapes/templates.tar). Captions must be those of templates. Prints which share of the drawings shows the
colour, position, background, shape and size that its caption asks for.

    --at-least NAME=SHARE ...   exit with 1 when a share is below, e.g. color=.9 position=.9 background=.9
"""
import argparse
import json
import struct
import sys
import tarfile
import zlib
from pathlib import Path

try:
    import numpy as np
except ImportError:
    sys.exit(
        f"nearest_template: numpy is missing for {sys.executable}\n"
        "  fix: run scripts/deps.sh demo, then this script with /usr/bin/python3"
    )

FIELDS = ["color", "position", "background", "shape", "size"]
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type of a PNG: grey, RGB, grey + alpha, RGB + alpha


def png_unfilter(rows, pixel):
    """Undoes the filters of PNG rows, [height, 1 + stride] u8, in whole rows where a filter allows it."""
    out = np.zeros((rows.shape[0] + 1, rows.shape[1] - 1), np.uint8)
    for y, row in enumerate(rows):
        kind, line, above, to = row[0], row[1:], out[y], out[y + 1]
        if kind == 0:
            to[:] = line
        elif kind == 1:
            to[:] = np.cumsum(line.reshape(-1, pixel), axis=0, dtype=np.uint8).reshape(-1)
        elif kind == 2:
            to[:] = line + above
        elif kind in (3, 4):
            for x in range(len(line)):
                left = int(to[x - pixel]) if x >= pixel else 0
                up = int(above[x])
                corner = int(above[x - pixel]) if x >= pixel else 0
                guess = left + up - corner
                nearest = min((left, up, corner), key=lambda v: abs(guess - v))  # ties to the first: Paeth
                to[x] = (int(line[x]) + ((left + up) // 2 if kind == 3 else nearest)) & 255
        else:
            raise ValueError(f"unknown filter {kind}")
    return out[1:]


def png_decode(body):
    """The pixels of an 8-bit PNG that is neither interlaced nor with a palette, [height, width, 3] u8; alpha is cut."""
    if body[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("not a PNG file")
    at, data, header = 8, b"", None
    while at + 8 <= len(body):
        length, kind = struct.unpack(">I4s", body[at : at + 8])
        chunk = body[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", chunk)
        elif kind == b"IDAT":
            data += chunk
        at += length + 12
    if header is None:
        raise ValueError("no header")
    width, height, depth, color, _, _, interlaced = header
    if depth != 8 or interlaced or color not in CHANNELS:
        raise ValueError(f"depth {depth}, colour type {color}, interlaced {interlaced}: only plain 8-bit PNG is read")
    channels = CHANNELS[color]
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
    pixels = png_unfilter(rows, channels).reshape(height, width, channels)
    return np.repeat(pixels[:, :, :1], 3, axis=2) if channels < 3 else pixels[:, :, :3]


def read_folder(folder):
    for line in (folder / "captions.tsv").read_text().splitlines():
        if line:
            file, tab, caption = line.partition("\t")
            if not tab:
                raise ValueError(f"captions.tsv: no tab in {line!r}")
            yield file, (folder / file).read_bytes(), {"caption": caption}


def read_tar(path):
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    for name, body in files.items():
        stem, _, kind = name.rpartition(".")
        if kind == "png":
            if f"{stem}.json" not in files:
                raise ValueError(f"{name} has no {stem}.json")
            yield name, body, json.loads(files[f"{stem}.json"])


def read_images(path):
    """Names, fields, and pixels [n, height * width * 3] float32 of all images of a folder or a tar."""
    names, fields, pixels = [], [], []
    try:
        for name, body, known in read_folder(path) if path.is_dir() else read_tar(path):
            try:
                pixels.append(png_decode(body).astype(np.float32).reshape(-1))
            except (ValueError, zlib.error) as error:
                raise ValueError(f"{name}: {error}") from error
            names.append(name)
            fields.append(known)
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        sys.exit(f"nearest_template: cannot read {path}: {error}")
    if not pixels or len({len(p) for p in pixels}) != 1:
        sys.exit(f"nearest_template: {path}: it must hold images, all of one size")
    return names, fields, np.stack(pixels)


def nearest(drawings, templates):
    """For each drawing [n, P] the index of its nearest template [m, P]."""
    squares = (templates**2).sum(axis=1)  # |d - t|^2 = |d|^2 - 2 d t + |t|^2, and |d|^2 is the same for all t
    return np.concatenate(
        [np.argmin(squares - 2 * drawings[i : i + 256] @ templates.T, axis=1) for i in range(0, len(drawings), 256)]
    )


def limit(text):
    name, _, share = text.partition("=")
    if name not in FIELDS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(FIELDS)}")
    return name, float(share)


def main():
    cache = Path(__file__).resolve().parent.parent / ".cache" / "shapes"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("templates", nargs="?", type=Path, default=cache / "templates.tar")
    parser.add_argument("--at-least", nargs="+", type=limit, default=[], metavar="NAME=SHARE")
    args = parser.parse_args()

    _, known, templates = read_images(args.templates)
    names, wanted, drawings = read_images(args.drawings)
    if templates.shape[1] != drawings.shape[1]:
        sys.exit("nearest_template: drawings and templates differ in size")
    by_caption = {fields["caption"]: fields for fields in known}
    for name, fields in zip(names, wanted):
        if fields.get("caption") not in by_caption:
            sys.exit(f"nearest_template: {name}: no template has the caption {fields.get('caption')!r}")

    found = [known[i] for i in nearest(drawings, templates)]
    asked = [by_caption[fields["caption"]] for fields in wanted]
    share = {field: float(np.mean([a[field] == f[field] for a, f in zip(asked, found)])) for field in FIELDS}
    share_all = float(np.mean([all(a[field] == f[field] for field in FIELDS) for a, f in zip(asked, found)]))
    print(f"{len(names)} drawings:", *(f"{field} {share[field]:.3f}," for field in FIELDS), f"all {share_all:.3f}")
    below = [f"{name} {share[name]:.3f} is below {least:g}" for name, least in args.at_least if share[name] < least]
    if below:
        sys.exit("nearest_template: " + "; ".join(below))


if __name__ == "__main__":
    main()
