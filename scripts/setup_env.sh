#!/usr/bin/env bash
# Make .venv/ in this checkout: the project (editable) with all that its tools, tests and examples need.
#
#   scripts/setup_env.sh      (what `make env` runs; a second run returns at once)
#
# .venv/.complete is written last. It names what the environment was made for (the checkout's path, the Python, the
# hash of metadata and kernels, whether there is a compiler), so that an interrupted, copied, moved or outdated environment is recognised and mended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.complete
needed_kib=$((9 * 1024 * 1024)) # 6.9 GiB installed here, torch and its CUDA libraries most of it, and room to unpack
say() { echo "env: $*" >&2; }

wanted_stamp() {
  echo "checkout $PWD"
  { cat pyproject.toml setup.py; [ ! -d csrc ] || find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 cat; } | sha256sum | cut -d' ' -f1
  if scripts/ensure_compiler.sh --check; then echo "with a compiler"; else echo "without a compiler"; fi
  "$venv/bin/python" -c 'import sys; print("python", sys.version.split()[0])' 2>/dev/null || echo "python is broken"
}

is_complete() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_stamp)" ]; }

# An environment whose interpreter starts, has pip, and was made at this path (scripts inside it hold absolute paths).
is_usable() {
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
    grep -qF "VIRTUAL_ENV=" "$venv/bin/activate" 2>/dev/null && grep -qF "$PWD/$venv" "$venv/bin/activate"
}

make_venv() {
  local python free_kib
  python=$(scripts/find_python.sh)
  free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
  if [ "$free_kib" -lt "$needed_kib" ]; then
    say "only $((free_kib / 1024 / 1024)) GiB free in $PWD; the environment needs $((needed_kib / 1024 / 1024)) GiB"
    exit 1
  fi
  if [ -e "$venv" ]; then
    [ -f "$venv/pyvenv.cfg" ] || [ -f "$venv/.ledom" ] || { say "$PWD/$venv is in the way and is no virtual environment: move it"; exit 1; }
    say "removing the unusable $venv"
    rm -rf "$venv"
  fi
  say "making $venv with $python"
  mkdir "$venv" && touch "$venv/.ledom" # known as ours even if killed before pyvenv.cfg is written
  "$python" -m venv "$venv"
}

install() {
  scripts/ensure_compiler.sh
  say "installing into $venv (the first time this downloads some gigabytes: torch comes with its CUDA libraries)"
  "$venv/bin/python" -m pip install --editable ".[dev]"
}

check_imports() {
  say "checking that what was installed can be imported"
  PYTHONWARNINGS=ignore "$venv/bin/python" scripts/check_imports.py
}

# One set-up at a time in a checkout: `make quickstart` and `make test` may be started together.
if command -v flock >/dev/null; then
  mkdir -p .cache
  exec 9>.cache/env.lock
  flock --nonblock 9 || { say "waiting for another set-up of this checkout"; flock 9; }
fi

if is_complete; then exit 0; fi
started=$SECONDS
mended=no
if is_usable; then
  say "$venv is unfinished or older than pyproject.toml: mending it"
  rm -f "$stamp"
  if install && check_imports; then mended=yes; else say "that did not work: starting over"; rm -rf "$venv"; fi
fi
if [ "$mended" = no ]; then
  make_venv
  install
  check_imports
fi
wanted_stamp >"$stamp"
say "ready in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s: $("$venv/bin/python" --version) in $venv"
