"""Runs on every rank: the memory of real trainings, counted and planned.

    count_memory.py OUT_FILE MODEL_FILE DS_CONFIG...

OUT_FILE gets name -> [planned, counted] bytes of rank 0.
"""

import json
import sys
from pathlib import Path

import torch

from ds_deberta import build
from ds_deberta.config import parse
from ds_deberta.distributed import initialize, is_main, shutdown, world_size
from ds_deberta.plan import Ledger, Trace, footprint, shape_of
from tests.launch import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from memory import train


def main() -> None:
    out_file, model, *names = sys.argv[1:]
    initialize(seed=0)
    results = {}
    for name in names:
        run = parse(
            [
                *("--objective", "rtd", "--model", model, "--output_dir", "unused"),
                *("--deepspeed_config", str(ROOT / f"ds_configs/{name}.json"), "--warmup", "0"),
                *("--train_batch_size", str(16 * world_size()), "--micro_batch_size", "8"),
                *("--max_seq_length", "32"),
            ]
        )
        configs = build.model_configs(run, None)
        trace = Trace()
        with Ledger(trace, torch.device("cpu")):
            train(run, configs)
        if is_main():
            ds_config = next(iter(build.build_ds_configs(run, configs).values()))
            shape = shape_of(run, configs, ds_config, "cpu")
            planned = footprint(shape, ds_config, world_size())
            results[name] = [planned.total, trace.peak["keep"]]
    if is_main():
        Path(out_file).write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
