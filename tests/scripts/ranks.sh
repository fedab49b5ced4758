#!/usr/bin/env bash
# Several processes train as one: the same bits as one process that takes their micro-batches in turn; checkpoints go on
# at any number of them; work for one process is done once; whatever ends one of them ends all with one message, and the
# run goes on from its last checkpoint. Skipped (77) where there is no mpirun.
#   tests/scripts/ranks.sh [BUILD]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-build}
train=$build/train
python=${PYTHON:-/usr/bin/python3}
if ! mpirun --version >/dev/null 2>&1; then echo "there is no mpirun (scripts/deps.sh installs Open MPI)" && exit 77; fi
grep -q '^HAVE_MPI := .' "$build/probes.mk" || { echo "this build found no MPI to build with" && exit 77; }
dir=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill -9 "$pid"; rm -rf "$dir"' EXIT
[ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
tar tf .cache/shapes/shapes.tar >"$dir/members"
head -400 "$dir/members" >"$dir/first"
mkdir "$dir/samples"
tar xf .cache/shapes/shapes.tar -C "$dir/samples" -T "$dir/first"
tar cf "$dir/small.tar" -C "$dir/samples" -T "$dir/first"

# Sizes that are multiples of nothing; clipping, which needs the norm over all processes, is always at work.
flags=(configs/demo.json --tokens 200 --steps 3000 --set run.threads=1 --set data.threads=1
  --set model.dim=24 --set model.layers=2 --set model.heads=3 --set model.kv_heads=1 --set model.head_dim=10
  --set model.cond_dim=22 --set model.vocab=300 --set model.text.experts=3 --set model.text.expert_dim=18
  --set model.image.experts=3 --set model.image.expert_dim=26 --set train.clip=0.5 --set train.ema_every=2
  --set eval.every=0 --set eval.documents=0 --set eval.samples=0 --set checkpoint.every=0 --set checkpoint.keep_last=9
  --set "data.sources=[{\"type\": \"webdataset\", \"path\": \"$dir/small.tar\"}]")
launch=(mpirun --allow-run-as-root --oversubscribe)
fail() {
  echo "$* (RANKS_SEED=$seed)"
  [ ! -f "$dir/log" ] || tail -12 "$dir/log"
  exit 1
}
step_change() { # NOW BEFORE WAY: said once at the last resume
  [ "$(grep -c "^warning: a step takes $1 micro-batches over all processes, not $2 as so far; $3" "$dir/log")" = 1 ] ||
    fail "a step of $1 micro-batches instead of $2: not said, or more than once"
}
run() { # PROCESSES FLAG...
  local n=$1
  shift
  if [ "$n" -eq 1 ]; then
    "$train" "${flags[@]}" "$@" 2>"$dir/log" || fail "one process $*: exit code $?"
  else
    timeout 60 "${launch[@]}" -np "$n" "$train" "${flags[@]}" "$@" 2>"$dir/log" || fail "$n processes $*: exit code $?"
  fi
}
same() { # RUN RUN STEP
  "$python" tests/scripts/same_state.py "$dir/$1/ckpt-$3" "$dir/$2/ckpt-$3" || fail "$1 and $2 differ after step $3"
}

seed=${RANKS_SEED:-$(date +%s)}
RANDOM=$seed
declare -a plan # flags of a memory plan at random, for the next run
random_plan() {
  local name list='"x": "keep"' words=(keep recompute offload)
  for name in h1 qkv qkv_rotated attention b1 h2 expert_pre b2; do list+=", \"$name\": \"${words[RANDOM % 3]}\""; done
  plan=(--set "memory.per_tensor={$list}")
}

# ---- the group itself, and who cannot have one ----
"${launch[@]}" -np 3 "$build/tests/test_ranks" >"$dir/log" 2>&1 || fail "the functions of a group"
echo 'int main(void) { Error e; if (ranks_open(&e) != 0) fatal(&e); return 0; }' >"$dir/alone.c"
# shellcheck disable=SC2086 # a compiler and its launcher
${CC:-gcc} -D_GNU_SOURCE -I. -include base/ranks.h -o "$dir/alone" "$dir/alone.c" base/ranks.c base/base.c -lm
"$dir/alone" || fail "a build without MPI, one process"
rc=0
"${launch[@]}" -np 2 "$dir/alone" 2>"$dir/log" || rc=$?
[ $rc -eq 2 ] || fail "a build without MPI, two processes: exit code $rc"
[ "$(grep -c '^error: mpirun started 2 processes, and this program was built without MPI' "$dir/log")" = 1 ] ||
  fail "a build without MPI, two processes: what it says"

# ---- bits: 2 and 3 processes, and 2 of 2 micro-batches each within rounding; resumed at other numbers ----
random_plan
run 1 --run-dir "$dir/one" --set train.micro_batches=3 --stop-at 6 "${plan[@]}"
random_plan
run 3 --run-dir "$dir/three" --stop-at 2 "${plan[@]}"
grep -q '^steps 1 to 2 of 3000: 3 processes x 1 x 200 = 600 token slots each' "$dir/log" || fail "the tokens of a step of all"
random_plan
run 3 --run-dir "$dir/three" --resume --stop-at 3 --set parallel.zero=0 "${plan[@]}"
random_plan
run 3 --run-dir "$dir/three" --resume --stop-at 4 --set parallel.zero=2 --set kernels.update=overlapped "${plan[@]}"
run 1 --run-dir "$dir/three" --resume --set train.micro_batches=3 --stop-at 5 --set kernels.update=overlapped
random_plan
run 3 --run-dir "$dir/three" --resume --set train.micro_batches=1 --stop-at 6 "${plan[@]}"
same one three 6
run 1 --run-dir "$dir/four" --set train.batch=800 --stop-at 4
run 2 --run-dir "$dir/pair" --set train.batch=800 --stop-at 2 # two micro-batches each
cp -r "$dir/pair" "$dir/again"
run 2 --run-dir "$dir/again" --resume --set train.batch=800 --stop-at 3 --set memory.policy=recompute --set parallel.zero=0
[ "$(grep -c '^warning: ' "$dir/log")" = 1 ] || fail "warnings at a resume: more or less than one"
cp -r "$dir/pair" "$dir/apart"
run 2 --run-dir "$dir/pair" --resume --set train.batch=800 --stop-at 3
same pair again 3
run 2 --run-dir "$dir/apart" --resume --set train.batch=800 --stop-at 3 --set parallel.zero=2
run 3 --run-dir "$dir/again" --resume --set train.batch=600 --stop-at 4
step_change 3 4 'a number of processes that divides 4 keeps it'
# Its saved config speaks of one micro-batch of each of three processes.
"$train" "$dir/again" --resume --stop-at 5 2>"$dir/log" || fail "the folder of a run of other processes as config"
grep -q '^steps 5 to 5 of 3000: 3 x 200 ' "$dir/log" || fail "train.batch: other steps with other processes"
! grep -q '^warning: a step takes' "$dir/log" || fail "a step of the same size: said to be of another"
"$python" - "$dir" <<'P'
import json, sys
rows = {name: [json.loads(line) for line in open(f"{sys.argv[1]}/{name}/metrics.jsonl")] for name in
        ("one", "three", "four", "pair", "apart")}
rows = {name: [row for row in all if "loss" in row] for name, all in rows.items()}
assert [len(rows[name]) for name in ("one", "three", "four", "pair", "apart")] == [6, 6, 4, 3, 3], rows
KEYS = "loss flow ce ce_caption ce_text balance z lr grad_norm tokens fill expert_load_max".split()
for name, like, tolerance in ("three", "one", 0), ("pair", "four", 1e-4), ("apart", "four", 1e-4):
    for a, b in zip(rows[name], rows[like]):
        for key in KEYS:
            assert abs(a[key] - b[key]) <= tolerance * abs(b[key]), (name, a["step"], key, a[key], b[key])
P

run 2 --run-dir "$dir/pair" --resume --stop-at 4
step_change 2 4 'train.micro_batches=2, or --batch, keeps it'

# ---- done once ----
"${launch[@]}" -np 2 "$train" --help >"$dir/help" 2>"$dir/log" || fail "--help"
[ "$(grep -c '^usage' "$dir/help")" = 1 ] || fail "--help: printed more or less than once"
"${launch[@]}" -np 2 "$train" "${flags[@]}" --print-config --batch 1100 >"$dir/config" 2>"$dir/log" || fail "--print-config"
grep -q '^train.micro_batches *derived *3$' "$dir/config" || fail "--batch: not shared out over the processes"
planned() { # LABEL PROCESSES FLAG...: bytes of a slab in one of them
  local label=$1 n=$2
  shift 2
  "${launch[@]}" -np "$n" "$train" "${flags[@]}" --plan "$@" 2>"$dir/log" |
    awk -v label="  $label " 'index($0, label) == 1 && / bytes / { print substr($0, 27) + 0 }'
}
# Rates of collectives are measured once, by all, and kept beside the run for later starts and plans of as many processes.
grep -q '^collectives of 2 processes: .* (measured in' "$dir/log" && fail "rates of a run that went on: measured again"
rates() { # PROCESSES: the plan's line, and the first two of its rates
  "${launch[@]}" -np "$1" "$train" "${flags[@]}" --run-dir "$dir/pair" --plan 2>"$dir/log" | tail -1
}
kept=$("$python" -c 'import json, sys
rates = json.load(open(sys.argv[1]))["collectives"]
print("%.4g GB/s reduced, %.4g gathered, %.0f us each (measured)" % (rates["reduce"] / 1e9, rates["gather"] / 1e9, 1e6 * rates["latency"]))' \
  "$dir/pair/costs.json") || fail "no rates of collectives in costs.json"
[ "${kept%each*}" != "1 GB/s reduced, 1 gathered, 50 us " ] || fail "rates of collectives: those that are assumed"
rates 2 | grep -qF "collectives of 2 processes: $kept" || fail "a plan with other rates than the run's ($kept)"
grep -q 'measured in' "$dir/log" && fail "a plan of a run that has rates: measured again"
rates 3 | grep -q '^collectives of 3 processes: .* (measured);' && grep -q '^collectives of 3 .*(measured in' "$dir/log" ||
  fail "a plan for other processes: not by rates of their own"
all=$(planned "Adam m" 1) third=$(planned "Adam m" 3)
[ "$(planned gradients 3 --set parallel.zero=2)" = "$third" ] && [ "$(planned gradients 3)" -gt "$third" ] ||
  fail "parallel.zero=2: the gradients of each"
[ "$(planned "Adam m" 3 --set parallel.zero=0)" = "$all" ] && [ $((3 * third)) -ge "$all" ] && [ $((3 * third)) -le $((all + 3 * 4096)) ] ||
  fail "parallel.zero: a share of $third bytes of $all"
"${launch[@]}" -np 2 "$train" "${flags[@]}" --dump "$dir/dump2" 2>"$dir/log" || fail "--dump"
"$train" "${flags[@]}" --set train.micro_batches=2 --dump "$dir/dump1" 2>"$dir/log" || fail "--dump, one process"
diff -rq "$dir/dump1" "$dir/dump2" || fail "--dump: not the same step"
"${launch[@]}" -np 2 "$train" "$dir/pair" --sample "a red circle" --out "$dir/drawn.png" 2>"$dir/log" || fail "--sample"
[ "$(grep -c '^drawn' "$dir/log")" = 1 ] || fail "--sample: said more or less than once"
evaluation=(--stop-at 2 --set eval.every=2 --set eval.documents=24 --set eval.samples=3 --set data.held_out=0.3)
run 3 --run-dir "$dir/evaluated" "${evaluation[@]}"
[ "$(grep -c '"eval"' "$dir/evaluated/metrics.jsonl")" = 1 ] || fail "evaluated more or less than once"
run 1 --run-dir "$dir/figures" "${evaluation[@]}" --set train.micro_batches=3
cmp <(grep '"eval"' "$dir/evaluated/metrics.jsonl") <(grep '"eval"' "$dir/figures/metrics.jsonl") || fail "other figures"
cmp "$dir"/{evaluated,figures}/samples/step-000002.png || fail "other drawings"

# ---- the end of one is the end of all ----
ended() { # WHAT CODE SECONDS PATTERN: the job in $pid
  local rc=0 began=$SECONDS
  wait "$pid" || rc=$?
  pid=
  [ "$rc" -ne 0 ] || fail "$1: exit code 0"
  [ "$2" = any ] || [ "$rc" -eq "$2" ] || fail "$1: exit code $rc"
  [ $((SECONDS - began)) -le "$3" ] || fail "$1: ends after $((SECONDS - began)) s"
  [ "$(grep -cE "$4" "$dir/log")" = 1 ] || fail "$1: the cause is not said once"
}
"${launch[@]}" -np 3 "$train" "${flags[@]}" --run-dir "$dir/bad" --set train.lrr=1 2>"$dir/log" & pid=$!
ended "a config that is wrong" 2 30 '^error: .*train.lrr'
both=(-np 1 "$train" "${flags[@]}" --run-dir "$dir/bad")
"${launch[@]}" "${both[@]}" : "${both[@]}" --set train.lr=1e-5 2>"$dir/log" & pid=$!
ended "other settings" 2 30 '^error: 1 of 2 processes, of rank 1, has other settings than rank 0'
[ ! -e "$dir/bad" ] || fail "a run that is refused left a folder"
"${launch[@]}" -np 3 "$train" "${flags[@]}" --run-dir "$dir/diverged" --set train.spike=1 \
  --set train.spike_patience=1 2>"$dir/log" & pid=$!
ended "an error in all of them at once" 1 30 "^error: .*there is no checkpoint to go back to"

forever() { # RUN: trains in the background until it has five more steps
  local from=0
  [ ! -f "$dir/$1/metrics.jsonl" ] || from=$(wc -l <"$dir/$1/metrics.jsonl")
  "${launch[@]}" -np 3 "$train" "${flags[@]}" --run-dir "$dir/$1" --resume --set train.micro_batches=1 \
    --set checkpoint.every=5 2>"$dir/log" & pid=$!
  for _ in $(seq 600); do
    [ ! -f "$dir/$1/metrics.jsonl" ] || [ "$(wc -l <"$dir/$1/metrics.jsonl")" -lt $((from + 7)) ] || return 0
    sleep 0.05
  done
  fail "$1: no five steps"
}
for victim in 1 3; do # a rank that is killed
  forever killed
  kill -9 "$(pgrep -P "$pid" | sed -n ${victim}p)"
  ended "kill -9 of a rank" any 30 'exited on signal 9'
done
forever killed # any signal that asks for an end, here of mpirun: the step is finished and saved
kill -USR1 "$pid"
rc=0
wait "$pid" || rc=$?
pid=
[ $rc -eq 0 ] || fail "SIGUSR1: exit code $rc"
last=$(sed -n 's/^stopped by a signal after step \([0-9]*\);.*/\1/p' "$dir/log")
[ -f "$dir/killed/ckpt-${last:-none}/state.json" ] || fail "SIGUSR1: not saved"
run 1 --run-dir "$dir/whole" --set train.micro_batches=3 --stop-at "$last"
same whole killed "$last"
forever killed
kill -TERM "$pid"
wait "$pid" || true
pid=
last=$(sed -n 's/^stopped by a signal after step \([0-9]*\);.*/\1/p' "$dir/log")
[ -f "$dir/killed/ckpt-${last:-none}/state.json" ] || fail "SIGTERM: not saved"
echo "2 and 3 processes have the bits of one; killed, stopped and resumed after $last steps"
