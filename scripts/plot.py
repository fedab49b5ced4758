#!/usr/bin/env python3
"""Charts of a run as one SVG: losses, evaluations, load balance, throughput, from its metrics.jsonl (docs/metrics.md).

    scripts/plot.py RUN_FOLDER [OUT.svg]      default: RUN_FOLDER/metrics.svg

A line is the mean, the band around it the smallest to the largest value of neighbouring steps (up to 150 groups).
Needs nothing but Python 3.
"""
import html
import json
import math
import sys
from pathlib import Path

GROUPS = 150
PANEL_W, PANEL_H = 540, 300  # outer size of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 54, 40  # of it, around the plot
HEAD = 64
INK, FAINT, GRID = "#222", "#666", "#e4e4e4"
BOLD = f'font-weight="600" fill="{INK}"'
BLACK, BLUE, ORANGE, GREEN = "#333333", "#0072b2", "#d55e00", "#009e73"  # told apart by colour-blind readers too


def fail(text, fix):
    sys.exit(f"plot: {text}\n  fix: {fix}")


def read_metrics(path):
    """The step lines, evaluations and load lines of a metrics.jsonl, each as [(steps done, figures)]."""
    steps, evals, loads, bad = [], [], [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}", "name the folder of a run, such as runs/demo")
    for line in lines:
        try:
            row = json.loads(line)
            if "eval" in row:
                evals.append((row["step"], row["eval"]))
            elif "load" in row:
                loads.append((row["step"], row["load"]))
            else:
                steps.append((row["step"] + 1, row))
        except (ValueError, TypeError, KeyError):
            bad += 1
    if bad:
        print(f"plot: {path}: {bad} lines are not those of docs/metrics.md and are left out", file=sys.stderr)
    if not steps:
        fail(f"{path} has no step", "train for a step or more first")
    return steps, evals, loads


def series(rows, key):
    """[(x, y)] of a figure that may be nested ("text_experts.entropy"), without missing values."""
    points = []
    for x, row in rows:
        for part in key.split("."):
            row = row.get(part) if isinstance(row, dict) else None
        if isinstance(row, (int, float)) and math.isfinite(row):
            points.append((x, row))
    return points


def grouped(points):
    """[(x, mean, smallest, largest)] of up to GROUPS groups of neighbours."""
    n = min(GROUPS, len(points))
    out = []
    for g in range(n):
        part = points[g * len(points) // n : (g + 1) * len(points) // n]
        ys = [y for _, y in part]
        out.append((sum(x for x, _ in part) / len(part), sum(ys) / len(ys), min(ys), max(ys)))
    return out


def linear_ticks(low, high, most):
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * k for k in (1, 2, 5, 10, 20) if (high - low) / (step * k) <= most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in (range(1, 10), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in digits if low <= m * 10.0**d <= high]
        if len(ticks) <= 7:
            break
    return ticks if len(ticks) > 1 else linear_ticks(low, high, 5)


def label(v):
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(v) >= size:
            return f"{v / size:.4g}{suffix}"
    return f"{v:.4g}"


class Panel:
    """One chart: lines are [(x, mean, low, high)]; the axes fit all of them."""

    def __init__(self, title, note, lines, x_max, log=False, floor=None, marks=False):
        self.title, self.note, self.marks, self.log = title, note, marks, log
        if log:  # zeros cannot be shown
            lines = [(name, color, [p for p in points if p[2] > 0]) for name, color, points in lines]
        self.lines = [(name, color, points) for name, color, points in lines if points]
        values = [v for _, _, points in self.lines for p in points for v in p[1:]]
        low, high = (min(values), max(values)) if values else (0, 1)
        if floor is not None:
            low = min(low, floor)
        if log and values:
            low, high = low / 1.1, high * 1.1
        else:
            pad = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
            low, high = (low if low == floor else low - pad), high + pad
        self.low, self.high, self.x_max = low, high, x_max

    def x(self, v):
        return LEFT + (PANEL_W - LEFT - RIGHT) * v / self.x_max

    def y(self, v):
        part = math.log(v / self.low) / math.log(self.high / self.low) if self.log and self.lines else (
            (v - self.low) / (self.high - self.low))
        return PANEL_H - BOTTOM - (PANEL_H - TOP - BOTTOM) * part

    def axes(self):
        right, bottom, out = PANEL_W - RIGHT, PANEL_H - BOTTOM, []
        ticks = log_ticks(self.low, self.high) if self.log and self.lines else linear_ticks(self.low, self.high, 6)
        for v in ticks:
            y = self.y(v)
            out.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="{GRID}"/>')
            out.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label(v)}</text>')
        for v in linear_ticks(0, self.x_max, 7):
            if v != int(v):
                continue
            x = self.x(v)
            out.append(f'<path d="M{x:.1f} {bottom}v4" stroke="{FAINT}"/>')
            out.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label(v)}</text>')
        out.append(f'<path d="M{LEFT} {bottom}H{right}" stroke="{FAINT}"/>')
        out.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 33}" text-anchor="middle">steps</text>')
        return out

    def svg(self):
        out = [f'<text x="{LEFT}" y="17" {BOLD} font-size="14">{html.escape(self.title)}</text>']
        out += [f'<text x="{PANEL_W - RIGHT}" y="17" text-anchor="end">{html.escape(self.note)}</text>']
        out += self.axes()
        if not self.lines:
            out.append(f'<text x="{PANEL_W / 2}" y="{PANEL_H / 2}" text-anchor="middle">no figures in this run</text>')
        for _, color, points in self.lines:
            if all(p[2] == p[3] for p in points):
                continue
            edge = [(x, high) for x, _, _, high in points] + [(x, low) for x, _, low, _ in reversed(points)]
            path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in edge)
            out.append(f'<path d="M{path}Z" fill="{color}" fill-opacity=".16"/>')
        for _, color, points in self.lines:
            path = "L".join(f"{self.x(p[0]):.1f} {self.y(p[1]):.1f}" for p in points)
            out.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.6" stroke-linejoin="round"/>')
            if self.marks or len(points) == 1:
                dots = [(self.x(p[0]), self.y(p[1])) for p in points]
                out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in dots]
        at = LEFT  # the legend, above the plot
        for name, color, points in self.lines:
            out.append(f'<path d="M{at} 36h16" stroke="{color}" stroke-width="3"/>')
            text = f"{name} {label(points[-1][1])}"
            out.append(f'<text x="{at + 21}" y="40" fill="{INK}">{html.escape(text)}</text>')
            at += 21 + 6.6 * len(text) + 14
        return out


def loss_panel(steps, x_max):
    skipped = sum("skipped" in row for _, row in steps)
    lines = [(name, color, grouped(series(steps, key))) for name, key, color in (
        ("total", "loss", BLACK), ("flow", "flow", BLUE), ("text cross-entropy", "ce", ORANGE))]
    return Panel("Training loss", f"{skipped} steps skipped" if skipped else "", lines, x_max, log=True)


def eval_panel(evals, x_max):
    retrieval = series(evals, "retrieval")
    note = f"caption retrieval among 16: {retrieval[-1][1]:.3f}" if retrieval else ""
    lines = [(name, color, grouped(series(evals, key))) for name, key, color in (
        ("flow", "flow", BLUE), ("bits/byte", "caption_bits_per_byte", ORANGE),
        ("bits/byte, other image", "caption_bits_per_byte_shuffled", GREEN))]
    of = evals[-1][1].get("of") if evals else None  # where nothing is held out, training samples are measured
    title = f"Evaluation, {'training' if of == 'training' else 'held-out'} samples"
    return Panel(title, note, lines, x_max, log=True, marks=True)


def load_panel(steps, evals, loads, x_max):
    source = loads or evals
    lines = [("worst layer, each step", BLACK, grouped(series(steps, "expert_load_max")))]
    lines += [(m, color, grouped(series(source, f"{m}_experts.max_over_mean")))
              for m, color in (("text", ORANGE), ("image", BLUE))]
    dead = [sum(f.get(f"{m}_experts", {}).get("dead", 0) for m in ("text", "image")) for _, f in source[-1:]]
    note = f"{dead[0]} experts without a token" if dead else ""
    return Panel("Fullest expert's load, 1 = even", note, lines, x_max, floor=1)


def speed_panel(steps, x_max):
    seconds = sum(y for _, y in series(steps, "seconds"))
    waited = sum(y for _, y in series(steps, "data_wait"))
    note = f"waiting for data {100 * waited / seconds:.2f}% of the time" if seconds else ""
    lines = [("tokens/s", GREEN, grouped(series(steps, "tokens_per_second")))]
    return Panel("Throughput, tokens per second", note, lines, x_max, floor=0)


def page_svg(title, about, panels, columns):
    """The text of an SVG with panels in rows of `columns`, under a title and a line about them."""
    rows = -(-len(panels) // columns)
    width, height = columns * (PANEL_W + 12), HEAD + rows * PANEL_H + 16
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{FAINT}">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="{LEFT}" y="30" {BOLD} font-size="18">{html.escape(title)}</text>',
           f'<text x="{LEFT}" y="48">{html.escape(about)}</text>']
    for i, panel in enumerate(panels):
        x, y = i % columns * (PANEL_W + 12), HEAD + i // columns * (PANEL_H + 8)
        svg.append(f'<g transform="translate({x} {y})">')
        svg += panel.svg() + ["</g>"]
    return "\n".join(svg + ["</svg>"]) + "\n"


def main():
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    run = Path(sys.argv[1])
    out = Path(sys.argv[2]) if len(sys.argv) == 3 else run / "metrics.svg"
    steps, evals, loads = read_metrics(run / "metrics.jsonl")
    x_max = max(x for x, _ in steps + evals)
    panels = [loss_panel(steps, x_max), eval_panel(evals, x_max), load_panel(steps, evals, loads, x_max),
              speed_panel(steps, x_max)]
    seconds, tokens = (sum(y for _, y in series(steps, key)) for key in ("seconds", "tokens"))
    clock = f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
    about = (f"{x_max:,} steps, {label(tokens)} tokens in {clock}; a line is the mean of neighbouring steps, its band "
             "their range; a number says where its line ends")
    page = page_svg(run.resolve().name, about, panels, 2)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as e:
        fail(f"cannot write {out}: {e.strerror}", "give a second argument: a file in a folder you may write to")
    print(out)


if __name__ == "__main__":
    main()
