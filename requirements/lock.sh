#!/usr/bin/env bash
# Resolves base.in, bench.in, stores.in, ray.in, trace.in, labs.in, dev.in and chains.in in fresh environments and writes exact pins. Usage: requirements/lock.sh [python3.11]
set -euo pipefail
cd "$(dirname "$0")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${1:-python3.11}" -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pins() { pip freeze --exclude-editable | sed 's/+cpu$//' | LC_ALL=C sort; }
pip install -r base.in
{ echo "# Written by requirements/lock.sh from base.in. Do not edit."; pins; } > base.lock
pip install -r bench.in
{ echo "# Written by requirements/lock.sh from bench.in: what it adds to base.lock. Do not edit."
  LC_ALL=C comm -13 <(grep -v '^#' base.lock) <(pins); } > bench.lock
pip uninstall --yes $(grep -v '^#' bench.lock | cut -d= -f1)
pip install -r stores.in
{ echo "# Written by requirements/lock.sh from stores.in: what it adds to base.lock. Do not edit."
  LC_ALL=C comm -13 <(grep -v '^#' base.lock) <(pins); } > stores.lock
pip uninstall --yes $(grep -v '^#' stores.lock | cut -d= -f1)
pip install -r ray.in
{ echo "# Written by requirements/lock.sh from ray.in: what it adds to base.lock. Do not edit."
  LC_ALL=C comm -13 <(grep -v '^#' base.lock) <(pins); } > ray.lock
pip uninstall --yes $(grep -v '^#' ray.lock | cut -d= -f1)
pip install -r trace.in
{ echo "# Written by requirements/lock.sh from trace.in: what it adds to base.lock. Do not edit."
  LC_ALL=C comm -13 <(grep -v '^#' base.lock) <(pins); } > trace.lock
pip uninstall --yes $(grep -v '^#' trace.lock | cut -d= -f1)
pip install -r labs.in
{ echo "# Written by requirements/lock.sh from labs.in: what it adds to base.lock. Do not edit."
  LC_ALL=C comm -13 <(grep -v '^#' base.lock) <(pins); } > labs.lock
pip uninstall --yes $(grep -v '^#' labs.lock | cut -d= -f1)
pip install -r dev.in
{ echo "# Written by requirements/lock.sh from dev.in: what it adds to base.lock. Do not edit."
  LC_ALL=C comm -13 <(grep -v '^#' base.lock) <(pins); } > dev.lock
pip install -r chains.in
{ echo "# Written by requirements/lock.sh from chains.in: what it adds to base.lock and dev.lock. Do not edit."
  LC_ALL=C comm -13 <(grep -hv '^#' base.lock dev.lock | LC_ALL=C sort) <(pins); } > chains.lock
