#!/usr/bin/python3
"""Compares the engine's slow ops with PyTorch's on one GPU; scripts/compare_torch.py does whole steps.

    make bench-gpu                              everything
    tests/gpu/bench_gpu.py BUILD SECTION...         some of: adaln linear attention experts moe

Each row: milliseconds of the engine and of PyTorch's fastest way (its name beside it), how many times as fast the
engine is, the rate of both, and the engine's percentage of the floor that the bytes or FLOPs set at the ceilings
measured first. Products (linear experts, together about a minute): microseconds and TFLOP/s of the engine, and how many
times as fast it is as cuBLASLt's dense products of equal FLOPs (R) and as torch._grouped_mm. All are captured graphs
over operands beyond the L2 cache, medians of rounds that take turns; the engine's come from tests/gpu/cuda_peer.c.
Exit code 77 without a GPU or PyTorch.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from timed_run import config_read
try:
    import numpy as np
    import torch
    import torch.nn.functional as F

    if not torch.cuda.is_available():
        raise ImportError("PyTorch sees no GPU")
    import torch._functorch.config
    import torch_model as M
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

ROUNDS, PRODUCT_ROUNDS = 5, 3
LAUNCHES, SAMPLES, SAMPLE_MS = 12, 5, 6  # as tests/gpu/cuda_bench.c
COPIES_BYTES = 4 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)  # of all operands

# ---- timing ---------------------------------------------------------------------------------------------------------


def copies_of(bytes):
    return min(6, COPIES_BYTES // bytes + 1)


class Timed:
    """Calls captured in one graph, in turn: LAUNCHES of them, fewer if they are long. round(): median milliseconds of
    one."""

    def __init__(self, calls):
        self.calls = calls  # the graph reads tensors that only they hold
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                for call in calls:
                    call()
            marks = self.marks()
            marks[0].record()
            calls[0]()
            marks[1].record()
            torch.cuda.synchronize()
            self.launches = int(min(LAUNCHES, max(2, SAMPLE_MS / marks[0].elapsed_time(marks[1]))))
            with torch.cuda.graph(self.graph, stream=stream):
                for i in range(self.launches):
                    calls[i % len(calls)]()

    @staticmethod
    def marks():
        return [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def round(self):
        marks = self.marks()
        self.graph.replay()
        samples = []
        for _ in range(SAMPLES):
            marks[0].record()
            self.graph.replay()
            marks[1].record()
            torch.cuda.synchronize()
            samples.append(marks[0].elapsed_time(marks[1]) / self.launches)
        return statistics.median(samples)


def backward_calls(forward, inputs, arriving):
    """Calls of the backward pass alone, one a copy: forward(*inputs[i]), whose outputs' gradients are arriving[i]. The
    first call, which is never captured, does the forward pass: backward runs on the stream that forward ran on."""

    def make(leaves, grads):
        outputs = []

        def call():
            if not outputs:
                outputs.extend(forward(*leaves))
            torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

        return call

    return [make(*pair) for pair in zip(inputs, arriving)]


class Engine:
    """tests/cuda_peer with some ops ready."""

    def __init__(self, build, sizes, ops):
        self.file, said = tempfile.NamedTemporaryFile(), tempfile.TemporaryFile("w+")
        arguments = [f"{key}={value}" for key, value in sizes.items()]
        command = [f"{build}/tests/cuda_peer", self.file.name, *arguments, *ops]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
        self.process = subprocess.Popen(command, text=True, **pipes)
        if self.process.stdout.readline() != "ready\n":
            code = self.process.wait()
            said.seek(0)
            sys.exit(f"{said.read()}bench_gpu: cuda_peer failed with exit code {code}")
        a = np.fromfile(self.file.name, np.int32)
        self.n_text, self.n_image, segments, T = (int(v) for v in a[:4])
        self.doc_start, self.kv_end = a[4 : 4 + 2 * T].reshape(2, T)  # sequence order
        self.seg_len = a[4 + 2 * T :][:segments]
        self.expert_rows = a[4 + 2 * T + segments :]  # text's experts, then image's
        self.segments = segments

    def round(self, op):
        self.process.stdin.write(op + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def attempt(make):
    """A way of PyTorch's that may not work here: None with a note instead of an end of everything."""
    try:
        return make()
    except Exception as error:  # whatever the compiler throws
        print(f"  (left out: {type(error).__name__}: {str(error).splitlines()[0][:140]})", flush=True)
        return None


# ---- the table ------------------------------------------------------------------------------------------------------


class Table:
    def __init__(self):
        self.bandwidth, self.flops = 3.0e12, 800e12  # until measured

    def head(self, title):
        columns = f"{'engine ms':>12}{'PyTorch ms':>12} {'(way)':<16}{'ratio':>6}{'engine':>9}{'PyTorch':>9}"
        print(f"\n{title}\n{'':<48}{columns}{'':<9}{'floor':>6}", flush=True)

    def row(self, name, ours, peers, bytes=0, flops=0):
        """ours: a round's function; peers: {way: Timed or None}. Rounds take turns."""
        peers = {way: peer for way, peer in peers.items() if peer}
        rounds = [(ours(), {way: peer.round() for way, peer in peers.items()}) for _ in range(ROUNDS)]
        mine = statistics.median(r[0] for r in rounds)
        theirs = {way: statistics.median(r[1][way] for r in rounds) for way in peers}
        rate = lambda ms: flops / ms / 1e9 if flops else bytes / ms / 1e9
        unit = "TFLOP/s" if flops else "TB/s"
        floor = max(bytes / self.bandwidth, flops / self.flops) * 1e3
        best = min(theirs, key=theirs.get, default=None)
        text = f"{name:<48}{mine:>12.4f}"
        if best:
            ratio = statistics.median(r[1][best] / r[0] for r in rounds)
            text += f"{theirs[best]:>12.4f} {'(' + best + ')':<16}{ratio:>6.2f}"
            text += f"{rate(mine):>9.3g}{rate(theirs[best]):>9.3g}"
        else:
            text += f"{'-':>12}{'':<17}{'-':>6}{rate(mine):>9.3g}{'-':>9}"
        print(f"{text} {unit:<8}{floor / mine:>6.0%}", flush=True)
        others = {way: ms for way, ms in theirs.items() if way != best}
        if others:
            print("    other ways: " + ", ".join(f"{way} {ms:.4f} ms" for way, ms in others.items()), flush=True)
        return mine

    def products_head(self, title):
        columns = f"{'engine us':>11}{'TFLOP/s':>9}{'R us':>10}{'of R':>7}{'grouped_mm':>12}{'times':>7}"
        print(f"\n{title}\n{'':<44}{columns}", flush=True)

    def products(self, name, ours, dense, grouped, flops):
        """ours: a round's function; dense, grouped: Timed or None. Rounds take turns."""
        peers = [peer for peer in (dense, grouped) if peer]
        rounds = [(ours(), *(peer.round() for peer in peers)) for _ in range(PRODUCT_ROUNDS)]
        mine, *theirs = (statistics.median(column) for column in zip(*rounds))
        text = f"{name:<44}{mine * 1e3:>11.1f}{flops / mine / 1e9:>9.0f}"
        for peer, width in ((dense, 10), (grouped, 12)):
            if peer:
                ms = theirs.pop(0)
                text += f"{ms * 1e3:>{width}.1f}{ms / mine:>7.2f}"
            else:
                text += f"{'-':>{width}}{'-':>7}"
        print(text, flush=True)
        return mine


def ceilings(table, build):
    """The copy is the faster one of PyTorch's and the engine's, which is cudaMemcpyAsync."""
    x = [torch.randn(1 << 28, device="cuda").to(torch.bfloat16) for _ in range(2)]
    copy = Timed([lambda: x[0].copy_(x[1])])
    engine = Engine(build, {"T": 1024}, ["COPY"])
    copies = {"PyTorch": 2 * x[0].nbytes / copy.round() * 1e3, "engine": 2 * (256 << 20) / engine.round("COPY") * 1e3}
    engine.close()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = Timed([lambda: a @ b])
    table.bandwidth = max(copies.values())
    table.flops = 2 * 8192**3 / product.round() * 1e3
    rates = ", ".join(f"{whose} {rate / 1e12:.2f}" for whose, rate in copies.items())
    print(f"\nceilings: copy {table.bandwidth / 1e12:.2f} TB/s (read and write; {rates})", end=", ")
    print(f"product of 8192^3 {table.flops / 1e12:.0f} TFLOP/s", flush=True)


# ---- AdaLN ----------------------------------------------------------------------------------------------------------


class SegmentRows(torch.autograd.Function):
    """mod[segment], whose gradient is a product with the matrix of who is in which segment [SEG, T]."""

    @staticmethod
    def forward(ctx, mod, segment, member):
        ctx.save_for_backward(member)
        return mod[segment]

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] @ grad, None, None


def site(x, branch, mod, rows_of):
    """Gate, residual, LayerNorm, modulation. x, branch [T, C]; mod [SEG, 3C]; rows_of: mod -> its rows [T, 3C]."""
    gate, shift, scale = rows_of(mod).chunk(3, dim=1)
    x = x + gate * branch
    return x, (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def adaln(table, build):
    table.head("AdaLN: gate + residual + LayerNorm + modulation, packed segments of text and 256-token images, bf16")
    T = 32768
    for C in (2048, 1024):
        engine = Engine(build, {"T": T, "C": C, "side": 16}, ["ADALN_FWD", "ADALN_BWD"])
        lengths = torch.from_numpy(engine.seg_len.astype(np.int64)).cuda()
        segment = torch.repeat_interleave(torch.arange(engine.segments, device="cuda"), lengths)  # [T] row order
        member = (segment == torch.arange(engine.segments, device="cuda")[:, None]).to(torch.bfloat16)  # [SEG, T]
        draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        n = copies_of(4 * T * C * 2)
        inputs = [[draw(T, C), draw(T, C), draw(engine.segments, 3 * C)] for _ in range(n)]
        arriving = [[draw(T, C), draw(T, C)] for _ in range(n)]
        for leaves in inputs:
            for t in leaves:
                t.requires_grad_()
        ways = {
            "eager": lambda x, b, m: site(x, b, m, lambda mod: mod[segment]),
            "compile": torch.compile(lambda x, b, m: site(x, b, m, lambda mod: mod[segment]), dynamic=False),
            "compile+matmul": torch.compile(
                lambda x, b, m: site(x, b, m, lambda mod: SegmentRows.apply(mod, segment, member)), dynamic=False
            ),
        }
        forwards = {way: attempt(lambda f=f: Timed([lambda a=a: f(*a) for a in inputs])) for way, f in ways.items()}
        table.row(f"forward, {T} rows, C {C}", lambda: engine.round("ADALN_FWD"), forwards, bytes=8 * T * C)
        del forwards
        backwards = {way: attempt(lambda f=f: Timed(backward_calls(f, inputs, arriving))) for way, f in ways.items()}
        table.row(f"backward, {T} rows, C {C}", lambda: engine.round("ADALN_BWD"), backwards, bytes=12 * T * C)
        engine.close()
        del backwards
        torch.cuda.empty_cache()


# ---- projections ----------------------------------------------------------------------------------------------------

# Widths of text and image rows before and after, side of an image: base's qkv, output, shared experts up and down;
# small's and fine's qkv
LINEAR = (
    ((2048, 2048), (3072, 3072), 16),
    ((2048, 2048), (2048, 2048), 16),
    ((2048, 2048), (2048, 4096), 16),
    ((1024, 2048), (2048, 2048), 16),
    ((512, 512), (1024, 1024), 8),
    ((1024, 1024), (1536, 1536), 8),
)


def linear(table, build):
    """PyTorch has the rows of text and image apart, and how many there are on the host. Weight gradients are fp32 where
    its products can be."""
    T = 16384
    table.products_head(f"projections, weights by modality, {T} tokens; R: one product a modality")
    products = {
        "forward": ("LINEAR_FWD", lambda x, w, dy: F.linear(x, w)),
        "input gradient": ("LINEAR_DGRAD", lambda x, w, dy: dy @ w),
        "weight gradient": ("LINEAR_WGRAD", lambda x, w, dy: torch.mm(dy.t(), x, out_dtype=torch.float32)),
    }
    for into, out, side in LINEAR:
        sizes = dict(T=T, side=side, I0=into[0], I1=into[1], O0=out[0], O1=out[1])
        engine = Engine(build, sizes, [op for op, _ in products.values()])
        rows = (engine.n_text, engine.n_image)
        draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        n = copies_of(2 * T * (min(into) + min(out)))
        # of each copy and modality: x, w, dy
        operands = [[(draw(r, i), draw(o, i), draw(r, o)) for r, i, o in zip(rows, into, out)] for _ in range(n)]
        calls = lambda product: [lambda both=both: [product(*m) for m in both] for both in operands]
        flops = sum(2.0 * r * i * o for r, i, o in zip(rows, into, out))
        for name, (op, product) in products.items():
            widths = f"{into[0]}, {into[1]} -> {out[0]}, {out[1]}"
            dense = attempt(lambda: Timed(calls(product)))
            if not dense and op == "LINEAR_WGRAD":
                dense = attempt(lambda: Timed(calls(lambda x, w, dy: dy.t() @ x)))
            table.products(f"{name}, {widths}", lambda: engine.round(op), dense, None, flops)
        engine.close()
        del operands, dense
        torch.cuda.empty_cache()


# ---- attention ------------------------------------------------------------------------------------------------------

ATTENTION = ((32768, 16, 16, 128, 16), (32768, 16, 4, 128, 32), (8192, 16, 16, 128, 64), (32768, 16, 16, 64, 16))


def attention(table, build):
    from torch.nn.attention.flex_attention import flex_attention

    table.head("attention with the mixed mask, packed documents, FLOPs of allowed pairs only; ours is deterministic")
    for T, H, G, D, side in ATTENTION:
        engine = Engine(build, dict(T=T, H=H, G=G, D=D, side=side), ["ATTENTION_FWD", "ATTENTION_BWD"])
        pairs = float((engine.kv_end - engine.doc_start).sum())
        doc_start, kv_end = (torch.from_numpy(a.copy()).cuda() for a in (engine.doc_start, engine.kv_end))
        mask = M.block_mask(doc_start, kv_end)
        torch.cuda.empty_cache()
        # [1, heads, T, D] as views of [T, heads, D], which is how a model has them
        draw = lambda heads: torch.randn(T, heads, D, device="cuda", dtype=torch.bfloat16).transpose(0, 1)[None]
        leaf = lambda heads: draw(heads).detach().requires_grad_()
        n = copies_of(2 * T * D * (2 * H + 2 * G))
        inputs = [[leaf(H), leaf(G), leaf(G)] for _ in range(n)]
        arriving = [[draw(H)] for _ in range(n)]
        call = lambda q, k, v: (flex_attention(q, k, v, block_mask=mask, enable_gqa=H != G),)
        flex = torch.compile(call, dynamic=False)
        # forward alone: to tune the backward pass takes minutes
        tuned = torch.no_grad()(torch.compile(call, dynamic=False, mode="max-autotune-no-cudagraphs"))
        ways = {"flex": flex, "flex autotuned": tuned}
        name = f"T {T}, {H}/{G} x {D}, {side * side}-token images"
        forwards = {way: attempt(lambda f=f: Timed([lambda a=a: f(*a) for a in inputs])) for way, f in ways.items()}
        table.row(f"forward, {name}", lambda: engine.round("ATTENTION_FWD"), forwards, flops=4 * pairs * H * D)
        del forwards
        backwards = {"flex": attempt(lambda: Timed(backward_calls(flex, inputs, arriving)))}
        table.row(f"backward, {name}", lambda: engine.round("ATTENTION_BWD"), backwards, flops=10 * pairs * H * D)
        engine.close()
        del backwards
        torch.compiler.reset()
        torch.cuda.empty_cache()


# ---- experts --------------------------------------------------------------------------------------------------------

EXPERT_OPS = (
    ["ROUTER_FWD", "EXPERT_UP_FWD", "EXPERT_DOWN_FWD", "EXPERT_COMBINE"]
    + ["EXPERT_DOWN_BWD", "EXPERT_DOWN_WGRAD", "EXPERT_UP_DGRAD", "EXPERT_UP_WGRAD", "ROUTER_BWD"]
)  # fmt: skip


# By how much experts' logits differ (cuda_peer's skew): the fullest expert has about that many times its share.
EVEN, SKEWED, STEEP = 0, 30, 160  # 1.0, 1.5 and 3


class Layer:
    """Sizes of an expert layer; by modality: experts, their width, how many a token has."""

    def __init__(self, name, T, C, side, experts, width, top_k):
        self.name, self.T, self.C, self.side = name, T, C, side
        self.experts, self.width, self.top_k = experts, width, top_k

    @staticmethod
    def text(T, C, experts, width, top_k):
        """All rows are of one modality."""
        name = f"{T} tokens, C {C}, {experts} experts of {width}, top {top_k}"
        return Layer(name, T, C, 0, (experts, 1), (width, 8), (top_k, 1))

    @staticmethod
    def config(name):
        config = config_read(ROOT / f"configs/{name}.json")
        model, keys = config["model"], ("experts", "expert_dim", "top_k")
        side = config["data"]["image_size"] // model["patch"]
        return Layer(name, 16384, model["dim"], side, *([model[m][key] for m in M.MODALITY] for key in keys))

    def arguments(self):
        a = dict(T=self.T, C=self.C, side=self.side)
        for m in (0, 1):
            a |= {f"E{m}": self.experts[m], f"F{m}": self.width[m], f"K{m}": self.top_k[m]}
        return a


def expert_peers(layer, rows, ends):
    """{op: (R's calls, grouped_mm's)}, both bare, of sorted rows. rows, ends (of experts' rows): by modality."""
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    weight = lambda *shape: draw(*shape).mul_(shape[-1] ** -0.5)
    both = [m for m in (0, 1) if rows[m]]
    E, C, width = layer.experts, layer.C, layer.width
    per_copy = 2 * sum(rows[m] * (C + 3 * width[m]) + 3 * E[m] * C * width[m] for m in both)
    copies = [
        {m: (draw(rows[m], C), draw(rows[m], 2 * width[m]), draw(rows[m], width[m]), weight(E[m], 2 * width[m], C),
             weight(E[m], C, width[m])) for m in both}
        for _ in range(copies_of(per_copy))
    ]  # fmt: skip
    # By copy and modality: x, the gradient of the pre-activation, the activation, W1, W2.
    calls = lambda product: [lambda c=c: [product(m, *c[m]) for m in both] for c in copies]
    grouped = lambda a, b, m: torch._grouped_mm(a, b, offs=ends[m])
    gradient = lambda a, b: torch.mm(a.t(), b, out_dtype=torch.float32)
    ways = {
        "EXPERT_UP_FWD": (lambda m, x, up, act, w1, w2: F.linear(x, w1[0]),
                          lambda m, x, up, act, w1, w2: grouped(x, w1.mT, m)),
        "EXPERT_DOWN_FWD": (lambda m, x, up, act, w1, w2: F.linear(act, w2[0]),
                            lambda m, x, up, act, w1, w2: grouped(act, w2.mT, m)),
        "EXPERT_DOWN_BWD": (lambda m, x, up, act, w1, w2: x @ w2[0], lambda m, x, up, act, w1, w2: grouped(x, w2, m)),
        "EXPERT_UP_DGRAD": (lambda m, x, up, act, w1, w2: up @ w1[0], lambda m, x, up, act, w1, w2: grouped(up, w1, m)),
        "EXPERT_DOWN_WGRAD": (lambda m, x, up, act, w1, w2: gradient(x, act),
                              lambda m, x, up, act, w1, w2: grouped(x.t(), act, m)),
        "EXPERT_UP_WGRAD": (lambda m, x, up, act, w1, w2: gradient(up, x),
                            lambda m, x, up, act, w1, w2: grouped(up.t(), x, m)),
    }  # fmt: skip
    return {op: [calls(product) for product in pair] for op, pair in ways.items()}


def expert_products(table, build, layer, skew):
    """The products of a layer's experts. PyTorch's are bare and their rows already sorted; the engine's also gather
    rows, apply SwiGLU forward and backward, weight and give the router weights' gradient. R: one product a modality of
    the same FLOPs. Returns the engine, {op: its milliseconds} and the FLOPs of a down product."""
    engine = Engine(build, layer.arguments() | {"skew": skew}, EXPERT_OPS)
    tokens = (engine.n_text, engine.n_image)
    rows = [n * k for n, k in zip(tokens, layer.top_k)]
    counts = np.split(engine.expert_rows, [layer.experts[0]])
    ends = [torch.tensor(c.cumsum(), dtype=torch.int32, device="cuda") for c in counts]
    fullest = max(c.max() / c.mean() for c in counts if c.sum())
    table.products_head(f"{layer.name}: {tokens[0]} text and {tokens[1]} image tokens, fullest expert {fullest:.2f} x")
    down = sum(2.0 * rows[m] * layer.C * layer.width[m] for m in (0, 1))
    ours = {}
    for op, pair in expert_peers(layer, rows, ends).items():
        dense, grouped = (attempt(lambda calls=calls: Timed(calls)) for calls in pair)
        ours[op] = table.products(op, lambda: engine.round(op), dense, grouped, down * (2 if "UP" in op else 1))
    combine = engine.round("EXPERT_COMBINE")  # forward, and as the sum of the rows' gradients
    forward = ours["EXPERT_UP_FWD"] + ours["EXPERT_DOWN_FWD"] + combine
    backward = sum(ours.values()) - forward + 2 * combine
    rates = f"{3 * down / forward / 1e9:.0f}, {6 * down / backward / 1e9:.0f} TFLOP/s"
    router = f"{engine.round('ROUTER_FWD') * 1e3:.0f}, {engine.round('ROUTER_BWD') * 1e3:.0f} us"
    print(f"layer, forward and backward with sums over experts: {rates}; router besides {router}", flush=True)
    return engine, ours, down


# Rows an expert at large and at moderate sizes; SonicMoE's published layers; training's, with routings as it has them.
def expert_layers():
    yield Layer.text(65536, 2048, 16, 2816, 1), (EVEN,)
    yield Layer.text(65536, 2048, 64, 2816, 1), (SKEWED, STEEP)
    yield Layer.text(32768, 2048, 64, 1024, 1), (EVEN,)
    yield Layer.text(24576, 1536, 32, 1024, 2), (EVEN,)
    yield Layer.text(32768, 4096, 64, 1024, 4), (EVEN,)
    yield Layer.text(32768, 4096, 64, 2048, 4), (EVEN,)
    for name in ("base", "small", "fine"):
        yield Layer.config(name), (EVEN, SKEWED, STEEP) if name == "base" else (EVEN, STEEP)


def experts(table, build):
    """The products of experts."""
    for layer, skews in expert_layers():
        for skew in skews:
            expert_products(table, build, layer, skew)[0].close()
            torch.cuda.empty_cache()


def moe(table, build):
    """Base's experts as a whole layer, beside PyTorch's."""
    layer_sizes = Layer.config("base")
    engine, ours, down = expert_products(table, build, layer_sizes, EVEN)
    table.head("base's experts as a layer")
    C, E, width, top_k = layer_sizes.C, layer_sizes.experts, layer_sizes.width, layer_sizes.top_k
    tokens = (engine.n_text, engine.n_image)
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5
    for op in EXPERT_OPS:
        ours[op] = ours.get(op) or statistics.median(engine.round(op) for _ in range(ROUNDS))

    one = lambda h, p, m: M.moe(p, M.MODALITY[m] + ".", h[m], top_k[m], M.grouped_mm)[0]
    layer = torch.compile(lambda h, p: (one(h, p, 0), one(h, p, 1)), fullgraph=True, dynamic=False)
    p = {}
    for m, name in enumerate(M.MODALITY):
        shapes = {"router.weight": (E[m], C), "experts.w1": (E[m], 2 * width[m], C), "experts.w2": (E[m], C, width[m])}
        p |= {f"{name}.{n}": draw(*shape).requires_grad_() for n, shape in shapes.items()}
    h = [draw(n, C).mul_(C**0.5).requires_grad_() for n in tokens]
    arriving = [draw(n, C) for n in tokens]
    leaves = [*h, *p.values()]

    def both_ways():
        torch.autograd.grad(layer(h, p), leaves, arriving)

    # The combine runs forward and, as the gather-sum of the gradient, backward.
    total = lambda: sum(engine.round(op) * (2 if op == "EXPERT_COMBINE" else 1) for op in EXPERT_OPS)
    table.row("layer forward and backward", total, {"compile": attempt(lambda: Timed([both_ways]))}, flops=9 * down)
    whole = sum(ms * (2 if op == "EXPERT_COMBINE" else 1) for op, ms in ours.items())
    router = ours["ROUTER_FWD"] + ours["ROUTER_BWD"]
    combine = 2 * ours["EXPERT_COMBINE"]
    print(f"router, sort and their backward: {router:.4f} ms, {router / whole:.1%} of the layer", end="; ")
    print(f"combines: {combine:.4f} ms, {combine / whole:.1%}", flush=True)
    engine.close()


SECTIONS = {"adaln": adaln, "linear": linear, "attention": attention, "experts": experts, "moe": moe}


def section(name, build):
    """Runs one section in this process."""
    # backward passes are timed again and again on one forward pass
    torch._functorch.config.donated_buffer = False
    table = Table()
    if name not in ("linear", "experts"):
        ceilings(table, build)
    SECTIONS[name](table, build)


def main():
    names = list(SECTIONS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", help="build folder with tests/cuda_peer")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=" ".join(names))
    options = parser.parse_args()
    for name in options.sections:
        if name not in names:
            parser.error(f"there is no section {name}: {' '.join(names)}")
    asked = options.sections or names
    if len(asked) == 1:
        section(asked[0], options.build)
        return
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", flush=True)
    # A process each: after an error on the device none of its process can go on.
    failed = [name for name in asked if subprocess.run([sys.executable, __file__, options.build, name]).returncode]
    if failed:
        sys.exit(f"bench_gpu: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
