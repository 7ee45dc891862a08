"""Runs on every rank: whole runs of run_pretrain.py, one after the other in one process.

moved_runs.py RUNS_JSON       a list of (command line, steps whose save fails, status)

The last rank finds the disk full at the steps whose save is to fail.
"""

import json
import os
import resource
import sys

from ds_deberta import checkpoint
from ds_deberta.config import parse
from ds_deberta.distributed import rank, shutdown, world_size
from ds_deberta.leftovers import own_temporary_folder
from run_pretrain import pretrain
from tests.cases import allow_fp16_on_cpus

SMALL = 4096  # bytes; less than any shard of a model has

if __name__ == "__main__":
    allow_fp16_on_cpus()
    full: list[int] = []
    real_write = checkpoint.write_shares

    def write(shares, folder):  # in the background, too; this rank writes nothing else meanwhile
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        is_full = int(folder.stem[-7:]) in full and rank() == world_size() - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL if is_full else most, most))
        try:
            return real_write(shares, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    checkpoint.write_shares = write
    with own_temporary_folder():
        for arguments, full[:], expected in json.loads(sys.argv[1]):
            try:
                status = pretrain(parse(arguments))
            except SystemExit as error:
                status = error.code
            assert status == expected, status
        shutdown()
    sys.stdout.flush()
    os._exit(0)
