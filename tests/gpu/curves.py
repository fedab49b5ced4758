#!/usr/bin/python3
"""Two runs of the same steps in other arithmetic: their losses must lie on each other.

    tests/gpu/curves.py RUN RUN [OUT.svg]    folders with a metrics.jsonl, named by what tells them apart (cpu, cuda)

Losses are means over WINDOW neighbouring steps, since a single step's follow its few documents. Prints the largest
differences of each, relative to the first run's, that of their means over the run, and the evaluations side by side;
draws the curves. Exit code 1 when one of them is more than LOSSES allows.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import plot

WINDOW = 20
EARLY = 60
# Key, title, and the largest difference allowed in the first EARLY steps, in all steps, and of the means of all steps.
# Rounding grows into other, equally good steps, so that only the early ones tell a small error from it. In % of the
# three losses, early, in all steps, and of their means:
#   CPU and H100                           0.6  2.8  0.9    2.6  15  2.5    0.1  1.9  0.3
#   CPU and CPU with train.lr 0.1% larger  0.6  0.8  0.8    5.9  15  6.2    1.2  1.4  1.2
#   CPU and CPU with train.lr 10% smaller  6.7  10  5.9    7.9  12  7.8    0.3  2.3  1.1
LOSSES = (("loss", "total", 0.02, 0.09, 0.025),
          ("flow", "flow", 0.06, 0.30, 0.04),
          ("ce", "text cross-entropy", 0.02, 0.09, 0.025))
FIGURES = ("flow", "caption_bits_per_byte", "retrieval")  # of an evaluation


def smooth(steps, key):
    """[(steps done, mean over the WINDOW steps up to it)]"""
    points = plot.series(steps, key)
    return [(points[i][0], sum(y for _, y in points[i - WINDOW + 1 : i + 1]) / WINDOW)
            for i in range(WINDOW - 1, len(points))]


def draw(runs, names, curves, out):
    panels = []
    for key, title, *_ in LOSSES:
        lines = [(name, color, [(x, y, y, y) for x, y in curves[key][i]])
                 for i, (name, color) in enumerate(zip(names, (plot.ORANGE, plot.BLUE)))]
        panels.append(plot.Panel(title, f"mean of {WINDOW} steps", lines, max(x for x, _ in runs[0][0]), log=True))
    page = plot.page_svg(" and ".join(names), "the same steps of the same model", panels, len(panels))
    Path(out).write_text(page, encoding="utf-8")


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__.strip())
    folders = [Path(a) for a in sys.argv[1:3]]
    names = [folder.resolve().name for folder in folders]
    runs = [plot.read_metrics(folder / "metrics.jsonl") for folder in folders]  # steps, evaluations, loads
    curves = {key: [smooth(steps, key) for steps, _, _ in runs] for key, *_ in LOSSES}
    apart, said = False, {}
    for key, title, *at_most in LOSSES:
        a, b = curves[key]
        if not a or [x for x, _ in a] != [x for x, _ in b]:
            sys.exit(f"{title}: {len(a)} points of {names[0]}, {len(b)} of {names[1]}")
        each = [(abs(v - w) / abs(w), x) for (x, w), (_, v) in zip(a, b)]
        early, (worst, at) = max(d for d, x in each if x <= EARLY), max(each)
        mean = sum(v for _, v in b) / sum(w for _, w in a) - 1
        apart |= any(d > most for d, most in zip((early, worst, abs(mean)), at_most))
        may = [f"may be {100 * most:g}%" for most in at_most]
        said[key] = (f"{100 * early:.2f}% ({may[0]}) in the first {EARLY} steps, {100 * worst:.2f}% ({may[1]}) in all, "
                     f"mean {100 * mean:+.2f}% ({may[2]})")
        print(f"{title}: at most {said[key]}; the largest at step {at}; last {a[-1][1]:.4f} ({names[0]}), "
              f"{b[-1][1]:.4f} ({names[1]})")
    for (at, a), (_, b) in zip(runs[0][1], runs[1][1]):
        print(f"evaluation at {at}: " + ", ".join(f"{k} {a[k]:.4f} and {b[k]:.4f}" for k in FIGURES if a.get(k)))
    if len(sys.argv) == 4:
        draw(runs, names, curves, sys.argv[3])
    print(f"losses of {len(runs[0][0])} steps: the total differs by at most {said['loss']}; "
          + ("too much, here or above" if apart else "flow and cross-entropy within theirs"))
    sys.exit(apart)


main()
