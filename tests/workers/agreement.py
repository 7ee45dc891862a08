"""Runs on every rank: the last one differs from the others in one thing after the other.

agreement.py FLAGS_JSON OTHER_DATA_DIR       flags of run_pretrain.py
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ds_deberta import agreement
from ds_deberta.config import parse
from ds_deberta.distributed import barrier, initialize, place_on_node, rank, shutdown, world_size


def check(run, kind: str, names: str) -> None:
    message = f"{kind} must be the same on all ranks; other than on rank 0 on rank 1: {names}"
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        agreement.check_agreement(run)
    assert str(error.value) == message


def mounted(path: Path, is_elsewhere: bool) -> Path:
    """What a path is on a node whose disk is its own."""
    return path.parent / "elsewhere" / path.name if is_elsewhere else path


if __name__ == "__main__":
    flags, other = json.loads(sys.argv[1]), Path(sys.argv[2])
    initialize(0)
    run = parse(flags)
    is_last = rank() == world_size() - 1
    agreement.check_agreement(run)

    named = str(run.data.data_dir)
    data = replace(run.data, data_dir=other)
    check(replace(run, data=data) if is_last else run, "data", str(other) if is_last else named)
    data = replace(run.data, data_dir=other / "not-there")
    with pytest.raises(ValueError, match=r"not-there must be a folder of .* \(found by rank 1\)"):
        agreement.check_agreement(replace(run, data=data) if is_last else run)

    assert place_on_node() == (rank(), world_size())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: f"node{rank()}")
        assert place_on_node() == (0, 1)

    folder = run.output_dir
    agreement.check_output_dir(folder)
    barrier()  # the first rank cleans up last
    assert not folder.exists()
    barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_VISIBLE", 0.5)
        patch.setattr(
            agreement, "_see", lambda token, see=agreement._see: see(mounted(token, is_last))
        )
        with pytest.raises(ValueError, match=r"must be one folder on .* \(found by rank 1\)"):
            agreement.check_output_dir(folder)
    barrier()
    assert not folder.exists()

    optim = replace(run.optim, learning_rate=0.125)
    changed = replace(run, seed=99, optim=optim)
    check(changed if is_last else run, "configuration", "seed, learning_rate")

    file = other / f"ds_config_{rank()}.json"
    file.write_text(run.deepspeed_config.read_text() + " " * rank())
    check(replace(run, deepspeed_config=file), "configuration", "deepspeed_config")

    if is_last:
        agreement.__file__ = str(other / "agreement.py")
    check(run, "code", "the files of ds_deberta")
    shutdown()
    os._exit(0)
