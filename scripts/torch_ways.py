"""The ways in which PyTorch trains the model of scripts/torch_model.py, each as a good user of it would: what
scripts/compare_torch.py times. All of it runs in a process of its own (serve), for a way may fail or hang.

Everything is compiled, attention is FlexAttention over the pack's block mask, experts are torch._grouped_mm. A step is
launched op by op or captured as one CUDA graph by hand. Weights and gradients are bf16; so are AdamW's states, or
else weights have fp32 masters and moments, as the engine has them.
"""
import contextlib
import faulthandler
import gc
import json
import math
import os
import statistics
import time
import traceback
from dataclasses import dataclass

import torch
import torch_model as M
from torch_model import R

# Most relative error of losses, of gradients, and of those of routers and experts, which get other rows where rounding
# decides between two experts: of bf16 on both sides, of fp32. With another formula they are off by 1.
ENOUGH = {"cuda": (0.02, 0.2, 0.5), "cpu": (1e-5, 1e-3, 1e-3)}
LR, BETAS, EPS = 1e-5, (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Way:
    """How PyTorch trains. memory: a key of MEMORY. flash: attention by FlexAttention's flash backend."""

    name: str
    masters: bool = False
    graph: bool = False
    memory: str = "keep"
    flash: bool = False


WAYS = [Way("bf16"), Way("bf16, graph", graph=True), Way("masters", masters=True),
        Way("masters, graph", masters=True, graph=True),
        Way("masters, graph, flash", masters=True, graph=True, flash=True),
        Way("masters, graph, checkpoint", masters=True, graph=True, memory="checkpoint"),
        Way("masters, graph, selective", masters=True, graph=True, memory="selective"),
        Way("masters, graph, budget", masters=True, graph=True, memory="budget")]  # fmt: skip
EAGER = [Way("eager"), Way("eager, masters", masters=True), Way("eager, checkpoint", memory="checkpoint")]  # on a CPU

# ---- what becomes of activations: layer, the compiler -> the compiled layer -----------------------------------------


def keep(layer, compiled):
    return compiled(lambda *operands: layer(*operands))


def save_products(context, op, *operands, **more):
    from torch.utils.checkpoint import CheckpointPolicy

    ops = torch.ops
    saved = op in (ops.aten.mm.default, ops.aten._grouped_mm.default, ops.higher_order.flex_attention)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts():
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(save_products)


def selective(layer, compiled):
    """What products and attention give is kept, everything else rebuilt."""
    from torch.utils.checkpoint import checkpoint

    return compiled(lambda *operands: checkpoint(lambda: layer(*operands), use_reentrant=False,
                                                 preserve_rng_state=False, context_fn=selective_contexts))  # fmt: skip


def budget(layer, compiled):
    """The compiler chooses what of half the activations' bytes is rebuilt."""
    import torch._functorch.config

    block = compiled(lambda *operands: layer(*operands))

    def call(*operands):
        with torch._functorch.config.patch(activation_memory_budget=0.5):  # read where the block is compiled
            return block(*operands)

    return call


def full(layer, compiled):
    """Nothing is kept but the layer's inputs."""
    from torch.utils.checkpoint import checkpoint

    block = compiled(lambda *operands: layer(*operands))
    return lambda *operands: checkpoint(block, *operands, use_reentrant=False, preserve_rng_state=False)


MEMORY = {"keep": keep, "selective": selective, "budget": budget, "checkpoint": full}

# ---- the model on a pack --------------------------------------------------------------------------------------------


class Peer:
    """The model on one pack of a dump; on a GPU compiled, each part once for all ways that use it."""

    def __init__(self, s, arrays, device, autotune):
        self.gpu = device == "cuda"
        self.s, self.device, self.dtype = s, device, torch.bfloat16 if self.gpu else torch.float32
        self.pack = pack = M.Pack(arrays, s, self.dtype, device)
        self.noised = torch.from_numpy(arrays["noised"].copy()).to(device, self.dtype).view(pack.images, -1, s.P)
        if self.gpu:
            self.mask = M.block_mask(pack.doc_start, pack.kv_end)
            self.options = {"attention": {"options": {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}},
                            "all": {"mode": "max-autotune-no-cudagraphs"}}.get(autotune, {})  # fmt: skip
        self.noise = self.compiled(lambda: M.noise(pack).to(self.dtype))
        self.bottom = self.compiled(lambda p, z: M.bottom(p, z, pack, s))
        self.top = self.compiled(lambda p, x, b, g, a: M.top(p, x, b, g, a, pack, s))
        self.blocks = {}

    def compiled(self, f):
        return torch.compile(f, fullgraph=True, dynamic=False, **self.options) if self.gpu else f

    def block(self, memory, flash):
        if (memory, flash) not in self.blocks:
            s, pack = self.s, self.pack
            if self.gpu:
                attend, grouped = M.attend_flex(self.mask, s, "FLASH" if flash else None), M.grouped_mm
            else:
                q, k = torch.arange(len(pack.kv_end))[:, None], torch.arange(len(pack.kv_end))
                allowed = (pack.doc_start[:, None] <= k) & (k < pack.kv_end[:, None])
                attend, grouped = M.attend_dense(pack, allowed, s), M.grouped_loop
            layer = lambda p, x, b, g, a: M.block(p, x, b, g, a, pack, s, attend, grouped)
            self.blocks[memory, flash] = MEMORY[memory](layer, self.compiled)
        return self.blocks[memory, flash]

    def losses(self, params, noised, memory, flash):
        parts = {"bottom": self.bottom, "block": self.block(memory, flash), "top": self.top}
        return M.forward(parts, params, noised, self.pack, self.s)


def leaves_of(params):
    return [t for group in (params["ends"], *params["layers"]) for t in group.values()]


def on_each(params, f):
    """f(group) of each group of parameters, in the same places."""
    return {"ends": f(params["ends"]), "layers": [f(layer) for layer in params["layers"]]}


def params_to(host, peer):
    """Leaves on the device, in the type that it computes in."""
    put = lambda t: t.to(peer.device, peer.dtype, copy=True).requires_grad_()
    return on_each(host, lambda group: {n: put(t) for n, t in group.items()})


def as_first(params, s):
    """What a run begins with of parameters that are zero there or nearly so; the others stay as the dump has them."""
    with torch.no_grad():
        for group in (params["ends"], *params["layers"]):
            group["mod.weight"].zero_()
            group["mod.base"].zero_()
        for group in params["layers"]:
            group["mod.base"][M.TEXT].view(6, s.C)[[2, 5]] = 1  # the gates of text
        params["ends"]["image_head.weight"].zero_()


# ---- the update -----------------------------------------------------------------------------------------------------


def scale_of(grads):
    """What gradients are to be divided by: their norm, where it is above 1. Stays on the device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float()).clamp(min=1.0)


class Update:
    """AdamW in the weights' own type: PyTorch's fused one, which divides gradients by grad_scale."""

    def __init__(self, leaves, peer):
        self.leaves, self.gpu = leaves, peer.gpu
        # lr as a tensor and capturable: the update can be captured
        rest = dict(lr=torch.tensor(LR, device="cuda"), fused=True, capturable=True) if self.gpu else dict(lr=LR)
        self.optimizer = torch.optim.AdamW(leaves, betas=BETAS, eps=EPS, weight_decay=0.0, **rest)
        if self.gpu:
            self.optimizer.found_inf = torch.zeros((), device="cuda")

    @torch.no_grad()
    def __call__(self):
        scale = scale_of([t.grad for t in self.leaves])
        if self.gpu:
            self.optimizer.grad_scale = scale
        else:
            for t in self.leaves:
                t.grad.div_(scale)
        self.optimizer.step()


def adamw(weight, master, m, v, grad, now):
    """One parameter: weight and grad bf16, the others fp32. now: what the gradient is divided by, and both
    corrections of moments that begin at zero."""
    grad = grad.float() / now[0]
    m.lerp_(grad, 1 - BETAS[0])
    v.lerp_(grad.square(), 1 - BETAS[1])
    master.sub_(LR * (m / now[1]) / ((v / now[2]).sqrt() + EPS))
    weight.copy_(master)


class MastersUpdate:
    """AdamW with fp32 masters and moments beside bf16 weights, compiled: one pass over all, 28 bytes a parameter. (The
    fused one wants gradients of the masters' type, which would make it 48.)"""

    def __init__(self, leaves, peer):
        rows = lambda t: t.detach().view(-1, math.gcd(t.numel(), 16))  # one code for all, with wide loads
        self.leaves, self.rows = leaves, rows
        masters = [rows(t).to(torch.float32, copy=True) for t in leaves]
        self.held = [(rows(t), x, torch.zeros_like(x), torch.zeros_like(x)) for t, x in zip(leaves, masters)]
        self.adamw = torch.compile(adamw, fullgraph=True) if peer.gpu else adamw
        self.steps = torch.zeros((), device=peer.device)

    @torch.no_grad()
    def __call__(self):
        grads = [t.grad for t in self.leaves]
        self.steps += 1
        now = torch.stack([scale_of(grads), *(1 - torch.pow(beta, self.steps) for beta in BETAS)])
        for held, grad in zip(self.held, grads):
            self.adamw(*held, self.rows(grad), now)


# ---- training -------------------------------------------------------------------------------------------------------


class Training:
    """One way: parameters, an update, perhaps a graph. step() says nothing to the host."""

    def __init__(self, peer, way, host):
        self.peer, self.way, self.params = peer, way, params_to(host, peer)
        as_first(self.params, peer.s)
        self.leaves = leaves_of(self.params)
        self.update = (MastersUpdate if way.masters else Update)(self.leaves, peer)
        self.loss = torch.zeros((), device=peer.device)
        self.run = self.step

    def losses(self):
        return self.peer.losses(self.params, self.peer.noise(), self.way.memory, self.way.flash)

    def gradients(self):
        for t in self.leaves:
            t.grad = None
        loss = M.total_loss(self.losses(), self.peer.s)
        loss.backward()
        self.loss.copy_(loss.detach())

    def step(self):
        self.gradients()
        self.update()

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


def time_gpu(peer, way, host, seconds):
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
        raise ValueError("the loss is not finite")
    return {"ms": ms, "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9, "loss": training.loss.item()}  # fmt: skip


def time_cpu(peer, way, host, seconds):
    training = Training(peer, way, host)
    ms = steps_timed_cpu(training.run, max(1, round(seconds / 0.5)))
    return {"ms": statistics.median(ms), "loss": training.loss.item()}


# ---- the same losses and gradients ----------------------------------------------------------------------------------


def read_pack(fail, dump):
    """The pack of a dump; ends a script by fail(text, fix) where the model has no way with it."""
    micro = R.safetensors_read(dump / "micro_0.safetensors")
    if len(set(micro["seg_len"][1:].tolist())) != 1:
        fail("the pack's images are not all of one size", "PyTorch's model wants data.image_mode=square and captions")
    return micro


def load_params(path, s):
    """Tensors of a dump, as the model has them."""
    tensors = R.safetensors_read(path)
    return M.params_from_reference({n: torch.from_numpy(a) for n, a in tensors.items()}, s)


def check(peer, said, want, host, memory, flash):
    """How far losses and gradients are from those that the dump said, and want."""
    params = params_to(host, peer)
    losses = peer.losses(params, peer.noised, memory, flash)
    M.total_loss(losses, peer.s).backward()
    error = max(abs(v.item() / said[name] - 1) for name, v in zip(("ce", "flow"), losses))
    errors = []
    groups = [("", params["ends"], want["ends"])]
    groups += [(f"layers.{i}.", *pair) for i, pair in enumerate(zip(params["layers"], want["layers"]))]
    for at, mine, theirs in groups:
        for name, t in mine.items():
            b = theirs[name].to(t.device)
            errors.append((((t.grad.float() - b).norm() / b.norm()).item(), at + name))
    errors.sort()
    most, worst = errors[-1]
    enough = ENOUGH[peer.device]
    near = lambda e, name: e < enough[2 if ".router." in name or ".experts." in name else 1]  # no NaN is
    good = error < enough[0] and all(near(*pair) for pair in errors)
    return {"losses": error, "gradients": len(errors), "gradients_median": errors[len(errors) // 2][0],
            "gradients_worst": most, "worst": worst, "agree": good}  # fmt: skip


# ---- a process that does it -----------------------------------------------------------------------------------------


def serve(pipe, folder, device, autotune, log):
    """Answers ("open",), ("check", memory, flash) and ("time", way, seconds) with dictionaries, {"failed"} where one
    fails, until the pipe is closed. Each answer says the seconds that it took. folder: of a dump; log: a file for
    tracebacks and the compiler's warnings."""
    with open(log, "a") as out:
        os.dup2(out.fileno(), 2)
    faulthandler.enable()
    torch.manual_seed(1)
    peer = host = want = None
    with contextlib.suppress(EOFError):
        while True:
            what, *operands = pipe.recv()
            began = time.time()
            try:
                if what == "open":
                    s = R.sizes_from_config(json.loads((folder / "config.json").read_text()))
                    peer = Peer(s, R.safetensors_read(folder / "micro_0.safetensors"), device, autotune)
                    half = lambda t: t.to(device, peer.dtype).cpu()  # as the model has it: rounded once
                    host = load_params(folder / "params.safetensors", s)
                    host = on_each(host, lambda group: {n: half(t) for n, t in group.items()})
                    answer = {"parameters": sum(t.numel() for t in leaves_of(host))}
                    if peer.gpu:
                        answer |= {"gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
                                   "name": torch.cuda.get_device_name()}  # fmt: skip
                elif what == "check":
                    want = want or load_params(folder / "grads.safetensors", peer.s)
                    said = json.loads((folder / "losses.json").read_text())
                    answer = check(peer, said, want, host, *operands)
                else:
                    answer = (time_gpu if peer.gpu else time_cpu)(peer, operands[0], host, operands[1])
            except Exception as error:  # out of memory, of the compiler, of a capture: whatever, another way may do
                traceback.print_exc()
                answer = {"failed": (str(error).strip().splitlines() or [type(error).__name__])[0][:160]}
            gc.collect()
            if device == "cuda" and "failed" not in answer:
                torch.cuda.empty_cache()
            pipe.send(answer | {"seconds": time.time() - began})
