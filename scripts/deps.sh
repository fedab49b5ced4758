#!/bin/sh
# Installs what a purpose needs, with apt: scripts/deps.sh [--check] [demo|test|emoji|icons|lint|all]
#
#   demo   build the engine and train on drawn shapes
#   emoji  the same, and make the emoji set
#   icons  the same as demo, and make the icons set
#   test   the same as demo, and build and run the tests (with PyTorch, for the parity tests, and Open MPI, with which
#          several processes train together)
#   lint   the same as demo, and make format, make lint
#   all    everything (the default)
#   --check  only report; exit code 1 if something is missing
#
# Finds what is there by compiling, linking and importing, so libraries from anywhere count. Where nothing is missing it
# installs nothing and needs no privilege; else it needs root or sudo, and without apt it prints a list.
set -eu

# The packages go into the distribution's own Python, whatever other python3 comes first in PATH.
python=/usr/bin/python3
[ -x $python ] || python=python3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# links LIBRARIES: does the C program on standard input compile and link?
links() {
  # shellcheck disable=SC2086 # a list of flags
  gcc -x c - -o "$work/program" $1 >"$work/log" 2>&1
}

imports() {
  $python -c "import $1" >"$work/log" 2>&1
}

# present PACKAGE: is what we use of it there? Every package named below has its probe here.
present() {
  case $1 in
  gcc | libc6-dev) echo 'int main(void) { return 0; }' | links '-fopenmp' ;;
  make) make --version >"$work/log" 2>&1 ;;
  libopenblas-pthread-dev) links -lopenblas <<'END' ;;
#include <cblas.h>
void openblas_set_num_threads(int);
int main(void) { openblas_set_num_threads(1); return (int)cblas_sdot(0, 0, 1, 0, 1); }
END
  libcjson-dev) links -lcjson <<'END' ;;
#include <cjson/cJSON.h>
int main(void) { return cJSON_Parse("{}") == 0; }
END
  libstb-dev) links -lm <<'END' ;;
#include <stb/stb_image.h>
#include <stb/stb_image_write.h>
#if __has_include(<stb/stb_image_resize2.h>)
#include <stb/stb_image_resize2.h>
#else
#include <stb/stb_image_resize.h>
#endif
int main(void) { return 0; }
END
  libpcre2-dev) links -lpcre2-8 <<'END' ;;
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
int main(void) { return pcre2_config(PCRE2_CONFIG_JIT, 0) < 0; }
END
  libopenmpi-dev)
    # shellcheck disable=SC2046 # its flags
    printf '#include <mpi.h>\nint main(void) { return MPI_Init(0, 0); }\n' |
      gcc -x c - -o "$work/program" $(mpicc --showme:compile) $(mpicc --showme:link) >"$work/log" 2>&1
    ;;
  openmpi-bin) mpirun --version >"$work/log" 2>&1 ;;
  libcmocka-dev) links -lcmocka <<'END' ;;
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
int main(void) { return cmocka_run_group_tests_name("none", (const struct CMUnitTest *)0, 0, 0) != 0; }
END
  python3) imports json ;;
  python3-numpy) imports numpy ;;
  python3-fonttools) imports fontTools.ttLib ;;
  python3-torch) # importing it takes seconds
    $python -c 'import importlib.util as u; assert u.find_spec("torch")' >"$work/log" 2>&1
    ;;
  librsvg2-bin) rsvg-convert --version >"$work/log" 2>&1 ;;
  npm) npm --version >"$work/log" 2>&1 ;;
  clang-format | clang-tidy) "$1" --version >"$work/log" 2>&1 ;;
  *) echo "deps: no probe for $1" >&2 && exit 2 ;;
  esac
}

# missing PACKAGE...: those that are not there; what the probe of the last one said stays in $work/said
missing() {
  list=
  for package in "$@"; do
    present "$package" || { list="$list $package" && cp "$work/log" "$work/said"; }
  done
  echo "$list"
}

# As root: apt-get, told not to ask anything.
apt_get() {
  if [ "$(id -u)" = 0 ]; then
    DEBIAN_FRONTEND=noninteractive apt-get "$@"
  else
    sudo DEBIAN_FRONTEND=noninteractive apt-get "$@"
  fi
}

# Takes python3-torch off the lacking ones if this release has no such package. It serves the parity tests alone,
# which are skipped without it, and say so.
lacking_drop_torch() {
  case $lacking in *python3-torch*) ;; *) return 0 ;; esac
  if ! apt-cache show python3-torch 2>/dev/null | grep -q '^Package:'; then
    echo "deps: this release has no package python3-torch; the tests against PyTorch will be skipped" >&2
    lacking=$(echo "$lacking" | sed 's/ python3-torch//')
  fi
}

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
}

check=false
purpose=
for argument in "$@"; do
  case $argument in
  --check) check=true ;;
  -h | --help) usage && exit 0 ;;
  demo | emoji | icons | test | lint | all)
    [ -z "$purpose" ] || { echo "deps: one purpose at a time, not $purpose and $argument" >&2 && exit 2; }
    purpose=$argument
    ;;
  *) echo "deps: unknown argument $argument" >&2 && usage >&2 && exit 2 ;;
  esac
done
purpose=${purpose:-all}

build="gcc libc6-dev make libopenblas-pthread-dev libcjson-dev libstb-dev libpcre2-dev python3 python3-numpy"
emoji="python3-fonttools"
icons="npm librsvg2-bin"
test="libcmocka-dev python3-torch libopenmpi-dev openmpi-bin"
lint="clang-format clang-tidy"
case $purpose in
demo) packages=$build ;;
emoji) packages="$build $emoji" ;;
icons) packages="$build $icons" ;;
test) packages="$build $test" ;;
lint) packages="$build $lint" ;;
all) packages="$build $emoji $icons $test $lint" ;;
esac

# shellcheck disable=SC2086 # lists of packages, here and below
lacking=$(missing $packages)
if [ -z "$lacking" ]; then
  echo "dependencies: all present ($purpose)"
  exit 0
fi
echo "dependencies missing ($purpose):$lacking"
if $check; then
  exit 1
fi

by_hand="  fix: install them by hand; the names are those of Debian and Ubuntu packages"
if ! command -v apt-get >/dev/null; then
  printf 'deps: there is no apt-get here\n%s\n' "$by_hand" >&2
  exit 1
fi
# Only a machine with package lists can say, without an update, that a package does not exist.
if [ -n "$(find /var/lib/apt/lists -name '*_Packages*' 2>/dev/null)" ]; then
  lacking_drop_torch
fi
if [ -z "$lacking" ]; then
  exit 0
fi
if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
  printf 'deps: installing needs root or sudo\n  fix: as root, %s%s\n' 'apt-get install --no-install-recommends' "$lacking" >&2
  exit 1
fi

apt_get -q update || echo "deps: apt-get update failed; trying with the package lists that are there" >&2
lacking_drop_torch
# shellcheck disable=SC2086
[ -z "$lacking" ] || apt_get -q install -y --no-install-recommends $lacking || {
  printf 'deps: apt-get install failed (see above)\n%s:%s\n' "$by_hand" "$lacking" >&2
  exit 1
}

# shellcheck disable=SC2086
lacking=$(missing $lacking)
if [ -n "$lacking" ]; then
  printf "deps: installed, but still not usable:%s; the last one's probe said:\n" "$lacking" >&2
  cat "$work/said" >&2
  exit 1
fi
echo "dependencies: installed ($purpose)"
