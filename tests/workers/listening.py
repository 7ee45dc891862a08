"""Runs on every rank: all sockets that listen are bound to this machine's own address."""

import os

import psutil
import torch

from ds_deberta.distributed import initialize, shutdown, sum_across_ranks
from ds_deberta.stop import StopRequest

if __name__ == "__main__":
    initialize(0)
    sum_across_ranks(torch.ones(1))
    StopRequest()
    sockets = psutil.Process().net_connections("inet")
    listening = [each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN]
    assert listening
    assert set(listening) == {"127.0.0.1"}, listening
    shutdown()
    os._exit(0)
