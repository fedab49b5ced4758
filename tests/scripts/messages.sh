#!/usr/bin/env bash
# What a new user meets: each mistake is made for real, in a fresh copy of the tree, and must end with the right exit
# code and a message that says what to do.
#   tests/scripts/messages.sh BUILD           check, also that docs/messages.md shows what is said
#   tests/scripts/messages.sh BUILD OUT.md    and write the table with the real output (docs/messages.md)
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
train=$(realpath "$1/train") wrong_blas=$(realpath "$1/tests/wrong_blas.so")
out=${2:+$(realpath "$2")}
work=$(mktemp -d)
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
table=$work/table count=0

# A clone that nothing was made in yet. Scripts are copied, since they look for the tree they lie in.
clone=$work/clone
mkdir "$clone"
cp -r scripts configs "$clone"
for entry in base data kernels model trainer tests Makefile train.c; do ln -s "$root/$entry" "$clone/$entry"; done
cp "$train" "$clone/train"
chmod 755 "$work"
cd "$clone"

# What is missing or old on this machine is played by programs that come first in PATH.
play() { # NAME, its text on standard input
  mkdir -p "$work/bin"
  cat >"$work/bin/$1"
  chmod +x "$work/bin/$1"
}

# Runs a command as typed by a user, by way of `as` when that is set; its output must match all of the patterns.
as=
case_of() { # SITUATION EXIT_CODE COMMAND PATTERN...
  local situation=$1 code=$2 command=$3 rc=0 text
  shift 3
  $as bash -o pipefail -c "$command" >"$work/said" 2>&1 || rc=$?
  # make's own lines and compilers' paths are not ours.
  text=$(grep -v '^make[:[]' "$work/said" |
    sed "s|$clone/||g; s|$work|/tmp|g; s/(process [0-9]*)/(process 12345)/" || true)
  for pattern in "$@"; do
    if [ "$rc" -ne "$code" ] || ! grep -q -- "$pattern" <<<"$text"; then
      printf '%s: expected exit code %s and "%s", got %s and\n%s\n' "$command" "$code" "$pattern" "$rc" "$text"
      exit 1
    fi
  done
  count=$((count + 1))
  # A table that precedes an error takes no room here.
  if grep -q '^error:' <<<"$text" && grep -q '^program .* ops$' <<<"$text"; then
    text="(the memory table)"$'\n'$(sed -n '/^error:/,$p' <<<"$text")
  fi
  printf '| %s | <code>%s</code> | <code>%s</code> | %s |\n' \
    "$situation" "$(escape <<<"$command")" "$(escape <<<"$text")" "$rc" >>"$table"
}

# Text for a cell of a Markdown table.
escape() {
  sed 's/&/\&amp;/g; s/</\&lt;/g; s/|/\\|/g; s/^  */\&emsp;/' | sed -z 's/\n$//; s/\n/<br>/g'
}

section() {
  printf '\n## %s\n\n| what happened | command | what it says | exit code |\n|---|---|---|---|\n' "$1" >>"$table"
}

section 'Building'
play gcc-no-cjson <<'END'
#!/bin/sh
case " $* " in *" -lcjson "*) exit 1 ;; esac
exec gcc "$@"
END
as="env PATH=$work/bin:$PATH"
case_of 'a library is missing' 2 'make CC=gcc-no-cjson' 'cjson NO' 'make deps'
play gcc-4 <<'END'
#!/bin/sh
exec gcc -U__GNUC__ -D__GNUC__=4 "$@"
END
case_of 'the compiler is too old' 2 'make CC=gcc-4' 'gcc-4 .*too old' 'CC='
case_of 'there is no compiler' 2 'make CC=no-such-gcc' 'no-such-gcc' 'make deps'
as=

section 'Data'
case_of 'the demo without its data' 2 './train configs/demo.json' 'data.sources\[0\]' 'make demo'
mkdir pictures table shards
printf '\211PNG\r\n\032\n' >pictures/cat.png
printf 'GIF89a' >pictures/dog.gif
folder() { # PATH: the command that trains on a folder
  printf '%s' "./train configs/demo.json --set 'data.sources=[{\"type\": \"folder\", \"path\": \"$1\"}]'"
}
case_of 'a folder without captions' 2 "$(folder pictures)" 'captions.tsv' '1 .gif, 1 .png' 'README.md'
echo 'cat.gif,a cat' >table/captions.csv
printf 'GIF89a' >table/cat.gif
case_of 'pictures of a format that is not decoded' 2 "$(folder table)" '1 neither JPEG nor PNG' 'but GIF'
echo 'id,breed' >table/captions.csv
case_of 'a table without the columns that are needed' 2 "$(folder table)" '"id,breed"' 'file_name,text'
printf '\377\376f\0' >table/captions.csv
case_of 'captions in UTF-16' 2 "$(folder table)" 'UTF-16' 'UTF-8'
case_of 'a shard of several is not there' 2 \
  "./train configs/demo.json --set 'data.sources=[{\"type\": \"webdataset\", \"path\": \"shards/{00..11}.tar\"}]'" \
  'cannot open shards/00.tar'
case_of 'an unknown kind of data' 2 \
  "./train configs/demo.json --set 'data.sources=[{\"type\": \"zip\", \"path\": \"a.zip\"}]'" \
  'folder|webdataset|text' 'hint:'
# The emoji font neither installed nor to be fetched: no apt-get in PATH.
mkdir "$work/few"
for tool in env python3 bash; do ln -s "$(PATH=/usr/bin:$PATH command -v $tool)" "$work/few/$tool"; done
if ! [ -f /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf ] && /usr/bin/python3 -c 'import fontTools' 2>/dev/null; then
  as="env PATH=$work/few"
  case_of 'no emoji font, and no way to fetch it' 1 'scripts/make_emoji.py' 'fonts-noto-color-emoji' 'fix:'
  as=
fi

section 'The config and the command line'
case_of 'the config is not there' 2 './train my.json' 'cannot open my.json'
: >empty.json
case_of 'an empty file as config' 2 './train empty.json' 'empty.json:1:1' 'configs/'
printf '\211PNG\r\n\032\n' >cat.png
printf '\377\376{\0}\0' >utf16.json
case_of 'a config in UTF-16' 2 './train utf16.json' 'UTF-16' 'UTF-8'
case_of 'a picture as config' 2 './train cat.png' 'cat.png:1:1' 'configs/'
case_of 'a folder that is no run' 2 './train pictures' 'pictures is a folder' 'no config.json' 'runs/NAME'
sed 's/"layers": 4,/"layers": 4/' configs/demo.json >comma.json
case_of 'a comma is missing' 2 './train comma.json' 'comma.json:[0-9]*:[0-9]*' 'hint:'
echo '{"tessera": 1000, "train": {"sleep": 3}}' >newer.json
case_of 'a config of a newer version' 2 './train newer.json' 'newer.json:1: tessera = 1000' 'newer version' 'hint:'
case_of 'an unknown flag' 2 './train configs/demo.json --epochs 10' 'unknown flag --epochs' '--help'
case_of 'a key where a flag is expected' 2 './train configs/demo.json --lr 1e-3' 'unknown flag --lr' '--set train.lr=VALUE'
case_of 'a caption without quotes' 2 './train runs/demo --sample a red circle' 'command line: red' 'in quotes'
case_of 'an unknown key' 2 './train configs/demo.json --set train.step=10' 'train.steps'
case_of 'a value out of range' 2 './train configs/demo.json --set train.lr=-1' 'train.lr = -1' 'from 0 to 10'
case_of 'a value of the wrong type' 2 './train configs/demo.json --set train.steps=many' 'train.steps = "many"'
case_of 'sizes that do not go together' 2 './train configs/demo.json --set data.image_size=30' \
  'multiple of model.patch' 'hint:'
case_of '--device cuda without a GPU' 2 'CUDA_VISIBLE_DEVICES= ./train configs/demo.json --device cuda' '--device cuda:'

section 'The machine'
case_of 'too little address space' 2 'ulimit -v 250000; ./train configs/demo.json --device cpu --set run.threads=2' \
  'OpenBLAS and 2 compute threads need' 'ulimit -v' 'run.threads'
as="env OPENBLAS_CORETYPE=Nehalem LD_PRELOAD=$wrong_blas WRONG_BLAS=tail"
case_of 'an OpenBLAS that computes wrong on this processor' 2 './train configs/demo.json --device cpu' \
  'OpenBLAS computes wrong on this processor' 'OPENBLAS_CORETYPE'
as=

section 'Runs'
[ -f "$root/.cache/shapes/shapes.tar" ] || "$root/scripts/make_shapes.py" "$root/.cache/shapes/shapes.tar" >"$work/log"
mkdir -p .cache/shapes
cp "$root/.cache/shapes/shapes.tar" .cache/shapes
case_of 'pictures that are all too large' 2 './train configs/demo.json --set data.max_pixels=100' \
  'with too many pixels' 'data.max_pixels'
case_of 'a use before the training' 2 './train configs/demo.json --sample "a red circle"' 'train it first'
case_of 'a trace that cannot be written' 2 './train configs/demo.json --trace traces/step.json' '--trace: cannot write'
case_of 'less memory than the model needs' 2 './train configs/demo.json --set memory.budget_gb=0.01' 'budget_gb' '--tokens' \
  'alive at the fullest moment' 'the largest: [0-9]* x '
# A run of a model so small that two steps take no time.
sed 's/"dim": 128, "layers": 4, "heads": 4/"dim": 16, "layers": 1, "heads": 2/; s/"every": 500, "keep/"every": 1, "keep/' \
  configs/demo.json >tiny.json
./train tiny.json --stop-at 2 2>"$work/log"
case_of 'the run exists already' 2 './train tiny.json' 'already holds checkpoints' '--resume'
# Its config.json as a version wrote it that had no data.max_bad.
sed -i '/"tessera"/d; /"max_bad"/d' runs/demo/config.json
case_of 'an older run goes on' 0 './train runs/demo --resume --stop-at 2 2>&1 | grep version' \
  'config.json was written by version 1; new since: data.max_bad=100'
case_of 'it goes on with other settings' 0 \
  './train tiny.json --resume --stop-at 2 --set train.lr=0.001 --steps 100 2>&1 | grep warning' \
  'not as runs/demo was trained so far: train.steps 3000 -> 100, train.lr 0.003 -> 0.001'
case_of 'a run where a checkpoint is expected' 2 './train tiny.json --run-dir runs/new --init runs/demo' \
  'not a checkpoint' 'runs/demo/ckpt-2'
case_of 'it goes on with another model' 2 './train tiny.json --resume --set model.dim=32' \
  'ckpt-2/model.safetensors' 'expected'
case_of 'it goes on with other data' 2 './train tiny.json --resume --set data.held_out=0.2' \
  'data.sources\[0\] had [0-9]* training samples then' '--init CKPT'
printf '!' | dd of=runs/demo/ckpt-2/model.safetensors bs=1 seek=5000 conv=notrunc 2>"$work/log"
case_of 'the newest checkpoint is damaged' 0 './train tiny.json --resume --stop-at 2 2>&1 | grep ckpt' \
  'ckpt-2 is left out' 'loaded runs/demo/ckpt-1'
exec 9>runs/demo/lock
flock 9
printf '%s\n' $$ >&9
case_of 'the run is being trained' 2 './train tiny.json --resume' 'another run uses runs/demo'
exec 9>&-
mkdir readonly
chmod 555 readonly
# For root nothing is read-only.
[ "$(id -u)" -ne 0 ] || as='setpriv --reuid=65534 --clear-groups'
case_of 'the folder of the run cannot be written' 2 './train configs/demo.json --run-dir readonly/run' \
  'cannot create folder readonly/run' '--run-dir'
as=

if [ "$out" ]; then
  {
    cat - "$table" <<'END'
# Messages

What a new user meets, and what the programs say then: the real output, written by `tests/scripts/messages.sh BUILD docs/messages.md`.
What `./train` refuses ends with exit code 2, and a config, flag or data set is refused before anything is created.
END
  } >"$out"
else
  # What hangs on the compiler, the processor or the build is left out of the comparison.
  awk '/^## / { machine = /Building|The machine/ } /^\|/ && !machine && !/--device cuda/' "$table" >"$work/rows"
  stale=$(grep -vxFf "$root/docs/messages.md" "$work/rows") && {
    printf 'docs/messages.md does not show this; tests/scripts/messages.sh BUILD docs/messages.md writes it:\n%s\n' "$stale"
    exit 1
  }
fi
echo "$count messages as they should be"
