#!/usr/bin/python3
"""scripts/patch_grid.py finds a pattern that is the same in every patch, and patches that do not fit; nothing else."""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import numpy as np
except ImportError as error:
    print(f"skipped: {error} (Debian: apt install python3-numpy, and run with /usr/bin/python3)")
    sys.exit(77)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.dont_write_bytecode = True
sys.path.insert(0, str(SCRIPTS))
from make_shapes import png_encode

PATCH, IMAGES = 8, 48
SEAMS = ("offsets",)  # cases whose patches do not fit
BOUND = ("as real", "offsets", "strong in all sizes")  # those that are held against bounds: one of each kind


def image(rng, height, width, change):
    """A picture whose spectrum falls with frequency, as real ones do, after `change`; u8 [height, width, 3]."""
    y, x = np.fft.fftfreq(height)[:, None, None], np.fft.fftfreq(width)[:, None]
    noise = np.fft.fft2(rng.standard_normal((height, width, 3)), axes=(0, 1))
    smooth = np.fft.ifft2(noise / (np.hypot(y, x) + 0.02), axes=(0, 1)).real
    return np.rint(change(128 + 40 * smooth / smooth.std())).clip(0, 255).astype(np.uint8)


def write(folder, rng, change, sizes):
    folder.mkdir(parents=True)
    rows = []
    for i in range(IMAGES):
        height, width = sizes[i % len(sizes)]
        (folder / f"{i:04}.png").write_bytes(png_encode(image(rng, height, width, change)))
        rows.append(f"{i:04}.png\tpicture {i}\n")
    (folder / "captions.tsv").write_text("".join(rows))


def pattern(rng, period, level):
    """Adds a pattern of this period and root mean square."""
    tile = rng.standard_normal((period, period, 3))
    tile *= level / tile.std()
    return lambda v: v + np.tile(tile, [-(-side // period) for side in v.shape[:2]] + [1])[: v.shape[0], : v.shape[1]]


def offsets(rng, level):
    """Adds to every patch a level of its own."""
    levels = lambda v: level * rng.standard_normal([side // PATCH for side in v.shape[:2]])
    return lambda v: v + np.kron(levels(v), np.ones((PATCH, PATCH)))[..., None]


def blur(v):
    for axis in (0, 1):
        v = 0.6 * v + 0.2 * (np.roll(v, 1, axis) + np.roll(v, -1, axis))
    return v


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPTS / "patch_grid.py", *arguments], capture_output=True, text=True)


def main():
    rng = np.random.default_rng(1)
    square, shapes = [(32, 32)], [(32, 32), (24, 48), (40, 16)]
    cases = {  # change, sizes of the images, least and largest excess
        "as real": (lambda v: v, square, -0.7, 0.7),
        "blurred": (blur, square, -0.7, 0.7),
        "noisy, more contrast": (lambda v: 128 + 2 * (v - 128) + 8 * rng.standard_normal(v.shape), square, -0.7, 0.7),
        "a period of 6": (pattern(rng, 6, 12), square, -1.5, 0.7),
        "offsets": (offsets(rng, 20), square, -20, 0),
        "weak": (pattern(rng, PATCH, 5), square, 1, 6),
        "strong": (pattern(rng, PATCH, 20), square, 6, 30),
        "sizes of all kinds": (lambda v: v, shapes, -0.7, 0.7),
        "strong in all sizes": (pattern(rng, PATCH, 20), shapes, 6, 30),
    }
    with tempfile.TemporaryDirectory() as top:
        for name, (change, sizes, least, most) in cases.items():
            folder = Path(top) / name
            write(folder, rng, change, sizes)
            write(folder / "real", rng, lambda v: v, sizes)
            done = run(folder)
            assert done.returncode == 0, f"{name}: {done.stderr}"
            excess, seams = map(float, re.search(r"excess (\S+) dB, seams (\S+) dB", done.stdout).groups())
            assert least <= excess <= most, f"{name}: {done.stdout}"
            assert (seams > 1) == (name in SEAMS), f"{name}: {done.stdout}"
            for bound in (max(excess, seams) - 0.1, max(excess, seams) + 0.1) if name in BOUND else ():
                done = run(folder, "--at-most", str(bound))
                assert done.returncode == (bound < max(excess, seams)), f"{name}: {done.stderr}"
            print(f"{name}: {excess:+.2f} dB, seams {seams:+.2f} dB")
        folder = Path(top) / "as real"
        for arguments, says in (
            ([Path(top) / "none"], "cannot read"),
            ([folder, "--patch", "12"], "not two or more patches of 12"),
            ([folder, "--patch", "32"], "not two or more patches of 32"),
        ):
            done = run(*arguments)
            assert done.returncode == 1 and says in done.stderr, (arguments, done.stderr)


main()
