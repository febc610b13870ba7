#!/bin/sh
# Prints the paths of Grafana's program and of its home directory, one per line; nothing if it is not installed.
# Usage: find_grafana.sh [DIRECTORY]    looks only in DIRECTORY, or without it on the PATH and in the directories of packages
set -eu
where=${1:+$1/bin}
where=${where:-$PATH:/usr/local/bin:/usr/sbin:/usr/share/grafana/bin}
program=$(PATH=$where; command -v grafana) || exit 0
program=$(readlink -f "$program")
for home in "${program%/bin/grafana}" /usr/share/grafana; do
  if [ -f "$home/conf/defaults.ini" ]; then
    # The program on the PATH may be a script with its own configuration.
    [ ! -x "$home/bin/grafana" ] || program=$home/bin/grafana
    printf '%s\n' "$program" "$home"
    exit
  fi
done
