#!/usr/bin/env python3
"""The engine beside PyTorch, written as a good user of it would: the same weights, the same pack, in one run.

    scripts/compare_torch.py CONFIG OUT              on a GPU; OUT/torch.json, torch.txt and torch.md
    scripts/compare_torch.py CONFIG OUT --device cpu only eager PyTorch: small configs such as configs/demo.json
    scripts/compare_torch.py CONFIG OUT --markdown PAGE..   puts what OUT has into pages; measures nothing

First ./train --dump writes a step: weights, a pack with its noise, losses, every gradient. PyTorch's model
(scripts/torch_model.py) loads them and must get these losses and gradients, with each treatment of activations. Then
both are timed in turns, in rounds which alternate in order: short runs of ./train, and each way of PyTorch
(scripts/torch_ways.py) in a process that holds nothing on the device meanwhile. A way that fails or takes longer than
--limit has its reason in the table and is not tried again; the others go on in a process of their own, with what has
been compiled. The files are written after each measurement, so that what is broken off leaves what there was.

Ways: bf16 weights, gradients and AdamW states; "masters": fp32 weights and moments beside bf16 weights, as the engine
has them; each launched op by op and captured as one CUDA graph, memory permitting; "flash": attention by the flash
backend, where it is installed; "selective": what products and attention give is kept and the rest rebuilt; "budget":
the compiler keeps half of the activations (activation_memory_budget); "checkpoint": none but the layers' inputs.

In PyTorch's favour: its one pack and block mask lie ready on the device, and it keeps no EMA. Both train from weights
that a run begins with, gates and image head zero. The engine reads, decodes and packs its data as it trains.
Exit code 77 without PyTorch, 1 where losses or gradients disagree.
"""
import argparse
import importlib.util
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

from ablate_report import aligned, fill_places, markdown_table
from timed_run import (QUIET, ROOT, Plan, check_paths, config_data, config_read, device_memory, dump_step, end_quietly,
                       end_without_torch, has_gpu, last_line, mean_step, positive, run_steps)  # fmt: skip

try:
    import torch
    import torch_ways as W
    from torch_ways import M
except ImportError as error:
    end_without_torch(__doc__, error)

WARM_UP, LEAST_STEPS = 6, 8  # steps of the engine: before those that count, and of those


def fail(text, fix):
    sys.exit(f"compare_torch: {text}\n  fix: {fix}")


# ---- PyTorch's process ----------------------------------------------------------------------------------------------


class Worker:
    """A process that runs torch_ways.serve. One that answers that it failed, or nothing for `limit` seconds, is ended;
    the next question has a new one."""

    def __init__(self, limit, *operands):
        self.limit, self.operands, self.process = limit, operands, None

    def ask(self, *question):
        if self.process is None:
            opened = self.start()
            if question == ("open",) or "failed" in opened:
                return opened
        self.pipe.send(question)
        return self.answer()

    def start(self):
        """Forked, for it has PyTorch then; this process itself never touches the device."""
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=self.serve, args=(self.pipe, theirs))
        self.process.start()
        theirs.close()
        self.pipe.send(("open",))
        return self.answer()

    def serve(self, ours, theirs):
        ours.close()  # or it would not see its end
        W.serve(theirs, *self.operands)

    def answer(self):
        try:
            said = self.pipe.recv() if self.pipe.poll(self.limit) else {"failed": f"longer than {self.limit:.0f} s"}
        except (EOFError, OSError):
            self.process.join()
            said = {"failed": f"its process ended with {self.process.exitcode}"}
        if "failed" in said:
            self.end()
        return said

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


# ---- the engine -----------------------------------------------------------------------------------------------------


class Engine:
    def __init__(self, args, device):
        config = config_read(args.config)
        self.every = config["train"].get("ema_every", 1)  # steps between updates of the average
        sets, bad = config_data(config, args.data, args.out)
        if bad:
            fail(bad, "or name a folder of scripts/make_bench_data.py with --data")
        self.args, self.device, self.sets = args, device, [*args.set, *QUIET, *sets]

    def command(self, *more):
        command = [str(self.args.train), str(self.args.config), "--device", self.device]
        command += ["--run-dir", str(self.args.out / "run")]
        for assignment in [*self.sets, "train.micro_batches=1"]:
            command += ["--set", assignment]
        return [*command, *(["--tokens", str(self.args.tokens)] if self.args.tokens else []), *more]

    def round(self):
        seconds = lambda lines: sum(s["seconds"] for s in lines[WARM_UP:])
        least = WARM_UP + max(LEAST_STEPS, self.every)
        enough = lambda lines: len(lines) >= least and seconds(lines) > self.args.seconds
        out = self.args.out
        command = self.command("--steps", "100000")
        lines, said = run_steps(command, out / "run", out / "log", enough, self.args.limit)
        if len(lines) <= WARM_UP:
            return {"failed": last_line(said)}
        lines, memory = lines[WARM_UP:], device_memory(said)
        median = lambda value: statistics.median(map(value, lines))
        step = mean_step(lines, self.every)
        row = {"ms": 1e3 * step, "tokens_per_second": median(lambda s: s["tokens"]) / step,
               "flops_a_token": median(lambda s: s["flops_per_second"] / s["tokens_per_second"])}
        if memory:
            row["memory_gb"] = float(memory[1])
        if "mfu" in lines[0]:
            row |= {"mfu": median(lambda s: s["mfu"] * s["seconds"]) / step,
                    "sheet": median(lambda s: s["flops_per_second"] / s["mfu"])}  # fmt: skip
        return row

    def largest(self):
        """{policy: the most token slots that fit}"""
        out = {}
        for policy in ("keep", "recompute", "auto"):
            plan = Plan(self.command("--tokens", "max", "--memory", policy))
            out[policy] = plan.slots if plan.fits else None
        return out


# ---- the table ------------------------------------------------------------------------------------------------------


def lines_of(*functions):
    """Lines of code, without blank ones and those of comments alone."""
    source = "\n".join(inspect.getsource(f) for f in functions).splitlines()
    return sum(bool(line.strip()) and not line.strip().startswith(("#", '"""')) for line in source)


def cost_to_write(way):
    """Lines of what a way takes: model, step and update, and what it adds to them."""
    parts = [M, W.Training.losses, W.Training.gradients, W.Training.step]
    parts += [W.adamw, W.MastersUpdate] if way.masters else [W.Update]
    parts += [W.Training.capture] * way.graph + [W.MEMORY[way.memory]]
    parts += [W.save_products, W.selective_contexts] * (way.memory == "selective")
    return lines_of(*parts)


def state_bytes(way, parameters):
    """Of what does not grow with the pack: weights and gradients in bf16, the update's states."""
    return parameters * (4 + 12 if way.masters else 4 + 4)


def summary(ways, rows, about):
    """A row each: medians over rounds; how many times as fast the engine is in the same round, with its spread. rows:
    {name: {round: what was measured}}."""
    tokens, mine = about["tokens"], {n: r for n, r in rows["engine"].items() if "failed" not in r}
    first = next(iter(mine.values()), {})
    out = [{"way": "engine", "rounds": len(mine)}]
    for name in ("tokens_per_second", "ms", "mfu", "memory_gb"):
        if name in first:
            out[0][name] = statistics.median(r[name] for r in mine.values())
    failed = [r["failed"] for r in rows["engine"].values() if "failed" in r]
    if failed:
        out[0]["failed"] = failed[0]
    for way in ways:
        good = {n: r for n, r in rows[way.name].items() if "ms" in r}
        row = {"way": way.name, "rounds": len(good), "lines": cost_to_write(way)}
        failed = [r["failed"] for r in rows[way.name].values() if "failed" in r]
        if failed:
            row["failed"] = failed[0]
        if good:
            ms = statistics.median(r["ms"] for r in good.values())
            row |= {"ms": ms, "tokens_per_second": 1e3 * tokens / ms}
            ratios = [mine[n]["tokens_per_second"] * r["ms"] / (1e3 * tokens) for n, r in good.items() if n in mine]
            if ratios:
                row |= {"engine": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
            if "sheet" in first:
                row["mfu"] = row["tokens_per_second"] * first["flops_a_token"] / first["sheet"]
            if "gb" in about:
                # The least of the rounds: what ways before have left behind is not its own.
                gb, state = (min(r["memory_gb"] for r in good.values()), state_bytes(way, about["parameters"]) / 1e9)
                row |= {"memory_gb": gb, "reserved_gb": min(r["reserved_gb"] for r in good.values()),
                        "largest_T": int(tokens * (about["gb"] - state) / (gb - state))}  # fmt: skip
        out.append(row)
    return out


def table(found):
    head = ["", "tokens/s", "ms a step", "MFU, %", "GB", "GB reserved", "largest T", "engine is faster", "lines"]
    out = [head]
    show = lambda row, name, form, times=1: format(row[name] * times, form) if row.get(name) is not None else "-"
    for row in found["rows"]:
        faster = show(row, "engine", ".2f")
        if "engine" in row:
            faster += f" x ({row['least']:.2f} to {row['largest']:.2f})"
        out.append([row["way"], show(row, "tokens_per_second", ",.0f"), show(row, "ms", ".2f"),
                    show(row, "mfu", ".1f", 100), show(row, "memory_gb", ".1f"), show(row, "reserved_gb", ".1f"),
                    show(row, "largest_T", ",d"), faster, show(row, "lines", "d")])  # fmt: skip
        if "failed" in row:
            out[-1][0] += f" ({row['failed']})"
    return out


def notes_of(found):
    """What the table does not say."""
    about, rounds = found["about"], sorted({row["rounds"] for row in found["rows"]} - {0})
    rounds = " to ".join(map(str, dict.fromkeys([rounds[0], rounds[-1]]))) if rounds else "no"
    out = [f"{about['config']}, {about['tokens']:,} tokens a step, {about['device']}, PyTorch {about['torch']}; "
           f"medians of {rounds} {'round' if rounds == '1' else 'rounds'}."]  # fmt: skip
    for name, a in found["agreement"].items():
        out.append(f"Losses of {name} are {a['losses']:.1e} from the engine's, its {a['gradients']} gradients "
                   f"{a['gradients_median']:.1e} (median) to {a['gradients_worst']:.1e} ({a['worst']})"
                   f"{'' if a['agree'] else ': NOT the same model'}.")  # fmt: skip
    if "gb" in about:
        out.append("GB: most allocated by PyTorch, from which its largest T follows, and reserved for that; in use by the "
                   "engine, whose largest T is what --plan finds room for.")  # fmt: skip
    out.append("Lines: of code, the model's among them.")
    return out


def write(found, out):
    """The text, which goes into torch.txt; the table in Markdown; everything."""
    text = "\n".join([*aligned(table(found)), *notes_of(found)]) + "\n"
    (out / "torch.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "torch.txt").write_text(text)
    (out / "torch.md").write_text(markdown(found) + "\n")
    return text


def markdown(found):
    return markdown_table(table(found)) + "\n\n" + " ".join(notes_of(found))


def markdown_short(found):
    """Without what is of interest to those who compare ways of PyTorch."""
    made = [[row[0], row[1], row[3], row[4], row[7]] for row in table(found)]
    made[0][0] = found["about"]["config"]
    return markdown_table(made)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, help="of a micro-batch (default: 16384 on a GPU, else the config's)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--seconds", type=positive, default=2, help="that a round times each way (default 2)")
    parser.add_argument("--minutes", type=positive, default=15,
                        help="after which no measurement begins (default 15)")  # fmt: skip
    parser.add_argument("--limit", type=positive, default=300,
                        help="seconds that one measurement may take, compiling included (default 300)")  # fmt: skip
    parser.add_argument("--ways", nargs="+", metavar="WAY", choices=[w.name for w in W.WAYS + W.EAGER],
                        help="of: " + "; ".join(w.name for w in W.WAYS))  # fmt: skip
    parser.add_argument("--once", nargs="+", default=[], metavar="WAY", choices=[w.name for w in W.WAYS + W.EAGER],
                        help="what is timed in the last round alone, after all others")  # fmt: skip
    parser.add_argument("--autotune", choices=["attention", "all"], help="what the compiler tries variants of, which "
                        "takes minutes (default: nothing)")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of scripts/make_bench_data.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: a GPU where there is one)")
    parser.add_argument("--train", type=Path, default=ROOT / "train", help="the program (default ./train)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as ./train takes it")
    parser.add_argument("--markdown", nargs="+", metavar="PAGE", help="where to put the tables of OUT")
    args = parser.parse_args()
    args.config, args.out, args.train = args.config.resolve(), args.out.resolve(), args.train.resolve()
    args.data = args.data and args.data.resolve()
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    needed = [(args.config, "name a config, such as configs/small.json"), (args.train, "make builds it")]
    check_paths(fail, args.out, [] if args.markdown else needed)
    return args


def flash_installed():
    return bool(importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"))


def measure(found, worker, engine, ways, args, end):
    """Fills found, in rounds, until all is measured or the time `end` would be passed, by what a measurement took the
    last time. False then."""
    rows = found["measured"] = {name: {} for name in ["engine", *(way.name for way in ways)]}
    found["rows"] = summary(ways, rows, found["about"])

    def add(name, number, row):
        rows[name][number] = row
        found["rows"] = summary(ways, rows, found["about"])
        write(found, args.out)
        print(f"round {number + 1}: {name} {row}", flush=True)

    def checked(way):
        """Whether its treatment of activations may be timed; asked once of each."""
        name = "flash" if way.flash else way.memory
        if name not in checks:
            there = flash_installed() or not way.flash
            checks[name] = a = (worker.ask("check", way.memory, way.flash) if there else
                                {"failed": "flash_attn.cute is not installed"})  # fmt: skip
            if "failed" not in a:
                found["agreement"][name] = a
                print(f"{name}: checked in {a['seconds']:.1f} s, compiling included", flush=True)
        return checks[name]

    checks, took = {}, {}
    often, once = ([name for name in rows if (name in args.once) == asked] for asked in (False, True))
    for number in range(args.rounds):
        for name in [*(often if number % 2 == 0 else reversed(often)), *(once if number == args.rounds - 1 else [])]:
            if any("failed" in row for row in rows[name].values()):
                continue
            began = time.time()
            if began + took.get(name, 0) >= end:
                return False
            way = next((way for way in ways if way.name == name), None)
            if way is None:
                add(name, number, engine.round())
            else:
                a = checked(way)
                began = time.time()  # the next time there is nothing to compile
                add(name, number, a if "failed" in a else worker.ask("time", way, args.seconds))
            took[name] = time.time() - began
    return True


def put(args):
    """The tables that are there into pages: <!-- torch CONFIG -->, <!-- torch CONFIG short -->."""
    if not (args.out / "torch.json").is_file():
        fail(f"there is no {args.out / 'torch.json'}", "measure first: scripts/compare_torch.py CONFIG OUT")
    try:
        found = json.loads((args.out / "torch.json").read_text())
        place = f"torch {found['about']['config']}"
        tables = {place: markdown(found), f"{place} short": markdown_short(found)}
    except (ValueError, KeyError, TypeError, IndexError):
        fail(f"{args.out / 'torch.json'} is not whole", "measure again: scripts/compare_torch.py CONFIG OUT")
    for page in args.markdown:
        if wrong := fill_places(page, tables):
            sys.exit(f"compare_torch: {wrong}")


def main():
    args = arguments()
    if args.markdown:
        return put(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends PyTorch's process, too
    began, device = time.time(), args.device or ("cuda" if has_gpu() else "cpu")
    args.tokens = args.tokens or (16384 if device == "cuda" else None)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(args.out / "compiled"))
    engine, dump = Engine(args, device), args.out / "dump"
    dump_step(fail, engine.command(), dump)
    micro = W.read_pack(fail, dump)
    worker = Worker(args.limit, dump, device, args.autotune, args.out / "torch.log")
    opened = worker.ask("open")
    print(f"dumped and opened in {time.time() - began:.1f} s", flush=True)
    if "failed" in opened:
        fail(f"PyTorch's model cannot be set up: {opened['failed']}", f"see {args.out / 'torch.log'}")
    ways = [w for w in (W.WAYS if device == "cuda" else W.EAGER) if not args.ways or w.name in args.ways]
    found = {"about": {"config": args.config.stem, "tokens": len(micro["row"]), "parameters": opened["parameters"],
                       "device": opened.get("name", "CPU"), "torch": torch.__version__}, "agreement": {}}  # fmt: skip
    if "gb" in opened:
        found["about"]["gb"] = opened["gb"]
    try:
        whole = measure(found, worker, engine, ways, args, began + 60 * args.minutes)
    finally:
        worker.end()
        shutil.rmtree(dump)
    if device == "cuda":
        found["engine_largest"] = engine.largest()
        found["rows"][0]["largest_T"] = found["engine_largest"]["auto"]
    print("\n" + write(found, args.out), end="")
    if not whole:
        print("Not all was measured within --minutes.")
    if not all(a["agree"] for a in found["agreement"].values()):
        sys.exit("compare_torch: PyTorch's losses or gradients are not the engine's: its times are of another model")


if __name__ == "__main__":
    end_quietly(main)
