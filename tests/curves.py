#!/usr/bin/python3
"""Two runs of the same steps in other arithmetic: their losses must lie on each other.

    tests/curves.py RUN RUN [OUT.svg]    folders with a metrics.jsonl, named by what tells them apart (cpu, cuda)

Losses are means over WINDOW neighbouring steps, since a single step's follow its few documents. Prints the largest
difference of each, relative to the first run's, and the evaluations side by side; draws the curves. Exit code 1 when
the total differs by more than AT_MOST.
"""
import html
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import plot

WINDOW = 20
# Rounding grows into other, equally good steps: two runs of the CPU whose beta2 was 0.95 and 0.9501 were 7% apart.
AT_MOST = 0.15
LOSSES = (("loss", "total"), ("flow", "flow"), ("ce", "text cross-entropy"))
FIGURES = ("flow", "caption_bits_per_byte", "retrieval")  # of an evaluation


def smooth(steps, key):
    """[(steps done, mean over the WINDOW steps up to it)]"""
    points = plot.series(steps, key)
    return [(points[i][0], sum(y for _, y in points[i - WINDOW + 1 : i + 1]) / WINDOW)
            for i in range(WINDOW - 1, len(points))]


def draw(runs, names, curves, out):
    panels = []
    for key, title in LOSSES:
        lines = [(name, color, [(x, y, y, y) for x, y in curves[key][i]])
                 for i, (name, color) in enumerate(zip(names, (plot.ORANGE, plot.BLUE)))]
        panels.append(plot.Panel(title, f"mean of {WINDOW} steps", lines, max(x for x, _ in runs[0][0]), log=True))
    width, height = len(panels) * (plot.PANEL_W + 12), plot.HEAD + plot.PANEL_H + 16
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{plot.FAINT}">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="{plot.LEFT}" y="30" {plot.BOLD} font-size="18">{html.escape(" and ".join(names))}</text>',
           f'<text x="{plot.LEFT}" y="48">the same steps of the same model</text>']
    for i, panel in enumerate(panels):
        svg.append(f'<g transform="translate({i * (plot.PANEL_W + 12)} {plot.HEAD})">')
        svg += panel.svg() + ["</g>"]
    Path(out).write_text("\n".join(svg + ["</svg>"]) + "\n", encoding="utf-8")


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__.strip())
    folders = [Path(a) for a in sys.argv[1:3]]
    names = [folder.resolve().name for folder in folders]
    runs = [plot.read_metrics(folder / "metrics.jsonl") for folder in folders]  # steps, evaluations, loads
    curves = {key: [smooth(steps, key) for steps, _, _ in runs] for key, _ in LOSSES}
    worst, mean = {}, {}
    for key, title in LOSSES:
        a, b = curves[key]
        if not a or [x for x, _ in a] != [x for x, _ in b]:
            sys.exit(f"{title}: {len(a)} points of {names[0]}, {len(b)} of {names[1]}")
        worst[key], at = max((abs(v - w) / abs(w), x) for (x, w), (_, v) in zip(a, b))
        mean[key] = sum(v for _, v in b) / sum(w for _, w in a) - 1
        print(f"{title}: largest difference {100 * worst[key]:.2f}%, at step {at}, mean {100 * mean[key]:+.2f}%; "
              f"last {a[-1][1]:.4f} ({names[0]}), {b[-1][1]:.4f} ({names[1]})")
    for (at, a), (_, b) in zip(runs[0][1], runs[1][1]):
        print(f"evaluation at {at}: " + ", ".join(f"{k} {a[k]:.4f} and {b[k]:.4f}" for k in FIGURES if a.get(k)))
    if len(sys.argv) == 4:
        draw(runs, names, curves, sys.argv[3])
    steps = len(runs[0][0])
    print(f"the losses of {steps} steps differ by {100 * worst['loss']:.2f}% at most (may be {100 * AT_MOST:.0f}%), "
          f"their mean by {100 * mean['loss']:+.2f}%")
    sys.exit(worst["loss"] > AT_MOST)


main()
