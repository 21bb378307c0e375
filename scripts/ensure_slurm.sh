#!/usr/bin/env bash
# See that Slurm and munge are installed for the tests of examples/slurm; install Debian's packages where root may.
#
#   scripts/ensure_slurm.sh            (what `make test` runs)
#   scripts/ensure_slurm.sh --check    status 0 where they are there; installs and says nothing
#
# Nothing is started or configured here: the tests run daemons of their own, with their own ports, keys and folders
# (tests/slurm/local_slurm.py). Where Slurm cannot be had those tests fail, so this says what to install.
set -euo pipefail

programs=(slurmctld slurmd sbatch srun scontrol munged)

found() {
  local program
  for program in "${programs[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || return 1
  done
}

if found; then exit 0; fi
if [ "${1:-}" = --check ]; then exit 1; fi
packages=(slurmctld slurmd slurm-client munge)
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "slurm: not installed; installing ${packages[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  install=(apt-get install --yes --no-install-recommends "${packages[@]}")
  if { "${install[@]}" || { apt-get update && "${install[@]}"; }; } >/dev/null 2>&1 && found; then exit 0; fi
fi
echo "slurm: slurmctld, slurmd, the client programs or munged are missing, and the tests of examples/slurm fail without them." >&2
echo "slurm: install them (Debian: apt-get install ${packages[*]}) and run this again" >&2
exit 1
