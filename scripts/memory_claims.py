#!/usr/bin/env python3
"""What memory plans are worth on this GPU: the runs that show it, and one table that holds them against what was to be
reached.

    scripts/memory_claims.py OUT [--device cuda] [--seconds S]

Curves of base, wide, fine and small (scripts/memory_curve.py) in OUT/CONFIG; base with the longest micro-batches that
keep has room for, and twice that; in budgets of 80 and 24 GB; and with four layers. Each measurement is kept as soon as
it is known: another call makes those that are missing, which `--seconds` limits a call to. Data are made in OUT, unless
--data names some. All of it takes an H200 about ten minutes. Needs Python 3, and numpy where data are made.
"""
import argparse
import copy
import math
import statistics
import time
from pathlib import Path

import trace_picture
from memory_curve import (PLENTY, POLICIES, Curve, add_arguments, check_arguments, curve_budgets, curve_points, errors, fail,
                          half_way, number)  # fmt: skip
from timed_run import ROOT, Plan, bench_data, config_read, end_quietly, positive

CONFIGS = ["base", "wide", "fine", "small"]
LONGER = 1.8  # times keep's longest micro-batch, at a loss of 5%
HALF, RECOMPUTED = {"base": 1.22, "wide": 1.21}, {"base": 1.05, "wide": 1.08}  # times recompute's tokens a second


class Claims:
    def __init__(self, args):
        self.args, self.began, self.table = args, time.time(), []
        self.curves, self.needs = {}, {}

    def curve(self, config, name=None, *sets):
        """Of a config of the project, with other settings under another name."""
        name = name or config
        if name not in self.curves:
            args = copy.copy(self.args)
            path = ROOT / "configs" / f"{config}.json"
            args.set = [*args.set, *sets]
            if not args.data:
                pixels = config_read(path)["data"]["image_size"]
                args.data = args.out / f"data-{pixels}"
                said = bench_data(args.data, pixels)
                if said:
                    fail(said, "--data names a folder of scripts/make_bench_data.py")
            print(f"--- {name}", flush=True)
            self.curves[name] = Curve(args, path, args.out / name)
        return self.curves[name]

    def needed(self, config):
        if config not in self.needs:
            self.needs[config] = self.curve(config).needed()
        return self.needs[config]

    def point(self, curve, policy, budget, *more):
        """A row; none where there is no time for it, or the run failed."""
        key = "point", policy, f"{budget:.3f}"
        if key not in curve.rows.of and time.time() - self.began > self.args.seconds:
            return None
        row = curve.point(policy, budget, *more)
        return None if row["note"] else row

    def claim(self, what, reach, value, text="{:.3f}"):
        """value: None where it is not measured yet."""
        self.table.append((what, reach, "not measured yet" if value is None else text.format(value)))

    # ---- the claims ----

    def against_recompute(self, config):
        """Half way between the budgets of recompute and keep, and in that of recompute."""
        curve = self.curve(config)
        needed = self.needed(config)
        half = half_way(needed)
        trace = curve.out / "half.trace.json"
        plans = {"half": self.point(curve, "auto", half, "--trace", str(trace)),
                 "recompute": self.point(curve, "recompute", needed["recompute"]),
                 "least": self.point(curve, "auto", needed["recompute"]), "keep": self.point(curve, "keep", needed["keep"])}
        self.claim(f"{config}: auto half way between the budgets of recompute and keep, x recompute's tokens/s",
                   f">= {HALF[config]}", ratio(plans["half"], plans["recompute"]))
        self.claim(f"{config}: the same, x keep's", "", ratio(plans["half"], plans["keep"]))
        self.claim(f"{config}: auto in recompute's budget, x recompute's", f">= {RECOMPUTED[config]}",
                   ratio(plans["least"], plans["recompute"]))
        if trace.exists():
            took, hidden = trace_picture.copy_times(trace_picture.TRANSFERS, passes_of(trace))
            self.claim(f"{config}: of its passes' transfers hidden, in a trace", ">= 98%",
                       hidden / took if took else None, "{:.1%}")

    def long(self):
        """Micro-batches as long as keep has room for, and longer."""
        curve = self.curve("base")
        slots = {policy: self.longest(curve, policy) for policy in ("keep", "auto")}
        self.claim("base: longest micro-batch, slots: keep", "", slots["keep"] or "none fits", "{}")
        self.claim("base: longest micro-batch, slots: auto", "", slots["auto"] or "none fits", "{}")
        if not slots["keep"]:
            return  # base has no room here at any length
        longer = {}
        for policy, times in (("keep", 1), ("auto", 2), ("recompute", 2), ("auto", LONGER)):
            length = int(slots["keep"] * times) // 64 * 64
            at = self.curve("base", f"base-{length}", f"data.micro_batch_tokens={length}")
            trace = at.out / "trace.json"
            more = ["--trace", str(trace)] if (policy, times) == ("auto", 2) else []
            longer[policy, times] = self.point(at, policy, math.inf, *more)
            if more and trace.exists():
                sent, busy = way_out(trace)
                self.claim("base: what leaves for the host there, GB a step", "", sent, "{:.1f}")
                self.claim("base: of the time until the last has left, the link busy", "", busy, "{:.1%}")
        keep, twice = longer["keep", 1], longer["auto", 2]
        if keep:
            self.claim("base: keep at its longest, tokens/s", "", number(keep, "tokens_per_second"), "{:.0f}")
        self.claim("base: auto at twice that, x recompute's tokens/s there", ">= 1.20", ratio(twice, longer["recompute", 2]))
        self.claim("base: the same, x keep's at half of it", ">= 0.99", ratio(twice, keep))
        self.claim(f"base: auto at {LONGER} times that, x keep's", ">= 0.95", ratio(longer["auto", LONGER], keep))

    def longest(self, curve, policy):
        plan = Plan(curve.command(policy, math.inf, "--tokens", "max"))
        if not plan.fits and "nothing fits" not in plan.text:
            fail(f"--plan failed: {plan.text}", "see what ./train CONFIG --plan says")
        return plan.micro_slots if plan.fits else None

    def smaller(self):
        """Budgets of other GPUs, and a model of so few layers that state and activations weigh alike."""
        curve = self.curve("base")
        for budget, length in ((80, 0), (24, 0), (24, 4096)):
            at = self.curve("base", f"base-{length}", f"data.micro_batch_tokens={length}") if length else curve
            row = self.point(at, "auto", budget)
            what = f"base: auto in {budget} GB" + (f", micro-batches of {length}" if length else "")
            self.claim(f"{what}, tokens/s", "", row and number(row, "tokens_per_second"), "{:.0f}")
        few = self.curve("base", "base-4-layers", "model.layers=4")
        budget = float(few.plan("recompute", PLENTY)["needed_gb"])
        self.claim("base with 4 layers: auto in recompute's budget, x recompute's tokens/s", "",
                   ratio(self.point(few, "auto", budget), self.point(few, "recompute", budget)))

    def whole(self, config):
        """What is left of a config's curve, and what its runs say of the predictions."""
        curve, needed = self.curve(config), self.needed(config)
        self.point(curve, "auto", half_way(needed))
        low = curve.smallest_budget(needed["keep"])
        for policy, budget in curve_points(curve_budgets(low, needed), needed):
            self.point(curve, policy, budget)
        curve.lines(POLICIES, low, needed)
        curve.picture()
        for what, a, b, reach in (("step time", "predicted_ms", "measured_ms", ("<= 2%", "<= 5%")),
                                  ("device memory", "planned_gb", "in_use_gb", ("-", "<= 0.4%"))):
            found = errors(curve.rows, a, b)
            value = f"{statistics.median(found):.2%}, {max(found):.2%}" if found else None
            self.claim(f"{config}: {what}, off from the prediction in {len(found)} runs: median, worst", ", ".join(reach),
                       value, "{}")
        hidden = [number(row, "hidden") for row in curve.rows.list("line", "auto") if row["hidden"] != ""]
        if hidden:
            self.claim(f"{config}: budgets on the curve in which plans hide 98% of their passes' transfers", "all",
                       f"{sum(share >= .98 for share in hidden)} of {len(hidden)}", "{}")


def ratio(row, other):
    return number(row, "tokens_per_second") / number(other, "tokens_per_second") if row and other else None


def passes_of(trace):
    """The slices of a trace that are of its passes."""
    _, programs, slices = trace_picture.read_trace(trace)
    spans = [(begin, end) for name, begin, end in programs if name.startswith("train")]
    return [piece for piece in slices if any(begin <= piece[2] < end for begin, end in spans)]


def way_out(trace):
    """GB that leave for the host in a trace's passes, and the share of the time until the last has left that this takes."""
    out = [piece for piece in passes_of(trace) if piece[0] == "device to host"]
    took = trace_picture.copy_times(["device to host"], out)[0]
    sent, end = sum(piece[4].get("bytes", 0) for piece in out), max((piece[3] for piece in out), default=0)
    return sent / 1e9, took / end if end else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS, help="whose curves (default: all)")
    parser.add_argument("--seconds", type=positive, default=math.inf, help="after which no further run begins")
    add_arguments(parser)
    args = parser.parse_args()
    check_arguments(parser, args)
    if args.out.exists() and not args.out.is_dir():
        fail(f"{args.out} is no folder", "OUT is a folder, which need not be there yet")
    claims = Claims(args)
    for config in [name for name in HALF if name in args.configs]:
        claims.against_recompute(config)
    claims.long()
    for config in args.configs:
        claims.whole(config)
    claims.smaller()
    width = max(len(what) for what, _, _ in claims.table)
    print(f"{'':{width}}  {'reach':>12}  measured")
    for what, reach, value in claims.table:
        print(f"{what:{width}}  {reach:>12}  {value}")


if __name__ == "__main__":
    end_quietly(main)
