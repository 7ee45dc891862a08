#!/usr/bin/env bash
# Pre-train a masked language model.
#
#   ./mlm.sh PRESET [flags of run_pretrain.py; they win over the preset's recipe]
#
# DEEPSPEED_ARGS holds options of the launcher, "--hostfile hostfiles/two_nodes" for instance.
# WORLD_SIZE, RANK and MASTER_ADDR, if set, count nodes: start it on each of them.
# MASTER_PORT is the port where the processes meet; default on one node: a free one.
# --procs_per_node N: processes of a node; default: one for each device, one on a CPU.
# Without --data_dir: the demo corpus for the nano preset, WikiText-103 for the others.
set -euo pipefail
cd "$(dirname "$0")"
[ ! -d .venv ] || PATH="$PWD/.venv/bin:$PATH"

python -m ds_deberta.recipes mlm "${1:-}" # no preset, or a wrong one: lists them, status 2
preset=$1
shift

data=data/wikitext-103
[ "$preset" != deberta-nano ] || data=data/demo
[[ " $* " == *" --data_dir"* ]] || make --silent "$data/manifest.json"

# shellcheck disable=SC2086 # the launcher's options are words
exec python -m ds_deberta.launch ${DEEPSPEED_ARGS:-} run_pretrain.py --objective mlm --model "$preset" \
    --data_dir "$data" --output_dir "runs/$preset" "$@"
