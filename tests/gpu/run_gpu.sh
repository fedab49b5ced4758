#!/usr/bin/env bash
# The proof that a GPU trains what the CPU does, one test a line: tests/gpu/run_gpu.sh BUILD
# It needs BUILD/train, BUILD/tests/cuda_ops, cuda_model, cuda_large and cuda_group, and python3 with numpy; nothing is
# built here.
# One test needs BUILD/tests/cuda_calls.so and CUPTI, and is skipped without them.
# The last line is "N passed, N failed[, N skipped]". Exit code 1 when anything failed, 77 where there is no GPU. About
# three minutes on an H100. BUILD/logs keeps what each test said, BUILD/logs/curves the losses of CPU and GPU.
set -u
cd "$(dirname "$0")/../.." || exit 2
build=$1
train=$build/train
logs=$build/logs/gpu
curves=$build/logs/curves
python=${PYTHON:-/usr/bin/python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000} # as ./train sets for itself
# shellcheck source=tests/count.sh
. tests/count.sh

limited() { # SECONDS COMMAND...; a test that hangs is a failed one
  local seconds=$1 rc=0
  shift
  timeout --kill-after=10 "$seconds" "$@" || rc=$?
  [ $rc -ne 124 ] || echo "error: no end within $seconds s"
  return $rc
}

# Trains into $work/NAME and says why when that fails.
demo() { # NAME FLAG...
  local name=$1
  shift
  limited 120 "$train" configs/demo.json --run-dir "$work/$name" --set eval.samples=0 --set checkpoint.every=0 "$@" \
    2>"$work/$name.log" || { echo "$name: $*" && tail -5 "$work/$name.log" && return 1; }
}

# ---- the same bits ----

# However the step is run: twice; op by op; with copies in the kernels' own queue; whatever is kept, computed again or
# offloaded; each tensor in memory of its own; whatever of the optimizer's state lies on the host; wherever gradients of
# a step's only micro-batch lie.
same_bits() {
  # shellcheck disable=SC2034 # named to same_ways
  local -A two=([again]="" [graph_off]="--graph off" [single]="--streams single" [recompute]="--memory recompute"
    [offload]="--memory offload" [offload_single]="--memory offload --streams single"
    [no_arena]="--memory offload --set memory.arena=false" [ema]="--set memory.state=ema"
    [moments]="--set memory.state=moments" [gradients]="--set memory.state=gradients"
    [gradients_offload]="--memory offload --set memory.state=gradients"
    [gradients_single]="--graph off --streams single --set memory.state=gradients"
    [pdl_off]="--set kernels.pdl=false" [pdl_graph_off]="--set kernels.pdl=false --graph off"
    [pdl_gradients]="--set kernels.pdl=false --memory offload --set memory.state=gradients")
  # shellcheck disable=SC2034
  local -A one=([apart]="--set memory.share_gradients=false" [shared_graph_off]="--graph off"
    [shared_offload]="--memory offload" [shared_moments]="--memory recompute --set memory.state=moments"
    [gradients_of_one]="--set memory.state=gradients" [no_arena_of_one]="--set memory.arena=false")
  same_ways 2 two && same_ways 1 one
}
same_ways() { # MICRO_BATCHES TABLE: its rows' flags against none
  local steps=20 file name first=first_of_$1
  local -n ways=$2
  local flags=(--device cuda --stop-at "$steps" --memory keep --set train.micro_batches="$1" --set eval.every=0
    --set eval.documents=0)
  demo "$first" "${flags[@]}" || return
  for name in "${!ways[@]}"; do
    # shellcheck disable=SC2086 # a list of flags
    demo "$name" "${flags[@]}" ${ways[$name]} || return
    for file in model ema optimizer-0x1; do
      cmp "$work/$first/ckpt-$steps/$file.safetensors" "$work/$name/ckpt-$steps/$file.safetensors" || return
    done
  done
  echo "$steps steps, $((${#ways[@]} + 1)) ways (${!ways[*]}): the same weights, EMA and moments"
}

# Kernels that begin before the one before has ended: those of a tiny model leave the most room for that, so that one
# which reads too early would most likely read something else. Three times 200 steps, by graphs.
early_launches() {
  local name steps=200 flags=(--device cuda --steps 200 --memory keep --set memory.arena=true --graph on)
  for name in off on_1 on_2 on_3; do
    limited 60 "$train" tests/gpu/gpu_tiny.json --run-dir "$work/early_$name" "${flags[@]}" \
      --set kernels.pdl="${name%_*}" 2>"$work/log" || { tail -5 "$work/log" && return 1; }
    cmp "$work/early_off/ckpt-$steps/model.safetensors" "$work/early_$name/ckpt-$steps/model.safetensors" || return
  done
  echo "$steps steps with kernels.pdl, three times: the weights of launches one behind the other"
}

# With state on the host: evaluations with the EMA, hashes of gradients, a resume and --eval say the same as without.
state_on_host() {
  local state flags=(--device cuda --memory keep --set train.micro_batches=3 --set train.verify_every=2
    --set eval.every=5 --set eval.documents=32)
  for state in device gradients; do
    demo "state_$state" "${flags[@]}" --set memory.state=$state --stop-at 5 || return
    demo "state_$state" "${flags[@]}" --set memory.state=$state --stop-at 10 --resume || return
    limited 60 "$train" "$work/state_$state" --device cuda --eval --set memory.state=$state >"$work/eval.$state" \
      2>"$work/log" || { tail -5 "$work/log" && return 1; }
  done
  cmp "$work/eval.device" "$work/eval.gradients" || return
  cmp "$work/state_device/ckpt-10/optimizer-0x1.safetensors" "$work/state_gradients/ckpt-10/optimizer-0x1.safetensors" ||
    return
  for state in device gradients; do
    grep '"eval"' "$work/state_$state/metrics.jsonl" >"$work/evals.$state"
  done
  cmp "$work/evals.device" "$work/evals.gradients" || return
  [ "$(wc -l <"$work/evals.device")" = 2 ] || { echo "there are not two evaluations" && return 1; }
  grep -q 'EMA, moments and gradients on the host' "$work/state_gradients.log" || { echo "nothing left" && return 1; }
  echo "two evaluations, a resume and --eval: the same with EMA, moments and gradients on the host"
}

# Other kernels for the same ops: the same losses within rounding.
ablations() {
  local name flags=(--device cuda --stop-at 20 --set eval.every=0 --set eval.documents=0)
  demo plain "${flags[@]}" || return
  demo adaln_unfused "${flags[@]}" --adaln unfused || return
  demo moe_gemm_loop "${flags[@]}" --moe-gemm loop || return
  demo moe_gemm_grouped "${flags[@]}" --moe-gemm grouped || return
  demo tiles "${flags[@]}" --set kernels.tiles.text=256 --set kernels.tiles.image=128 || return
  "$python" - "$work" plain adaln_unfused moe_gemm_loop moe_gemm_grouped tiles <<'P'
import json, sys

folder, plain, *others = sys.argv[1:]
AT_MOST = 0.02


def column(run, key):
    return [row.get(key) for row in map(json.loads, open(f"{folder}/{run}/metrics.jsonl")) if "loss" in row]


def losses(run):
    return column(run, "loss")


want, said, bad = losses(plain), [], False
mfu = column(plain, "mfu")
if not all(x is not None and 0 < x < 1 for x in mfu):
    sys.exit(f"{plain}: a step's share of what the data sheet promises cannot be {mfu}")
for run in others:
    got = losses(run)
    worst = max(abs(a - b) / b for a, b in zip(got, want)) if len(got) == len(want) else float("inf")
    said.append(f"{run} {100 * worst:.3f}%")
    bad |= not worst <= AT_MOST
print(f"largest difference of the loss in {len(want)} steps: {', '.join(said)} (may be {100 * AT_MOST:.0f}%); "
      f"MFU at most {100 * max(mfu):.2f}%")
sys.exit(bad)
P
}

# ---- what a run is for ----

same_curves() {
  local device
  mkdir -p "$curves"
  for device in cpu cuda; do
    demo $device --device $device --steps 300 --set eval.every=300 || return
    mkdir -p "$curves/$device"
    cp "$work/$device/metrics.jsonl" "$curves/$device"
  done
  "$python" tests/gpu/curves.py "$curves/cpu" "$curves/cuda" "$curves/cpu_and_cuda.svg"
}

# The run of same_curves, used: both devices must agree on what it learned, and a drawing has the same bits twice.
use_run() {
  local device name
  [ -d "$work/cuda" ] || { echo "there is no run to use: same_curves failed" && return 1; }
  for device in cpu cuda; do
    limited 60 "$train" "$work/cuda" --device $device --eval >"$work/eval.$device" 2>"$work/log" ||
      { tail -5 "$work/log" && return 1; }
  done
  for name in one two; do
    limited 60 "$train" "$work/cuda" --device cuda --sample "a small red circle at the top left on black" \
      --out "$work/$name.png" 2>"$work/log" || { tail -5 "$work/log" && return 1; }
  done
  cmp "$work/one.png" "$work/two.png" || return
  "$python" - "$work/eval.cpu" "$work/eval.cuda" <<'P'
import json, re, sys

AT_MOST = 0.02
cpu, cuda = (json.loads(re.search(r"\{.*\}", open(path).read(), re.S)[0]) for path in sys.argv[1:])
cpu, cuda = (figures.get("eval", figures) for figures in (cpu, cuda))
keys = ("flow", "caption_bits_per_byte")
worst = max(abs(cuda[k] - cpu[k]) / abs(cpu[k]) for k in keys)
print("a run of the GPU, evaluated on CPU and GPU: " + ", ".join(f"{k} {cpu[k]:.4f} and {cuda[k]:.4f}" for k in keys)
      + f": {100 * worst:.2f}% apart (may be {100 * AT_MOST:.0f}%); a drawing has the same bits twice")
sys.exit(not worst <= AT_MOST)
P
}

# ---- what a step asks of the driver ----

# Two graphs and a few copies: nothing is allocated, and the host waits only for what earlier steps left behind.
driver_calls() {
  local library=$build/tests/cuda_calls.so
  if [ ! -f "$library" ] || ldd "$library" | grep -q 'not found'; then
    echo "there is no CUPTI, which is a part of the CUDA toolkit" && return 77
  fi
  CUDA_INJECTION64_PATH=$library CUDA_CALLS=$work/calls.txt \
    demo calls --device cuda --stop-at 60 --set eval.every=0 --set eval.documents=0 || return
  "$python" - "$work/calls.txt" <<'P'
import re, statistics, sys
from collections import Counter

STEPS = 30  # of the last ones; the final checkpoint follows them
lines = open(sys.argv[1]).read().split("\n")
calls = [line for line in lines if line and not line.startswith("graph ")]
graphs = sorted(tuple(map(int, line.split()[1:])) for line in lines if line.startswith("graph "))
launches = [i for i, name in enumerate(calls) if name.startswith("cuGraphLaunch")]
# Before the first step more of them are timed, and the second step's update is launched op by op.
assert len(launches) == len(graphs) >= 119, f"{len(launches)} graphs launched and {len(graphs)} traced in 60 steps"
steps = Counter(calls[launches[-2 * STEPS - 1] + 1 : launches[-1] + 1])
allowed = r"cu(GraphLaunch|Memcpy\w*Async|EventRecord|EventSynchronize|EventElapsedTime|StreamWaitEvent)\w*"
others = [name for name in steps if not re.fullmatch(allowed, name)]
print("a step: " + ", ".join(f"{n / STEPS:g} {name}" for name, n in steps.most_common()))
between = [begin - end for (_, end), (begin, _) in zip(graphs, graphs[1:])][-2 * STEPS :]
took = statistics.median(end - begin for begin, end in graphs[-2 * STEPS :: 2])
print(f"from a step's passes ({took / 1e3:.0f} us) to its update {statistics.median(between[1::2]) / 1e3:.1f} us, "
      f"to the next step's passes {statistics.median(between[::2]) / 1e3:.1f} us (medians, traced)")
if others:
    sys.exit(f"a step allocates, waits or loads: {', '.join(others)}")
if steps["cuEventSynchronize"] > 2 * STEPS:
    sys.exit("a step waits for more than a pinned buffer of two steps before and the results of the step before")
P
}

# ---- the plan ----

# Ops are timed before the first step of a run, and again only where a step does not take what follows from that. Steps
# are long enough for launches not to decide.
predicted() {
  local flags=(--device cuda --memory auto --tokens 32768 --set train.micro_batches=2 --set eval.every=0
    --set eval.documents=0)
  demo planned "${flags[@]}" --stop-at 10 || return
  cp "$work/planned.log" "$work/timed.log"
  demo planned "${flags[@]}" --stop-at 20 --resume || return
  grep -q 'kinds of ops timed' "$work/timed.log" || { echo "no ops were timed" && return 1; }
  ! grep 'kinds of ops timed' "$work/planned.log" || grep -q 'ops are timed again' "$work/planned.log" ||
    { echo "they were timed twice" && return 1; }
  "$python" - "$work/planned/costs.json" "$work/timed.log" "$work/planned.log" <<'P'
import json, re, sys

AT_MOST = 0.05
worst = 0
link = json.load(open(sys.argv[1]))["link"]
print(", ".join(f"{way} {rate / 1e9:.1f} GB/s" for way, rate in link.items() if way != "latency")
      + f", {link['latency'] * 1e6:.1f} us a copy besides")
for way in ("d2h", "h2d"):
    assert 1e9 < link["both_" + way] <= 1.05 * link[way] < 1e12, f"{way}: no link is like that"
for path in sys.argv[2:]:
    # The last comparison: where the first one is off, ops are timed again.
    said = [*re.finditer(r"a step: predicted ([\d.]+) ms, measured ([\d.]+) ms.*", open(path).read())][-1]
    print(said[0])
    worst = max(worst, abs(float(said[2]) / float(said[1]) - 1))
sys.exit(not worst <= AT_MOST)
P
}

# ---- several processes ----

launch=(mpirun --allow-run-as-root --oversubscribe --bind-to none)

has_mpi() {
  mpirun --version >/dev/null 2>&1 && grep -q '^HAVE_MPI := .' "$build/probes.mk" && return
  echo "there is no mpirun, or this build found no MPI to build with" && return 1
}

# Collectives alone: two and three processes that share this GPU, and NCCL with one.
group() {
  local n
  has_mpi || return 77
  for n in 2 3; do
    limited 60 "${launch[@]}" -np $n "$build/tests/cuda_group" host >"$work/said" 2>&1 || { cat "$work/said" && return 1; }
    tail -1 "$work/said"
  done
  limited 60 "$build/tests/cuda_group" nccl >"$work/said" 2>&1 && tail -1 "$work/said" && return
  grep 'there is no libnccl' "$work/said" && return 77
  cat "$work/said"
  return 1
}

several() { # PROCESSES NAME FLAG...: as demo
  local alone=$train train=$work/several
  printf '#!/bin/sh\nexec %s -np %s %s "$@"\n' "${launch[*]}" "$1" "$alone" >"$train"
  chmod +x "$train"
  shift
  demo "$@"
}

# Processes that share this GPU train as one that takes their micro-batches in turn, within rounding, whatever
# parallel.zero is; twice they have the same bits, also with a stop between.
ranks() {
  local n zero steps=20
  local flags=(--device cuda --memory keep --set eval.every=0 --set eval.documents=0 --set parallel.collectives=host
    --set train.ema_every=2 --set train.clip=0.5)
  has_mpi || return 77
  for n in 2 3; do
    demo alone$n "${flags[@]}" --stop-at $steps --set train.micro_batches=$n || return
    for zero in 0 1 2; do
      several $n zero$n$zero "${flags[@]}" --stop-at $steps --set parallel.zero=$zero || return
    done
    several $n again$n "${flags[@]}" --stop-at 7 || return
    several $n again$n "${flags[@]}" --stop-at $steps --resume --set checkpoint.copy=never || return
    demo mixed$n "${flags[@]}" --stop-at 7 --set train.micro_batches=$n || return
    several $n mixed$n "${flags[@]}" --stop-at $steps --resume --set train.micro_batches=1 || return
    "$python" tests/scripts/same_state.py "$work/zero${n}1/ckpt-$steps" "$work/again$n/ckpt-$steps" || return
  done
  grep -q "through the host's memory" "$work/zero21.log" || { echo "not through the host" && return 1; }
  "$python" - "$work" <<'P'
import json, sys

AT_MOST, FIRST = 0.01, 1e-5  # of the first step, before rounding makes other routes of some tokens
worst = first = 0
for n in 2, 3:
    losses, norms = {}, {}
    for run in f"alone{n}", f"zero{n}0", f"zero{n}1", f"zero{n}2", f"again{n}", f"mixed{n}":
        rows = [json.loads(line) for line in open(f"{sys.argv[1]}/{run}/metrics.jsonl")]
        losses[run] = [row["loss"] for row in rows if "loss" in row]
        norms[run] = next(row["grad_norm"] for row in rows if "loss" in row)
    want, norm = losses[f"alone{n}"], norms[f"alone{n}"]
    for run, got in losses.items():
        first = max(first, abs(got[0] / want[0] - 1), abs(norms[run] / norm - 1))
        assert len(got) == len(want) == 20, (run, len(got))
        worst = max(worst, *(abs(a - b) / b for a, b in zip(got, want)))
print(f"2 and 3 processes, parallel.zero 0, 1 and 2, stopped and resumed, begun by one: losses {100 * worst:.4f}% apart "
      f"at most (may be {100 * AT_MOST:.0f}%), the first one and its norm {first:.1e}; two runs have the same bits")
sys.exit(not (worst <= AT_MOST and first <= FIRST))
P
}

# More processes than GPUs, without saying that they share one.
ranks_refused() {
  has_mpi || return 77
  says 2 'processes have the GPU .* to themselves' 'hint: .*parallel.collectives=host' -- \
    "${launch[@]}" -np "$(($(nvidia-smi -L | wc -l) + 1))" "$train" configs/demo.json --device cuda \
    --run-dir "$work/refused" || return
  [ ! -e "$work/refused" ] || { echo "a run that is refused left a folder" && return 1; }
  grep -m 1 '^error' "$work/said"
}

# ---- messages ----

# A command that must end with an exit code and say each pattern, and not by a signal.
says() { # EXIT_CODE PATTERN... -- COMMAND...
  local code=$1 rc=0 patterns=() pattern
  shift
  while [ "$1" != -- ]; do patterns+=("$1") && shift; done
  shift
  limited 60 "$@" >"$work/said" 2>&1 || rc=$?
  [ $rc -eq "$code" ] || { tail -5 "$work/said" && echo "$*: exit code $rc, expected $code" && return 1; }
  for pattern in "${patterns[@]}"; do
    grep -q -- "$pattern" "$work/said" || { tail -5 "$work/said" && echo "$*: does not say \"$pattern\"" && return 1; }
  done
}

out_of_memory() {
  says 2 'alive at the fullest moment' 'are needed' 'the largest: .* x ' 'more than the 0.010 GB of memory.budget_gb' \
    'hint:' -- \
    "$train" configs/demo.json --device cuda --run-dir "$work/budget" --set memory.budget_gb=0.01 || return
  # A plan may be for another machine: what this one's host has no memory for is a warning.
  says 0 '^warning: .* GB are to lie in this machine.s memory .*, which has .* GB for that' -- \
    "$train" configs/wide.json --device cuda --plan --memory offload --tokens 4194304 \
    --set model.layers=64 --set memory.budget_gb=1000000 --set memory.host_gb=1000000 || return
  # A budget that no GPU has: here the device itself says no, and a table names what was to be allocated.
  says 2 'activations (arena) .* bytes' 'weights .* bytes' 'hint:' \
    'out of memory: activations (arena) needs .* GB; the largest: .* x ' -- \
    "$train" configs/demo.json --device cuda --run-dir "$work/huge" --memory keep --tokens 4194304 \
    --set model.layers=16 --set memory.budget_gb=1000000 || return
  grep 'out of memory' "$work/said"
}

no_gpu() {
  says 2 'no GPU is visible' 'hint: --device cpu' -- env CUDA_VISIBLE_DEVICES= \
    "$train" configs/demo.json --device cuda --run-dir "$work/none" || return
  local said
  said=$(head -1 "$work/said")
  says 0 -- env CUDA_VISIBLE_DEVICES= "$train" configs/demo.json --device auto --run-dir "$work/auto" --stop-at 1 \
    --set eval.every=0 --set eval.documents=0 --set eval.samples=0 || return
  echo "$said; --device auto trains on the CPU"
}

# ---- compute-sanitizer ----

# A few steps of a tiny model, each tensor an allocation of its own and each op launched by itself. Shows the summary.
sanitizer() { # TOOL SECONDS FLAG... -- FLAG_OF_TRAIN...
  local tool=$1 seconds=$2 rc=0 options=() summary
  shift 2
  command -v compute-sanitizer >/dev/null || { echo "there is no compute-sanitizer (CUDA toolkit)" && return 77; }
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  limited "$seconds" compute-sanitizer --tool "$tool" --error-exitcode 9 "${options[@]}" \
    "$train" tests/gpu/gpu_tiny.json --device cuda --run-dir "$work/sanitizer-$tool-$RANDOM" "$@" >"$work/said" 2>&1 || rc=$?
  summary=$(grep -E '^=+ [A-Z]+ SUMMARY' "$work/said" | tail -1)
  if [ $rc -eq 0 ] && [ "$summary" ]; then
    echo "${summary#========= }"
    return 0
  fi
  grep -E '^=========|error' "$work/said" | head -60
  echo "exit code $rc; ${summary:-no summary}"
  return 1
}

# Training, evaluation and drawing.
memcheck() {
  sanitizer memcheck 120 -- --memory offload --set eval.every=3 --set eval.documents=4 --set eval.samples=2 \
    --set eval.sampler_steps=2
}
# Device memory is not cleared when it is allocated, and here no tensor's memory is another's before it. What kernels
# read is checked, not what cudaMemcpy does: an offloaded tensor is copied whole, with parts that no kernel writes or
# reads (slots of experts beyond the used ones).
initcheck() {
  sanitizer initcheck 120 --check-api-memory-access no -- --memory offload
}
# racecheck follows barriers of threads. What the mbarriers of the Hopper kernels (named *_sm90) order it does not see,
# so that its word on them, good or bad, means nothing: they are left out, and the second check says so.
racecheck() {
  sanitizer racecheck 120 --kernel-name-exclude kns=sm90 -- --steps 1
}
racecheck_sm90() {
  echo "not checked: racecheck cannot follow the mbarriers of the kernels named *_sm90; ops, model and same_bits compare" \
    "the bits of their results over many runs"
  return 77
}

# ---- all of it ----

for program in train tests/cuda_ops tests/cuda_model tests/cuda_large tests/cuda_group; do
  [ -x "$build/$program" ] || { echo "test-gpu: there is no $build/$program: make test-gpu builds it"; exit 2; }
done
if ! limited 60 "$build/tests/cuda_ops" ZERO >"$work/gpu" 2>&1 && grep -q 'device cuda:' "$work/gpu"; then
  echo "test-gpu: SKIPPED: $(grep -m 1 'device cuda:' "$work/gpu")"
  exit 77
fi
head -1 "$work/gpu"
[ -f .cache/shapes/shapes.tar ] || "$python" scripts/make_shapes.py .cache/shapes/shapes.tar || exit 1

began=$SECONDS
check ops limited 240 "$build/tests/cuda_ops"
check model limited 120 "$build/tests/cuda_model"
check large limited 200 "$build/tests/cuda_large"
check same_bits same_bits
check early_launches early_launches
check state_on_host state_on_host
check resume limited 120 tests/scripts/resume.sh "$build" --device cuda
check same_curves same_curves
check use_run use_run
check ablations ablations
check driver_calls driver_calls
check predicted predicted
check group group
check ranks ranks
check ranks_refused ranks_refused
check out_of_memory out_of_memory
check no_gpu no_gpu
check memcheck memcheck
check initcheck initcheck
check racecheck racecheck
check racecheck_sm90 racecheck_sm90
count_print
