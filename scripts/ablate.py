#!/usr/bin/env python3
"""Where the speed comes from: each technique switched off alone, the ladder from nothing to everything, the largest
batch, and what orders a step, measured by short runs of ./train.

    scripts/ablate.py OUT                    small, fine, base, medium and wide on a GPU: in 15 minutes a round of
                                             everything and further ones of what is quick; called again, more of them
                                             (an hour in all)
    scripts/ablate.py OUT --device cpu       the demo on a CPU, in two minutes: memory and packing alone
    scripts/ablate.py OUT --markdown [PAGE]  tables and charts of what OUT has, printed or put into pages; measures
                                             nothing

OUT/ablate.csv gets a row as soon as it is measured, and what is there is not measured again: one that was broken off,
by --minutes or by hand, goes on. A run that fails gets no row, so that the next call tries it again. All rows of an
OUT are of the same --set, --tokens, --data and --init, which OUT/ablate.settings.json keeps. OUT/ablate.txt, ablate.json
and three SVGs are made of the rows at the end.

A run trains on the same documents from the same first weights as all others of its model, and its tokens/s are those of
its median step behind the first, with its share of an EMA's update; padding is no token. A round runs every variant of
a part on a model once; each next round goes the other way round. After a first round of all parts and models, the next
one is of the part and model that have had the least time so far. A gain is the median over the rounds of the ratio
within a round, so that a machine that gets slower or faster takes all variants with it; beside it stand the least and
the largest of these ratios. Whatever a variant does to the speed, its losses must stay: those of memory, graphs and
streams to the last digit that is logged, of others within rounding. Needs nothing but Python 3;
scripts/make_bench_data.py, which makes the data of models that name none, needs numpy.
"""
import argparse
import json
import math
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ablate_report
from timed_run import (QUIET, ROOT, Plan, check_paths, check_settings, config_data, config_read, device_memory,
                       end_quietly, has_gpu, last_line, mean_step, positive, run_steps, table_append, table_read)  # fmt: skip

MODELS = ["small", "fine", "base", "medium", "wide"]
COLUMNS = ["device", "model", "part", "variant", "round", "tokens", "tokens_per_second", "step_ms", "mfu", "memory_gb",
           "text_rows", "image_rows", "load_max", "fill", "steps", "seconds", "first_losses", "loss", "note"]
WARM_UP = 6  # steps before those that count; ops may be timed again after the fourth
LEAST_STEPS, LEAST_LONG = 8, 4  # that count; the latter where they have taken four times --seconds
LOSS_STEP = 10  # whose loss variants must share
RUN_STEPS = 100000  # more than any run gets to
NO_ROOM = "no plan has room for it"


def fail(text, fix):
    sys.exit(f"ablate: {text}\n  fix: {fix}")


# ---- what is compared ----


@dataclass
class Comparison:
    """A technique: the variant that has it against the one that has not. How their losses compare: "bits", "rounding",
    "other" where steps hold other documents, "routing" where tokens go to other experts."""

    technique: str
    has: str
    has_not: str
    losses: str = "rounding"


# Flags of each variant. {tight}, {half}: budgets in GB, what recompute needs and half way from there to keep. {keep}:
# what keep needs for T tokens, in which the part "batch" stays. {double}, {most} ..: tokens.
SWITCHES = {
    "everything": [],
    "AdaLN unfused": ["--adaln", "unfused"],
    "a product an expert": ["--moe-gemm", "loop"],
    "recompute": ["--memory", "recompute"],
    "padded": ["--packing", "padded"],
    "one tile kind": ["--moe-gemm", "grouped"],
    "no graphs": ["--graph", "off"],
    "even loads": ["--set", "router.even=true"],
    "a product an expert, even": ["--set", "router.even=true", "--moe-gemm", "loop"],
}
MEMORY = {
    "recompute": ["--memory", "recompute"],
    "planned, tight": ["--set", "memory.budget_gb={tight}"],
    "tight, one stream": ["--set", "memory.budget_gb={tight}", "--streams", "single"],
    "tight, gradients apart": ["--set", "memory.budget_gb={tight}", "--set", "memory.share_gradients=false"],
    "planned, half way": ["--set", "memory.budget_gb={half}"],
    "offload": ["--memory", "offload"],
}
NOTHING = ["--adaln", "unfused", "--packing", "padded"]
LADDER = {
    "nothing": ["--memory", "recompute", "--moe-gemm", "loop", *NOTHING],
    "+ planned memory": ["--set", "memory.budget_gb={tight}", "--moe-gemm", "loop", *NOTHING],
    "+ grouped GEMM": ["--set", "memory.budget_gb={tight}", *NOTHING],
    "+ AdaLN, varlen": ["--set", "memory.budget_gb={tight}"],
    "+ all memory": [],
}
BATCH = {
    "T, keep": ["--memory", "keep", "--set", "memory.budget_gb={keep}"],
    "2 T, planned": ["--set", "memory.budget_gb={keep}", "--tokens", "{double}"],
    "2 T, recompute": ["--memory", "recompute", "--set", "memory.budget_gb={keep}", "--tokens", "{double}"],
    "most, recompute": ["--memory", "recompute", "--set", "memory.budget_gb={keep}", "--tokens", "{most_recomputed}"],
    "most, planned": ["--set", "memory.budget_gb={keep}", "--tokens", "{most}"],
}
STEP = {
    "everything": [],
    "launches apart": ["--set", "kernels.pdl=off"],
    "update in the forward pass": ["--set", "kernels.update=overlapped"],
}
# Not timed: so few images a pack that both ways of packing choose the same documents.
SAME = {
    "varlen, same documents": ["--set", "data.max_images={few}"],
    "padded, same documents": ["--packing", "padded", "--set", "data.max_images={few}"],
}


def parts_of(is_gpu, has_modality):
    """{part: (its variants, its comparisons)}."""
    switches = [Comparison("AdaLN in one kernel", "everything", "AdaLN unfused"),
                Comparison("grouped GEMM", "everything", "a product an expert"),
                Comparison("keep instead of recompute", "everything", "recompute", "bits"),
                Comparison("varlen packing", "everything", "padded", "other"),
                Comparison("tiles by modality", "everything", "one tile kind"),
                Comparison("captured graphs", "everything", "no graphs", "bits"),
                Comparison("even loads", "even loads", "everything", "routing"),
                Comparison("grouped GEMM, even loads", "even loads", "a product an expert, even")]  # fmt: skip
    memory = [Comparison("planned in recompute's memory", "planned, tight", "recompute", "bits"),
              Comparison("planned, half way to keep", "planned, half way", "recompute", "bits"),
              Comparison("offload of everything", "offload", "recompute", "bits"),
              Comparison("streams for transfers", "planned, tight", "tight, one stream", "bits"),
              Comparison("gradients in the arena", "planned, tight", "tight, gradients apart", "bits")]  # fmt: skip
    rungs = list(LADDER)
    ladder = [Comparison(b, b, a, "other" if "varlen" in b else "bits" if "memory" in b else "rounding")
              for a, b in zip(rungs, rungs[1:])]  # fmt: skip
    ladder.append(Comparison("all of it", rungs[-1], rungs[0], "other"))
    batch = [Comparison("twice the batch, planned", "2 T, planned", "T, keep", "other"),
             Comparison("planned instead of recompute", "2 T, planned", "2 T, recompute", "bits"),
             Comparison("the largest batch, recompute", "most, recompute", "T, keep", "other"),
             Comparison("the largest batch, planned", "most, planned", "T, keep", "other")]  # fmt: skip
    step = [Comparison("launches that overlap", "everything", "launches apart", "bits"),
            Comparison("update in the forward pass", "update in the forward pass", "everything", "bits")]  # fmt: skip
    if not is_gpu:  # the CPU has one way of each op, no queues, no graphs and no other memory for what does not fit
        step = []
        switches = [c for c in switches if c.has_not in ("recompute", "padded", "everything")]
        memory = [c for c in memory if not c.has_not.startswith("tight, ")]
        ladder = [c for c in ladder if "GEMM" not in c.technique]
        ladder[1].has_not = "+ planned memory"
    elif not has_modality:
        switches = [c for c in switches if c.has_not != "one tile kind"]
    parts = {"switches": (SWITCHES, switches), "memory": (MEMORY, memory), "ladder": (LADDER, ladder),
             "batch": (BATCH, batch), "step": (STEP, step)}  # fmt: skip
    used = lambda compared: {name for c in compared for name in (c.has, c.has_not)}
    return {part: ({n: f for n, f in flags.items() if n in used(compared)}, compared)
            for part, (flags, compared) in parts.items()}  # fmt: skip


# ---- ./train ----


class Model:
    """One config: how it is run, and the figures that its flags want."""

    def __init__(self, name, args):
        self.args = args
        self.path = Path(name).resolve() if name.endswith(".json") else ROOT / "configs" / f"{name}.json"
        if not self.path.is_file():
            fail(f"there is no config {self.path}", "--models takes names of configs/NAME.json, or paths")
        self.name, self.config = self.path.stem, config_read(self.path)
        self.sets, self.known = [*args.set, *QUIET], {}

    def prepare(self):
        """Makes the data that are not there."""
        sets, bad = config_data(self.config, self.args.data, self.args.out)
        if bad:
            fail(bad, "or name a folder of scripts/make_bench_data.py with --data")
        self.sets += sets

    def folder(self, name):
        """Of its runs of that name, each of which finds there what ops took in the one before."""
        return self.args.out / "runs" / re.sub(r"\W+", "-", f"{self.name} {name}".strip())

    def command(self, flags, name=""):
        """Flags that come later win."""
        command = [str(self.args.train), str(self.path), "--run-dir", str(self.folder(name))]
        if self.args.tokens:
            command += ["--tokens", str(self.args.tokens)]
        if self.args.device:
            command += ["--device", self.args.device]
        if self.args.init:
            command += ["--init", str(self.args.init)]
        for assignment in self.sets:
            command += ["--set", assignment]
        return command + flags

    def plan(self, *flags):
        try:
            return Plan(self.command(list(flags)))
        except ValueError as error:
            fail(str(error), "use this script with the ./train of its own version")

    def needs(self, *flags):
        plan = self.plan(*flags)
        if not plan.fits:
            fail(f"{self.name}: --plan failed: {plan.text}", "see what ./train CONFIG --plan says")
        return plan

    def figure(self, name):
        """What stands for {name} in flags, as text; None where there is no such run."""
        if name not in self.known:
            self.known[name] = getattr(self, f"find_{name}")()
        return self.known[name]

    def gb(self, *flags):
        return self.needs(*flags, "--set", "memory.budget_gb=1000000").needed_gb

    def find_tight(self):
        """In GB: enough for recompute, and for the planner where it can do with less."""
        return f"{self.gb('--memory', 'recompute'):.3f}"

    def find_keep(self):
        return f"{self.gb('--memory', 'keep'):.3f}"

    def find_half(self):
        return f"{(float(self.figure('tight')) + float(self.figure('keep'))) / 2:.3f}"

    def find_slots(self):
        return self.needs("--memory", "recompute", "--set", "memory.budget_gb=1000000").slots

    def find_double(self):
        return str(2 * self.figure("slots"))

    def find_most(self, *flags):
        plan = self.plan("--tokens", "max", "--set", f"memory.budget_gb={self.figure('keep')}", *flags)
        return str(plan.slots) if plan.fits else None

    def find_most_recomputed(self):
        return self.find_most("--memory", "recompute")

    def patches(self):
        data = self.config["data"]
        return (data["image_size"] // self.config["model"]["patch"]) ** 2

    def find_few(self):
        """Images of which each has room in T slots however long its caption."""
        sets = dict(assignment.split("=", 1) for assignment in self.sets)
        caption = int(sets.get("data.max_caption", self.config["data"].get("max_caption", 64)))
        return str(max(1, self.figure("slots") // (caption + 4 + self.patches())))

    def flags(self, flags):
        """Flags with their figures, None where one of them does not exist."""
        out = []
        for flag in flags:
            for name in re.findall(r"{(\w+)}", flag):
                if self.figure(name) is None:
                    return None
                flag = flag.replace(f"{{{name}}}", self.figure(name))
            out.append(flag)
        return out

    def rows_an_expert(self, said, tokens):
        """Rows of an expert of each modality for even loads, from what the run says of its data."""
        found = re.search(r"data: \d+ samples with (\d+) images, about ([\d.]+)([kMB]?) tokens", said)
        if not found:
            return {}
        every = float(found[2]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[found[3]]
        share = int(found[1]) * self.patches() / every
        moe = self.config["model"]
        rows = {m: tokens * s * moe[m]["top_k"] / moe[m]["experts"] for m, s in (("text", 1 - share), ("image", share))}
        return {f"{m}_rows": f"{n:.0f}" for m, n in rows.items()}

    def measure(self, name, flags):
        """A row of what a run of that name takes."""
        flags, began = self.flags(flags), time.time()
        if flags is None:
            return {"note": NO_ROOM}

        every = self.config["train"].get("ema_every", 1)

        def enough(lines):
            lines = lines[WARM_UP:]
            took = sum(s["seconds"] for s in lines) / self.args.seconds
            return took >= 1 and len(lines) >= (LEAST_LONG if took >= 4 else max(LEAST_STEPS, every))

        command = self.command([*flags, "--steps", str(RUN_STEPS)], name)
        lines, said = run_steps(command, self.folder(name), self.args.out / "log", enough, self.args.limit)
        counted = lines[WARM_UP:]
        if not counted:
            return {"note": last_line(said)}
        median = lambda value: statistics.median(map(value, counted))
        tokens, seconds = median(lambda s: s["tokens"]), mean_step(counted, every)
        row = {"tokens": f"{tokens:.0f}", "tokens_per_second": f"{tokens / seconds:.0f}",
               "step_ms": f"{1e3 * seconds:.3f}",
               "load_max": f"{median(lambda s: s['expert_load_max']):.2f}",
               "fill": f"{median(lambda s: s['fill']):.4f}", "steps": len(counted),
               "seconds": f"{time.time() - began:.1f}",
               "first_losses": " ".join(f"{lines[0].get(key, math.nan):.9g}" for key in ("flow", "ce"))}  # fmt: skip
        if len(lines) >= LOSS_STEP:
            row["loss"] = f"{lines[LOSS_STEP - 1]['loss']:.9g}"
        if "mfu" in counted[0]:
            row["mfu"] = f"{median(lambda s: s['mfu'] * s['seconds']) / seconds:.4f}"
        planned = re.search(r"memory: ([\d.]+) GB of the", said)
        memory = device_memory(said)
        row["memory_gb"] = memory[1] if memory else planned[1] if planned else ""
        return row | self.rows_an_expert(said, float(row["tokens"]) / float(row["fill"]))


# ---- rows ----


class Rows:
    """The CSV: rows by (device, model, part, variant, round), added one by one. Those of runs that failed are shown with
    the others, but not written: another call tries them again."""

    KEY = COLUMNS[:5]

    def __init__(self, path, makes=True):
        self.path, self.of, self.failed, self.good = path, {}, [], 0
        if path.exists():
            rows = table_read(path, COLUMNS)
            if rows is None:
                fail(f"{path} is not a whole table of this script", "move it away, or name another OUT")
            self.of = {tuple(row[name] for name in self.KEY): row for row in rows if not self.is_failure(row)}
        elif not makes:
            fail(f"there is no {path}", "measure first: scripts/ablate.py OUT")

    @staticmethod
    def is_failure(row):
        return not row["tokens_per_second"] and row["note"] != NO_ROOM

    def get(self, key, make):
        key = tuple(map(str, key))
        if key not in self.of:
            row = dict.fromkeys(COLUMNS, "") | dict(zip(self.KEY, key)) | make()
            if self.is_failure(row):
                self.failed.append(row["note"])
            else:
                table_append(self.path, COLUMNS, row)
            self.of[key] = {name: str(value) for name, value in row.items()}
            shown = ("tokens_per_second", "step_ms", "memory_gb", "loss", "seconds", "note")
            print(f"{' / '.join(key[1:])}: " + ", ".join(f"{n} {row[n]}" for n in shown if row[n] != ""), flush=True)
        self.good += not self.is_failure(self.of[key])
        return self.of[key]

    def seconds(self, *key):
        """That runs of this device, model and part took."""
        return sum(float(row["seconds"] or 0) for at, row in self.of.items() if at[: len(key)] == key)


def measure_all(rows, models, parts, args, device):
    """Round by round, so that what --minutes cuts off is repeats. False where it did."""
    end = time.time() + 60 * args.minutes
    pairs = [(part, model) for part in args.parts for model in models]

    def get(model, part, variant, number, flags):
        if time.time() >= end and (device, model.name, part, variant, str(number)) not in rows.of:
            raise TimeoutError
        make = lambda: model.measure(f"{part} {variant}", flags)
        return rows.get((device, model.name, part, variant, number), make)

    def rounds(part, model):
        """Whole ones."""
        whole = lambda n: all((device, model.name, part, v, str(n)) in rows.of for v in parts[part][0])
        return next(n for n in range(args.repeats + 1) if n == args.repeats or not whole(n))

    def turn(pair):
        had = rounds(*pair)
        return had > 0, rows.seconds(device, pair[1].name, pair[0]) if had else 0, pairs.index(pair)

    try:
        while left := [pair for pair in pairs if rounds(*pair) < args.repeats]:
            part, model = min(left, key=turn)
            number, variants = rounds(part, model), list(parts[part][0].items())
            if number == 0 and "padded" in parts[part][0]:
                for variant, flags in SAME.items():
                    get(model, "same documents", variant, 0, flags)
            for variant, flags in variants if number % 2 == 0 else reversed(variants):
                get(model, part, variant, number, flags)
    except TimeoutError:
        return False
    return True


# ---- results ----


def losses_of(kind, a, b, same):
    """What the losses of two rows say of each other: (words, whether they are as they must be)."""
    far = lambda x, y: max(abs(p / q - 1) if q else abs(p) for p, q in zip(x, y))
    values = lambda row, name: [float(v) for v in row[name].split()]
    if kind == "other":
        if not same:
            return "other documents a step", True
        x, y = (values(row, "first_losses") for row in same)
        return ("the same digits" if x == y else f"{far(x, y):.0e}") + " on the same documents", far(x, y) < 1e-2
    if kind == "routing" or not (a["loss"] and b["loss"]):
        return "other experts" if kind == "routing" else "-", True
    if a["loss"] == b["loss"] and a["first_losses"] == b["first_losses"]:
        return "the same digits", True
    apart = far(values(a, "loss"), values(b, "loss"))
    return f"{apart:.0e}", kind == "rounding" and apart < 1e-2


def results(rows):
    """{"runs": [..], "gains": [..], "init": ..}: plain data, a run of each variant (medians over rounds), a gain of each
    technique and model, the checkpoint that runs began with."""
    groups = {}
    for (device, model, part, variant, number), row in rows.of.items():
        groups.setdefault((device, model, part, variant), {})[int(number)] = row
    runs, gains = [], []
    for (device, model, part, variant), by_round in groups.items():
        good = [row for row in by_round.values() if row["tokens_per_second"]]
        run = {"device": device, "model": model, "part": part, "variant": variant, "rounds": len(good),
               "note": next((row["note"] for row in by_round.values() if row["note"]), "")}  # fmt: skip
        for name in ("tokens", "tokens_per_second", "step_ms", "mfu", "memory_gb", "text_rows", "image_rows",
                     "load_max", "fill"):  # fmt: skip
            values = [float(row[name]) for row in good if row[name]]
            run[name] = statistics.median(values) if values else None
        runs.append(run)
    for device, model in dict.fromkeys(key[:2] for key in groups):
        same = [groups.get((device, model, "same documents", variant), {}).get(0) for variant in SAME]
        same = same if all(row and row["first_losses"] for row in same) else None
        for part, (_, compared) in parts_of(device == "cuda", True).items():
            for c in compared:
                has, has_not = (groups.get((device, model, part, v), {}) for v in (c.has, c.has_not))
                pairs = [(has[n], has_not[n]) for n in sorted(has.keys() & has_not.keys())
                         if has[n]["tokens_per_second"] and has_not[n]["tokens_per_second"]]  # fmt: skip
                if not pairs:
                    continue
                ratios = [float(a["tokens_per_second"]) / float(b["tokens_per_second"]) for a, b in pairs]
                words, good = losses_of(c.losses, *pairs[0], same if "varlen" in c.technique else None)
                percent = lambda ratio: 100 * (ratio - 1)
                gains.append({"device": device, "model": model, "part": part, "technique": c.technique, "has": c.has,
                              "has_not": c.has_not, "rounds": len(ratios), "gain": percent(statistics.median(ratios)),
                              "least": percent(min(ratios)), "largest": percent(max(ratios)),
                              "losses": words, "losses_agree": good})  # fmt: skip
    try:
        init = json.loads(rows.path.with_suffix(".settings.json").read_text())["--init"]
    except (OSError, ValueError, KeyError, TypeError):
        init = None
    return {"runs": runs, "gains": gains, "init": init}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="of configs/, or paths (default: as above)")
    parts = ["switches", "ladder", "memory", "batch", "step"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="of those parts, only these")
    parser.add_argument("--minutes", type=positive, help="when to end (default 15 on a GPU, else 2)")
    parser.add_argument("--repeats", type=int, default=6, help="rounds (default 6: as many either way)")
    parser.add_argument("--seconds", type=positive, default=1, help=f"of a run, behind {WARM_UP} steps (default 1)")
    parser.add_argument("--limit", type=positive, default=120, help="seconds that a run may take in all (default 120)")
    parser.add_argument("--tokens", type=int, help="of a micro-batch (default: 16384 on a GPU, else the config's)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of scripts/make_bench_data.py, for all models")
    parser.add_argument("--init", type=Path, metavar="CKPT", help="a trained model's weights, with the routing it learned")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: a GPU where there is one)")
    parser.add_argument("--train", type=Path, default=ROOT / "train", help="the program (default ./train)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as ./train takes it")
    parser.add_argument("--markdown", nargs="*", metavar="PAGE", help="tables and charts alone, printed or put into pages")
    args = parser.parse_args()
    args.out, args.train = args.out.resolve(), args.train.resolve()
    args.data, args.init = (path and path.resolve() for path in (args.data, args.init))
    if args.repeats < 1:
        parser.error("--repeats: at least 1")
    needed = [] if args.markdown is not None else [(args.train, "make builds it")]
    needed += [(args.data / "bench.tar", "scripts/make_bench_data.py makes it")] if args.data else []
    check_paths(fail, args.out, needed)
    return args


def main():
    args = arguments()
    table = args.out / "ablate.csv"
    if args.markdown is not None:
        found = results(Rows(table, makes=False))
        ablate_report.files(found, args.out)
        wrong = ablate_report.markdown(found, args.markdown or ["-"])
        return sys.exit(f"ablate: {wrong}") if wrong else None
    device = args.device or ("cuda" if has_gpu() else "cpu")
    args.minutes = args.minutes or (15 if device == "cuda" else 2)
    given_tokens, args.tokens = args.tokens, args.tokens or (16384 if device == "cuda" else None)
    models = [Model(name, args) for name in args.models or (MODELS if device == "cuda" else ["demo"])]
    for model in models:
        model.prepare()
    allowed = models[0].plan("--set", "kernels.moe_gemm=?").text  # the refusal names the words
    parts = parts_of(device == "cuda", "modality" in allowed)
    if args.variants:
        names = {name for variants, _ in parts.values() for name in variants}
        for name in args.variants:
            if name not in names:
                fail(f"there is no variant {name}", "one of: " + ", ".join(sorted(names)))
        parts = {part: ({n: f for n, f in variants.items() if n in args.variants}, compared)
                 for part, (variants, compared) in parts.items()}  # fmt: skip
    rows = Rows(table)
    settings = {"--set": args.set, "--tokens": given_tokens, "--data": args.data and str(args.data),
                "--init": args.init and str(args.init)}  # fmt: skip
    check_settings(fail, table, settings)
    whole = measure_all(rows, models, parts, args, device)
    if rows.failed and not rows.good:
        fail(f"nothing could be measured; the last run said: {rows.failed[-1]}", f"{args.out}/log has all that it said")
    found = results(rows)
    print("\n" + ablate_report.text(found), end="")
    print("\n".join(map(str, ablate_report.files(found, args.out))))
    if device == "cpu":
        print("A CPU has no queues, graphs or other ways of an op: what AdaLN, grouped products, streams and graphs\n"
              "are worth, and whether copies hide behind kernels, only a GPU shows.")  # fmt: skip
    if not whole:
        print("Not all was measured within --minutes: the same command goes on.")
    wrong = [f"{g['model']}: {g['technique']}" for g in found["gains"] if not g["losses_agree"]]
    if wrong:
        sys.exit("ablate: variants that do not train to the same losses: " + "; ".join(wrong))


if __name__ == "__main__":
    end_quietly(main)
