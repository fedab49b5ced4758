#!/usr/bin/env bash
# The demos behind `make demo` and `make demo-emoji`: make the data, train (or go on), show what was learned.
#   scripts/demo.sh shapes|emoji
set -eu
cd "$(dirname "$0")/.."
case $1 in
  shapes)
    run=runs/demo config=configs/demo.json
    [ -f .cache/shapes/shapes.tar ] || scripts/make_shapes.py .cache/shapes/shapes.tar
    ;;
  emoji)
    run=runs/emoji config=configs/emoji.json
    scripts/make_emoji.py .cache/emoji
    ;;
esac

# A run that was cut short goes on; a finished one is only shown.
./train "$config" --resume

newest=$(ls "$run"/samples/step-*.png | sort | tail -1)
if [ "$1" = emoji ]; then
  # Captions that no picture has, made of words that were seen.
  printf '%s\n' "red cat" "blue fish" "yellow car" "sleeping bear" "angry star" "smiling dog" "red moon" "orange bird" \
    "pink flower" "blue apple" "purple fish" "red bird" "green car" "yellow apple" "blue rose" "blue dog" |
    ./train "$run" --sample - --out "$run/samples/made-up.png"
fi
echo
echo "The run is in $run:"
echo "  drawings beside the real images   $newest"
[ "$1" != emoji ] || echo "  drawings of made-up captions      $run/samples/made-up.png"
echo "  losses and quality figures        $run/metrics.jsonl"
echo "  newest checkpoint                 $(ls -d "$run"/ckpt-* | sort -V | tail -1)"
echo "Try: ./train $run --sample \"$([ "$1" = emoji ] && echo 'red heart' || echo 'a large green triangle at the center on black')\" --out drawn.png"
echo "     ./train $run --describe drawn.png"
