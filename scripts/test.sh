#!/usr/bin/env bash
# Lint, types and all tests, after setting up .venv if needed (with the extras that the oracle tests compare with).
# Usage: bash scripts/test.sh [pytest arguments]
#   bash scripts/test.sh -m "not slow"         a few minutes: no real model, no fresh environments
#   bash scripts/test.sh tests/grpo -x         one folder, stop at the first failure
# TEST_PROCESSES=N shares the tests out to N processes (2); 0 keeps them in one, as a debugger wants.
# All four checks run even if one fails; the exit code is 0 only if all pass.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$repo/scripts/setup.sh"
setup_venv "$repo" "dev,verl,trl"
cd "$repo"
export COLUMNS=140 # processes of a test run have no terminal to ask
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # idle threads sleep at once: other tests share the cores

failed=()
check() {
  local name="$1"
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}
check "ruff check" "$venv/bin/ruff" check .
check "ruff format" "$venv/bin/ruff" format --check .
check "mypy" "$venv/bin/mypy"
check "pytest" "$venv/bin/python" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadscope --no-loadscope-reorder "$@"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
