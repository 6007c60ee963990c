#!/usr/bin/env bash
# Several machines without a scheduler: run the same script on each of them.
#   first machine:   REWARD_MODEL_PATH=FOLDER bash examples/ray/train_2nodes.sh head 2 [key=value ...]     2: machines
#   every other:     bash examples/ray/train_2nodes.sh worker HEAD_ADDRESS
# HEAD_ADDRESS is what the first machine prints. The checkout, its .venv-gpu, models and data lie under the same path
# everywhere. Port 6379 of the first machine and Ray's worker ports must be open between them, and to nobody else: who
# reaches Ray can run code. Made for machines that nobody here had: see docs/gpu.md.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$repo"
venv="$repo/.venv-gpu"
export PATH="$venv/bin:$PATH" UPS_RM_VENV="$venv" PYTHONUNBUFFERED=1
gpus="$(nvidia-smi --list-gpus | wc -l)"
port=6379

case "${1:-}" in
  head)
    nodes="${2:?number of machines}"
    [ -n "${REWARD_MODEL_PATH:-}" ] || { echo "REWARD_MODEL_PATH names no reward model folder" >&2; exit 2; }
    shift 2
    address="$(hostname --ip-address | awk '{print $1}')"
    ray start --head --node-ip-address="$address" --port="$port" --num-gpus="$gpus" --disable-usage-stats
    trap 'ray stop' EXIT
    echo "on every other machine: bash examples/ray/train_2nodes.sh worker $address:$port"
    python examples/ray/wait_for_nodes.py --address "$address:$port" --nodes "$nodes" --gpus "$gpus" --seconds 1800
    ups-rm train --engine verl --recipe pku_saferlhf_qwen2_7b_2nodes "trainer.nnodes=$nodes" \
      "ray_kwargs.ray_init.address=$address:$port" "$@"
    ;;
  worker)
    # until the head stops, or Ctrl-C
    ray start --address="${2:?address of the head, host:port}" --num-gpus="$gpus" --disable-usage-stats --block
    ;;
  *)
    echo "usage: train_2nodes.sh head MACHINES [key=value ...] | worker HOST:PORT" >&2
    exit 2
    ;;
esac
