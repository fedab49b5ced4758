#!/usr/bin/env bash
# The demos behind `make demo`, `make demo-icons` and `make demo-emoji`: make the data, train (or go on), show what was
# learned.
#   scripts/demo.sh [shapes|icons|emoji]
# Without a name: icons where ./train computes on a GPU and the drawings can be fetched, else shapes.
set -eu
cd "$(dirname "$0")/.."

# Would ./train use a GPU? One is there, the build has the backend, and the two fit.
on_gpu() {
  nvidia-smi -L 2>/dev/null | grep -q '^GPU' && ./train configs/icons.json --device cuda --plan >/dev/null 2>&1 &&
    ! ./train configs/icons.json --plan 2>&1 | grep -q 'on the CPU'
}

demo=${1:-shapes}
if [ $# = 0 ] && on_gpu; then
  if scripts/deps.sh icons && scripts/make_icons.py; then
    demo=icons
  else
    echo "demo: the icons cannot be made (see above): training on drawn shapes instead" >&2
  fi
fi
config=configs/$demo.json run=runs/$demo
try='red heart'
case $demo in
  shapes)
    config=configs/demo.json run=runs/demo # configs/shapes.json is the learning test
    try='a large green triangle at the center on black'
    [ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
    ;;
  icons)
    try='red heart, noto style'
    scripts/make_icons.py
    ;;
  emoji) scripts/make_emoji.py .cache/emoji ;;
  *) echo "demo: there is no demo $demo; there are shapes, icons and emoji" >&2 && exit 2 ;;
esac

# A run that was cut short goes on; a finished one is only shown.
./train "$config" --resume

# Captions that no picture has, made of words that were seen, one a line.
made_up() {
  case $demo in
    icons) # concepts by style
      for concept in "blue cat" "green heart with crown" "sleeping robot" "red airplane"; do
        for style in fluent "fluent flat" noto "old noto" twemoji emojione; do
          echo "$concept, $style style"
        done
      done
      ;;
    emoji)
      printf '%s\n' "red cat" "blue fish" "yellow car" "sleeping bear" "angry star" "smiling dog" "red moon" \
        "orange bird" "pink flower" "blue apple" "purple fish" "red bird" "green car" "yellow apple" "blue rose" \
        "blue dog"
      ;;
  esac
}
newest=$(ls "$run"/samples/step-*.png | sort | tail -1)
[ "$demo" = shapes ] || made_up | ./train "$run" --sample - --out "$run/samples/made-up.png"
echo
echo "The run is in $run:"
echo "  drawings beside the real images   $newest"
[ "$demo" = shapes ] || echo "  drawings of made-up captions      $run/samples/made-up.png"
echo "  losses and quality figures        $run/metrics.jsonl"
echo "  newest checkpoint                 $(ls -d "$run"/ckpt-* | sort -V | tail -1)"
echo "Try: ./train $run --sample \"$try\" --out drawn.png"
echo "     ./train $run --describe drawn.png"
