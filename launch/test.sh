#!/usr/bin/env bash
# Runs the tests on the CPU; needs only Python >= 3.11 and git. Without torch and transformers, which it does not install, the
# comparisons with them are left out; the goldens run. At the end it lists what was left out, and why.
# Two processes share the work. Arguments go to pytest: bash launch/test.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project test
cd "$root"
echo "== pytest -q -rs -n 2 --dist worksteal $*"
exec "$python" -m pytest -q -rs -n 2 --dist worksteal "$@"
