"""Tessera's model in PyTorch: all of it in one file, for comparison with the engine.

It works in any float type (float64 for parity, float32 as a baseline for speed) and leaves gradients to autograd.
Sizes: n used tokens of a pack, n_text + n_image of them; C dim, H query heads, G kv heads, D head_dim, P = 3 patch^2,
Z cond_dim, L layers, V vocab, SEG modulation rows, M = 6CL + 2C modulation columns; E experts of width F, shared
expert of width S, k experts a token, each of them by modality.

Two orders, as in the engine: *row order* is [text | image], *sequence order* is the order of the pack. Filler slots
are dropped when a pack is read, so nothing here knows about them.
"""
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

TEXT, IMAGE = 0, 1
NOISED, CLEAN = 0, 1
MODALITY = ("text", "image")
EPS = 1e-6  # of every norm
STREAM_TIME = 2
STREAM_NOISE = 3

# ---- files --------------------------------------------------------------------------------------------------------

DTYPES = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}


def safetensors_read(path):
    """All tensors of a file as {name: numpy array}. Format: u64 length of the header, JSON header, raw data."""
    data = np.fromfile(path, np.uint8)
    size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(data[8 + size + begin : 8 + size + end], DTYPES[entry["dtype"]])  # no copy
        tensors[name] = raw.reshape(entry["shape"])
    return tensors


def safetensors_write(path, tensors):
    """Writes {name: numpy array}."""
    names = {np.dtype(t): name for name, t in DTYPES.items()}
    header, blobs, at = {}, [], 0
    for name, array in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(blob)],
        }
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text + b"".join(blobs))


# ---- sizes and parameters -----------------------------------------------------------------------------------------


@dataclass
class Sizes:
    """What the model needs of a config. Pairs are (text, image)."""

    C: int
    L: int
    H: int
    G: int
    D: int
    Z: int
    V: int
    P: int
    bottleneck: int  # 0: none
    E: tuple
    F: tuple
    S: tuple  # 0: no shared expert
    k: tuple
    per_modality: bool = False
    tied: bool = False
    ce_weight: float = 1.0
    t_floor: float = 0.05
    balance: float = 0.01
    z: float = 0.001


def sizes_from_config(config):
    """Sizes from a resolved config (a dict, as ./train --print-config shows it)."""
    m = config["model"]
    pair = lambda key: (m["text"][key], m["image"][key])
    return Sizes(
        C=m["dim"], L=m["layers"], H=m["heads"], G=m["kv_heads"], D=m["head_dim"], Z=m["cond_dim"], V=m["vocab"],
        P=3 * m["patch"] ** 2, bottleneck=m["patch_bottleneck"], E=pair("experts"), F=pair("expert_dim"),
        S=pair("shared_dim"), k=pair("top_k"), per_modality=m["attn_per_modality"], tied=m["tie_embeddings"],
        ce_weight=config["train"]["ce_weight"], t_floor=config["flow"]["t_floor"],
        balance=config["router"]["balance"], z=config["router"]["z"],
    )  # fmt: skip


def param_shapes(s):
    """{name: shape} of every parameter. Linear weights are [out, in]."""
    C, P, Z, M, QKV = s.C, s.P, s.Z, 6 * s.C * s.L + 2 * s.C, (s.H + 2 * s.G) * s.D
    shapes = {"embed.weight": (s.V, C)}
    if not s.tied:
        shapes["head.weight"] = (s.V, C)
    if s.bottleneck:
        shapes["patch.down.weight"] = (s.bottleneck, P)
    shapes |= {
        "patch.in.weight": (C, s.bottleneck or P),
        "patch.in.bias": (C,),
        "image_head.weight": (P, C),
        "image_head.bias": (P,),
        "cond.time1.weight": (Z, 256),
        "cond.time1.bias": (Z,),
        "cond.time2.weight": (Z, Z),
        "cond.time2.bias": (Z,),
        "cond.pool.weight": (Z, C),
        "cond.kind": (2, Z),
        "mod.base": (2, M),
        "mod.weight": (M, Z),
    }
    for layer in range(s.L):
        at = f"layers.{layer}."
        for part in ("text.", "image.") if s.per_modality else ("",):
            shapes[f"{at}attn.qkv.{part}weight"] = (QKV, C)
            shapes[f"{at}attn.out.{part}weight"] = (C, s.H * s.D)
        shapes[at + "attn.q_norm"] = shapes[at + "attn.k_norm"] = (2, s.D)
        for m, name in enumerate(MODALITY):
            shapes[f"{at}{name}.router.weight"] = (s.E[m], C)
            shapes[f"{at}{name}.experts.w1"] = (s.E[m], 2 * s.F[m], C)
            shapes[f"{at}{name}.experts.w2"] = (s.E[m], C, s.F[m])
            if s.S[m]:
                shapes[f"{at}{name}.shared.w1"] = (2 * s.S[m], C)
                shapes[f"{at}{name}.shared.w2"] = (C, s.S[m])
    return shapes


# ---- random numbers -----------------------------------------------------------------------------------------------


def philox4x32(seed, draw, stream, blocks):
    """Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (draw low, draw high, stream, block).
    blocks: array of block numbers [n]; returns u32 [n, 4]."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.full(len(blocks), v & 0xFFFFFFFF, np.uint64) for v in (draw, draw >> 32, stream)]
    c.append(np.asarray(blocks, np.uint64))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k0), p1 & low, high0 ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, 1).astype(np.uint32)


def philox_normals(seed, draw, stream, count):
    """The first `count` normals of a stream, by Box-Muller: words (a, b) give two of them. The uniforms and the angle
    are rounded to fp32 as the engine's are; all else is float64."""
    words = philox4x32(seed, draw, stream, np.arange((count + 3) // 4)).reshape(-1, 2)
    u = ((words >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    radius = np.sqrt(-2 * np.log(u[:, 0].astype(np.float64)))
    angle = (np.float32(2 * math.pi) * u[:, 1]).astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count]


def flow_times(a, seed, flow):
    """The times of a pack's images [SEG-1], float64: 1 for clean ones; for noised ones sigmoid(N(t_mean, t_std)), or
    uniform for a share t_uniform. flow: that group of the config."""
    times = np.ones(int(a["dims"][2]) - 1)
    for g in range(1, len(times) + 1):
        if a["seg_kind"][g] != NOISED:
            continue
        draw, stream = int(a["seg_doc"][g]), STREAM_TIME | int(a["seg_ordinal"][g]) << 8
        choose, uniform = ((int(w) >> 9) + 0.5 for w in philox4x32(seed, draw, stream, np.zeros(1))[0, 2:])
        normal = philox_normals(seed, draw, stream, 1)[0]
        times[g - 1] = 1 / (1 + math.exp(-(flow["t_mean"] + flow["t_std"] * normal)))
        if choose * 2.0**-23 < flow["t_uniform"]:
            times[g - 1] = uniform * 2.0**-23
    return times


def patches_clean(a):
    """Pixels as the model sees them, float64 [n_image, P], from a pack's arrays."""
    return a["patch"].astype(np.float64) / 127.5 - 1


def patches_noised(a, seed, stream=STREAM_NOISE):
    """What the network is shown, float64 [n_image, P]: t x + (1-t) eps for noised images, x for clean ones."""
    z = patches_clean(a)
    n_text, _, segments = (int(v) for v in a["dims"][:3])
    for g in range(1, segments):
        if a["seg_kind"][g] != NOISED:
            continue
        begin, length, t = a["seg_start"][g] - n_text, a["seg_len"][g], float(a["seg_time"][g])
        image_stream = stream | int(a["seg_ordinal"][g]) << 8
        eps = philox_normals(seed, int(a["seg_doc"][g]), image_stream, length * z.shape[1])
        z[begin : begin + length] = t * z[begin : begin + length] + (1 - t) * eps.reshape(length, -1)
    return z


# ---- a packed micro-batch -----------------------------------------------------------------------------------------


class Pack:
    """The arrays of kernels/batch.h as tensors, with what attention needs worked out once. `a` maps array names to
    numpy arrays; longer ones are cut to their used length. `dtype` is the float type the model will run in."""

    def __init__(self, a, dtype):
        self.n_text, self.n_image, self.segments = (int(v) for v in a["dims"][:3])
        self.n = n = self.n_text + self.n_image
        long = lambda name, count: torch.from_numpy(a[name][:count].astype(np.int64))
        real = lambda values: torch.from_numpy(np.array(values)).to(dtype)
        self.row = long("row", n)  # [n] sequence -> row
        self.token = long("token", self.n_text)  # [n_text]
        target = long("target", self.n_text)
        self.target_row = torch.nonzero(target >= 0)[:, 0]  # [n_target] text rows with a target
        self.target = target[self.target_row]  # [n_target]
        self.target_kind = long("target_kind", self.n_text)[self.target_row]
        self.segment = long("segment", n)  # [n] row order
        self.image_kind = long("seg_kind", self.segments)[1:]  # [SEG-1]
        caption = [long(name, self.segments)[1:] for name in ("cap_start", "cap_end")]
        self.caption = torch.stack(caption, 1)  # [SEG-1, 2] text rows
        self.noised_row = self.n_text + torch.nonzero(self.image_kind[self.segment[self.n_text :] - 1] == NOISED)[:, 0]
        time = a["seg_time"][1 : self.segments].astype(np.float64)  # [SEG-1]
        self.time = real(time)
        self.noised = real(a["noised"])  # z [n_image, P]
        self.clean = real(a["clean"])  # x [n_image, P]

        # Angles reach 1000, so they stay in float64 until their cosine is taken.
        angle = 1000 * time[:, None] * np.power(10000.0, -np.arange(128) / 128)
        self.time_features = real(np.concatenate([np.cos(angle), np.sin(angle)], 1))  # [SEG-1, 256]

        self.position = a["position"][a["seq"][:n]]  # [n, 2] row order
        self.groups, self.place = self.documents(*(a[name][:n] for name in ("doc_start", "kv_end", "q_end")), dtype)

    def documents(self, doc_start, kv_end, q_end, dtype):
        """Documents of similar length (up to the same power of two) attend together. A group of them has rows
        [docs, len] in sequence order, where a document that is shorter repeats its first; and bias [docs, 1, len, len],
        0 where a query may attend to a key and -1e30 elsewhere (queries past the end give values that nobody reads).
        Returns the groups, and place [n]: where each row is in the concatenation of the groups."""
        begins = np.unique(doc_start)
        lengths = np.diff(np.append(begins, self.n))
        bits = np.frexp(lengths - 0.5)[1]
        groups, place, used = [], torch.empty(self.n, dtype=torch.int64), 0
        for bit in np.unique(bits):
            begin, length = begins[bits == bit][:, None], lengths[bits == bit][:, None]
            offset = np.arange(length.max())
            inside = offset < length
            at = np.where(inside, begin + offset, begin)  # [docs, len] sequence positions
            q, k = at[:, :, None], at[:, None, :]
            allowed = (doc_start[q] <= k) & (k < kv_end[q]) & (q < q_end[k]) & inside[:, None, :]
            bias = torch.where(torch.from_numpy(allowed), 0.0, -1e30).to(dtype)[:, None]
            rows, inside = self.row[torch.from_numpy(at)], torch.from_numpy(inside)
            groups.append((rows, bias))
            place[rows[inside]] = used + torch.nonzero(inside.flatten())[:, 0]
            used += inside.numel()
        return groups, place


# ---- the model ----------------------------------------------------------------------------------------------------


def rms_norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def adaln(x, shift, scale):
    """(1 + scale) LN(x) + shift; LN has no weights of its own. All [n, C]."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def gates_first(w1):
    """[..., 2F, C] with rows 2f gate and 2f+1 up -> the F gate rows, then the F up rows."""
    return w1.unflatten(-2, (-1, 2)).transpose(-3, -2).flatten(-3, -2)


def swiglu(x, w1, w2):
    """x [n, C]; w1 [2F, C], gates first; w2 [C, F]."""
    gate, up = (x @ w1.T).chunk(2, dim=1)
    return (F.silu(gate) * up) @ w2.T


def caption_pool(p, pack, s):
    """RMSnorm of the mean embedding of each image segment's caption [SEG-1, C]; 0 where it is empty."""
    begin, end = pack.caption[:, 0], pack.caption[:, 1]
    has = end > begin
    row = torch.arange(pack.n_text)
    member = (row >= begin[:, None]) & (row < end[:, None])  # [SEG-1, n_text]
    weight = member.to(pack.time.dtype) / (end - begin).clamp(min=1)[:, None]
    mean = weight @ F.embedding(pack.token, p["embed.weight"])  # [SEG-1, C]
    return torch.where(has[:, None], rms_norm(mean), torch.zeros((), dtype=mean.dtype))


def modulation(p, pack, s):
    """[SEG, M]: row 0 is text's learned scale and shift, the others those of each image segment."""
    hidden = F.silu(pack.time_features @ p["cond.time1.weight"].T + p["cond.time1.bias"])
    c = hidden @ p["cond.time2.weight"].T + p["cond.time2.bias"]
    c = c + caption_pool(p, pack, s) @ p["cond.pool.weight"].T + p["cond.kind"][pack.image_kind]  # [SEG-1, Z]
    image = p["mod.base"][IMAGE] + F.silu(c) @ p["mod.weight"].T
    return torch.cat([p["mod.base"][TEXT : TEXT + 1], image])


def embed(p, pack, s):
    """The residual stream at the bottom [n, C]."""
    z = pack.noised
    if s.bottleneck:
        z = z @ p["patch.down.weight"].T
    image = z @ p["patch.in.weight"].T + p["patch.in.bias"]
    return torch.cat([F.embedding(pack.token, p["embed.weight"]), image])


def rotary_turn(pack, D, dtype):
    """e^(i angle), complex [n, 1, D/2] in row order. Pair j has theta 10000^(-2j/D) and turns by the row coordinate for
    even j, by the column for odd j. Angles are fp32."""
    j = np.arange(D // 2)
    theta = np.power(10000.0, -2 * j / D).astype(np.float32)
    angle = torch.from_numpy(pack.position[:, j % 2].astype(np.float32) * theta).to(dtype)  # [n, D/2]
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def rotate(x, turn):
    """x [n, heads, D]; pair j, elements (2j, 2j+1), is a complex number."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def linear_by_modality(p, name, x, pack, s):
    """x [n, in] in row order through one matrix, or one per modality."""
    if not s.per_modality:
        return x @ p[name + ".weight"].T
    text, image = x.split([pack.n_text, pack.n_image])
    return torch.cat([text @ p[name + ".text.weight"].T, image @ p[name + ".image.weight"].T])


def attention(p, at, h, pack, s, turn):
    """h [n, C] -> [n, C], both in row order."""
    qkv = linear_by_modality(p, at + "qkv", h, pack, s).view(pack.n, s.H + 2 * s.G, s.D)
    modality = (torch.arange(pack.n) >= pack.n_text).long()
    wq, wk = (F.embedding(modality, p[at + name])[:, None] for name in ("q_norm", "k_norm"))  # [n, 1, D]
    weight = torch.cat([wq.expand(-1, s.H, -1), wk.expand(-1, s.G, -1)], 1)  # [n, H+G, D]
    qk, v = qkv.split([s.H + s.G, s.G], dim=1)
    qkv = torch.cat([rotate(rms_norm(qk) * weight, turn), v], 1).flatten(1)  # [n, (H+2G) D]
    out = []
    for rows, bias in pack.groups:
        docs, length = rows.shape
        picked = qkv.index_select(0, rows.flatten()).view(docs, length, -1, s.D).transpose(1, 2)
        q, k, v = picked.split([s.H, s.G, s.G], dim=1)  # [docs, heads, len, D]
        k, v = (x.repeat_interleave(s.H // s.G, 1) for x in (k, v))  # query head h uses kv head h // (H/G)
        scores = q @ k.transpose(2, 3) / math.sqrt(s.D) + bias  # [docs, H, len, len]
        out.append((scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1).flatten(1))  # [docs len, H D]
    o = torch.cat(out).index_select(0, pack.place)  # [n, H D], row order
    return linear_by_modality(p, at + "out", o, pack, s)


def moe(p, at, h, k):
    """Mixture of experts over the rows of one modality. h [R, C] -> out [R, C], router loss terms, ids [R, k] and the
    smallest margin by which an expert was chosen over another (an fp32 engine may choose otherwise where it is ~0)."""
    logits = h @ p[at + "router.weight"].T  # [R, E]
    experts = logits.shape[1]
    ranked, order = logits.detach().sort(dim=1, descending=True, stable=True)  # ties: the lower index first
    ids = order[:, :k]
    margin = (ranked[:, k - 1] - ranked[:, k]).min().item() if k < experts else math.inf
    probability = logits.softmax(1)
    weight = probability.gather(1, ids) if k == 1 else logits.gather(1, ids).softmax(1)

    count = torch.bincount(ids.flatten(), minlength=experts)
    slot = ids.flatten().argsort(stable=True)  # assignments row k + j, grouped by expert
    rows = h.index_select(0, slot // k).split(count.tolist())
    w1, w2 = gates_first(p[at + "experts.w1"]).unbind(), p[at + "experts.w2"].unbind()
    y = torch.cat([swiglu(*operands) for operands in zip(rows, w1, w2)])
    y = y.index_select(0, slot.argsort()).view(-1, k, h.shape[1])  # [R, k, C]
    out = (weight[:, :, None] * y).sum(1)
    if at + "shared.w1" in p:
        out = out + swiglu(h, gates_first(p[at + "shared.w1"]), p[at + "shared.w2"])

    fraction = count.to(logits.dtype) / ids.numel()
    balance = experts * (fraction * probability.mean(0)).sum()
    z = logits.logsumexp(1).square().mean()
    return out, balance, z, ids, margin


@dataclass
class Output:
    nll: torch.Tensor  # [n_target] negative log likelihood of each target
    x: torch.Tensor  # [noised tokens, P] the predicted clean patches, rows pack.noised_row
    balance: torch.Tensor  # router losses before their coefficients: means over layers, sums over modalities
    z: torch.Tensor
    routes: list  # [L][modality] expert ids [rows, k], None for a modality without rows
    margin: float  # the smallest margin of any choice of expert


def forward(p, pack, s):
    """The model on one pack. p: {name: tensor}, shapes of param_shapes()."""
    C = s.C
    x = embed(p, pack, s)  # [n, C]
    table = modulation(p, pack, s)  # [SEG, M]
    turn = rotary_turn(pack, s.D, x.dtype)
    balance = z = torch.zeros((), dtype=x.dtype)
    routes, margin = [], math.inf
    for layer in range(s.L):
        at = f"layers.{layer}."
        mod = F.embedding(pack.segment, table[:, 6 * C * layer : 6 * C * (layer + 1)])  # [n, 6C]
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.split(C, dim=1)
        x = x + gate1 * attention(p, at + "attn.", adaln(x, shift1, scale1), pack, s, turn)
        h = adaln(x, shift2, scale2).split([pack.n_text, pack.n_image])
        branch, chosen = [], []
        for m, name in enumerate(MODALITY):
            if len(h[m]) == 0:
                branch.append(h[m])
                chosen.append(None)
                continue
            out, b, zz, ids, gap = moe(p, f"{at}{name}.", h[m], s.k[m])
            balance, z, margin = balance + b / s.L, z + zz / s.L, min(margin, gap)
            branch.append(out)
            chosen.append(ids)
        x = x + gate2 * torch.cat(branch)
        routes.append(chosen)

    shift, scale = F.embedding(pack.segment, table[:, 6 * C * s.L :]).split(C, dim=1)
    h = adaln(x, shift, scale)
    head = p["embed.weight" if s.tied else "head.weight"]
    nll = F.cross_entropy(h[pack.target_row] @ head.T, pack.target, reduction="none")
    predicted = F.silu(h[pack.noised_row]) @ p["image_head.weight"].T + p["image_head.bias"]
    return Output(nll, predicted, balance, z, routes, margin)


def flow_sum(pack, predicted, s):
    """Sum over noised tokens and elements of the squared velocity error."""
    row = pack.noised_row
    t = pack.time[pack.segment[row] - 1]
    weight = 1 / (1 - t).clamp(min=s.t_floor).square()
    return (weight[:, None] * (predicted - pack.clean[row - pack.n_text]).square()).sum()


def step(p, packs, s):
    """One training step over its micro-batches: adds the gradients of the total loss to p's tensors and returns the
    losses as floats (the keys of a dump's losses.json, less grad_norm), and the outputs of each micro-batch."""
    targets = sum(len(pack.target) for pack in packs)
    noised = sum(len(pack.noised_row) for pack in packs)
    kinds = [sum(int((pack.target_kind == kind).sum()) for pack in packs) for kind in (0, 1)]
    losses = dict.fromkeys(("ce_text", "ce_caption", "ce", "flow", "balance", "z", "total"), 0.0)
    outputs = []
    for pack in packs:
        out = forward(p, pack, s)
        parts = {
            "ce": out.nll.sum() / max(targets, 1),
            "flow": flow_sum(pack, out.x, s) / (max(noised, 1) * s.P),
            "balance": s.balance * out.balance / len(packs),
            "z": s.z * out.z / len(packs),
        }
        total = s.ce_weight * parts["ce"] + parts["flow"] + parts["balance"] + parts["z"]
        total.backward()
        for name, value in parts.items():
            losses[name] += value.item()
        losses["total"] += total.item()
        for kind, name in enumerate(("ce_text", "ce_caption")):
            losses[name] += out.nll.detach()[pack.target_kind == kind].sum().item() / max(kinds[kind], 1)
        outputs.append(out)
    losses |= {"targets": targets, "noised_tokens": noised, "micro_batches": len(packs)}
    return losses, outputs
