#!/usr/bin/python3
"""Draws the shapes set: a captioned image set on which a small model learns something in minutes.

2 sizes x 8 colours x 4 shapes x 9 positions x 4 backgrounds = 2,304 combinations of 32 x 32 pixels, each with a
caption such as "a small red circle at the top left on black". The output is one WebDataset tar of NNNNNN.png and
NNNNNN.json members. The field "combination" names what the caption says: hold out by it (data.held_out_by), and
no jittered copy of a held-out combination is ever trained on. The bytes depend on the options alone (and on the
version of zlib, which packs the pixels).

    scripts/make_shapes.py                  .cache/shapes/shapes.tar: jittered samples, to train on
    scripts/make_shapes.py --templates      .cache/shapes/templates.tar: each combination once, not jittered. The
                                            template nearest to a drawing (mean squared error) says what it shows
"""
import argparse
import io
import itertools
import json
import os
import random
import struct
import sys
import tarfile
import zlib
from pathlib import Path

try:
    import numpy as np
except ImportError:
    sys.exit(
        f"make_shapes: numpy is missing for {sys.executable}\n"
        "  fix: run scripts/deps.sh demo, then this script with /usr/bin/python3"
    )

PIXELS = 32
SUPERSAMPLE = 4  # each pixel averages 4 x 4 points

# Radius of the circle in pixels. With jitter the widest shape still just fits in its corner.
SIZES = {"small": 3.8, "large": 5.5}
# Any two of these twelve are at least 100 apart (Euclidean, of 442), and the jitter of colour is small beside that.
COLORS = {
    "red": (225, 25, 35),
    "orange": (255, 135, 15),
    "yellow": (255, 235, 40),
    "green": (20, 170, 50),
    "cyan": (30, 215, 235),
    "blue": (30, 60, 235),
    "purple": (155, 30, 200),
    "pink": (255, 130, 205),
}
BACKGROUNDS = {"black": (8, 8, 8), "white": (247, 247, 247), "gray": (125, 125, 125), "brown": (100, 62, 30)}
POSITIONS = {  # centre (x, y) in pixels
    "top left": (8, 8),
    "top": (16, 8),
    "top right": (24, 8),
    "left": (8, 16),
    "center": (16, 16),
    "right": (24, 16),
    "bottom left": (8, 24),
    "bottom": (16, 24),
    "bottom right": (24, 24),
}
# Is a point inside? (x, y) from the centre in units of the radius, y downwards. The areas are about equal.
SHAPES = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.89,
    "triangle": lambda x, y: (y <= 1.2) & (2 * abs(x) <= y + 1.2),  # apex up, 2.4 wide and high
    "diamond": lambda x, y: abs(x) + abs(y) <= 1.2,
}

SHIFT_JITTER = 1.0  # pixels, either way
RADIUS_JITTER = 0.06  # of the radius
COLOR_JITTER = 10  # levels of 255 per channel
BACKGROUND_JITTER = 5


def combinations():
    for size, color, shape, position, background in itertools.product(SIZES, COLORS, SHAPES, POSITIONS, BACKGROUNDS):
        yield {
            "caption": f"a {size} {color} {shape} at the {position} on {background}",
            "combination": f"{size} {color} {shape} {position.replace(' ', '-')} {background}",
            "size": size,
            "color": color,
            "shape": shape,
            "position": position,
            "background": background,
        }


def shape_draw(sample, jitter):
    """The image of a sample, [PIXELS, PIXELS, 3] u8. jitter(amount) is uniform in [-amount, amount]."""
    radius = SIZES[sample["size"]] * (1 + jitter(RADIUS_JITTER))
    center_x, center_y = (c + jitter(SHIFT_JITTER) for c in POSITIONS[sample["position"]])
    color = np.array([c + jitter(COLOR_JITTER) for c in COLORS[sample["color"]]])
    background = np.array([c + jitter(BACKGROUND_JITTER) for c in BACKGROUNDS[sample["background"]]])

    points = (np.arange(PIXELS * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    x = (points[None, :] - center_x) / radius
    y = (points[:, None] - center_y) / radius
    inside = SHAPES[sample["shape"]](x, y)
    coverage = inside.reshape(PIXELS, SUPERSAMPLE, PIXELS, SUPERSAMPLE).mean(axis=(1, 3))[:, :, None]
    image = background + (color - background) * coverage
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def png_encode(image):
    """An 8-bit RGB PNG of image, [height, width, 3] u8."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row starts with its filter type, 0 = none
    rows[:, 1:] = image.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tar_add(tar, name, body):
    member = tarfile.TarInfo(name)
    member.size = len(body)
    tar.addfile(member, io.BytesIO(body))


def samples(copies, seed):
    """(sample, image) pairs; copies = 0 gives the templates. Every sample has a random stream of its own."""
    for copy in range(max(copies, 1)):
        for sample in combinations():
            stream = random.Random(f"{seed}/{copy}/{sample['combination']}")
            jitter = (lambda amount, s=stream: amount * (2 * s.random() - 1)) if copies else (lambda amount: 0)
            yield sample, shape_draw(sample, jitter)


def main():
    cache = Path(__file__).resolve().parent.parent / ".cache" / "shapes"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="the tar to write")
    parser.add_argument("--templates", action="store_true", help="one image a combination, not jittered")
    parser.add_argument("--samples", type=int, default=4, help="jittered samples a combination (default 4)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the jitter (default 1)")
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples {args.samples}: must be at least 1")
    out = args.out or cache / ("templates.tar" if args.templates else "shapes.tar")

    count = 0
    part = out.with_name(f"{out.name}.{os.getpid()}.part")  # renamed when whole, so that OUT is never half a file
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, image in samples(0 if args.templates else args.samples, args.seed):
                tar_add(tar, f"{count:06d}.png", png_encode(image))
                tar_add(tar, f"{count:06d}.json", json.dumps(sample).encode() + b"\n")
                count += 1
        os.replace(part, out)
    except OSError as error:
        sys.exit(f"make_shapes: cannot write {out}: {error}\n  fix: name a writable file, or free some space")
    finally:
        part.unlink(missing_ok=True)
    print(f"{out}: {count} images, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
