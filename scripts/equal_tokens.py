#!/usr/bin/env python3
"""What twice the batch is worth to learning: a config trained to the same number of tokens with micro-batches of T slots
and of 2 T, the latter planned in the memory that T takes when everything is kept.

    scripts/equal_tokens.py CONFIG OUT [--steps N] [--seeds S ...]
    scripts/equal_tokens.py CONFIG OUT --markdown PAGE..    puts the table of what OUT has into pages; trains nothing

Of each seed three runs, evaluated once, at the end: N steps of T; N / 2 steps of 2 T at the same learning rate; the
same at one that is 1.41 times as high. Warm-up and the decay of the averaged weights are the same in tokens. OUT/runs
has the runs, OUT/equal.csv a row of each as soon as it has ended, which another call does not repeat; the table goes to
OUT/equal.txt. On an H200 2,000 steps of configs/icons.json take about 20 s and another 5 of start and evaluation, so
that two seeds are two and a half minutes; scripts/make_icons.py makes its data. Needs nothing but Python 3.
"""
import argparse
import math
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import run_metrics
from ablate_report import aligned, fill_places, markdown_table
from timed_run import (ROOT, Plan, check_paths, check_settings, config_data, config_read, end_quietly, last_line,
                       table_append, table_read)  # fmt: skip

COLUMNS = ["config", "variant", "seed", "slots", "steps", "lr", "tokens", "tokens_per_second", "seconds", "flow",
           "retrieval", "caption_bits_per_byte", "of"]  # fmt: skip
FIGURES = {"flow": "flow loss", "retrieval": "caption retrieval among 16", "caption_bits_per_byte": "caption, bits/byte"}
QUIET = ["eval.every=0", "eval.samples=0", "checkpoint.every=0"]


def fail(text, fix):
    sys.exit(f"equal_tokens: {text}\n  fix: {fix}")


@dataclass
class Variant:
    name: str
    longer: int  # times T
    faster: float = 1  # times the learning rate


VARIANTS = [Variant("T", 1), Variant("2 T", 2), Variant("2 T, learning rate x 1.41", 2, math.sqrt(2))]


def resolved(args):
    """{key: value} of what the schedule depends on, as ./train resolves it."""
    done = subprocess.run(command(args, "--print-config"), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        fail(last_line(done.stderr), "see what ./train CONFIG --print-config says")
    found = {}
    for key in ("data.micro_batch_tokens", "train.steps", "train.lr", "train.warmup_steps", "train.ema"):
        found[key] = float(re.search(rf"^{re.escape(key)} .* (\S+)$", done.stdout, re.M)[1])
    return found


def command(args, *more):
    flags = ["--device", args.device] if args.device else []
    for assignment in [*args.set, *QUIET]:
        flags += ["--set", assignment]
    return [str(args.train), str(args.config), *flags, *more]


def train(args, variant, seed, config, keep_gb):
    """A row of a whole run."""
    slots, steps = int(config["data.micro_batch_tokens"]), int(config["train.steps"])
    run = args.out / "runs" / f"{args.config.stem}-{VARIANTS.index(variant)}-{seed}"
    lr = config["train.lr"] * variant.faster
    flags = ["--run-dir", str(run), "--tokens", str(slots * variant.longer), "--steps", str(steps // variant.longer),
             "--seed", str(seed), "--set", f"memory.budget_gb={keep_gb:.3f}", "--set", f"train.lr={lr:.6g}",
             "--memory", "keep" if variant.longer == 1 else "auto"]  # fmt: skip
    flags += ["--set", f"train.warmup_steps={int(config['train.warmup_steps']) // variant.longer}"]
    flags += ["--set", f"train.ema={config['train.ema'] ** variant.longer:.9g}", "--resume"]
    with open(args.out / "log", "a") as log:
        done = subprocess.run(command(args, *flags), cwd=ROOT, stdout=log, stderr=subprocess.PIPE, text=True)
        log.write(done.stderr)
    lines, found = run_metrics.steps(run), run_metrics.evaluations(run)
    if done.returncode or not (lines and found):
        fail(f"{args.config.stem}, {variant.name}: {last_line(done.stderr)}", f"{args.out / 'log'} has all that it said")
    seconds, tokens = sum(line["seconds"] for line in lines), sum(line["tokens"] for line in lines)
    result = found[-1]["eval"]
    row = {"config": args.config.stem, "variant": variant.name, "seed": seed, "slots": slots * variant.longer,
           "steps": len(lines), "lr": f"{lr:.3g}", "tokens": f"{tokens:.0f}", "seconds": f"{seconds:.1f}",
           "tokens_per_second": f"{statistics.median(line['tokens'] / line['seconds'] for line in lines):.0f}",
           "of": result["of"]}  # fmt: skip
    return row | {key: "" if result[key] is None else f"{result[key]:.4f}" for key in FIGURES}


def table_of(rows):
    """A row a variant; figures of its seeds one after another."""
    table = [["", "slots x steps", "learning rate", *FIGURES.values(), "tokens/s", "s of steps"]]
    for name in dict.fromkeys(row["variant"] for row in rows):
        of = [row for row in rows if row["variant"] == name]
        middle = lambda key, form: format(statistics.median(float(row[key]) for row in of), form)
        table.append([name, f"{int(of[0]['slots']):,} x {int(of[0]['steps']):,}", of[0]["lr"],
                      *(", ".join(row[key] or "-" for row in of) for key in FIGURES),
                      middle("tokens_per_second", ",.0f"), middle("seconds", ".1f")])  # fmt: skip
    return table


def note_of(rows):
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    tokens = statistics.median(float(row["tokens"]) for row in rows)
    return (f"{rows[0]['config']}, {tokens / 1e6:.1f}M tokens a run, {len(seeds)} seed{'s' * (len(seeds) > 1)}; flow, "
            f"retrieval and captions of {rows[0]['of'].replace('_', '-')} samples.")  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, help="of T slots each (default: the config's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="(default 1 2)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: a GPU where there is one)")
    parser.add_argument("--train", type=Path, default=ROOT / "train", help="the program (default ./train)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as ./train takes it")
    parser.add_argument("--markdown", nargs="+", metavar="PAGE", help="where to put the table of OUT")
    args = parser.parse_args()
    args.config, args.out, args.train = args.config.resolve(), args.out.resolve(), args.train.resolve()
    if args.steps is not None and args.steps < 2:
        parser.error("--steps: at least 2")
    needed = [(args.config, "name a config, such as configs/icons.json"), (args.train, "make builds it")]
    check_paths(fail, args.out, [] if args.markdown else needed)
    return args


def main():
    args = arguments()
    path = args.out / "equal.csv"
    rows = table_read(path, COLUMNS) if path.exists() else []
    if rows is None:
        fail(f"{path} is not a whole table of this script", "move it away, or name another OUT")
    if not args.markdown:
        check_settings(fail, path, {"config": str(args.config), "--steps": args.steps, "--set": args.set,
                                    "--device": args.device})  # fmt: skip
        sets, bad = config_data(config_read(args.config), None, args.out)
        if bad:
            fail(bad, "see the script that makes the config's data")
        args.set += sets
        config, plan = resolved(args), Plan(command(args, "--memory", "keep", "--set", "memory.budget_gb=1000000"))
        config["train.steps"] = args.steps or config["train.steps"]
        if config["train.steps"] % 2:
            fail(f"{config['train.steps']:.0f} steps cannot be halved", "--steps N, an even number")
        if not plan.fits:
            fail(f"--plan failed: {plan.text}", "see what ./train CONFIG --plan says")
        done = {(row["variant"], row["seed"]) for row in rows}
        for seed in args.seeds:
            for variant in VARIANTS:
                if (variant.name, str(seed)) not in done:
                    row = train(args, variant, seed, config, plan.needed_gb)
                    table_append(path, COLUMNS, row)
                    rows.append({name: str(value) for name, value in row.items()})
                    print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)
    if not rows:
        fail(f"{path} has no rows", f"measure first: scripts/equal_tokens.py {args.config.name} OUT")
    table = table_of(rows)
    if args.markdown:
        made = {f"equal tokens {args.config.stem}": markdown_table(table) + "\n\n" + note_of(rows)}
        for page in args.markdown:
            if wrong := fill_places(page, made):
                sys.exit(f"equal_tokens: {wrong}")
        return
    text = "\n".join(aligned(table))
    (args.out / "equal.txt").write_text(f"{text}\n{note_of(rows)}\n")
    print(f"\n{text}\n{note_of(rows)}")


if __name__ == "__main__":
    end_quietly(main)
