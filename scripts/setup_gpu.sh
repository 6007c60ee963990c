#!/usr/bin/env bash
# The environment for ENGINE=verl on NVIDIA GPUs: Linux x86-64, Python 3.12, exact versions from constraints-gpu.txt.
# Usage: bash scripts/setup_gpu.sh [--without-flash-attn] [FOLDER]        FOLDER: .venv-gpu if not given
# Python: PYTHON=/path/to/python3.12. flash-attn 2.8.3 is built here, which needs nvcc of CUDA 13 and up to an hour.
# It is an environment of its own: verl[vllm] pins another torch and transformers than the local engine is tested with.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

flash_attn=1
folder="$repo/.venv-gpu"
for argument in "$@"; do
  case "$argument" in
    --without-flash-attn) flash_attn=0 ;;
    -*) echo "unknown option $argument; usage: setup_gpu.sh [--without-flash-attn] [FOLDER]" >&2 && exit 2 ;;
    *) folder="$argument" ;;
  esac
done

if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "constraints-gpu.txt is for Linux x86_64, this is $(uname -sm)" >&2
  exit 1
fi
python="${PYTHON:-python3.12}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
  echo "constraints-gpu.txt is for Python 3.12; set PYTHON=/path/to/python3.12 (found: $("$python" --version 2>&1 || echo none))" >&2
  exit 1
fi
if [ "$flash_attn" = 1 ] && ! command -v nvcc >/dev/null; then
  echo "flash-attn is built with nvcc, which is not on PATH: install the CUDA 13 toolkit, or give --without-flash-attn" >&2
  echo "(without it: actor_rollout_ref.model.use_remove_padding=false and sdpa attention, see docs/gpu.md)" >&2
  exit 1
fi

"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
# the lock is complete: --no-deps keeps pip from resolving anything anew
"${pip[@]}" install --no-deps -r "$repo/constraints-gpu.txt"
"${pip[@]}" install --no-deps -e "$repo"
"${pip[@]}" check
if [ "$flash_attn" = 1 ]; then
  # verl 0.9.1's own pin for torch 2.11 and CUDA 13; its build needs the torch that is installed
  "${pip[@]}" install --no-deps --no-build-isolation flash-attn==2.8.3
fi
echo "ready: UPS_RM_VENV=$folder ENGINE=verl bash scripts/run_grpo_pku_saferlhf.sh"
"$folder/bin/ups-rm" doctor --engine verl || echo "the table above says what is missing on this machine" >&2
