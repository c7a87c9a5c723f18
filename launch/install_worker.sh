#!/usr/bin/env bash
# Installs this checkout for TPU on the machine it is on: Python 3.11 to 3.13 where there is none, .venv, and what setup.py
# asks for.
#
#   launch/install_worker.sh

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
find_python() {
  local name
  for name in python3.13 python3.12 python3.11; do
    # Debian's Pythons come without ensurepip, which makes the environment.
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}
if [[ ! -x .venv/bin/pip ]]; then
  if ! python=$(find_python); then
    sudo DEBIAN_FRONTEND=noninteractive apt-get update -qq
    sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3.11 python3.11-venv ||
      sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3.12 python3.12-venv
    python=$(find_python) || {
      echo "install_worker: $(hostname): found no Python 3.11 to 3.13 with venv, and apt-get has none" >&2
      exit 1
    }
  fi
  "$python" -m venv .venv
fi
.venv/bin/pip install --quiet --editable '.[tpu,eval]'
