#!/usr/bin/env bash
# Print the path of a Python interpreter that this project can use, or say what was looked at and what to install.
#
#   scripts/find_python.sh            -> /usr/bin/python3.12
#   PYTHON=/opt/py/bin/python3 scripts/find_python.sh
#
# A candidate counts only after it has run: version managers put shims on PATH that exist and refuse to start.
# Order: $PYTHON, then for each supported version everything on PATH, then the folders of version managers and, last,
# the system's ($SYSTEM_PYTHON_FOLDERS, separated by spaces, replaces those).
set -euo pipefail

# Versions for which megatron-core 0.19 has wheels (it needs 3.12, and has none for 3.14), the preferred one first.
supported="3.12 3.13"

system_folders=${SYSTEM_PYTHON_FOLDERS-/opt/conda/bin /opt/conda/envs/*/bin /opt/*/bin /opt/homebrew/bin /usr/local/bin /usr/bin}
looked_at=()
probe='import sys; print("%d.%d" % sys.version_info[:2]); import ensurepip, venv'

# What is wrong with candidate $1 (empty: nothing); sets `version`.
check() {
  local output
  version=""
  [ -x "$1" ] || { fault="not an executable file"; return; }
  if output=$("$1" -I -c "$probe" 2>&1 </dev/null); then
    version=$output
    case " $supported " in
      *" $version "*) fault="" ;;
      *) fault="is Python $version" ;;
    esac
  else
    version=${output%%$'\n'*}
    case "$version" in
      3.[0-9]*) fault="is Python $version without the modules venv and ensurepip" ;;
      2.[0-9]*) fault="is Python $version" ;;
      *) fault="does not run (${version:-no message})" ;;
    esac
    version=""
  fi
}

# Every executable on PATH under name $1, the hidden ones too.
on_path() { type -aP "$1" 2>/dev/null || true; }

candidates() {
  local version manager
  for version in $supported; do on_path "python$version"; done
  on_path python3
  on_path python
  for version in $supported; do
    for manager in \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions"/*/bin \
      "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}"/*/bin \
      "${ASDF_DATA_DIR:-$HOME/.asdf}/installs/python"/*/bin \
      "${MISE_DATA_DIR:-$HOME/.local/share/mise}/installs/python"/*/bin \
      "${CONDA_PREFIX:-$HOME/conda}"/bin \
      "$HOME"/{miniconda3,anaconda3,miniforge3,mambaforge}/bin \
      "$HOME"/{miniconda3,anaconda3,miniforge3,mambaforge}/envs/*/bin \
      $system_folders; do  # unquoted: a list of patterns
      [ -e "$manager/python$version" ] && echo "$manager/python$version"
    done
  done
  return 0
}

if [ -n "${PYTHON:-}" ]; then
  asked=$(command -v "$PYTHON" || echo "$PYTHON")
  check "$asked"
  if [ -z "$fault" ]; then echo "$asked"; exit 0; fi
  looked_at+=("\$PYTHON=$PYTHON: $fault")
  echo "find_python: PYTHON=$PYTHON $fault; looking elsewhere" >&2
fi

found=""
found_rank=99
while IFS= read -r candidate; do
  check "$candidate"
  if [ -n "$fault" ]; then looked_at+=("$candidate: $fault"); continue; fi
  rank=0
  for version_wanted in $supported; do
    [ "$version" = "$version_wanted" ] && break
    rank=$((rank + 1))
  done
  if [ "$rank" -lt "$found_rank" ]; then found=$candidate; found_rank=$rank; fi
  [ "$found_rank" -eq 0 ] && break
done < <(candidates | awk '!seen[$0]++')

if [ -n "$found" ]; then echo "$found"; exit 0; fi

{
  echo "find_python: no usable Python; this project needs one of: $supported (with venv and ensurepip)."
  echo "Looked at:"
  for line in ${looked_at[@]+"${looked_at[@]}"}; do echo "  $line"; done
  echo "  and found no python${supported// /, python} in the folders of pyenv, uv, asdf, mise, conda and the system"
  echo "Install one, for instance:"
  echo "  apt install python3.12 python3.12-venv     # Debian, Ubuntu"
  echo "  dnf install python3.12                     # Fedora, RHEL, Rocky"
  echo "  module load python/3.12                    # many clusters"
  echo "  pyenv install 3.12  |  uv python install 3.12  |  conda create -n py312 python=3.12"
  echo "or name one: make env PYTHON=/path/to/python3.12"
} >&2
exit 1
