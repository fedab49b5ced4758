#!/usr/bin/python3
"""The engine beside PyTorch, written as a good user of it would: the same weights, the same pack, in one run.

    scripts/compare_torch.py CONFIG OUT              on a GPU; OUT/torch.json, torch.txt and torch.md
    scripts/compare_torch.py CONFIG OUT --device cpu only eager PyTorch: small configs such as configs/demo.json

First ./train --dump writes a step: weights, a pack with its noise, losses, every gradient. PyTorch's model
(scripts/torch_model.py) loads them and must get these losses and gradients. Then both are timed in turns, in rounds:
short runs of ./train, and each way of PyTorch in a process that holds nothing on the device meanwhile.

Ways: bf16 weights, gradients and AdamW states; "masters": fp32 weights and moments beside bf16 weights, as the engine
has them; each launched op by op and captured as one CUDA graph, memory permitting; "selective": the compiler keeps half
of the activations (activation_memory_budget); "checkpoint": none but the layers' inputs. Everything is compiled,
attention is FlexAttention, experts are torch._grouped_mm, AdamW is the fused one.

In PyTorch's favour: its one pack and block mask lie ready on the device, and it keeps no EMA. Both train from weights
that a run begins with, gates and image head zero. The engine reads, decodes and packs its data as it trains.
Exit code 77 without PyTorch, 1 where losses or gradients disagree.
"""
import argparse
import gc
import inspect
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ablate_report import markdown_table
from timed_run import (QUIET, ROOT, Plan, config_data, config_read, device_memory, last_line, mean_step, positive,
                       run_steps)  # fmt: skip

try:
    import torch
    import torch_model as M
    from torch_model import R
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

WARM_UP, LEAST_STEPS = 6, 8  # steps of the engine: before those that count, and of those
LIMIT = 180  # seconds of a run of it
# Most relative error of losses and of gradients: of bf16 on both sides, of fp32. With another formula they are off by 1.
ENOUGH = {"cuda": (0.02, 0.2), "cpu": (1e-5, 1e-3)}


def fail(text, fix):
    sys.exit(f"compare_torch: {text}\n  fix: {fix}")


@dataclass
class Way:
    """How PyTorch trains. memory: keep, selective or checkpoint."""

    name: str
    masters: bool = False
    graph: bool = False
    memory: str = "keep"


WAYS = [Way("bf16"), Way("bf16, graph", graph=True), Way("masters", masters=True),
        Way("masters, graph", masters=True, graph=True),
        Way("masters, graph, selective", masters=True, graph=True, memory="selective"),
        Way("masters, graph, checkpoint", masters=True, graph=True, memory="checkpoint")]  # fmt: skip
EAGER = [Way("eager")]  # on a CPU

# ---- PyTorch --------------------------------------------------------------------------------------------------------


class Peer:
    """The model on one pack of a dump; compiled on a GPU, once for all ways."""

    def __init__(self, s, arrays, device, autotune):
        gpu = device == "cuda"
        self.s, self.device, self.dtype = s, device, torch.bfloat16 if gpu else torch.float32
        self.pack = pack = M.Pack(arrays, s, self.dtype, device)
        self.noised = torch.from_numpy(arrays["noised"].copy()).to(device, self.dtype).view(pack.images, -1, s.P)
        if gpu:
            mode = "max-autotune-no-cudagraphs" if autotune else None
            compiled = lambda f: torch.compile(f, fullgraph=True, dynamic=False, mode=mode)
            attend, grouped = M.attend_flex(M.block_mask(pack.doc_start, pack.kv_end), s), M.grouped_mm
        else:
            compiled = lambda f: f
            q, k = torch.arange(len(pack.kv_end))[:, None], torch.arange(len(pack.kv_end))
            allowed = (pack.doc_start[:, None] <= k) & (k < pack.kv_end[:, None])
            attend, grouped = M.attend_dense(pack, allowed, s), M.grouped_loop
        self.noise = compiled(lambda: M.noise(pack).to(self.dtype))
        self.bottom = compiled(lambda p, z: M.bottom(p, z, pack, s))
        self.top = compiled(lambda p, x, b, g, a: M.top(p, x, b, g, a, pack, s))
        block = compiled(lambda p, x, b, g, a: M.block(p, x, b, g, a, pack, s, attend, grouped))
        less = compiled(lambda p, x, b, g, a: M.block(p, x, b, g, a, pack, s, attend, grouped))  # code of its own
        self.blocks = {"keep": block, "selective": selective(less), "checkpoint": checkpointed(block)}

    def losses(self, params, noised, memory="keep"):
        parts = {"bottom": self.bottom, "block": self.blocks[memory], "top": self.top}
        return M.forward(parts, params, noised, self.pack, self.s)


def selective(block):
    """The compiler chooses what of half the activations' bytes is rebuilt."""

    def call(*operands):
        import torch._functorch.config as functorch

        with functorch.patch(activation_memory_budget=0.5):  # read where the block is compiled
            return block(*operands)

    return call


def checkpointed(block):
    from torch.utils.checkpoint import checkpoint

    return lambda *operands: checkpoint(block, *operands, use_reentrant=False, preserve_rng_state=False)


def leaves_of(params):
    return [t for group in (params["ends"], *params["layers"]) for t in group.values()]


def params_to(host, peer):
    """Leaves on the device, in the type that it computes in."""
    put = lambda group: {n: t.to(peer.device, peer.dtype, copy=True).requires_grad_() for n, t in group.items()}
    return {"ends": put(host["ends"]), "layers": [put(layer) for layer in host["layers"]]}


def as_first(params, s):
    """What a run begins with of parameters that are zero there or nearly so; the others stay as the dump has them."""
    with torch.no_grad():
        for group in (params["ends"], *params["layers"]):
            group["mod.weight"].zero_()
            group["mod.base"].zero_()
        for group in params["layers"]:
            group["mod.base"][M.TEXT].view(6, s.C)[[2, 5]] = 1  # the gates of text
        params["ends"]["image_head.weight"].zero_()


class Update:
    """AdamW with the clipping folded in: the fused update divides gradients by grad_scale."""

    def __init__(self, leaves, masters):
        self.leaves, self.held, self.masters = leaves, leaves, masters
        if masters:  # fp32: weights, gradients
            self.held = [t.detach().float().requires_grad_() for t in leaves]
            for t in self.held:
                t.grad = torch.zeros_like(t)
        gpu = leaves[0].is_cuda  # lr as a tensor and capturable: the update can be captured
        rest = dict(lr=torch.tensor(1e-5, device="cuda"), fused=True, capturable=True) if gpu else dict(lr=1e-5)
        self.optimizer = torch.optim.AdamW(self.held, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, **rest)
        if gpu:
            self.optimizer.found_inf = torch.zeros((), device="cuda")

    @torch.no_grad()
    def __call__(self):
        grads = [t.grad for t in self.leaves]
        if self.masters:
            torch._foreach_copy_([t.grad for t in self.held], grads)
            grads = [t.grad for t in self.held]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
        if grads[0].is_cuda:
            self.optimizer.grad_scale = norm.clamp(min=1.0)
        else:
            for g in grads:
                g.div_(norm.clamp(min=1.0))
        self.optimizer.step()
        if self.masters:
            torch._foreach_copy_(self.leaves, self.held)


class Training:
    """One way: parameters, an optimiser, perhaps a graph. step() says nothing to the host."""

    def __init__(self, peer, way, host):
        self.peer, self.way, self.params = peer, way, params_to(host, peer)
        as_first(self.params, peer.s)
        self.leaves = leaves_of(self.params)
        self.update = Update(self.leaves, way.masters)
        self.loss = torch.zeros((), device=peer.device)
        self.run = self.step

    def step(self):
        for t in self.leaves:
            t.grad = None
        loss = M.total_loss(self.peer.losses(self.params, self.peer.noise(), self.way.memory), self.peer.s)
        loss.backward()
        self.update()
        self.loss.copy_(loss.detach())

    def capture(self, stream):
        for t in self.leaves:
            t.grad = None
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.step()
        self.run = self.graph.replay


def steps_timed_gpu(run, steps, warm_up=3):
    """Milliseconds of each step, by events; nothing waits for the device in between."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + warm_up + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])][warm_up:]


def steps_timed_cpu(run, steps, warm_up=1):
    times = []
    for _ in range(steps + warm_up):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return times[warm_up:]


def time_way(peer, way, host, seconds):
    """{"ms", "memory_gb", "loss"} of a training of its own, or {"failed"}. host: parameters in host memory."""
    gpu = peer.device == "cuda"
    try:
        if not gpu:
            training = Training(peer, way, host)
            ms = steps_timed_cpu(training.run, max(1, round(seconds / 0.5)))
            return {"ms": statistics.median(ms), "loss": training.loss.item()}
        torch.cuda.reset_peak_memory_stats()
        stream = torch.cuda.Stream()  # backward runs where forward ran, and a capture must not see the default stream
        training = Training(peer, way, host)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):
                training.step()
            torch.cuda.synchronize()
            if way.graph:
                training.capture(stream)
            first = statistics.median(steps_timed_gpu(training.run, 3))
            ms = statistics.median(steps_timed_gpu(training.run, max(8, round(1e3 * seconds / first))))
        if not training.loss.isfinite():
            return {"failed": "the loss is not finite"}
        return {"ms": ms, "memory_gb": torch.cuda.max_memory_allocated() / 1e9, "loss": training.loss.item()}
    except (RuntimeError, AssertionError) as error:  # out of memory is one
        return {"failed": (str(error).splitlines() or [type(error).__name__])[0][:160]}
    finally:
        training = None
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()


# ---- the same losses and gradients ----------------------------------------------------------------------------------


def load_params(path, s):
    """Tensors of a dump, as the model has them."""
    tensors = R.safetensors_read(path)
    return M.params_from_reference({n: torch.from_numpy(a.copy()) for n, a in tensors.items()}, s)


def check(peer, folder, host):
    """Prints how far losses and gradients are from the dump's; the summary, and whether they agree."""
    params = params_to(host, peer)
    losses = peer.losses(params, peer.noised)
    M.total_loss(losses, peer.s).backward()
    said = json.loads((folder / "losses.json").read_text())
    error = max(abs(v.item() / said[name] - 1) for name, v in zip(("ce", "flow"), losses))
    want, errors = load_params(folder / "grads.safetensors", peer.s), []
    groups = [("", params["ends"], want["ends"])]
    groups += [(f"layers.{i}.", *pair) for i, pair in enumerate(zip(params["layers"], want["layers"]))]
    for at, mine, theirs in groups:
        for name, t in mine.items():
            b = theirs[name].to(t.device)
            errors.append((((t.grad.float() - b).norm() / b.norm()).item(), at + name))
    errors.sort()
    middle, (most, worst) = errors[len(errors) // 2][0], errors[-1]
    good = error < ENOUGH[peer.device][0] and most < ENOUGH[peer.device][1]
    print(f"losses differ by {error:.1e}, {len(errors)} gradients by {middle:.1e} (median) to {most:.1e} ({worst})"
          f"{'' if good else ': NOT the same model'}", flush=True)  # fmt: skip
    return {"losses": error, "gradients_median": middle, "gradients_worst": most, "worst": worst}, good


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

    def dump(self, folder):
        done = subprocess.run(self.command("--dump", str(folder)), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            fail(f"./train --dump failed: {done.stderr.strip()}", "see what ./train CONFIG says")

    def round(self):
        seconds = lambda lines: sum(s["seconds"] for s in lines[WARM_UP:])
        least = WARM_UP + max(LEAST_STEPS, self.every)
        enough = lambda lines: len(lines) >= least and seconds(lines) > self.args.seconds
        out = self.args.out
        lines, said = run_steps(self.command("--steps", "100000"), out / "run", out / "log", enough, LIMIT)
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
    """Lines of what a way takes: model, update, and what it adds to both."""
    parts = [M, Training.step]
    parts += [Update] + [Training.capture] * way.graph
    parts += {"keep": [], "selective": [selective], "checkpoint": [checkpointed]}[way.memory]
    return lines_of(*parts)


def state_bytes(way, parameters):
    """Of what does not grow with the pack."""
    return parameters * (20 if way.masters else 8)


def summary(engine_rows, ways, rows, tokens, parameters, total_gb):
    """A row each: medians over rounds; how many times as fast the engine is in the same round, with its spread."""
    mine = [r for r in engine_rows if "failed" not in r]
    first = mine[0] if mine else {}
    out = [{"way": "engine", "rounds": len(mine)}]
    for name in ("tokens_per_second", "ms", "mfu", "memory_gb"):
        if name in first:
            out[0][name] = statistics.median(r[name] for r in mine)
    for way in ways:
        good = [(r, e) for r, e in zip(rows[way.name], engine_rows) if "ms" in r]
        row = {"way": way.name, "rounds": len(good), "lines": cost_to_write(way)}
        failed = [r["failed"] for r in rows[way.name] if "failed" in r]
        if failed:
            row["failed"] = failed[0]
        if good:
            ms = statistics.median(r["ms"] for r, _ in good)
            row |= {"ms": ms, "tokens_per_second": 1e3 * tokens / ms}
            ratios = [e["tokens_per_second"] * r["ms"] / (1e3 * tokens) for r, e in good if "ms" in e]
            if ratios:
                row |= {"engine": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
            if "sheet" in first:
                row["mfu"] = row["tokens_per_second"] * first["flops_a_token"] / first["sheet"]
            if "memory_gb" in good[0][0]:
                gb, state = max(r["memory_gb"] for r, _ in good), state_bytes(way, parameters) / 1e9
                row |= {"memory_gb": gb, "largest_T": int(tokens * (total_gb - state) / (gb - state))}
        out.append(row)
    return out


def table(found):
    head = ["", "tokens/s", "ms a step", "MFU, %", "GB", "largest T", "engine is faster", "lines"]
    out = [head]
    show = lambda row, name, form, times=1: format(row[name] * times, form) if row.get(name) is not None else "-"
    for row in found["rows"]:
        faster = show(row, "engine", ".2f")
        if "engine" in row:
            faster += f" x ({row['least']:.2f} to {row['largest']:.2f})"
        out.append([row["way"], show(row, "tokens_per_second", ",.0f"), show(row, "ms", ".2f"),
                    show(row, "mfu", ".1f", 100), show(row, "memory_gb", ".1f"), show(row, "largest_T", ",d"), faster,
                    show(row, "lines", "d")])  # fmt: skip
        if "failed" in row:
            out[-1][0] += f" ({row['failed']})"
    return out


def text_of(found):
    made = table(found)
    widths = [max(len(row[i]) for row in made) for i in range(len(made[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in made]
    about = found["about"]
    lines.append(f"{about['config']}, {about['tokens']} tokens, {about['device']}, PyTorch {about['torch']}.\n"
                 "GB of PyTorch: most allocated, from which its largest T follows; the engine's is planned.\n"
                 "Lines: of code, the model's among them.")  # fmt: skip
    return "\n".join(lines) + "\n"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, help="of a micro-batch (default: 16384 on a GPU, else the config's)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--seconds", type=positive, default=2, help="that a round times each way (default 2)")
    parser.add_argument("--ways", nargs="+", choices=[w.name for w in WAYS], metavar="WAY",
                        help="of: " + "; ".join(w.name for w in WAYS))  # fmt: skip
    parser.add_argument("--autotune", action="store_true", help="compile with max-autotune, which takes minutes")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of scripts/make_bench_data.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: a GPU where there is one)")
    parser.add_argument("--train", type=Path, default=ROOT / "train", help="the program (default ./train)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as ./train takes it")
    args = parser.parse_args()
    args.config, args.out, args.train = args.config.resolve(), args.out.resolve(), args.train.resolve()
    args.data = args.data and args.data.resolve()
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    for path, fix in ((args.config, "name a config, such as configs/small.json"), (args.train, "make builds it")):
        if not path.is_file():
            fail(f"there is no {path}", fix)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"{args.out}: {e.strerror}", "OUT is a folder, which need not be there yet")
    return args


def main():
    args = arguments()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.tokens = args.tokens or (16384 if device == "cuda" else None)
    torch.manual_seed(1)
    engine, dump = Engine(args, device), args.out / "dump"
    engine.dump(dump)
    s = R.sizes_from_config(json.loads((dump / "config.json").read_text()))
    arrays = {name: a.copy() for name, a in R.safetensors_read(dump / "micro_0.safetensors").items()}
    if len(set(arrays["seg_len"][1:].tolist())) != 1:
        fail("the pack's images are not all of one size", "PyTorch's model wants data.image_mode=square and captions")
    peer, host = Peer(s, arrays, device, args.autotune), load_params(dump / "params.safetensors", s)
    agreement, good = check(peer, dump, host)
    shutil.rmtree(dump)
    tokens, parameters = len(arrays["row"]), sum(t.numel() for t in leaves_of(host))
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    ways = [w for w in (WAYS if device == "cuda" else EAGER) if not args.ways or w.name in args.ways]
    rows, engine_rows = {w.name: [] for w in ways}, []
    total_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if device == "cuda" else math.nan
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    found = {"about": {"config": args.config.stem, "tokens": tokens, "parameters": parameters, "device": name,
                       "torch": torch.__version__}, "agreement": agreement}  # fmt: skip
    for number in range(args.rounds):
        engine_rows.append(engine.round())
        print(f"round {number + 1}: engine {engine_rows[-1]}", flush=True)
        for way in ways if number % 2 == 0 else ways[::-1]:
            rows[way.name].append(time_way(peer, way, host, args.seconds))
            print(f"round {number + 1}: {way.name} {rows[way.name][-1]}", flush=True)
        found["rows"] = summary(engine_rows, ways, rows, tokens, parameters, total_gb)
        (args.out / "torch.json").write_text(json.dumps(found, indent=1) + "\n")
    if device == "cuda":
        found["engine_largest"] = engine.largest()
        found["rows"][0]["largest_T"] = found["engine_largest"]["auto"]
        (args.out / "torch.json").write_text(json.dumps(found, indent=1) + "\n")
    text = text_of(found)
    (args.out / "torch.txt").write_text(text)
    (args.out / "torch.md").write_text(markdown_table(table(found)) + "\n")
    print(text, end="")
    if not good:
        sys.exit("compare_torch: PyTorch's losses or gradients are not the engine's: its times are of another model")


if __name__ == "__main__":
    main()
