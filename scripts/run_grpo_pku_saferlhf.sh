#!/usr/bin/env bash
# The whole way with one command: venv, install, default policy, prepare -> RM -> checks -> GRPO -> before/after table.
# Usage: bash scripts/run_grpo_pku_saferlhf.sh [key=value ...]      (recipe overrides in verl's names; ups-rm run --help)
# Environment: POLICY_MODEL_PATH REWARD_MODEL_PATH TRAIN_DATA VAL_DATA OUTPUT_DIR ENGINE=local FRESH=1 PYTHON=python3
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$repo/scripts/setup.sh"
setup_venv "$repo" ""
exec "$venv/bin/ups-rm" run "$@"
