#!/usr/bin/python3
"""What a trained checkpoint is used for: the figures of --eval and the sheet of drawings beside real images.

    tests/scripts/uses.py BUILD

Needs numpy. Exit code 1 on the first thing that is not as it should be.
"""
import json, math, re, subprocess, sys, tarfile, tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from nearest_template import png_decode
from checks import check, run_metrics

DOCUMENTS, SAMPLES, STEPS = 20, 5, 2
SHARES = ("retrieval", "retrieval_training")
PAIRS = ("flow_at", "flow_at_shuffled", "x_mse", "x_mse_shuffled")
EXPERTS = ("text_experts", "image_experts")


def train(binary, *arguments):
    done = subprocess.run([binary, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    check(done.returncode == 0, f"{arguments}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def check_figures(said, run):
    """--eval prints one object: that of the run's own last evaluation, whole, with figures that can be."""
    (line,) = said.splitlines()
    printed = json.loads(line)
    (own,) = [row for row in run_metrics.evaluations(run) if row["step"] == STEPS]
    check(printed == own, f"--eval prints {printed},\nthe run wrote {own}")
    figures = printed["eval"]
    documented = re.findall(r"^\| (`[^|]*`) \|", re.split("### ", (ROOT / "docs/metrics.md").read_text())[2], re.M)
    names = {name for cell in documented for name in re.findall(r"`(\w+)`", cell)}
    check(names == set(figures), f"figures that docs/metrics.md or --eval lacks: {names ^ set(figures)}")
    check((figures["documents"], figures["of"]) == (DOCUMENTS, "held_out"), f"{figures}")
    check(figures["t"] == [0.1, 0.3, 0.5, 0.7, 0.9], f"{figures['t']}")
    for name in SHARES:  # of 20 images
        check(0 <= figures[name] <= 1 and (DOCUMENTS * figures[name]).is_integer(), f"{name} {figures[name]}")
    for name in PAIRS:
        check(len(figures[name]) == 5 and all(0 < x < 1000 for x in figures[name]), f"{name} {figures[name]}")
    # The velocity's error is x's over (1 - t)^2, its denominator floored at t_floor.
    for t, flow, mse in zip(figures["t"], figures["flow_at"], figures["x_mse"]):
        check(math.isclose(flow, mse / (1 - t) ** 2, rel_tol=1e-5), f"at {t} flow {flow}, x mse {mse}")
    check(0.1 < figures["flow"] < 10, f"flow {figures['flow']}")
    for name in ("caption_bits_per_byte", "caption_bits_per_byte_shuffled"):  # barely trained: no better than guessing
        check(0.5 < figures[name] < 10, f"{name} {figures[name]}")
    for name in EXPERTS:
        f = figures[name]
        check(f["all"] == 16 and 0 <= f["dead"] < 16 and 0 < f["entropy"] <= 1 and 1 <= f["max_over_mean"] <= 4, f"{f}")


def pictures(folder):
    decoded = [png_decode((folder / f"{i:04d}.png").read_bytes()) for i in range(SAMPLES)]
    return [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in decoded]


def check_sheet(sheet, folder):
    """Each drawing, then its real image, four pairs a row, where the layout of trainer/output/grid.c puts them."""
    margin, line, side = 8, 12, 64
    cells = [image for pair in zip(pictures(folder), pictures(folder / "real")) for image in pair]
    check(all(image.shape == (side, side, 3) for image in cells), "pictures of 32 x 32 pixels, doubled")
    row_at = [margin + line + margin + line + 2]  # below the title, its line and the columns' titles

    def cell(i, y):
        x = margin + i % 8 * (side + margin)
        return sheet[y : y + side, x : x + side]

    # The second row lies below the captions of the first, which are one to four lines.
    row_at += [y for n in range(1, 5) if (cell(8, y := row_at[0] + side + 4 + n * line + margin) == cells[8]).all()]
    check(len(row_at) == 2, "the second row's first drawing is not there")
    for i, image in enumerate(cells):
        what = f"{'real image' if i % 2 else 'drawing'} {i // 2}"
        check((cell(i, row_at[i // 8]) == image).all(), f"{what} is not in cell {i % 8} of row {i // 8}")


def check_real(folder):
    """The real images are those of the captions beside them."""
    images = {}
    with tarfile.open(ROOT / ".cache/shapes/shapes.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    for name, body in files.items():
        if name.endswith(".json"):
            images.setdefault(json.loads(body)["caption"], []).append(files[name[:-4] + "png"])
    for i, row in enumerate((folder / "captions.tsv").read_text().splitlines()):
        file, caption = row.split("\t")
        check(file == f"{i:04d}.png", row)
        real = png_decode((folder / "real" / file).read_bytes())
        is_one = any((png_decode(png) == real).all() for png in images[caption])
        check(is_one, f"real/{file} is no image of '{caption}'")


def main():
    binary = str(Path(sys.argv[1]).resolve() / "train")
    keys = {"eval.documents": DOCUMENTS, "eval.samples": SAMPLES, "eval.sampler_steps": 2}
    sets = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    if not (ROOT / ".cache/shapes/shapes.tar").exists():
        subprocess.run(["scripts/make_shapes.py", ".cache/shapes/shapes.tar"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        run, drawings = Path(folder) / "run", Path(folder) / "drawings"
        train(binary, "configs/demo.json", "--run-dir", run, "--tokens", 256, "--steps", STEPS, *sets)
        said = train(binary, run, "--eval", "--out", drawings)
        try:
            check_figures(said, run)
            check_sheet(png_decode((run / f"samples/step-{STEPS:06d}.png").read_bytes()), drawings)
            check_real(drawings)
        except AssertionError as error:
            print(f"FAILED: {error}")
            return 1
    print("--eval's figures and the sheet's cells: as they should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
