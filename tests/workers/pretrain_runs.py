"""Runs on every rank: whole runs of run_pretrain.py, one after the other in one process.

pretrain_runs.py RUNS_JSON       a list of command lines
"""

import json
import sys

from ds_deberta.config import parse
from ds_deberta.distributed import shutdown
from run_pretrain import pretrain
from tests.cases import allow_fp16_on_cpus

if __name__ == "__main__":
    allow_fp16_on_cpus()
    for arguments in json.loads(sys.argv[1]):
        pretrain(parse(arguments))
    shutdown()
