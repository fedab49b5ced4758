#!/usr/bin/env python3
"""PyTorch's DistributedDataParallel on the GPUs of one host, of the model that scripts/scaling.py runs on them.

    scripts/torch_scaling.py CONFIG OUT [--ranks N] [--data FOLDER]    N: as many as there are GPUs
    scripts/torch_scaling.py configs/demo.json OUT --ranks 2 --device cpu --tokens 192

A process a GPU (NCCL; Gloo on CPUs), each with the model of scripts/torch_model.py, compiled, everything kept, weights,
gradients and AdamW's states in bf16: the fastest way of scripts/torch_ways.py. Each GPU trains by itself first, all at
the same time, then with the others: the mean of gradients is formed by DDP in buckets as the backward pass makes them
(static_graph, gradient_as_bucket_view). Both op by op and captured as one CUDA graph. Before it is timed, gradients
must be the mean of what the processes had alone.

Every process draws its own noise, but all have the same pack, so that none waits for one with a longer one. The pack,
and the weights of all layers, which begin equal, are what ./train --dump writes of a model of one layer; a compiled
layer does not depend on how many there are. Exit code 77 without PyTorch, 1 where a process fails, gradients are wrong
or --limit is passed; what was measured is printed by then.
"""
import argparse
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path

from timed_run import (QUIET, ROOT, check_paths, config_data, config_read, dump_step, end_quietly, end_without_torch,
                       gpus, has_gpu, positive)  # fmt: skip

try:
    import torch
    import torch.distributed as dist
    import torch_ways as W
    from torch.nn.parallel import DistributedDataParallel
    from torch_ways import R
except ImportError as error:
    end_without_torch(__doc__, error)

ENOUGH = {"cuda": 0.05, "cpu": 1e-5}  # of gradients from their mean: of bf16, of fp32
WARM_UP = 11  # steps of DDP before a capture: it times its own first ten by events, which no capture may see,
MOST_STEPS = 80  # and then each hundredth


def fail(text, fix):
    sys.exit(f"torch_scaling: {text}\n  fix: {fix}")


# ---- a process ------------------------------------------------------------------------------------------------------


class Losses(torch.nn.Module):
    """What DDP sees of a Training: its parameters, and its losses as a forward pass."""

    def __init__(self, training):
        super().__init__()
        self.leaves = torch.nn.ParameterList(training.leaves)
        self.forward = training.losses


class Replica(W.Training):
    """A Training that can be made one of several."""

    def __init__(self, peer, way, first):
        super().__init__(peer, way, first)
        self.params = W.on_each(self.params, lambda group: {n: torch.nn.Parameter(t) for n, t in group.items()})
        self.leaves = W.leaves_of(self.params)
        self.update = W.Update(self.leaves, peer)
        self.first = W.leaves_of(first)

    def distribute(self, bucket_mb):
        self.losses = DistributedDataParallel(Losses(self), bucket_cap_mb=bucket_mb, static_graph=True,
                                              gradient_as_bucket_view=True)  # fmt: skip

    @torch.no_grad()
    def begin(self):
        for leaf, value in zip(self.leaves, self.first):
            leaf.copy_(value)

    def gradients_of_dump(self):
        """Of the weights as they were dumped, with which no gradient is zero; this process's noise, always the same."""
        self.begin()
        torch.manual_seed(1 + dist.get_rank())
        self.gradients()
        grads = [t.grad.clone() for t in self.leaves]
        self.begin()
        W.as_first(self.params, self.peer.s)
        return grads


def distance(grads, want):
    norm = lambda values: sum(t.float().square().sum() for t in values).sqrt()
    return (norm([a - b for a, b in zip(grads, want)]) / norm(want)).item()


def timed(training, steps):
    """Milliseconds of a step, while the other processes do the same."""
    dist.barrier()
    return statistics.median((W.steps_timed_gpu if training.peer.gpu else W.steps_timed_cpu)(training.run, steps))


def time_ways(say, training, what, args):
    training.run = training.step
    for _ in range(WARM_UP if training.peer.gpu else 0):
        training.step()
    say(f"op by op, {what}", timed(training, args.steps))
    if training.peer.gpu:
        training.capture(torch.cuda.current_stream())
        say(f"graph, {what}", timed(training, args.steps))
        del training.graph, training.run  # and the memory that the graph holds
        gc.collect()
        torch.cuda.empty_cache()


def gradients_alone(training):
    """(the mean of all processes' gradients, how far this one's are from it)"""
    grads = training.gradients_of_dump()
    mean = [t.clone() for t in grads]
    for t in mean:
        dist.all_reduce(t)
        t /= dist.get_world_size()
    return mean, distance(grads, mean)


def measure(say, training, args):
    mean, apart = gradients_alone(training)
    time_ways(say, training, "alone", args)
    training.distribute(args.bucket_mb)
    say("gradients", (distance(training.gradients_of_dump(), mean), apart))
    time_ways(say, training, "together", args)


def serve(pipe, rank, args, layers):
    """A process: says (what, value) down the pipe."""
    with open(args.out / f"rank{rank}.log", "w") as out:
        os.dup2(out.fileno(), 2)
    try:
        gpu = args.device == "cuda"
        stream = contextlib.nullcontext()
        if gpu:
            torch.cuda.set_device(rank)
            torch._dynamo.config.optimize_ddp = False  # would split a layer where a bucket ends
            stream = torch.cuda.stream(torch.cuda.Stream())  # backward runs where forward ran: not the default stream
        else:
            torch.set_num_threads(max(1, os.cpu_count() // args.ranks))
        meet = f"file://{args.out}/meet"
        dist.init_process_group("nccl" if gpu else "gloo", init_method=meet, rank=rank, world_size=args.ranks)
        dump, s = args.out / "dump", R.sizes_from_config(json.loads((args.out / "dump/config.json").read_text()))
        with stream:
            pack = R.safetensors_read(dump / "micro_0.safetensors")
            peer = W.Peer(dataclasses.replace(s, L=layers), pack, args.device, None)
            first = W.load_params(dump / "params.safetensors", s)
            first = W.on_each(first, lambda group: {n: t.to(args.device, peer.dtype) for n, t in group.items()})
            first["layers"] *= layers
            measure(lambda *said: pipe.send(said), Replica(peer, W.Way("bf16"), first), args)
        pipe.send(("end", None))
    except Exception as error:  # whatever: the others wait for this one, so all are ended
        traceback.print_exc()
        pipe.send(("failed", (str(error).strip().splitlines() or [type(error).__name__])[0][:160]))
    os._exit(0)  # not before all has been said, and without waiting for the others


# ---- all of them ----------------------------------------------------------------------------------------------------


def dump(args):
    """A model of one layer, and a pack. (tokens of the pack, layers of the whole model)"""
    config = config_read(args.config)
    layers = config["model"].get("layers") or fail(f"{args.config} has no model.layers", "write how many there are")
    sets, bad = config_data(config, args.data, args.out)
    if bad:
        fail(bad, "or name a folder of scripts/make_bench_data.py with --data")
    command = [str(args.train), str(args.config), "--device", args.device, "--run-dir", str(args.out / "run")]
    for assignment in [*QUIET, *sets, "train.micro_batches=1", "model.layers=1"]:
        command += ["--set", assignment]
    command += ["--tokens", str(args.tokens)] if args.tokens else []
    dump_step(fail, command, args.out / "dump")
    return len(W.read_pack(fail, args.out / "dump")["row"]), layers


def answers(pipes, until):
    """Yields (what, [each process's value]) as all have said it. Ends the script where one fails, or says nothing until
    `until`."""
    while True:
        said, failed = [], []
        for rank, pipe in enumerate(pipes):
            try:
                in_time = pipe.poll(max(0, until - time.time()))
                said.append(pipe.recv() if in_time else ("failed", "says nothing"))
            except EOFError:
                said.append(("failed", "it ended"))
            if said[-1][0] == "failed":
                failed.append(f"process {rank}: {said[-1][1]}")
                until = min(until, time.time() + 2)  # one fails because another does: which one, both may say
        if failed:
            fail("; ".join(failed), "see rank*.log in OUT; --limit may be too short")
        what, values = said[0][0], [value for _, value in said]
        yield what, values


def report(args, tokens, said):
    """Prints what all processes say. Whether gradients were right."""
    alone, good = {}, True
    name = f"{args.config.stem}, {tokens} tokens"
    for what, values in said:
        way, _, which = what.partition(", ")
        if what == "gradients":
            off, apart = (max(v) for v in zip(*values))
            good = off < ENOUGH[args.device]  # no NaN is
            line = f"{off:.1e} from the mean of all, a GPU's own {apart:.1e}{'' if good else '  WRONG'}"
        elif what == "end":
            return good
        else:
            mean = statistics.mean(values)
            each = ", ".join(f"{v:.2f}" for v in values)
            line = f"{mean:.2f} ms a step ({each}), {1e3 * tokens / mean:.0f} tokens/s a GPU"
            if which == "alone":
                alone[way] = mean
            else:
                line += f" = {alone[way] / mean:.3f} of one"
            what = f"{way}, a GPU alone" if which == "alone" else f"{way}, {args.ranks} GPUs"
        print(f"{f'{name}, PyTorch, {what}':<58} {line}", flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path, help="a folder for the dump and the processes' logs")
    parser.add_argument("--ranks", type=int, help="processes (default: GPUs)")
    parser.add_argument("--tokens", type=int, help="of a micro-batch (default: 16384 on GPUs, else the config's)")
    parser.add_argument("--steps", type=int, default=20, help=f"that are timed, at most {MOST_STEPS} (default 20)")
    parser.add_argument("--bucket-mb", type=positive, default=25, help="of gradients, as DDP takes it (default 25)")
    parser.add_argument("--limit", type=positive, default=240, help="seconds for all of it (default 240)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of scripts/make_bench_data.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: GPUs where there are any)")
    parser.add_argument("--train", type=Path, default=ROOT / "train", help="the program (default ./train)")
    args = parser.parse_args()
    args.config, args.out, args.train = args.config.resolve(), args.out.resolve(), args.train.resolve()
    args.data = args.data and args.data.resolve()
    args.device = args.device or ("cuda" if has_gpu() else "cpu")
    args.tokens = args.tokens or (16384 if args.device == "cuda" else None)
    if not 1 <= args.steps <= MOST_STEPS:
        parser.error(f"--steps: 1 to {MOST_STEPS}")
    args.ranks = gpus() if args.ranks is None else args.ranks
    if args.ranks < 1:
        parser.error("--ranks: at least 1, of which each has a GPU; --ranks 2 --device cpu does without")
    needed = [(args.config, "name a config, such as configs/small.json"), (args.train, "make builds it")]
    check_paths(fail, args.out, needed)
    return args


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the processes, too
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # as the engine's figures were measured: without multicast
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # as PyTorch asks of those who capture collectives
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(args.out / "compiled"))
    until = time.time() + args.limit
    tokens, layers = dump(args)
    (args.out / "meet").unlink(missing_ok=True)
    pipes, processes = [], []
    try:
        for rank in range(args.ranks):  # forked, for they have PyTorch then; this process never touches a device
            ours, theirs = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(target=serve, args=(theirs, rank, args, layers))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        good = report(args, tokens, answers(pipes, until))
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(args.out / "dump")
    sys.exit(not good)


if __name__ == "__main__":
    end_quietly(main)
