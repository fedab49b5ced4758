#!/usr/bin/env bash
# The command line: what must be refused is refused with exit code 2, a message and nothing created; what needs no data
# works without any.
set -euo pipefail
cd "$(dirname "$0")/../.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
train=$1/train

refused() { # EXPECTED_TEXT ARGS...
  local expect=$1 rc=0
  shift
  "$train" "$@" >"$dir/out" 2>&1 || rc=$?
  if [ "$rc" -ne 2 ] || ! grep -q -- "$expect" "$dir/out" || ! grep -q 'hint:' "$dir/out"; then
    echo "expected exit 2 and '$expect' with a hint from: $*"
    cat "$dir/out"
    exit 1
  fi
}

run=(--run-dir "$dir/run")
refused 'unknown flag --bogus' configs/demo.json --bogus
for flag in --lr --learning-rate --train.lr; do
  refused "unknown flag $flag" configs/demo.json $flag 1e-3
  grep -q 'hint: --set train.lr=VALUE' "$dir/out"
done
refused 'unknown flag --steps=100' configs/demo.json --steps=100
grep -q 'hint: .* two words: --steps 100$' "$dir/out"
for out in cat.jpg cat.WEBP; do
  refused "drawings are PNG files" configs/demo.json --sample x --out "$dir/no/$out"
done
refused "cannot write $dir/no/x.PNG: No such file" configs/demo.json --sample x --out "$dir/no/x.PNG"
refused 'cannot open the folder README.md' configs/demo.json --set 'data.sources=[{"type":"folder","path":"README.md"}]'
grep -q 'hint: .* a .tar is of type webdataset' "$dir/out"
refused 'no file in docs ends in .tar' configs/demo.json --set 'data.sources=[{"type":"webdataset","path":"docs"}]'
grep -q 'hint: .* is of type folder' "$dir/out"
refused 'a second config on the command line: black' configs/demo.json --sample a black cat
grep -q 'hint: .*in quotes' "$dir/out"
refused 'needs a value' configs/demo.json --steps
refused 'exclude each other' configs/demo.json --resume --from x
refused 'exclude each other' configs/demo.json --plan --eval
refused 'no/such.json' no/such.json
refused 'train.lr' configs/demo.json --set train.lr=-1
refused 'train.steps' configs/demo.json --set train.stepz=1
CUDA_VISIBLE_DEVICES='' refused 'device cuda:' configs/demo.json --device cuda
"$train" configs/demo.json --device cuda --print-config >"$dir/config"
grep -q 'run.device .*flag .*cuda' "$dir/config"
for flag in --from --init --dump --out --run-dir; do
  refused "$flag needs a value, and got --resume" configs/demo.json $flag --resume
done
: >"$dir/file"
for flag in --trace --dump '--eval --out' '--sample x --out'; do # unquoted: flags of their own
  refused "cannot write $dir/file/x.png: Not a directory" configs/demo.json "${run[@]}" $flag "$dir/file/x.png"
done
refused "--trace: cannot write $dir: Is a directory" configs/demo.json "${run[@]}" --trace "$dir"
refused "--trace: cannot write $dir/no/trace: No such file" configs/demo.json "${run[@]}" --trace "$dir/no/trace"
refused "--out: cannot write $dir/no/x.png: No such file" configs/demo.json "${run[@]}" --eval --out "$dir/no/x.png"
refused "--dump: cannot write $dir/file: Not a directory" configs/demo.json "${run[@]}" --dump "$dir/file"
refused 'go with training alone' configs/demo.json "${run[@]}" --eval --trace "$dir/trace"
refused 'data.sources' configs/base.json "${run[@]}"
refused 'no/shapes.tar' configs/demo.json "${run[@]}" --set 'data.sources=[{"type":"webdataset","path":"no/shapes.tar"}]'
refused 'no checkpoint' configs/demo.json "${run[@]}" --eval
refused 'budget' configs/base.json --plan --set memory.budget_gb=1
grep -q 'activations (arena)' "$dir/out" # the table all the same
refused 'memory.per_tensor' configs/demo.json --plan --set 'memory.per_tensor={"x":"recompute"}'
for key in memory.budget_gb memory.host_gb; do
  refused "$key = 0: must be a number from 1e-06 to 1000000 or auto" configs/demo.json --plan --set "$key=0"
done
# Memory is held against its budget before the data is opened, and by --print-config as far as it can be known.
none=(--set 'data.sources=[{"type": "webdataset", "path": "no/shapes.tar"}]')
refused 'memory.per_tensor: there is no saved tensor "y"' configs/demo.json "${run[@]}" "${none[@]}" --set 'memory.per_tensor={"y":"keep"}'
refused 'more than the 0.010 GB of memory.budget_gb' configs/demo.json "${run[@]}" "${none[@]}" --set memory.budget_gb=0.01
refused 'memory.per_tensor: there is no saved tensor "y"' configs/demo.json --print-config --set 'memory.per_tensor={"y":"keep"}'
refused 'more than the 0.010 GB of memory.budget_gb' configs/demo.json --print-config --set memory.budget_gb=0.01
refused 'nothing fits' configs/demo.json --tokens max --plan --set memory.budget_gb=0.05
[ ! -e "$dir/run" ] && [ ! -e "$dir/no" ] && [ ! -s "$dir/file" ] || { echo "a refused run left its folder"; exit 1; }

for config in configs/*.json; do
  "$train" "$config" --plan --set memory.budget_gb=1000 >"$dir/plan"
  grep -q 'activations (arena)' "$dir/plan"
  "$train" "$config" --print-config >"$dir/config"
  grep -q 'micro_batch_tokens' "$dir/config"
done

# The largest micro-batch is the same wherever the search begins, and 64 slots more do not fit.
max_tokens() { "$train" configs/demo.json "$@" --tokens max --plan --set memory.budget_gb=0.1 2>&1 |
  sed -n 's/^--tokens max: \([0-9]*\) .*/\1/p'; }
most=$(max_tokens --tokens 256)
[ "$most" -gt 256 ]
[ "$(max_tokens --tokens 8192)" = "$most" ]
"$train" configs/demo.json --plan --set memory.budget_gb=0.1 --tokens "$most" >"$dir/plan"
refused 'budget' configs/demo.json --plan --set memory.budget_gb=0.1 --tokens $((most + 64))
"$train" --help >"$dir/help"
grep -q -- 'train.warmup_steps' "$dir/help"

# An output that cannot be written is an error, on a full device as on a closed descriptor.
unwritten() { # ARGS...
  local rc to
  for to in /dev/full closed; do
    rc=0
    if [ $to = closed ]; then "$train" "$@" >&- 2>"$dir/out" || rc=$?; else "$train" "$@" >$to 2>"$dir/out" || rc=$?; fi
    [ $rc -eq 2 ] && grep -q 'error: cannot write to standard output' "$dir/out" && grep -q 'hint:' "$dir/out" ||
      { echo "to $to: exit code $rc, expected 2 and an error from: $*" && cat "$dir/out" && exit 1; }
  done
}
unwritten --help
unwritten configs/demo.json --print-config
unwritten configs/demo.json --plan

# A short run, its lock and its refusal to be overwritten; then its uses.
[ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
short=(--set data.micro_batch_tokens=256 --set eval.documents=4 --set eval.samples=2 --set eval.sampler_steps=2)
"$train" configs/demo.json "${run[@]}" "${short[@]}" --steps 2 2>"$dir/log"
[ -f "$dir/run/samples/step-000002.png" ]
[ -f "$dir/run/ckpt-2/state.json" ]
refused 'already holds checkpoints' configs/demo.json "${run[@]}" "${short[@]}" --steps 2
"$train" "$dir/run" --eval --out "$dir/drawings" >"$dir/eval.json" 2>"$dir/log"
[ -f "$dir/drawings/captions.tsv" ]
[ -f "$dir/drawings/real/0001.png" ]
cmp "$dir/drawings/captions.tsv" "$dir/drawings/real/captions.tsv"
grep -q "^drawn: 2 held-out captions in $dir/drawings, the real images in real/" "$dir/log"
"$train" "$dir/run" --sample "a small red circle" --out "$dir/one.png" 2>"$dir/log"
"$train" "$dir/run" --describe "$dir/one.png" >"$dir/caption" 2>"$dir/log"
printf 'a red square\na blue circle\n' | "$train" "$dir/run" --sample - --out "$dir/two.png" 2>"$dir/log"
! grep -q max_caption "$dir/log" || { echo "a short caption is cut" && exit 1; }
"$train" "$dir/run" --sample "a small red circle $(printf 'é%.0s' {1..90})" --out "$dir/one.png" 2>"$dir/log"
cut='warning: "a small red circle é[^"]*\.\.\." is 1[0-9]* tokens: cut to the first 32 (data.max_caption)'
grep -q "^$cut$" "$dir/log" || { echo "a long caption is cut, and nobody says so" && cat "$dir/log" && exit 1; }
unwritten "$dir/run" --eval
unwritten "$dir/run" --describe "$dir/one.png"
[ -s "$dir/one.png" ]
[ -s "$dir/two.png" ]
refused 'cannot' "$dir/run" --describe no/such.png
refused 'train.steps' "$dir/run" --set train.steps=0
refused 'ckpt-2 is a checkpoint' "$dir/run/ckpt-2" --sample "a small red circle"
# A run folder's config in another folder: the flag counts, the folder that the saved config names does not.
refused 'elsewhere has no checkpoint' "$dir/run" --run-dir "$dir/elsewhere" --eval
"$train" "$dir/run" --run-dir "$dir/elsewhere" --steps 3 --from "$dir/run/ckpt-2" 2>"$dir/log"
[ -f "$dir/elsewhere/ckpt-3/state.json" ]
[ ! -e "$dir/run/ckpt-3" ]
mv "$dir/elsewhere" "$dir/moved"
"$train" "$dir/moved" --sample "a small red circle" 2>"$dir/log"
[ -s "$dir/moved/samples/drawn.png" ]
[ ! -e "$dir/elsewhere" ]
"$train" configs/demo.json --run-dir "$dir/idle" "${short[@]}" --steps 1 --device cpu --adaln unfused --graph off 2>"$dir/log"
grep -q 'kernels.adaln unfused changes nothing on the cpu' "$dir/log"
grep -q 'kernels.graph and kernels.pdl change nothing' "$dir/log"
"$train" configs/demo.json --run-dir "$dir/tuned" "${short[@]}" --steps 1 --init "$dir/run/ckpt-2" --memory offload \
  --trace "$dir/tuned/trace.json" 2>"$dir/log"
# The trace, in a folder that was made first: lanes have ops, those of the compute lane lie in
# their program, and programs follow each other.
"${PYTHON:-/usr/bin/python3}" - "$dir/tuned/trace.json" <<'P'
import json, sys
events = json.load(open(sys.argv[1]))["traceEvents"]
lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
assert list(lanes.values()) == ["compute", "device to host", "host to device", "update"], lanes
slices = [(e["tid"], e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e["ph"] == "X"]
programs = [s for s in slices if s[3].startswith(("train", "update"))]
assert [p[3] for p in programs] == ["train first", "update with ema"], programs
assert abs(programs[1][1] - programs[0][2]) < 0.01, programs
ops = [s for s in slices if s not in programs]
assert {op[0] for op in ops} == {0, 1, 2}, "the update has a lane of its own when it is asked for"
assert all(any(p[1] <= op[1] and op[2] <= p[2] for p in programs) for op in ops)
copies = [e for e in events if e["ph"] == "X" and e["tid"]]
for e in copies: # what went over the link, and at which rate
    assert e["args"]["bytes"] > 0 and "GFLOP/s" not in e["args"], e
    assert e["dur"] < 1 or abs(e["args"]["GB/s"] * e["dur"] * 1e3 / e["args"]["bytes"] - 1) < 0.2, e
assert sum(e["args"]["bytes"] for e in copies if e["tid"] == 1) == sum(e["args"]["bytes"] for e in copies if e["tid"] == 2)
P
"$train" configs/demo.json "${run[@]}" "${short[@]}" --steps 3 --from "$dir/run/ckpt-2" 2>"$dir/log"
[ -f "$dir/run/ckpt-3/state.json" ]

# Arrays that the model sizes lie on no stack: heads of 1024 and thousands of experts run on a small one.
wide=(--set model.layers=1 --set model.dim=32 --set model.heads=64 --set model.kv_heads=1 --set model.head_dim=1024
  --set model.text.experts=4096 --set model.text.expert_dim=4 --set model.image.experts=1024 --set model.image.expert_dim=4)
(ulimit -s 512 && "$train" configs/demo.json --run-dir "$dir/wide" "${short[@]}" "${wide[@]}" --steps 1 \
  --set eval.documents=0 2>"$dir/log") || { tail -3 "$dir/log"; exit 1; }

# Closed descriptors: what is said goes nowhere, least of all into a file of the run.
for closed in '2>&-' '<&- 2>&-' '<&- >&- 2>&-'; do
  rm -rf "$dir/closed"
  rc=0
  (eval "exec $closed" && exec "$train" configs/demo.json --run-dir "$dir/closed" "${short[@]}" --steps 2) || rc=$?
  said=$(grep -rlaE '^(step |eval of|run folder)' "$dir/closed" || true)
  if [ $rc -ne 0 ] || [ -n "$said" ] || [ ! -f "$dir/closed/ckpt-2/state.json" ] ||
    grep -qvE '^[0-9]+$' "$dir/closed/lock" || grep -qv '^{.*}$' "$dir/closed/metrics.jsonl"; then
    echo "$closed: exit code $rc, the log is in: $said" && exit 1
  fi
done
echo "command line: all as it should be"
