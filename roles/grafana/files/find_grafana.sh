#!/bin/sh
# Prints where Grafana's program is and where the files it comes with are, a line each; nothing if it is not installed.
# Usage: find_grafana.sh [DIRECTORY]    looks in DIRECTORY alone, or else on the PATH and where packages put it
set -eu
where=${1:+$1/bin}
where=${where:-$PATH:/usr/local/bin:/usr/sbin:/usr/share/grafana/bin}
program=$(PATH=$where; command -v grafana) || exit 0
program=$(readlink -f "$program")
for home in "${program%/bin/grafana}" /usr/share/grafana; do
  if [ -f "$home/conf/defaults.ini" ]; then
    # On the PATH may be a script that brings a configuration of its own.
    [ ! -x "$home/bin/grafana" ] || program=$home/bin/grafana
    printf '%s\n' "$program" "$home"
    exit
  fi
done
