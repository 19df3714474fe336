#!/usr/bin/env bash
# Runs every test on the CPU; needs only Python >= 3.11 and git. Arguments go to pytest: bash launch/test.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project test
cd "$root"
echo "== pytest -q $*"
exec "$python" -m pytest -q "$@"
