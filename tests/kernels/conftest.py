"""Without a GPU Triton's interpreter runs the kernels, if told before triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
