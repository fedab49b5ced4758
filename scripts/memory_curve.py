#!/usr/bin/env python3
"""Tokens a second against the memory budget, for each memory policy: what ./train --plan predicts as lines, what runs
of ./train measure as points.

    scripts/memory_curve.py CONFIG OUT [--data FOLDER] [--budgets GB ...] [--set KEY=VALUE ...]
    scripts/memory_curve.py CONFIG OUT --markdown PAGE..    puts table and picture of what OUT has into pages

Writes OUT/curve.csv, a row as soon as it is known: what is there already is not measured again, so a curve that was
broken off goes on; all rows of an OUT are of the same settings, which OUT/curve.settings.json keeps. OUT/curve.svg is
drawn anew each time. At the end the errors of the predictions are printed.

Budgets: six, unless given, from the smallest in which a plan runs: in thirds to what recomputing everything needs, half
way from there to all that keep needs, and that. A policy that leaves nothing to choose takes the same time in any budget
that it fits: it is measured once. A step's time is the mean of those with and without the EMA's update. Runs are killed
after their steps, before they write a checkpoint. FOLDER is one of scripts/make_bench_data.py; without it the config's
own data are read.
Needs nothing but Python 3.
"""
import argparse
import html
import math
import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ablate_report import chart_beside, fill_places, markdown_table
from timed_run import (QUIET, ROOT, Plan, bench_sets, check_paths, check_settings, device_memory, end_quietly, last_line,
                       mean_step, positive, run_steps, table_append, table_read)  # fmt: skip

POLICIES = ["auto", "recompute", "offload", "keep"]
COLOURS = {"auto": "#d55e00", "recompute": "#0072b2", "offload": "#009e73", "keep": "#333333"}
COLUMNS = ["kind", "policy", "budget_gb", "needed_gb", "predicted_ms", "measured_ms", "tokens_per_second", "hidden",
           "planned_gb", "in_use_gb", "note"]
LINE_BUDGETS = 24
PLENTY = 1e6  # GB: more than anything needs
SECTIONS = 8  # that a range of budgets is cut into while the smallest is looked for
WARM_UP = 4  # steps before those that count
FEW, FEW_SECONDS = 5, 5.0  # steps that are enough once they have taken so long
INK, FAINT, GRID = "#222", "#666", "#e4e4e4"


def fail(text, fix):
    sys.exit(f"memory_curve: {text}\n  fix: {fix}")


# ---- rows ----


class Rows:
    """The CSV: rows by (kind, policy, budget), added one by one. Those of runs that failed, which have a note, are shown
    but not written: another call tries them again."""

    def __init__(self, path):
        self.path, self.of = path, {}
        if path.exists():
            rows = table_read(path, COLUMNS)
            if rows is None:
                fail(f"{path} is not a whole curve of this script", "move it away, or name another OUT")
            self.of = {(row["kind"], row["policy"], row["budget_gb"]): row for row in rows if not row["note"]}

    def get(self, kind, policy, budget, make):
        key = kind, policy, f"{budget:.3f}"
        if key not in self.of:
            row = dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS, key)) | make()
            if not row["note"]:
                table_append(self.path, COLUMNS, row)
            self.of[key] = row
            print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)
        return self.of[key]

    def list(self, kind, policy):
        rows = [row for key, row in self.of.items() if key[:2] == (kind, policy)]
        return sorted(rows, key=lambda row: float(row["budget_gb"]))


def number(row, column):
    return float(row[column]) if row[column] != "" else math.nan


# ---- ./train ----


class Curve:
    """A config's rows, and the program that makes them."""

    def __init__(self, args, config, out):
        self.args, self.config, self.out = args, config, out
        check_paths(fail, out)
        self.rows = Rows(out / "curve.csv")
        settings = {"CONFIG": str(config), "--set": args.set, "--data": args.data and str(args.data),
                    "--device": args.device}  # fmt: skip
        check_settings(fail, self.rows.path, settings)
        self.sets = [*args.set, *(bench_sets(args.data) if args.data else []), *QUIET]

    def command(self, policy, budget, *more):
        """math.inf as a budget: what the device has free."""
        command = [str(self.args.train), str(self.config), "--memory", policy, "--run-dir", str(self.out / "run"), *more]
        if budget < math.inf:
            command += ["--set", f"memory.budget_gb={budget:.3f}"]
        if self.args.device:
            command += ["--device", self.args.device]
        for assignment in self.sets:
            command += ["--set", assignment]
        return command

    def plan(self, policy, budget, *more):
        """What --plan says: {} where it does not fit. needed_gb; predicted_ms where a device's time can be told, and of
        the passes' copies the share that is hidden."""
        try:
            plan = Plan(self.command(policy, budget, *more))
        except ValueError as error:
            fail(str(error), "use this script with the ./train of its own version")
        if not plan.fits:
            if "budget_gb" not in plan.text:
                fail(f"--plan failed: {plan.text}", "see what ./train CONFIG --plan says")
            return {}
        row = {"needed_gb": f"{plan.needed_gb:.3f}"}
        if plan.predicted_ms:
            row["predicted_ms"] = plan.predicted_ms
            row["tokens_per_second"] = f"{plan.slots / float(plan.predicted_ms) * 1e3:.0f}"
            row["hidden"] = plan.hidden or ""
        return row

    def measure(self, policy, budget, *more):
        """What a run of some steps takes."""
        args = self.args
        command = self.command(policy, budget, *more, "--set", f"train.steps={WARM_UP + args.steps + 1000}")
        lines, said = run_steps(command, self.out / "run", self.out / "log", self.has_enough, args.limit)
        lines = lines[WARM_UP:]
        if not lines:
            return {"note": last_line(said)}
        predicted = re.findall(r"a step: predicted ([\d.]+) ms, measured", said)
        extra = re.findall(r"every (\d+) steps the EMA takes ([\d.]+) ms more", said)
        every, more = (int(extra[-1][0]), 1e-3 * float(extra[-1][1])) if extra else (1, 0.0)
        seconds = mean_step(lines, every, more)
        tokens = statistics.median(line["tokens"] for line in lines)
        row = {"measured_ms": f"{1e3 * seconds:.3f}", "tokens_per_second": f"{tokens / seconds:.0f}"}
        if predicted:
            row["predicted_ms"] = f"{float(predicted[-1]) + 1e3 * more / every:.2f}"
        if device_memory(said):
            row["planned_gb"], row["in_use_gb"] = device_memory(said)
        return row

    def has_enough(self, lines):
        """Long steps vary less: of those a few do, behind which a second prediction has been held against its steps."""
        counted = lines[WARM_UP:]
        return len(counted) >= self.args.steps or (
            len(counted) > FEW and sum(line["seconds"] for line in counted) > FEW_SECONDS)  # fmt: skip

    def point(self, policy, budget, *more):
        return self.rows.get("point", policy, budget, lambda: self.measure(policy, budget, *more))

    def plan_all(self, plans):
        """Their results, several at once where they need not measure the device's link."""
        several = min(8, os.cpu_count() or 1) if (self.out / "run" / "costs.json").exists() else 1
        with ThreadPoolExecutor(max_workers=several) as pool:
            return list(pool.map(lambda plan: plan(), plans))

    def needed(self):
        """GB that each policy but auto needs."""
        made = self.plan_all([lambda p=p: self.plan(p, PLENTY) for p in POLICIES[1:]])
        return {p: math.ceil(float(row["needed_gb"]) * 1e3) / 1e3 for p, row in zip(POLICIES[1:], made)}

    def smallest_budget(self, most):
        """The least GB in which `auto` has a plan, to a hundredth of `most`, and a hundredth more: by costs measured
        later it may need a little more."""
        low, high = 0.0, most
        while high - low > max(0.01 * most, 0.001):
            tried = [low + (high - low) * i / SECTIONS for i in range(1, SECTIONS)]
            fits = self.plan_all([lambda budget=budget: self.plan("auto", budget) for budget in tried])
            first = next((i for i, row in enumerate(fits) if row), len(tried))
            low, high = ([low] + tried)[first], (tried + [high])[first]
        return math.ceil(min(1.01 * high, most) * 1e3) / 1e3

    def lines(self, policies, low, needed):
        """The predictions: of auto in budgets from `low` to what keep needs."""
        for policy in policies:
            if policy == "auto":
                budgets = [low + (needed["keep"] - low) * i / (LINE_BUDGETS - 1) for i in range(LINE_BUDGETS)]
                missing = [b for b in budgets if ("line", policy, f"{b:.3f}") not in self.rows.of]
                made = dict(zip(missing, self.plan_all([lambda b=b: self.plan("auto", b) for b in missing])))
            else:  # the same time from what it needs on
                budgets = needed[policy], 1.02 * max(needed.values())
                made = dict.fromkeys(budgets, self.plan(policy, PLENTY))
            for budget in budgets:
                self.rows.get("line", policy, budget, lambda: made[budget])

    def picture(self):
        text = draw(self.rows, self.config.stem)
        if text:
            (self.out / "curve.svg").write_text(text, encoding="utf-8")
            print(f"{self.out}/curve.svg")


def curve_budgets(low, needed):
    """Six: in thirds from the smallest to what recomputing everything needs, then half way to keep's, and that."""
    middle, most = needed["recompute"], needed["keep"]
    if not low < middle < most:
        return [low + (most - low) * i / 5 for i in range(6)]
    return [low + (middle - low) * i / 3 for i in range(4)] + [half_way(needed), most]


def half_way(needed):
    """Between the budgets of recompute and keep."""
    return (needed["recompute"] + needed["keep"]) / 2


def curve_points(budgets, needed):
    """(policy, budget) of all runs."""
    return [("auto", b) for b in budgets] + [(p, needed[p]) for p in POLICIES[1:]]


# ---- the picture ----


def tick_step(span, most):
    power = 10 ** math.floor(math.log10(span / most))
    return next(power * f for f in (1, 2, 5, 10) if span / (power * f) <= most)


def draw(rows, title):
    width, height, left, right, top, bottom = 760, 460, 86, 130, 48, 56
    xy = {}
    for kind in ("line", "point"):
        for policy in POLICIES:
            xy[kind, policy] = [(float(r["budget_gb"]), number(r, "tokens_per_second")) for r in rows.list(kind, policy)
                                if r["tokens_per_second"] != ""]
    flat = [p for points in xy.values() for p in points]
    if not flat:
        return None
    x0, x1 = min(p[0] for p in flat), max(p[0] for p in flat)
    x0, x1 = x0 - 0.04 * (x1 - x0 or 1), x1 + 0.04 * (x1 - x0 or 1)
    y1 = 1.06 * max(p[1] for p in flat)

    def at(x, y):
        return left + (width - left - right) * (x - x0) / (x1 - x0), height - bottom - (height - top - bottom) * y / y1

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
           f'font-size="13" fill="{INK}"><rect width="100%" height="100%" fill="white"/>',
           f'<text x="{left}" y="24" font-size="15" font-weight="600">{html.escape(title)}</text>',
           f'<text x="{left}" y="{top - 6}" fill="{FAINT}">tokens/s: lines predicted, points measured</text>',
           f'<text x="{(left + width - right) / 2}" y="{height - 12}" text-anchor="middle" fill="{FAINT}">'
           f'budget, GB of the device</text>']
    step = tick_step(y1, 6)
    for i in range(int(y1 / step) + 1):
        x, y = at(x0, i * step)
        out.append(f'<path d="M{x:.1f} {y:.1f}H{width - right}" stroke="{GRID}"/><text x="{x - 8:.1f}" y="{y + 4:.1f}" '
                   f'text-anchor="end" fill="{FAINT}">{i * step:,.6g}</text>')
    step = tick_step(x1 - x0, 8)
    for i in range(math.ceil(x0 / step), math.floor(x1 / step) + 1):
        x, y = at(i * step, 0)
        out.append(f'<path d="M{x:.1f} {y:.1f}v5" stroke="{FAINT}"/><text x="{x:.1f}" y="{y + 20:.1f}" '
                   f'text-anchor="middle" fill="{FAINT}">{i * step:.6g}</text>')
    shown = [policy for policy in POLICIES if xy["line", policy] or xy["point", policy]]
    for i, policy in enumerate(shown):
        fill = COLOURS[policy]
        line = " L".join("{:.1f} {:.1f}".format(*at(*p)) for p in xy["line", policy])
        if line:
            out.append(f'<path d="M{line}" fill="none" stroke="{fill}" stroke-width="2"/>')
        for p in xy["point", policy]:
            x, y = at(*p)
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="white"/>')
        y = top + 14 + 22 * i
        out.append(f'<path d="M{width - right + 14} {y - 4}h18" stroke="{fill}" stroke-width="2"/>'
                   f'<circle cx="{width - right + 23}" cy="{y - 4}" r="4.5" fill="{fill}" stroke="white"/>'
                   f'<text x="{width - right + 40}" y="{y}">{policy}</text>')
    return "\n".join(out) + "\n</svg>\n"


# ---- the table ----


def errors(rows, predicted, measured):
    """By how much the points of one column differ from those of another."""
    points = [row for policy in POLICIES for row in rows.list("point", policy)]
    return [abs(number(r, measured) / number(r, predicted) - 1) for r in points if r[predicted] and r[measured]]


def print_errors(rows):
    for what, a, b in (("step time", "predicted_ms", "measured_ms"), ("device memory", "planned_gb", "in_use_gb")):
        found = errors(rows, a, b)
        if found:
            print(f"{what}, predicted against measured in {len(found)} runs: median {statistics.median(found):.2%}, "
                  f"worst {max(found):.2%}")
    speed = {p: [(number(r, "budget_gb"), number(r, "tokens_per_second")) for r in rows.list("point", p)
                 if r["tokens_per_second"] != ""] for p in POLICIES}
    for budget, auto in speed["auto"]:
        ratios = [f"{auto / rate:.3f} x {p}" for p in POLICIES[1:] for _, rate in speed[p]]
        if ratios:
            print(f"auto in {budget:.3f} GB: {auto:.0f} tokens/s, " + ", ".join(ratios))


def table_of(rows):
    """The points, from the largest budget to the smallest, auto's before those that leave nothing to choose."""
    points = [row for policy in POLICIES for row in rows.list("point", policy) if row["measured_ms"]]
    points.sort(key=lambda row: (-number(row, "budget_gb"), POLICIES.index(row["policy"])))
    classic = next((number(row, "tokens_per_second") for row in points if row["policy"] == "recompute"), math.nan)
    table = [["policy", "budget, GB", "ms a step", "predicted", "tokens/s", "x recompute"]]
    for row in points:
        predicted = f"{number(row, 'predicted_ms'):.1f}" if row["predicted_ms"] else "-"
        rate = number(row, "tokens_per_second")
        times = "-" if math.isnan(classic) else f"{rate / classic:.2f}"
        table.append([row["policy"], f"{number(row, 'budget_gb'):.1f}", f"{number(row, 'measured_ms'):.1f}", predicted,
                      f"{rate:,.0f}", times])  # fmt: skip
    return table


def put(args):
    """Into the places <!-- memory CONFIG --> of pages."""
    path, name = args.out / "curve.csv", args.config.stem
    if not path.is_file():
        fail(f"there is no {path}", "measure first: scripts/memory_curve.py CONFIG OUT")
    rows = Rows(path)
    chart = draw(rows, name)
    for page in args.markdown:
        try:
            block = chart_beside(page, f"memory-{name}.svg", f"Tokens a second of {name} by memory", chart) if chart else []
        except OSError as e:
            fail(f"{e.filename}: {e.strerror}", "the picture goes to the folder of figures beside the page")
        if wrong := fill_places(page, {f"memory {name}": "\n\n".join([markdown_table(table_of(rows)), *block])}):
            sys.exit(f"memory_curve: {wrong}")


def add_arguments(parser):
    """Those that this script shares with memory_claims.py."""
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of scripts/make_bench_data.py")
    parser.add_argument("--steps", type=int, default=12, help=f"of a run, behind {WARM_UP} (default 12)")
    parser.add_argument("--limit", type=positive, default=240, help="seconds of a run (default 240)")
    parser.add_argument("--device", help="as ./train takes it")
    parser.add_argument("--train", type=Path, default=ROOT / "train", help="the program (default ./train)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as ./train takes it")


def check_arguments(parser, args):
    args.out, args.train, args.data = args.out.resolve(), args.train.resolve(), args.data and args.data.resolve()
    if args.steps < 1:
        parser.error("--steps: at least 1")
    if not args.train.is_file():
        fail(f"there is no {args.train}", "make builds it")
    if args.data and not args.data.is_dir():
        fail(f"there is no folder {args.data}", "scripts/make_bench_data.py makes it")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", type=positive, nargs="+", metavar="GB", help="to measure auto in")
    parser.add_argument("--least", type=positive, metavar="GB", help="where the curve begins (default: in what just runs)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--plan-only", action="store_true", help="lines alone: nothing is run")
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="PAGE", help="where to put what OUT has")
    add_arguments(parser)
    args = parser.parse_args()
    if args.markdown:
        return put(args)
    check_arguments(parser, args)
    curve = Curve(args, args.config.resolve(), args.out)
    needed = curve.needed()
    print("needed, GB: " + ", ".join(f"{p} {gb:.3f}" for p, gb in needed.items()), flush=True)
    # The first run times the ops that all plans after it go by: one that has both to keep and to recompute.
    if not args.plan_only and "auto" in args.policies:
        curve.point("auto", args.budgets[-1] if args.budgets else half_way(needed))
    low = args.least or curve.smallest_budget(needed["keep"])
    budgets = args.budgets or curve_budgets(low, needed)
    points = [] if args.plan_only else [point for point in curve_points(budgets, needed) if point[0] in args.policies]
    curve.lines(args.policies, low, needed)
    for policy, budget in points:
        curve.point(policy, budget)
    curve.picture()
    print_errors(curve.rows)
    said = [curve.point(policy, budget)["note"] for policy, budget in points]
    if points and all(said):
        fail(f"nothing could be measured; the last run said: {said[-1]}", f"{curve.out}/log has all that it said")


if __name__ == "__main__":
    end_quietly(main)
