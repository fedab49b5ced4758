#!/usr/bin/python3
"""What a run makes of its data, from the config to the packs: every test writes a small data set of its own.

    tests/scripts/data_run.py TRAIN

Exit code 1 on the first thing that is not as it should be.
"""
import json, math, os, random, re, shutil, struct, subprocess, sys, tarfile, tempfile, time, zlib
from io import BytesIO
from pathlib import Path

from checks import check, run_metrics

SIDE, PATCH = 16, 8  # images of four patches
VOCAB = 260  # bytes and the special ids
BOS, EOS, BOI, EOI = range(VOCAB - 4, VOCAB)
# Bytes by their ids, GPT-2's order: first those that print.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += sorted(set(range(256)) - set(BYTES))
KINDS = {"U8": ("B", 1), "I32": ("i", 4), "I64": ("q", 8), "F32": ("f", 4)}


def png(seed):
    """A grey picture of noise."""
    rng = random.Random(seed)
    rows = b"".join(b"\0" + rng.randbytes(SIDE) for _ in range(SIDE))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def damaged(image):
    """With a header that is right and pixels that are not."""
    return image[:60] + bytes(byte ^ 255 for byte in image[60:64]) + image[64:]


def tensors(path):
    """{name: values} of a safetensors file, flat."""
    data = path.read_bytes()
    (n,) = struct.unpack_from("<Q", data)
    out = {}
    for name, about in json.loads(data[8 : 8 + n]).items():
        if name == "__metadata__":
            continue
        kind, size = KINDS[about["dtype"]]
        first, end = about["data_offsets"]
        out[name] = struct.unpack_from(f"<{(end - first) // size}{kind}", data, 8 + n + first)
    return out


class Pack:
    """A micro-batch of --dump; `documents`: their tokens in order, each image as the string of its kind."""

    def __init__(self, path):
        arrays = tensors(path)
        self.text, self.image = arrays["dims"][:2]
        self.documents = []
        first = None
        for q in range(self.text + self.image):
            row = arrays["row"][q]
            if arrays["doc_start"][q] != first:
                first = arrays["doc_start"][q]
                self.documents.append([])
            if row < self.text:
                self.documents[-1].append(arrays["token"][row])
                continue
            segment = arrays["segment"][row]
            if arrays["seg_start"][segment] == row:
                self.documents[-1].append("clean" if arrays["seg_kind"][segment] else "noised")


def words(document):
    """The text of a document."""
    return bytes(BYTES[token] for token in document if isinstance(token, int) and token < 256).decode()


class Case:
    def __init__(self, train, folder):
        self.train, self.folder = str(Path(train).resolve()), folder
        self.data = folder / "data"
        self.data.mkdir()

    def pictures(self, name, captions, bad=(), fields=None):
        """A folder source of one picture a caption, those in `bad` damaged."""
        folder = self.data / name
        folder.mkdir()
        with open(folder / "captions.jsonl", "w") as lines:
            for i, caption in enumerate(captions):
                image = png(i)
                (folder / f"{i:03}.png").write_bytes(damaged(image) if i in bad else image)
                row = {"file": f"{i:03}.png", "caption": caption, **(fields(i) if fields else {})}
                print(json.dumps(row), file=lines)
        return {"type": "folder", "path": str(folder)}

    def shard(self, name, n):
        path = self.data / name
        with tarfile.open(path, "w") as tar:
            for i in range(n):
                for suffix, body in ((".png", png(i)), (".txt", f"picture {i}".encode())):
                    member = tarfile.TarInfo(f"{i:03}{suffix}")
                    member.size = len(body)
                    tar.addfile(member, BytesIO(body))
        return {"type": "webdataset", "path": str(path)}

    def config(self, sources, data=None, train=None, **more):
        experts = {"experts": 2, "expert_dim": 16, "top_k": 1}
        model = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "cond_dim": 16, "patch": PATCH,
                 "vocab": VOCAB, "text": experts, "image": experts}  # fmt: skip
        data = {"micro_batch_tokens": 256, "image_size": SIDE, "tokenizer": "bytes", "held_out": 0, **(data or {})}
        return {"model": model, "data": {**data, "sources": sources}, "train": {"steps": 4, **(train or {})},
                "eval": {"every": 0, "documents": 0, "samples": 0}, "checkpoint": {"every": 0},
                "run": {"threads": 1}, **more}  # fmt: skip

    def start(self, config, *flags, run="run"):
        path = self.folder / "config.json"
        path.write_text(json.dumps(config))
        command = [self.train, path, "--run-dir", self.folder / run, *flags]
        return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)

    def end(self, process, code):
        """Waits for a run's end; what it said."""
        try:
            said = process.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError("no end within 60 s:\n" + process.communicate()[1]) from None
        check(process.returncode == code, f"exit code {process.returncode}, not {code}:\n{said}")
        return said

    def make(self, config, *flags, code=0, run="run"):
        return self.end(self.start(config, *flags, run=run), code)

    def dump(self, config, name="dump"):
        """Losses, gradients and packs of the first step."""
        folder = self.folder / name
        self.make(config, "--dump", folder)
        packs = [Pack(folder / f"micro_{k}.safetensors") for k in range(config["train"].get("micro_batches", 1))]
        return json.loads((folder / "losses.json").read_text()), tensors(folder / "grads.safetensors"), packs

    def rows(self, run="run"):
        return run_metrics.lines(self.folder / run)


def distance(a, b):
    """Relative difference of two sets of gradients."""
    square = sum((x - y) ** 2 for name in a for x, y in zip(a[name], b[name]))
    return math.sqrt(square / sum(y * y for name in a for y in b[name]))


def norm(a):
    return math.sqrt(sum(x * x for values in a.values() for x in values))


# ---- images that cannot be decoded ----


def test_losses_of_what_is_there(case):
    """The gradient of a good and a bad image is that of the good one alone, in one micro-batch and in two."""
    router = {"balance": 0, "z": 0}  # of these each micro-batch has its own
    source = case.pictures("both", ["a", "b"], bad=(1,))
    for share, tokens in ((1, 9), (0, 9)):  # drawn, described: a document is 7 or 9 tokens
        found = None
        for seed in range(1, 20):  # whose first image is the good one

            def step(micro_batches, slots):
                data = {"micro_batch_tokens": slots, "max_caption": 1, "caption_to_image": share, "cfg_drop": 0}
                config = case.config([source], data, {"micro_batches": micro_batches}, router=router)
                config["run"]["seed"] = seed
                return case.dump(config, f"{share}-{seed}-{micro_batches}-{slots}")

            alone = step(1, tokens)
            if not alone[2][0].documents:
                continue
            found = seed
            for micro_batches, slots in ((2, tokens), (1, 2 * tokens)):
                losses, gradients, packs = step(micro_batches, slots)
                documents = [document for pack in packs for document in pack.documents]
                check(len(documents) == 1 and words(documents[0]) == "a", f"documents: {documents}")
                away = distance(gradients, alone[1])
                check(norm(alone[1]) > 1e-3, "there is no gradient")
                check(away < 1e-5, f"caption_to_image {share}, {micro_batches} x {slots}: gradients differ by {away}")
                for key in ("flow", "ce", "targets", "noised_tokens"):
                    same = math.isclose(losses[key] or 0, alone[0][key] or 0, rel_tol=1e-5)
                    check(same, f"{key} {losses[key]}, not {alone[0][key]}")
            break
        check(found, "every seed begins with the bad image")


def test_tokens_of_what_is_there(case):
    """The step line counts no token of a document that was lost; a step without any has no figure of a loss."""
    source = case.pictures("few", ["same"] * 3, bad=(0,))
    data = {"micro_batch_tokens": 12, "max_caption": 4, "caption_to_image": 1, "cfg_drop": 0}  # a document a step
    said = case.make(case.config([source], data, {"steps": 9}))
    tokens = [row["tokens"] for row in case.rows() if "loss" in row]
    check(sorted(tokens) == [0] * 3 + [10] * 6, f"tokens of nine steps: {tokens}")
    lines = [row for row in case.rows() if row.get("tokens") == 0]
    check(all(row["tokens_per_second"] == 0 and row["fill"] == 0 for row in lines), f"{lines}")
    check(all("skipped" not in row and math.isfinite(row["loss"]) for row in case.rows() if "tokens" in row), "skipped")
    check("a step learns nothing" in said, said)
    check("6 documents, 3 undecodable" in said, said)


def test_nothing_decodes(case):
    """A data set, or one source of several, of which nothing can be decoded ends the run at once."""
    bad = case.pictures("bad", [f"picture {i}" for i in range(40)], bad=range(40))
    few = case.pictures("two", ["one", "two"], bad=(0, 1))
    good = case.pictures("good", [f"good {i}" for i in range(40)])
    for sources, index, tried in (([bad], 0, 16), ([good, bad], 1, 16), ([few], 0, 2)):
        for most in (100, 0):
            run = f"run-{len(sources)}-{tried}-{most}"
            config = case.config(sources, {"max_bad": most}, {"steps": 1000})
            said = case.make(config, code=1, run=run)
            error = f"error: data.sources[{index}]: none of its images can be decoded: tried {tried} in a row"
            check(error in said, said)
            check("CRC" in said or "checksum" in said, said)
            check(len(case.rows(run)) < 20, f"{len(case.rows(run))} steps before it ended")


# ---- data that changes ----


def until_step(case, process, step, run="run"):
    """Waits for a step of a run that is under way."""
    path = case.folder / run / "metrics.jsonl"
    for _ in range(6000):
        if path.exists() and f'"step":{step},' in path.read_text():
            return
        if process.poll() is not None:
            raise AssertionError("it has ended:\n" + process.stderr.read())
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"no step {step}:\n{process.communicate()[1]}")


def test_changed_shard(case):
    """Touched, replaced, cut or removed under the run: it says what is different, keeps its steps, and can go on."""
    whole = case.shard("whole.tar", 60)
    changes = {
        "touch": lambda path: os.utime(path, ns=(1, 10**18)),
        "cut": lambda path: os.truncate(path, 20000),
        "remove": lambda path: path.unlink(),
    }
    for name, change in changes.items():
        path = case.data / f"{name}.tar"
        shutil.copy(whole["path"], path)
        bytes_then = path.stat().st_size
        config = case.config([{"type": "webdataset", "path": str(path)}], {"cache_mb": 0}, {"steps": 1000000})
        process = case.start(config, run=name)
        until_step(case, process, 20, name)
        change(path)
        said = case.end(process, 1)
        check("cannot be decoded" not in said, said)
        kept = re.search(r"saved after step (\d+), from which --resume goes on", said)
        steps = len([row for row in case.rows(name) if "loss" in row])
        check(kept and int(kept[1]) == steps >= 21, f"{name}: {steps} steps were made:\n{said}")
        check((case.folder / name / f"ckpt-{steps}").is_dir(), f"{name}: no checkpoint of step {steps}")
        if name == "remove":
            check(f"error: cannot open {path}: No such file" in said, said)
        else:
            bytes_now = path.stat().st_size
            check(f"error: {path} has changed since it was indexed: it had {bytes_then} bytes, written" in said, said)
            check(f"and has {bytes_now} bytes, written " in said, said)
            check("written 2001-09-0" in said if name == "touch" else True, said)
        shutil.copy(whole["path"], path)
        said = case.make(config, "--resume", "--stop-at", steps + 3, run=name)
        check(f"(step {steps})" in said, said)


def test_nothing_decodes_any_more(case):
    """Fewer images than data.max_bad, all of them replaced under the run."""
    source = case.pictures("replaced", [f"picture {i}" for i in range(30)])
    process = case.start(case.config([source], {"cache_mb": 0}, {"steps": 1000000}))
    until_step(case, process, 20)
    for path in (case.data / "replaced").glob("*.png"):
        path.write_bytes(path.read_bytes() + b"!")
    said = case.end(process, 1)
    check("error: data.sources[0]: none of its images can be decoded any more: tried 60 in a row" in said, said)
    check("has changed since it was indexed" in said, said)
    check(re.search(r"saved after step \d+, from which --resume goes on", said), said)


def test_more_samples(case):
    """A sample that was added before --resume: what is different, and the way to train on it."""
    source = case.pictures("grows", [f"picture {i}" for i in range(5)])
    config = case.config([source])
    case.make(config)
    with open(case.data / "grows/captions.jsonl", "a") as lines:
        print(json.dumps({"file": "000.png", "caption": "one more"}), file=lines)
    said = case.make(config, "--resume", "--steps", 8, code=2)
    check("data.sources[0] had 5 training samples then, it has 6 now" in said, said)
    check(re.search(r"hint: .*--init CKPT", said), said)
    case.make(config, "--init", case.folder / "run/ckpt-4", run="next")


# ---- from the config to the packs ----


def binomial(share, n):
    """Five standard deviations."""
    return 5 * math.sqrt(share * (1 - share) / n)


def test_weights(case):
    """Sources give their weights' shares of the documents, and not in lumps."""
    sources = [case.pictures(name, [name] * 5) for name in "abc"]
    for source, weight in zip(sources, (1, 9, 2.5)):
        source["weight"] = weight
    _, _, packs = case.dump(case.config(sources, {"cfg_drop": 0}, {"micro_batches": 40}))
    drawn = [words(document) for pack in packs for document in pack.documents]
    check(len(drawn) > 800, f"{len(drawn)} documents")
    for name, weight in zip("abc", (1, 9, 2.5)):
        share, wanted = drawn.count(name) / len(drawn), weight / 12.5
        check(abs(share - wanted) < 0.01, f"source {name} of weight {weight} gives {share:.3f} of the documents")


def test_dropped_captions(case):
    """data.cfg_drop and data.caption_to_image are shares of the documents."""
    source = case.pictures("pictures", [f"picture {i}" for i in range(20)])
    for drop, share in ((0, 0.5), (0.3, 0.8), (1, 1)):
        data = {"cfg_drop": drop, "caption_to_image": share}
        _, _, packs = case.dump(case.config([source], data, {"micro_batches": 40}), f"drop-{drop}")
        documents = [document for pack in packs for document in pack.documents]
        drawn = [document for document in documents if document[-1] == "noised"]
        empty = [document for document in drawn if document[:2] == [BOS, BOI]]
        found = len(drawn) / len(documents)
        check(abs(found - share) <= binomial(share, len(documents)), f"{found:.3f} are drawn, not {share}")
        found = len(empty) / len(drawn)
        check(abs(found - drop) <= binomial(drop, len(drawn)), f"{found:.3f} have no caption, not {drop}")
        described = [document for document in documents if document[-1] != "noised"]
        check(all(words(document) for document in described), "a described image lost its caption")


def is_held_out(value, fraction):
    """data/source.h's sample_is_held_out once more."""
    mask = (1 << 64) - 1
    h = 0xCBF29CE484222325
    for byte in value.encode():
        h = (h ^ byte) * 0x100000001B3 & mask
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask
    h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
    h ^= h >> 31
    return (h >> 11) / 2**53 < fraction


def test_held_out(case):
    """The split goes by data.held_out_by and data.held_out; evaluation and training share nothing."""
    style = lambda i: f"style {i % 20}"
    captions = [f"{i:03} {'z' if is_held_out(style(i), 0.4) else 'a'}" for i in range(100)]
    source = case.pictures("styles", captions, fields=lambda i: {"style": style(i)})
    out = {caption for i, caption in enumerate(captions) if is_held_out(style(i), 0.4)}
    check(20 < len(out) < 60, f"{len(out)} held out")
    data = {"held_out": 0.4, "held_out_by": "style", "cfg_drop": 0}
    _, _, packs = case.dump(case.config([source], data, {"micro_batches": 20}))
    trained = {words(document) for pack in packs for document in pack.documents}
    check(trained == set(captions) - out, f"trained on held-out samples: {sorted(trained & out)[:5]}")
    evaluated = case.config([source], data, eval={"every": 0, "documents": 100, "samples": 0})
    said = case.make(evaluated)
    read = set(re.findall(r"\b\d{3} [az]\b", said))
    check(read and read <= out, f"captions that were read: {sorted(read)} of the held-out {sorted(out)[:5]}..\n{said}")
    figures = [row for row in case.rows() if "eval" in row][-1]["eval"]
    check(figures["documents"] == len(out) and figures["of"] == "held_out", f"{figures}")


def test_learnt_tokenizer(case):
    """data.tokenizer = train learns no word of a held-out caption."""
    captions = [("quetzalcoatl " if is_held_out(f"{i:03}.png", 0.5) else "marmalade ") * 4 for i in range(40)]
    source = case.pictures("learnt", captions)
    config = case.config([source], {"tokenizer": "train", "held_out": 0.5, "held_out_by": "key"})
    config["model"]["vocab"] = 320
    case.make(config)
    merges = [line.split() for line in (case.folder / "run/tokenizer.bpe").read_text().splitlines()]
    pieces = {"".join(pair) for pair in merges if len(pair) == 2}
    check(any("marm" in piece for piece in pieces), f"learnt nothing: {sorted(pieces)}")
    check(not any("q" in piece or "z" in piece for piece in pieces), f"learnt held-out words: {sorted(pieces)}")


def main():
    tests = [test for name, test in globals().items() if name.startswith("test_")]
    for test in tests:
        folder = Path(tempfile.mkdtemp())
        try:
            test(Case(sys.argv[1], folder))
        except AssertionError as error:
            print(f"{test.__name__}: FAILED: {error}")
            return 1
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(tests)} tests of what a run makes of its data")
    return 0


if __name__ == "__main__":
    sys.exit(main())
