#!/usr/bin/env bash
# Runs the tests on the CPU; needs only Python >= 3.11 and git. Without torch and transformers, which it does not install, the
# comparisons with them are left out; the goldens run. At the end it lists what was left out, and why.
# The tests of the scripts in benchmarks/ are .ci/run's. Arguments go to pytest: bash launch/test.sh -k resume
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project test
run_tests -m "not lab" "$@"
