"""Runs on every rank: whole runs, one after the other, in which some samples give a NaN.

    poisoned_runs.py RUNS_JSON FIRST LAST OUT_DIR

RUNS_JSON is a list of command lines. The loss of a batch with a sample from FIRST to LAST is NaN.
OUT_DIR gets each rank's statuses as RANK.json, and what it said on stderr as RANK.txt.
"""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

from ds_deberta.config import parse
from ds_deberta.data.loader import Batch
from ds_deberta.distributed import rank, shutdown
from ds_deberta.kernels import HeadOutput
from ds_deberta.objectives.mlm import MLMObjective
from run_pretrain import pretrain


def main() -> None:
    runs, first, last = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    run_model = MLMObjective._run

    def run_poisoned(objective: MLMObjective, batch: Batch) -> HeadOutput:
        output = run_model(objective, batch)
        is_bad = (batch.sample_numbers >= first) & (batch.sample_numbers <= last)
        is_bad &= objective.model.module.training
        return output._replace(loss=output.loss * math.nan) if is_bad.any() else output

    MLMObjective._run = run_poisoned
    out = Path(sys.argv[4]) / os.environ["RANK"]
    with out.with_suffix(".txt").open("w") as file, contextlib.redirect_stderr(file):
        statuses = [pretrain(parse(arguments)) for arguments in runs]
    assert rank() == int(out.name)
    out.with_suffix(".json").write_text(json.dumps(statuses))
    shutdown()


if __name__ == "__main__":
    main()
