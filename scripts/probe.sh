#!/usr/bin/env bash
# What this machine can build with, as make variables: scripts/probe.sh KEY FILE, with CC and CUDA (not empty: look for
# nvcc) in the environment. Compiles and links, and never asks the package manager. FILE says PROBED := KEY, by which make
# knows when to ask again; PROBES_INCOMPLETE where something is missing, which may be installed at any time.
set -u
key=$1 file=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
incomplete=

# $CC may be a command with arguments.
# shellcheck disable=SC2086
builds() { # "LINE\nLINE..." FLAG...: does it compile and link?
  printf '%b\n' "$1" >"$work/probe.c"
  shift
  ${CC:-gcc} -o "$work/probe" "$work/probe.c" "$@" >/dev/null 2>&1
}
probe() { # NAME "LINE\nLINE..." FLAG...
  local name=$1
  shift
  if builds "$@"; then echo "$name := yes"; else echo "$name :=" && incomplete=yes; fi
}
# nvcc itself says where its libraries are (it may be a script or a link to a compiler elsewhere).
# shellcheck disable=SC2086
probe_cuda() {
  local libraries
  libraries="$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^.* LIBRARIES= *//p' | tr -d '"') -lcudart_static -lstdc++ -ldl -lrt"
  echo "CUDA_LIBS := $libraries"
  echo 'int main(void) { return cudaFree(0) != 0; }' >"$work/probe.cu"
  if nvcc -c -o "$work/probe.o" "$work/probe.cu" >/dev/null 2>&1 &&
    ${CC:-gcc} -o "$work/probe" "$work/probe.o" $libraries -lpthread >/dev/null 2>&1; then
    echo "HAVE_CUDA := yes"
  else
    echo "HAVE_CUDA :=" && incomplete=yes
  fi
}

# HAVE_MPI is the name of its library, which is loaded at run time. MPI is the one whose mpicc says how it is built with:
# Open MPI, or MPICH. Without it the engine is whole for one process, so that nothing is asked again.
# shellcheck disable=SC2086
probe_mpi() {
  local flags libraries library=
  flags=$(mpicc --showme:compile 2>/dev/null || mpicc -compile_info 2>/dev/null | cut -d' ' -f2-)
  libraries=$(mpicc --showme:link 2>/dev/null || mpicc -link_info 2>/dev/null | cut -d' ' -f2-)
  if builds '#include <mpi.h>\nint main(void) { return MPI_Init(0, 0); }' $flags $libraries -lpthread; then
    library=$(ldd "$work/probe" | sed -n 's/^[[:space:]]*\(lib[^ ]*mpi[^ ]*\.so[^ ]*\) => .*/\1/p' | grep -Ev 'rte|pal|mpicxx' | head -1)
  fi
  if [ -n "$library" ]; then printf 'HAVE_MPI := %s\nMPI_FLAGS := %s\n' "$library" "$flags"; else printf 'HAVE_MPI :=\nMPI_FLAGS :=\n'; fi
}

{
  echo "# Made by scripts/probe.sh, and again when the compiler, its flags or nvcc change."
  echo "PROBED := $key"
  probe HAVE_CC '#if defined __GNUC__ && !defined __clang__ && __GNUC__ < 11\n#error too old\n#endif\nint main(void) { return 0; }' \
    -std=gnu11
  probe HAVE_OPENBLAS '#include <cblas.h>\nint main(void) { return cblas_sasum(0, 0, 1) != 0; }' -lopenblas
  probe HAVE_CJSON '#include <cjson/cJSON.h>\nint main(void) { return !cJSON_Version(); }' -lcjson
  probe HAVE_PCRE2 '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <pcre2.h>\nint main(void) { return pcre2_config(PCRE2_CONFIG_JIT, 0) < 0; }' \
    -lpcre2-8
  probe HAVE_STB '#include <stb/stb_image.h>\n#include <stb/stb_image_write.h>\nint main(void) { return 0; }' -lm
  probe HAVE_OPENMP '#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }' -fopenmp
  probe HAVE_CMOCKA '#include <stdarg.h>\n#include <stddef.h>\n#include <setjmp.h>\n#include <stdint.h>\n#include <cmocka.h>\nint main(void) { return 0; }' \
    -lcmocka
  probe_mpi
  if [ -n "${CUDA:-}" ] && command -v nvcc >/dev/null; then probe_cuda; else printf 'CUDA_LIBS :=\nHAVE_CUDA :=\n'; fi
  echo "PROBES_INCOMPLETE := $incomplete"
} >"$work/probes.mk"
mkdir -p "$(dirname "$file")" && mv "$work/probes.mk" "$file"
