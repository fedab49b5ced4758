#!/usr/bin/python3
"""Measures the patches in drawings: what repeats in each of them, and their seams, beside real images.

    ./train RUN --eval --out DRAWINGS && scripts/patch_grid.py DRAWINGS [REAL]

DRAWINGS and REAL are folders of PNG files with captions.tsv, or tars of NNNNNN.png with NNNNNN.json, as
scripts/nearest_template.py reads them; REAL is DRAWINGS/real unless given. A pattern that repeats from patch to patch
has its energy at the frequencies (i, j) / patch. Real images have some there, too, and about as much at the frequencies
next to them. So the figure is a ratio of ratios, the mean over all (i, j):

    excess = energy at (i, j) / patch over that of its neighbours in drawings, over the same in real images, in dB

0 dB is as periodic as real images. Blur, contrast and noise change a frequency and its neighbours alike and do not
count. 64 real images of a set against 64 others differ by about 0.3 dB. Patches that do not fit together show
elsewhere (their edges have no energy at these frequencies):

    seams = squared differences of neighbouring pixels across the edges of patches over those within, likewise, in dB

    --at-most DB   exit with 1 when one of them is above
"""
import argparse
import sys
import tarfile
import zlib
from pathlib import Path

from nearest_template import np, png_decode, read_folder, read_tar

QUANTIZED = 1 / 12  # variance of rounding to levels: what even a flat image has at every frequency


def read_images(path):
    """[height, width, 3] float64 each."""
    images = []
    try:
        for name, body, _ in read_folder(path) if path.is_dir() else read_tar(path):
            try:
                images.append(png_decode(body).astype(float))
            except (ValueError, zlib.error) as error:
                raise ValueError(f"{name}: {error}") from error
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        sys.exit(f"patch_grid: cannot read {path}: {error}")
    return images


def spectrum_sums(images, patch):
    """Mean energy over images and channels at the frequencies (i, j) / patch [patch, patch] and next to them, and the
    sum of all. Energy as variance times pixels: that of white noise of variance 1 is 1 at every frequency."""
    at, near, total = np.zeros((patch, patch)), np.zeros((patch, patch)), 0.0
    for image in images:
        height, width, _ = image.shape
        power = (np.abs(np.fft.fft2(image - image.mean((0, 1)), axes=(0, 1))) ** 2).mean(2) / (height * width)
        y, x = np.meshgrid(np.arange(patch) * height // patch, np.arange(patch) * width // patch, indexing="ij")
        at += power[y, x]
        around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        near += np.mean([power[(y + dy) % height, (x + dx) % width] for dy, dx in around], axis=0)
        total += power.sum() / (height * width)
    return at / len(images), near / len(images), total / len(images)


def seams(images, patch):
    """Mean squared difference of neighbouring pixels across the edges of patches over that within, in dB."""
    sums = np.zeros((2, 2))  # (within, across), (sum, count)
    for image in images:
        for axis in (0, 1):
            steps = (np.diff(image, axis=axis) ** 2).mean((1 - axis, 2))
            across = np.arange(1, len(steps) + 1) % patch == 0
            for kind in (0, 1):
                sums[kind] += steps[across == kind].sum(), (across == kind).sum()
    within, across = sums[:, 0] / sums[:, 1] + 2 * QUANTIZED
    return 10 * np.log10(across / within)


def measure(images, patch):
    """Mean contrast in dB of the frequencies (i, j) / patch, and their share of all energy."""
    at, near, total = spectrum_sums(images, patch)
    pixels = np.mean([image.shape[0] * image.shape[1] for image in images])
    repeating = np.arange(patch * patch) > 0  # the first is the mean
    contrast = 10 * np.log10((at + QUANTIZED) / (near + QUANTIZED))
    return contrast.reshape(-1)[repeating].mean(), at.sum() / pixels / max(total, 1e-12)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("real", type=Path, nargs="?", help="default: DRAWINGS/real")
    parser.add_argument("--patch", type=int, default=8, help="pixels of a patch's side (default 8)")
    parser.add_argument("--at-most", type=float, metavar="DB")
    args = parser.parse_args()
    drawings, real = read_images(args.drawings), read_images(args.real or args.drawings / "real")
    for path, images in ((args.drawings, drawings), (args.real or args.drawings / "real", real)):
        if not images:
            sys.exit(f"patch_grid: {path} holds no images")
        for image in images:
            if any(side % args.patch or side < 2 * args.patch for side in image.shape[:2]):
                height, width = image.shape[:2]
                sys.exit(f"patch_grid: {path}: {width} x {height} pixels are not two or more patches of {args.patch}")
    (drawn, drawn_share), (truth, true_share) = measure(drawings, args.patch), measure(real, args.patch)
    excess, seam = drawn - truth, seams(drawings, args.patch) - seams(real, args.patch)
    print(
        f"{len(drawings)} drawings: at multiples of 1/{args.patch} {100 * drawn_share:.2f}% of the energy "
        f"(real images {100 * true_share:.2f}%), excess {excess:+.2f} dB, seams {seam:+.2f} dB"
    )
    if args.at_most is not None and not max(excess, seam) <= args.at_most:
        sys.exit(f"patch_grid: an excess of {excess:.2f} dB or seams of {seam:.2f} dB are above {args.at_most:g}")


if __name__ == "__main__":
    main()
