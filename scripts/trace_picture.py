#!/usr/bin/env python3
"""A picture of a traced step as SVG: what its lanes of ops and of copies do, one above the other.

    scripts/trace_picture.py TRACE.json [OUT.svg] [--from MS] [--to MS]      default: TRACE.svg, the whole step

TRACE.json is what ./train --trace writes. Under the lanes stands, and is printed, what was copied, at which rate, and
the share of that time in which the compute lane was at work. Needs nothing but Python 3.
"""
import argparse
import html
import json
import math
import sys
from pathlib import Path

WORK = ["compute", "update"]  # lanes of ops; an overlapped update has one of its own
TRANSFERS = ["device to host", "host to device", "between processes"]
WIDTH, LEFT, RIGHT, TOP = 1200, 136, 20, 64
LANE_H, LANE_GAP, AXIS_H, LEGEND_H = 56, 14, 40, 30
PAUSE = 0.02  # ms: between two ops of the compute lane that follow each other; a longer one is a wait
INK, FAINT, GRID, PASS = "#222", "#666", "#e4e4e4", "#f4f4f4"
# Families of ops, told apart by colour-blind readers too.
FAMILIES = [
    ("projections", "#0072b2", ("LINEAR",)),
    ("experts", "#d55e00", ("EXPERT", "SWIGLU")),
    ("attention", "#009e73", ("ATTENTION", "QKNORM")),
    ("norms, modulation", "#e69f00", ("ADALN", "COMBINE_ADALN", "MOD", "COND")),
    ("router", "#cc79a7", ("ROUTER",)),
    ("update", "#666666", ("ADAMW", "GRAD")),
    ("others", "#bbbbbb", ("",)),
    ("copies", "#56b4e9", ()),
]


def fail(text, fix):
    sys.exit(f"trace_picture: {text}\n  fix: {fix}")


def read_trace(path):
    """(title, programs, slices): [(name, begin, end)] and [(lane, op, begin, end, args)], in milliseconds."""
    lanes, title, programs, slices = {}, "", [], []
    try:
        for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
            if e.get("ph") == "M" and e["name"] == "thread_name":
                lanes[e["tid"]] = e["args"]["name"]
            elif e.get("ph") == "M" and e["name"] == "process_name":
                title = e["args"]["name"]
            elif e.get("ph") == "X":
                begin, end = e["ts"] / 1e3, (e["ts"] + e["dur"]) / 1e3
                if "tensor" in e["args"]:
                    slices.append((lanes.get(e["tid"], ""), e["name"], begin, end, e["args"]))
                else:
                    programs.append((e["name"], begin, end))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        fail(f"{path} is no trace of ./train: {e}", "write one with ./train CONFIG --trace FILE")
    if not slices:
        fail(f"{path} holds no op", "trace a step of training: ./train CONFIG --trace FILE")
    return title, programs, slices


def colour(lane, op):
    if lane not in WORK:
        return FAMILIES[-1][1]
    return next(c for _, c, prefixes in FAMILIES if op.startswith(prefixes))


def merged(spans, pause=0.0):
    """Sorted spans (begin, end) without overlaps, those joined that lie no more than `pause` apart."""
    out = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1] + pause:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([begin, end])
    return out


def overlap(a, b):
    """How long two lists of merged spans have in common."""
    total, k = 0.0, 0
    for begin, end in a:
        while k < len(b) and b[k][1] <= begin:
            k += 1
        i = k
        while i < len(b) and b[i][0] < end:
            total += min(end, b[i][1]) - max(begin, b[i][0])
            i += 1
    return total


def copy_times(lanes, slices):
    """Milliseconds in which these lanes copied, and of them those beside the compute lane's work."""
    compute = merged(((s[2], s[3]) for s in slices if s[0] == WORK[0]), PAUSE)
    busy = merged((s[2], s[3]) for s in slices if s[0] in lanes)
    return sum(e - b for b, e in busy), overlap(busy, compute)


def copies_text(lane, slices):
    """What a lane's copies carried, and how fast."""
    mine = [s for s in slices if s[0] == lane]
    if not mine:
        return f"{lane}: nothing"
    took, sent = copy_times([lane], slices)[0], sum(s[4].get("bytes", 0) for s in mine)
    rate = sent / took / 1e6 if took > 0 else 0.0
    return f"{lane}: {len(mine)} copies, {sent / 1e9:.3g} GB in {took:.3g} ms of copying, {rate:.3g} GB/s"


def hidden_text(slices):
    """Which share of the transfers' time passed beside work of the compute lane."""
    shares = []
    for lane in TRANSFERS:
        took, hidden = copy_times([lane], slices)
        if took > 0:
            shares.append(f"{lane} {hidden / took:.1%}")
    took, hidden = copy_times(TRANSFERS, slices)
    if not shares:
        return "no transfers"
    return f"transfers hidden: {', '.join(shares)}; {took - hidden:.3g} ms with no op beside them"


def bars(slices, lane, first, last, x_of, y):
    """Rectangles; neighbours of one colour that are less than a third of a pixel apart are drawn as one."""
    out, open_bar = [], None
    for _, op, begin, end, _ in sorted((s for s in slices if s[0] == lane), key=lambda s: s[2]):
        if end < first or begin > last:
            continue
        x0, x1, fill = x_of(max(begin, first)), x_of(min(end, last)), colour(lane, op)
        if open_bar and open_bar[2] == fill and x0 - open_bar[1] < 1 / 3:
            open_bar[1] = max(open_bar[1], x1)
            continue
        if open_bar:
            out.append(open_bar)
        open_bar = [x0, x1, fill]
    out += [open_bar] if open_bar else []
    return "".join(f'<rect x="{x0:.2f}" y="{y}" width="{max(x1 - x0, .1):.2f}" height="{LANE_H}" fill="{fill}"/>'
                   for x0, x1, fill in out)


def tick_step(span):
    """1, 2 or 5 times a power of ten: at most ten ticks."""
    power = 10 ** math.floor(math.log10(span / 10))
    return next(power * f for f in (1, 2, 5, 10) if span / (power * f) <= 10)


def draw(title, programs, slices, first, last):
    present = [lane for lane in WORK + TRANSFERS if lane == WORK[0] or any(s[0] == lane for s in slices)]
    width, bottom = WIDTH - LEFT - RIGHT, TOP + len(present) * (LANE_H + LANE_GAP)
    notes = [copies_text(lane, slices) for lane in present if lane in TRANSFERS]
    notes += [hidden_text(slices)] if notes else []
    height = bottom + AXIS_H + LEGEND_H + 20 * len(notes) + 8

    def x_of(ms):
        return LEFT + width * (ms - first) / (last - first)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
           f'font-family="sans-serif" font-size="13" fill="{INK}"><rect width="100%" height="100%" fill="white"/>',
           f'<text x="{LEFT}" y="22" font-size="15" font-weight="600">{html.escape(title)}, '
           f'{max(s[3] for s in slices):.1f} ms</text>']
    for name, begin, end in programs:
        if end < first or begin > last:
            continue
        x0, x1 = x_of(max(begin, first)), x_of(min(end, last))
        out.append(f'<rect x="{x0:.2f}" y="{TOP - 24}" width="{x1 - x0:.2f}" height="{bottom - TOP + 24}" fill="{PASS}" '
                   f'stroke="{GRID}"/>')
        if x1 - x0 > 7 * len(name):
            out.append(f'<text x="{x0 + 4:.2f}" y="{TOP - 9}" fill="{FAINT}">{html.escape(name)}</text>')
    step = tick_step(last - first)
    for i in range(math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9) + 1):
        x = x_of(i * step)
        out.append(f'<path d="M{x:.2f} {TOP}V{bottom}" stroke="{GRID}"/><text x="{x:.2f}" y="{bottom + 16}" '
                   f'text-anchor="middle" fill="{FAINT}">{i * step:g}{" ms" if (i + 1) * step > last else ""}</text>')
    for i, lane in enumerate(present):
        y = TOP + i * (LANE_H + LANE_GAP)
        out.append(f'<text x="{LEFT - 8}" y="{y + LANE_H / 2 + 4}" text-anchor="end">{lane}</text>')
        out.append(bars(slices, lane, first, last, x_of, y))
    x, used = LEFT, {colour(s[0], s[1]) for s in slices}
    for name, fill, _ in FAMILIES:
        if fill not in used:
            continue
        out.append(f'<rect x="{x}" y="{bottom + AXIS_H - 11}" width="12" height="12" fill="{fill}"/>'
                   f'<text x="{x + 17}" y="{bottom + AXIS_H}" fill="{FAINT}">{name}</text>')
        x += 34 + 7 * len(name)
    for i, note in enumerate(notes):
        out.append(f'<text x="{LEFT}" y="{bottom + AXIS_H + LEGEND_H + 20 * i}">{html.escape(note)}</text>')
    return "\n".join(out) + "\n</svg>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--from", dest="first", type=float, metavar="MS", help="where the picture begins (default 0)")
    parser.add_argument("--to", dest="last", type=float, metavar="MS", help="where it ends (default: with the step)")
    args = parser.parse_args()
    title, programs, slices = read_trace(args.trace)
    end = max(s[3] for s in slices)
    first = min(max(args.first or 0, 0), end)
    last = min(args.last if args.last is not None else end, end)
    if not first < last:  # NaN, too
        fail(f"nothing lies between {first:g} and {last:g} ms", f"the step ends at {end:.3f} ms")
    out = args.out or args.trace.with_suffix(".svg")
    picture = draw(title, programs, slices, first, last)
    try:
        out.write_text(picture, encoding="utf-8")
    except OSError as e:
        fail(f"cannot write {out}: {e.strerror}", "OUT.svg is a file, in a folder that there is")
    print(f"{out}: {first:g} to {last:g} ms")
    for lane in TRANSFERS:
        print(copies_text(lane, slices))
    print(hidden_text(slices))


if __name__ == "__main__":
    main()
