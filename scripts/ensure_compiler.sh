#!/usr/bin/env bash
# See that there is a C++17 compiler with OpenMP for the kernels and their tests; install Debian's g++ where root may.
#
#   scripts/ensure_compiler.sh            (what scripts/setup_env.sh runs; $CXX is asked before c++ and g++)
#   scripts/ensure_compiler.sh --check    status 0 where there is one; installs and says nothing
#
# Without one the package still works, with torch's attention, and the tests of the kernels fail: so it says what to install.
set -euo pipefail

works() {
  command -v "$1" >/dev/null &&
    echo '#include <omp.h>
#include <string_view>
int main() { return omp_get_max_threads() > 0 ? 0 : 1; }' | "$1" -std=c++17 -fopenmp -x c++ -fsyntax-only - 2>/dev/null
}

found() { for compiler in ${CXX:-} c++ g++; do if works "$compiler"; then return 0; fi; done; return 1; }

if found; then exit 0; fi
if [ "${1:-}" = --check ]; then exit 1; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "env: no C++17 compiler with OpenMP; installing g++" >&2
  if { apt-get update && apt-get install --yes --no-install-recommends g++; } >/dev/null 2>&1 && found; then exit 0; fi
fi
echo "env: no C++17 compiler with OpenMP: attention takes torch's path, and the tests of the kernels fail." >&2
echo "env: install one (Debian: apt-get install g++) and run this again" >&2
