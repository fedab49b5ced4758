#!/usr/bin/python3
"""Uses a trained run without the engine: one file, PyTorch and NumPy.

    scripts/infer.py runs/demo --sample "a small red circle" --out drawn.png
    scripts/infer.py runs/demo --describe drawn.png

It reads what a run leaves behind (config.json, tokenizer.bpe, the newest checkpoint's weights) and gives what
`./train RUN --sample` and `--describe` give for the same seed, within rounding. `--set eval.guidance=3` and the like
reach the same keys as there. Images that the engine did not write are read with Pillow. Read it to learn how to take a
model elsewhere.

Sizes: n tokens of one document in the order it is read, C dim, D head_dim, P = 3 patch^2, M = 6CL + 2C modulation
columns, F width of an expert.
"""
import argparse
import json
import math
import pathlib
import re
import struct
import sys
import unicodedata
import zlib

import numpy as np
import torch
import torch.nn.functional as F

NOISED, CLEAN = 0, 1  # kinds of images: one that is drawn, one that is read
STREAM_SAMPLE = 7  # of the random numbers
EPS = 1e-6  # of every norm

# ---- the model ----------------------------------------------------------------------------------------------------


def rms_norm(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def adaln(x, shift, scale):
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def swiglu(x, w1, w2):
    """w1 [2F, C]: row 2f is gate f, row 2f + 1 its up; w2 [C, F]."""
    gate, up = (x @ w1.T).unflatten(-1, (-1, 2)).unbind(-1)
    return (F.silu(gate) * up) @ w2.T


def by_modality(w, name, x, image):
    """x [n, in] through one matrix, or through one for text and one for images."""
    if name + ".weight" in w:
        return x @ w[name + ".weight"].T
    return torch.where(image[:, None], x @ w[name + ".image.weight"].T, x @ w[name + ".text.weight"].T)


def attention(w, at, h, image, turn, m):
    """Text sees what was before it, image tokens also the whole of their image. turn: e^(i angle) [n, 1, D/2]."""
    n, H, G, D = len(h), m["heads"], m["kv_heads"], m["head_dim"]
    q, k, v = by_modality(w, at + "qkv", h, image).view(n, H + 2 * G, D).split([H, G, G], 1)
    q, k = (rms_norm(x) * w[at + name][image.long()][:, None] for x, name in ((q, "q_norm"), (k, "k_norm")))
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn for x in (q, k))
    q, k = (torch.view_as_real(x).flatten(-2).transpose(0, 1) for x in (q, k))  # [heads, n, D]
    k, v = (x.repeat_interleave(H // G, 0) for x in (k, v.transpose(0, 1)))
    seen = torch.ones(n, n).tril().bool() | (image[:, None] & image)
    p = (q @ k.transpose(1, 2) / math.sqrt(D)).masked_fill(~seen, -math.inf).softmax(-1)
    return by_modality(w, at + "out", (p @ v).transpose(0, 1).flatten(1), image)


def experts(w, at, h, top_k):
    """h [rows of one modality, C] through the shared expert, if any, and the best top_k of the others."""
    score = h @ w[at + "router.weight"].T
    chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    share = score.softmax(1).gather(1, chosen) if top_k == 1 else score.gather(1, chosen).softmax(1)
    w1, w2 = w.get(at + "shared.w1"), w.get(at + "shared.w2")
    out = torch.zeros_like(h) if w1 is None else swiglu(h, w1, w2)
    for e in range(score.shape[1]):
        row, place = torch.where(chosen == e)
        out[row] += share[row, place, None] * swiglu(h[row], w[at + "experts.w1"][e], w[at + "experts.w2"][e])
    return out


def condition(w, caption, t, kind):
    """The modulation of text and that of an image at flow time t with these caption tokens [2, M]."""
    angle = 1000 * np.float64(t) * np.power(10000, -np.arange(128) / 128)
    x = torch.from_numpy(np.concatenate([np.cos(angle), np.sin(angle)]).astype(np.float32))
    x = F.silu(x @ w["cond.time1.weight"].T + w["cond.time1.bias"]) @ w["cond.time2.weight"].T
    x = x + w["cond.time2.bias"] + w["cond.kind"][kind]
    if len(caption):
        x = x + w["cond.pool.weight"] @ rms_norm(w["embed.weight"][caption].mean(0))
    return torch.stack([w["mod.base"][0], w["mod.base"][1] + w["mod.weight"] @ F.silu(x)])


def forward(w, m, before, patches, shape, after, t, kind):
    """One document: text ids, an image (patches [tokens, P], shape in patches), text ids. Returns the clean patches it
    predicts [tokens, P] and the logits [V] of the token after the last."""
    n, begin, end = len(before) + len(patches) + len(after), len(before), len(before) + len(patches)
    image = (torch.arange(n) >= begin) & (torch.arange(n) < end)
    place = np.stack([np.arange(n)] * 2, 1)
    place[begin:end] = begin + np.indices(shape).reshape(2, -1).T
    place[end:] += max(shape) - len(patches)
    j = np.arange(m["head_dim"] // 2)
    angle = place[:, j % 2].astype(np.float32) * np.power(10000.0, -2 * j / m["head_dim"]).astype(np.float32)
    turn = torch.polar(torch.ones(angle.shape), torch.from_numpy(angle))[:, None]

    z = patches @ w["patch.down.weight"].T if "patch.down.weight" in w else patches
    z = z @ w["patch.in.weight"].T + w["patch.in.bias"]
    x = torch.cat([w["embed.weight"][before], z, w["embed.weight"][after]])
    *blocks, last = condition(w, before[1:-1], t, kind)[image.long()].split(6 * m["dim"], 1)
    for layer, part in enumerate(blocks):
        at = f"layers.{layer}."
        shift1, scale1, gate1, shift2, scale2, gate2 = part.chunk(6, 1)
        x = x + gate1 * attention(w, at + "attn.", adaln(x, shift1, scale1), image, turn, m)
        h = adaln(x, shift2, scale2)
        branch = torch.empty_like(x)
        for name, rows in (("text", ~image), ("image", image)):
            branch[rows] = experts(w, f"{at}{name}.", h[rows], m[name]["top_k"])
        x = x + gate2 * branch
    h = adaln(x, *last.chunk(2, 1))
    head = w["head.weight"] if "head.weight" in w else w["embed.weight"]
    return F.silu(h[image]) @ w["image_head.weight"].T + w["image_head.bias"], head @ h[-1]


# ---- random numbers -----------------------------------------------------------------------------------------------


def philox(seed, index, blocks):
    """Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (index, stream, block). u32 [blocks, 4]."""
    c = [np.full(blocks, v, np.uint64) for v in (index & 0xFFFFFFFF, index >> 32, STREAM_SAMPLE)]
    c.append(np.arange(blocks, dtype=np.uint64))
    k, low, half = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)], np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [q >> half ^ c[1] ^ k[0], q & low, p >> half ^ c[3] ^ k[1], p & low]
        k = [k[0] + np.uint64(0x9E3779B9) & low, k[1] + np.uint64(0xBB67AE85) & low]
    return np.stack(c, 1).astype(np.uint32)


def uniforms(words):
    return ((words >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def normals(seed, index, count):
    """By Box and Muller: two words give two of them."""
    u = uniforms(philox(seed, index, (count + 3) // 4)).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), np.float32(2 * math.pi) * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count].astype(np.float32)


# ---- a run's files ------------------------------------------------------------------------------------------------


def safetensors_read(path):
    """{name: fp32 tensor}. The format: u64 length of the header, the header as JSON, the data."""
    data = bytearray(path.read_bytes())
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    types = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
    tensors = {}
    for name, entry in header.items():
        (begin, end), dtype = entry["data_offsets"], types[entry["dtype"]]
        flat = torch.frombuffer(data[8 + size + begin : 8 + size + end], dtype=dtype)
        tensors[name] = flat.float().reshape(entry["shape"])
    return tensors


class Tokenizer:
    """Byte-level BPE as GPT-2's (Radford et al. 2019): ids 0-255 are bytes, then a merge a line, specials last."""

    def __init__(self, path, vocab):
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        order = printable + [b for b in range(256) if b not in printable]
        self.letter = {b: chr(b if i < len(printable) else 256 + i - len(printable)) for i, b in enumerate(order)}
        self.byte = {letter: b for b, letter in self.letter.items()}
        lines = [line.rstrip("\r") for line in path.read_text("utf-8").split("\n")]
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        self.token = [self.letter[b] for b in order] + [a + b for a, b in merges[: vocab - 260]]
        self.id = {token: i for i, token in enumerate(self.token)}
        self.rank = {pair: i for i, pair in enumerate(merges[: vocab - 260])}
        self.bos, self.eos, self.boi, self.eoi = range(vocab - 4, vocab)

    def words(self, text):
        """GPT-2's pattern. Other alphabets stand in as ASCII of their class, since `re` has no \\p{L}."""
        classes = {"L": "A", "N": "0", "Z": "\n"}
        blanks = text.replace("\x85", "\n").replace("\u180e", "\n")  # two blanks that are not of class Z
        kind = (c if c < "\x80" else classes.get(unicodedata.category(c)[0], "!") for c in blanks)
        pattern = r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
        return (text[match.start() : match.end()] for match in re.finditer(pattern, "".join(kind), re.ASCII))

    def encode(self, text):
        ids = []
        for word in self.words(text):
            parts = [self.letter[b] for b in word.encode("utf-8", "surrogateescape")]
            while len(parts) > 1:
                rank, i = min((self.rank.get(pair, math.inf), i) for i, pair in enumerate(zip(parts, parts[1:])))
                if rank == math.inf:
                    break
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            ids += [self.id[part] for part in parts]
        return ids

    def decode(self, ids):
        return bytes(self.byte[letter] for i in ids for letter in self.token[i])


class Run:
    """config: the run's, w: weights by name (the average where there is one), tokenizer."""

    def __init__(self, folder, sets):
        folder = pathlib.Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        for text in sets:
            path, value = text.split("=", 1)
            *groups, key = path.split(".")
            group = self.config
            for name in groups:
                group = group[name]
            group[key] = value if isinstance(group[key], str) or value == "auto" else json.loads(value)
        checkpoints = [state.parent for state in folder.glob("ckpt-*/state.json")]
        checkpoints = [path for path in checkpoints if re.fullmatch(r"ckpt-(0|[1-9]\d{0,17})", path.name)]
        if not checkpoints:
            sys.exit(f"{folder} has no checkpoint: train it first")
        newest = max(checkpoints, key=lambda path: int(path.name[5:]))
        ema = self.config["train"]["ema"] > 0 and (newest / "ema.safetensors").exists()
        self.w = safetensors_read(newest / ("ema.safetensors" if ema else "model.safetensors"))
        self.tokenizer = Tokenizer(folder / "tokenizer.bpe", self.config["model"]["vocab"])


# ---- pictures -----------------------------------------------------------------------------------------------------


def png_write(path, pixels):
    """pixels u8 [height, width, 3]."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    pathlib.Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def png_read(path):
    """u8 [height, width, 3] of a PNG as png_write and the engine write them, None for any other file."""
    data, at, packed = pathlib.Path(path).read_bytes(), 8, b""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[24:29] != b"\x08\x02\0\0\0":  # 8 bits, RGB, not interlaced
        return None
    width, height = struct.unpack_from(">II", data, 16)
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name in (b"eXIf", b"tRNS"):  # perhaps to be turned, or with a transparent colour
            return None
        packed += data[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += length + 12
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 3 * width).astype(int)
    pixels = np.zeros((height + 1, width + 1, 3), int)  # row and column 0: what the filters see beyond the edge
    for y, (kind, line) in enumerate(((row[0], row[1:].reshape(width, 3)) for row in rows), 1):
        for x in range(1, width + 1):
            a, b, c = pixels[y, x - 1], pixels[y - 1, x], pixels[y - 1, x - 1]
            pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - 2 * c)
            paeth = np.where((pa <= pb) & (pa <= pc), a, np.where(pb <= pc, b, c))
            pixels[y, x] = line[x - 1] + (0, a, b, (a + b) // 2, paeth)[kind] & 255
    return pixels[1:, 1:].astype(np.uint8)


def grid_fit(config, width, height):
    """(rows, columns) of patches that an image gets: the square, or with its aspect kept."""
    data, side = config["data"], config["data"]["image_size"] // config["model"]["patch"]
    if data["image_mode"] == "square":
        return side, side
    most = data["max_image_tokens"] or side * side
    scale = min(side / min(width, height), math.sqrt(most / (width * height)))
    rows, columns = (int(min(max(math.floor(v * scale + 0.5), 1), most)) for v in (height, width))
    while rows * columns > most:  # rounding went up: shorten the longer side
        shorten = rows > columns if rows != columns else height < width
        rows, columns = (rows - 1, columns) if shorten else (rows, columns - 1)
    return rows, columns


def image_read(path, config):
    """u8 [height, width, 3] on the patch grid. Resizing is Pillow's, so then it is not the engine's to the bit."""
    pixels, p = png_read(path), config["model"]["patch"]
    if pixels is not None and pixels.shape[:2] == tuple(p * n for n in grid_fit(config, *pixels.shape[1::-1])):
        return pixels
    from PIL import Image, ImageOps  # python3-pil: for all that the engine did not write

    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    height, width = (p * n for n in grid_fit(config, *image.size))
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return np.asarray(image.resize((width, height), Image.BICUBIC, box))


def to_patches(pixels, p):
    """[height, width, 3] -> [tokens, P], each patch in (row, column, channel) order."""
    height, width, _ = pixels.shape
    return pixels.reshape(height // p, p, width // p, p, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 3 * p * p)


def from_patches(patches, p, rows):
    return patches.reshape(rows, -1, p, p, 3).transpose(0, 2, 1, 3, 4).reshape(rows * p, -1, 3)


# ---- flow times ---------------------------------------------------------------------------------------------------

SAMPLER_TRAINED = 0.99  # share of the training times below the latest that the sampler takes


def time_quantile(flow, p):
    """The t that a share p of the training times lies below, by bisection over its logit."""
    low, high, uniform = -800.0, 800.0, flow.get("t_uniform", 0)
    for _ in range(80):
        x = (low + high) / 2
        z = (flow["t_mean"] - x) / (flow["t_std"] or 1e-300) / math.sqrt(2)
        below = (1 - uniform) * 0.5 * math.erfc(z) + uniform / (1 + math.exp(min(-x, 700)))
        low, high = (x, high) if below < p else (low, x)
    return 1 / (1 + math.exp(min(-low, 700)))


def time_grid(config):
    """Where the sampler's steps begin, and 1: uniform, with its last step from t_end at the latest."""
    flow, steps, end = config["flow"], config["eval"]["sampler_steps"], config["eval"].get("t_end", "auto")
    end = min(time_quantile(flow, SAMPLER_TRAINED), 1 - flow["t_floor"]) if end in ("auto", 0) else float(end)
    if steps == 1 or (steps - 1) / steps <= end:
        return [s / steps for s in range(steps + 1)]
    return [s * end / (steps - 1) for s in range(steps)] + [1.0]


# ---- what it does -------------------------------------------------------------------------------------------------


def draw(run, caption, seed):
    """u8 [size, size, 3]: from noise along v = (x^ - z) / (1 - t), by Euler's or Heun's method."""
    c, tokenizer, m = run.config["eval"], run.tokenizer, run.config["model"]
    floor, rows = run.config["flow"]["t_floor"], run.config["data"]["image_size"] // m["patch"]
    ids = tokenizer.encode(caption)[: run.config["data"]["max_caption"]]
    z = torch.from_numpy(normals(seed, 0, rows * rows * 3 * m["patch"] ** 2).reshape(rows * rows, -1))

    def clean(z, t, ids):
        before = [tokenizer.bos, *ids, tokenizer.boi]
        return forward(run.w, m, before, z, (rows, rows), [], np.float32(t), NOISED)[0]

    def velocity(z, t):
        x = clean(z, t, ids)
        if c["guidance"] != 1 and t > c["guidance_from"]:
            blank = clean(z, t, [])
            x = blank + c["guidance"] * (x - blank)
        return (x - z) / max(1 - t, floor)

    grid = time_grid(run.config)
    for t, to in zip(grid, grid[1:]):
        dt, v = to - t, velocity(z, t)
        if c["sampler"] == "heun" and to < 1:
            v = (v + velocity(z + dt * v, to)) / 2
        z = z + dt * v
    pixels = ((z.numpy() + 1) * np.float32(127.5)).clip(0, 255)
    return from_patches(np.rint(pixels).astype(np.uint8), m["patch"], rows)


def choose(logits, tokenizer, temperature, top_p, u):
    """The next token: eos or one that stands for text. Temperature 0 is the likeliest."""
    ids = np.array([*range(len(tokenizer.token)), tokenizer.eos])
    score = logits.numpy()[ids].astype(np.float64)
    order = np.argsort(-score, kind="stable")
    if temperature == 0:
        return int(ids[order[0]])
    weight = np.exp((score[order] - score[order[0]]) / temperature).astype(np.float32).astype(np.float64)
    total = weight.cumsum()
    kept = int(np.searchsorted(total, top_p * weight.sum())) + 1
    return int(ids[order[min(int(np.searchsorted(total, u * total[:kept][-1])), len(ids) - 1)]])


def describe(run, pixels, seed):
    c, data, tokenizer, m = run.config["eval"], run.config["data"], run.tokenizer, run.config["model"]
    patches = torch.from_numpy(to_patches(pixels, m["patch"]).astype(np.float32)) / 127.5 - 1
    shape, ids = (pixels.shape[0] // m["patch"], pixels.shape[1] // m["patch"]), []
    room = min(data["max_caption"], data["micro_batch_tokens"] - 3 - len(patches))
    room = min(room, (data["max_text"] or room + 3) - 3)
    u = uniforms(philox(seed, 0, max(room, 1))[:, 0])
    while len(ids) < room:
        before, after = [tokenizer.bos, tokenizer.boi], [tokenizer.eoi, *ids]
        _, logits = forward(run.w, m, before, patches, shape, after, 1.0, CLEAN)
        token = choose(logits, tokenizer, c["temperature"], c["top_p"], u[len(ids)])
        if token == tokenizer.eos:
            break
        ids.append(token)
    return tokenizer.decode(ids).split(b"\0")[0]  # a text ends at byte 0, as the engine's does


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run's folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sample", metavar="CAPTION", help="draw a caption")
    what.add_argument("--describe", metavar="IMAGE", help="caption an image")
    parser.add_argument("--out", metavar="FILE.png", help="default: RUN/samples/drawn.png")
    parser.add_argument("--seed", type=int, help="default: run.seed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config")
    a = parser.parse_args()
    run = Run(a.run, a.set)
    seed = run.config["run"]["seed"] if a.seed is None else a.seed
    with torch.inference_mode():
        if a.sample is not None:
            out = pathlib.Path(a.out or pathlib.Path(a.run) / "samples" / "drawn.png")
            if not a.out:
                out.parent.mkdir(exist_ok=True)
            png_write(out, draw(run, a.sample, seed))
            print(f"drawn: {out}", file=sys.stderr)
            return
        sys.stdout.buffer.write(describe(run, image_read(a.describe, run.config), seed) + b"\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ImportError, KeyError, ValueError) as error:
        sys.exit(f"infer.py: {type(error).__name__}: {error}")
