#!/usr/bin/env bash
# scripts/infer.py against the engine: the same pictures and captions from the same seed, for two tiny runs that between
# them have every choice of the model; and what else is said of drawing and of the files of a checkpoint.
#   tests/scripts/infer.sh BUILD_FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-/usr/bin/python3}
"$python" -c 'import torch' 2>/dev/null || { echo "$python has no torch (python3-torch)" && exit 77; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
[ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar

tiny=(configs/demo.json --tokens 256 --steps 2 --set model.dim=48 --set model.layers=2 --set model.head_dim=16
  --set model.cond_dim=32 --set train.lr=1e-2 --set train.warmup_steps=5 --set checkpoint.every=0 --set eval.documents=1
  --set eval.samples=0 --set eval.sampler=euler --set eval.sampler_steps=6 --set eval.guidance=3)
other=(--set model.attn_per_modality=true --set model.tie_embeddings=true --set model.patch_bottleneck=20
  --set model.text.shared_dim=24 --set model.image.shared_dim=16 --set model.text.experts=3 --set model.text.top_k=1
  --set model.image.top_k=1 --set model.kv_heads=1 --set model.patch=4 --set eval.sampler=heun --set train.ema=0
  --set data.tokenizer=bytes --set data.image_mode=aspect --set data.max_caption=20 --set eval.guidance_from=0.4
  --set flow.t_mean=-2 --set flow.t_uniform=0.002)
for run in plain other; do
  flags=("${tiny[@]}")
  [ $run = plain ] || flags+=("${other[@]}")
  "$1/train" "${flags[@]}" --run-dir "$dir/$run" 2>"$dir/log" || { tail -5 "$dir/log" && exit 1; }
done
"$python" tests/scripts/fixed_weights.py "$dir"/{plain,other}/ckpt-2 # what is drawn does not hang on what was learned

TRAIN=$1/train DIR=$dir "$python" - <<'PY'
import io, json, os, pathlib, pty, subprocess, sys
import numpy as np, torch

sys.path.insert(0, "scripts")
sys.dont_write_bytecode = True
import infer

folder, binary = pathlib.Path(os.environ["DIR"]), os.environ["TRAIN"]
torch.set_num_threads(1)


def train(run, *flags, rc=0):
    done = subprocess.run([binary, folder / run, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == rc, (flags, done.returncode, done.stderr)
    return done.stderr.decode() if rc else done.stdout[:-1]


def difference(a, b):
    return abs(a.astype(int) - b.astype(int)).mean()


def refused(text, *flags):
    assert text in (said := train("plain", *flags, rc=2)), (flags, said)


engine, ours = str(folder / "engine.png"), str(folder / "ours.png")
captions = ["a small red circle at the top left on black", "", "Zoë's 12½ «naïve»  cafés!\t日本 don't", "7"]
pictures, texts, worst = {}, [], 0
wide = np.arange(24 * 40 * 3).reshape(24, 40, 3).astype(np.uint8)  # 6 x 10 patches of `other`, which keeps the aspect
for name in ("plain", "other"):
    run = infer.Run(folder / name, [])
    for seed, caption in enumerate(captions, 1 << 33):  # a key of two words
        train(name, "--sample", caption, "--out", engine, "--seed", str(seed))
        with torch.inference_mode():
            infer.png_write(ours, infer.draw(run, caption, seed))
        picture, mine = infer.png_read(engine), infer.png_read(ours)
        worst = max(worst, difference(picture, mine))
        assert difference(picture, mine) <= 0.05, (name, caption, difference(picture, mine))
        assert picture.std() > 20, (name, caption, "a picture of nothing proves nothing")
        pictures[name, caption] = picture
        if name == "other" and not caption:
            infer.png_write(ours, wide)
            assert infer.image_read(ours, run.config).shape == wide.shape
        for temperature in ("0", "0.8", "1.5"):
            keys = [f"eval.temperature={temperature}", "eval.top_p=0.9"]
            flags = [flag for key in keys for flag in ("--set", key)]
            said = train(name, "--describe", ours, "--seed", str(seed), *flags)
            run_there = infer.Run(folder / name, keys)
            with torch.inference_mode():
                read = infer.describe(run_there, infer.image_read(ours, run_there.config), seed)
            assert said == read, (name, caption, temperature, said, read)
            texts.append(said)
    with torch.inference_mode():  # what must make a difference does
        first = infer.draw(run, captions[0], 1 << 33)
        assert difference(first, infer.draw(run, captions[0], 1)) > 3
        assert difference(first, infer.draw(run, captions[3], 1 << 33)) > 1
assert len(set(texts)) > len(texts) // 2, texts

# The files of a checkpoint.
for name, weights in (("plain", "ema"), ("plain", "model"), ("other", "model")):
    checkpoint = folder / name / "ckpt-2"
    data = (checkpoint / f"{weights}.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = (checkpoint / "config.json").read_text()
    assert header["__metadata__"] == {"format": "pt", "config.json": text}
    ours, theirs = json.loads(text), infer.Run(folder / name, []).config["model"]
    assert ours["model_type"] == "tessera" and ours["architectures"]
    assert [ours["vocab_size"], ours["hidden_size"]] == header["embed.weight"]["shape"]
    assert ours["bos_token_id"] == ours["vocab_size"] - 4 and ours["eoi_token_id"] == ours["vocab_size"] - 1
    for modality in ("text", "image"):
        e = ours[modality]
        shape = [e["num_experts"], ours["hidden_size"], e["moe_intermediate_size"]]
        assert shape == header[f"layers.1.{modality}.experts.w2"]["shape"]
        assert e["num_experts_per_tok"] == theirs[modality]["top_k"]
        assert e["shared_expert_intermediate_size"] == theirs[modality]["shared_dim"]
    assert ours["tie_word_embeddings"] == ("head.weight" not in header) == (name == "other")
    assert ours["attention_per_modality"] == ("layers.0.attn.qkv.weight" not in header)

# Drawing k of a caption is that of seed + k, whatever is drawn with it; a sheet and a folder.
lines = subprocess.PIPE
sampling = [binary, folder / "plain", "--sample", "-", "--count", "3", "--seed", "5", "--out"]
for out in ("sheet.png", "drawings"):
    subprocess.run([*sampling, folder / out], input=b"a red square\nthe other one\n", stderr=lines, check=True)
train("plain", "--sample", "a red square", "--seed", "7", "--out", engine)
assert (folder / "drawings/0002.png").read_bytes() == pathlib.Path(engine).read_bytes()
names = [line.split("\t") for line in (folder / "drawings/captions.tsv").read_text().splitlines()]
assert names == [[f"{i:04}.png", ["a red square", "the other one"][i // 3]] for i in range(6)]
sheet = infer.png_read(folder / "sheet.png")
assert sheet.shape[1] < 3 * (64 + 8) + 24 and sheet.shape[0] > 2 * 64, sheet.shape
refused("--count 0 is not a positive number", "--sample", "x", "--count", "0")
refused("--count 2x is not a positive number", "--sample", "x", "--count", "2x")
refused("--count goes with --sample", "--eval", "--count", "2")
refused("more than 4096", "--sample", "x", "--count", "5000")

# At a terminal captions are drawn as they are typed, into files of their own.
host, terminal = pty.openpty()
talk = subprocess.Popen([binary, folder / "plain", "--sample", "-"], stdin=terminal, stderr=lines)
os.write(host, b"a red square\na red square\n\n")
said = talk.communicate()[1].decode()
assert talk.returncode == 0 and said.count("caption> ") == 3, said
drawn = [folder / f"plain/samples/drawn-{i:04}.png" for i in (1, 2)]
assert all(f"{path} (--seed {seed})" in said for seed, path in enumerate(drawn, 1)), said
assert difference(*map(infer.png_read, drawn)) > 3

# The script by itself: the picture goes where ./train puts it.
(folder / "plain/samples/drawn.png").unlink(missing_ok=True)
said = subprocess.run([sys.executable, "scripts/infer.py", folder / "plain", "--sample", "x"], stderr=lines, check=True)
assert said.stderr.decode() == f"drawn: {folder}/plain/samples/drawn.png\n", said.stderr
assert infer.png_read(folder / "plain/samples/drawn.png").shape == (32, 32, 3)

# Damage to the text of a checkpoint is damage.
path = folder / "plain/ckpt-2/config.json"
path.write_text(path.read_text().replace("tessera", "tesserb"))
refused("none of the 1 checkpoints", "--sample", "x")
path.unlink()
refused("none of the 1 checkpoints", "--sample", "x")
print(f"{len(pictures)} pictures within {worst:.3f} of 255, {len(texts)} captions, all else as said")
PY
