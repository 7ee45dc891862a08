#!/usr/bin/env bash
# Pre-train a generator and a discriminator by replaced token detection.
#
#   ./rtd.sh PRESET [flags of run_pretrain.py; they win over the preset's recipe]
#   ./rtd.sh --help
#
# DEEPSPEED_ARGS holds options of the launcher, "--hostfile hostfiles/two_nodes" for instance.
# WORLD_SIZE, RANK and MASTER_ADDR, if set, count nodes: start it on each of them.
# MASTER_PORT is the port where the processes meet; default on one node: a free one.
# --procs_per_node N: processes of a node; default: one for each device, one on a CPU.
# Without --data_dir: the demo corpus for a nano preset, WikiText-103 for the others.
# Without --output_dir: runs/PRESET in the current folder.
exec "$(dirname "$0")/preset.sh" rtd "$@"
