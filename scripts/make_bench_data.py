#!/usr/bin/python3
"""Makes a data set to time training with: nothing can be learned from it, but its tokens are spread as those of real
captioned images are. A handful of pictures, each used many times, under random captions of 32 to 96 words.

    scripts/make_bench_data.py FOLDER --size 64      FOLDER/bench.tar (WebDataset) and FOLDER/bench.bpe

The tokenizer bench.bpe has one id for each of the 676 two-letter words that captions consist of, so a caption has
exactly as many tokens as words.
"""
import argparse
import itertools
import random
import string
import sys
import tarfile
from pathlib import Path

try:
    import numpy as np
    from make_shapes import png_encode, tar_add
except ImportError as error:
    sys.exit(f"make_bench_data: {error}\n  fix: run scripts/deps.sh demo, then this script with /usr/bin/python3")

PICTURES = 8
WORDS = (32, 96)  # of a caption, both ends included


def picture(random_numbers, size):
    """Smooth colours with a little grain, [size, size, 3] u8: a PNG that takes about as long to decode as a photo's."""
    y, x = np.mgrid[:size, :size] / size
    waves = random_numbers.uniform(1, 6, (3, 2))
    smooth = 128 + 90 * np.sin(waves[:, 0] * x[..., None] + waves[:, 1] * y[..., None] * 2)
    return np.clip(smooth + random_numbers.normal(0, 6, (size, size, 3)), 0, 255).astype(np.uint8)


def merges():
    """Pairs of letters, then each of them behind a space."""
    words = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]
    return words, ["#version: 0.2", *(f"{a} {b}" for a, b in words), *(f"\u0120 {word}" for word in words)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default 64)")
    parser.add_argument("--samples", type=int, default=2000, help="captioned images (default 2000)")
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    words, lines = merges()
    (args.folder / "bench.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pictures = [png_encode(picture(np.random.default_rng(i), args.size)) for i in range(PICTURES)]
    chance = random.Random(1)
    with tarfile.open(args.folder / "bench.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(args.samples):
            caption = " ".join(chance.choices(words, k=chance.randint(*WORDS)))
            tar_add(tar, f"{i:06d}.png", chance.choice(pictures))
            tar_add(tar, f"{i:06d}.txt", caption.encode())
    print(f"{args.folder}/bench.tar: {args.samples} captioned images of {args.size} x {args.size} pixels")


if __name__ == "__main__":
    main()
