"""Compile for GPUs that are not here whatever one call of the Triton attention launches.

python compile_attention.py FILE CASE ...; each CASE is "sm_90 bfloat16 64 0.1 full": target, dtype,
head size, dropout, and "full" (512 positions), "short" (128) or "odd" (77 queries of their own, 300
positions).
Writes one JSON object: for each case and kernel, what the assembler says of it.

It must run without TRITON_INTERPRET, so the tests run it as a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock, Mock, patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_deberta.kernels import triton_attention

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OPTIONS = ("num_warps", "num_stages")
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
KERNELS = [name for name in vars(triton_attention) if name.endswith("_kernel")]


def launches(dtype: torch.dtype, size: int, dropout_p: float, shape: str) -> list[tuple]:
    """Record what a forward and backward pass of a packed batch would launch."""
    recorded = []

    def recorder(kernel):
        def launcher(_grid):
            return lambda *args, **flags: recorded.append((kernel, args, flags))

        return MagicMock(__getitem__=Mock(side_effect=launcher))

    heads, batch = 2, 2
    length, queries = {"full": (512, 512), "short": (128, 128), "odd": (300, 77)}[shape]
    states = [
        torch.zeros(batch, heads, rows, size, dtype=dtype, requires_grad=True)
        for rows in (queries, length, length)
    ]
    positions = torch.zeros(batch, queries, dtype=torch.int64) if shape == "odd" else None
    tables = [torch.zeros(heads, 8, size, dtype=dtype, requires_grad=True)] * 2
    recorders = {name: recorder(getattr(triton_attention, name)) for name in KERNELS}
    with patch.multiple(triton_attention, **recorders):
        triton_attention.disentangled_attention(
            *states,
            *tables,
            slots=torch.zeros(2 * length - 1, dtype=torch.int64),
            documents=torch.ones(batch, length, dtype=torch.int32),
            query_positions=positions,
            scale=1.0,
            dropout_p=dropout_p,
        ).sum().backward()
    return recorded


def compile_launch(kernel, args: tuple, flags: dict, target: GPUTarget):
    """Compile as the launcher would: with what it knows of numbers that are 1 or divide by 16."""
    options = {name: flags[name] for name in OPTIONS if name in flags}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in flags.items() if name not in OPTIONS}
    specialised = {p.name for p in kernel.params if not p.do_not_specialize}
    signature, constants, hints = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        value = values[name]
        is_constant = kernel.params[number].is_constexpr
        if (
            value is None
            or is_constant
            or (type(value) is int and value == 1 and name in specialised)
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            hints[(number,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name in specialised:
                hints[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=target, options=options)


def describe(compiled) -> dict[str, int]:
    """Registers, stack (spills), shared memory, tensor core instructions, moves of 2 bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [CUOBJDUMP, "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert usage
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "shared": compiled.metadata.shared,
        "HGMMA": dump.count("HGMMA"),
        "HMMA": len(re.findall(r"\bHMMA", dump)),
        "2 bytes": len(re.findall(r"\b(?:LDG|STG)\S*\.U16", dump)),
    }


def main() -> None:
    report: dict[str, dict] = {}
    for case in sys.argv[2:]:
        arch, dtype, size, dropout_p, shape = case.split()
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        report[case] = {}
        problem = (getattr(torch, dtype), int(size), float(dropout_p), shape)
        for kernel, args, flags in launches(*problem):
            if kernel.__name__ not in report[case]:
                compiled = compile_launch(kernel, args, flags, target)
                report[case][kernel.__name__] = describe(compiled)
    Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
