"""Launch a kernel of the Triton attention for two chunks, on a driver that only writes it down.

python launch_attention.py FILE writes a JSON list: what the driver was given for each chunk, and
whether Triton looked the kernel up for it. There need be no GPU.

It must run without TRITON_INTERPRET, so the tests run it as a process of its own.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ds_deberta.kernels import triton_attention

LAUNCHED: list[dict] = []


class Launcher:
    """Stands for what calls CUDA."""

    def __init__(self, _source, _metadata) -> None: ...

    def __call__(self, *args) -> None:
        """Write down the grid and the kernel's own arguments, which come last."""
        *arguments, _first_sample, first_head, batch, heads, size, rows, columns = args[-11:]
        LAUNCHED.append(
            {
                "grid": args[:3],
                "args": [
                    x.data_ptr() if isinstance(x, torch.Tensor) else x
                    for x in (*arguments, _first_sample, batch, heads, size, rows, columns)
                ],
                "first_head": first_head,
            }
        )


DRIVER = SimpleNamespace(
    launcher_cls=Launcher,
    get_current_device=lambda: 0,
    get_current_stream=lambda _device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    map_python_to_cpp_type=str,
    utils=SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
    ),
)


def main() -> None:
    driver.set_active(DRIVER)
    out, grad_out = (torch.zeros(2, 40, 3, 32) for _ in range(2))
    dots = torch.zeros(2, 3, 40)
    tile = triton_attention.Tile(32, 32, 4, 1)
    launch = triton_attention._Launcher(
        triton_attention.row_dots_kernel, tile, out.shape, 2, out, grad_out, dots, 40
    )
    for head in range(2):
        with patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run:
            launch(triton_attention._Chunk(0, head, 2, 1))
        LAUNCHED[-1]["looked up"] = run.called
    Path(sys.argv[1]).write_text(json.dumps(LAUNCHED))


if __name__ == "__main__":
    main()
