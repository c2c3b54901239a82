"""What a launch compiles to, without a GPU: registers, spills, shared memory, instructions.

`python -m mergeprobe_fast.kernels._inspect` prints the table of README.md. A developer's tool: the
package itself never imports it.
"""

import subprocess
import tempfile
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import _configs
from ._arguments import Stack
from ._inspect_canonical import canonical_launches
from ._inspect_entries import entry_launches
from ._inspect_pass import pass_variants
from ._inspect_tiles import tile_launches
from .gram import launches

POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes one program may have
KINDS = {  # name: (dtype of U, dtype of V, accumulate)
    "half": (torch.bfloat16, torch.bfloat16, "fp32"),
    "high": (torch.float32, torch.float32, "fp32"),
    "highest": (torch.float32, torch.float32, "fp32"),
    "fp64": (torch.float32, torch.float32, "fp64"),
}


@dataclass(frozen=True)
class Resources:
    """Of one program. Spilled registers lie on the stack, and nothing else does."""

    registers: int
    stack: int
    shared: int
    ptx: str


def meta_launches(
    kind, arch, *, size, reduce, ranks, two_stacks=False, transposed=False, dtypes=None, config=None
):
    """What `block_gram` would launch on that architecture, on tensors without memory."""
    dtype_u, dtype_v, acc = KINDS[kind]
    dtype_u, dtype_v = dtypes or (dtype_u, dtype_v)
    bounds = list(accumulate(ranks, initial=0))

    def stack():
        shape = (4096, bounds[-1]) if transposed else (bounds[-1], 4096)
        U = torch.empty(shape, dtype=dtype_u, device="meta")
        V = torch.empty((bounds[-1], 1024), dtype=dtype_v, device="meta")
        return Stack(U.T if transposed else U, V, bounds, torch.ones(len(ranks)).double())

    pairs = 10**6 if size == "large" else 0
    capability = divmod(arch, 10)
    config = config or _configs.choose(kind, reduce, lambda block: pairs, capability, 132)
    n_i = len(ranks) if reduce == "both" else bounds[-1]
    n_j = bounds[-1] if reduce == "none" else len(ranks)
    out = torch.empty((n_i, n_j), dtype=torch.float64, device="meta")
    return list(launches(stack(), stack() if two_stacks else None, reduce, acc, config, out))


def resources(launch, arch):
    """Compile one (kernel, grid, arguments) as the launcher would specialise it."""
    kernel, _, named = launch
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, named[parameter.name]
        special, tensor = not parameter.do_not_specialize, isinstance(value, torch.Tensor)
        one = special and not tensor and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = POINTER[value.dtype] if tensor else "i32" if value < 2**31 else "i64"
        if tensor or (special and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in named.items() if name not in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output([tool, "-res-usage", cubin.name], text=True)
    usage = dict(item.split(":") for item in usage.split() if item.count(":") == 1)
    return Resources(
        int(usage["REG"]), int(usage["STACK"]), built.metadata.shared, built.asm["ptx"]
    )


def main():
    ranks = {"uniform 16": (16,) * 64, "odd": (3, 5, 7, 1, 30, 9) * 20}
    for arch, (kind, size) in product((80, 90), _configs.AMPERE):
        found = []
        for reduce, name, two_stacks in product(("both", "columns", "none"), ranks, (False, True)):
            if reduce == "none" and size == "large":
                continue
            launch, *_ = meta_launches(
                kind, arch, size=size, reduce=reduce, ranks=ranks[name], two_stacks=two_stacks
            )
            found.append(resources(launch, arch))
        registers = [x.registers for x in found]
        spilling = sum(x.stack > 0 for x in found)
        print(
            f"sm_{arch} {kind:8} {size:6} {len(found):2} variants: "
            f"{min(registers):3} to {max(registers):3} registers, {spilling} spill, "
            f"{max(x.shared for x in found) // 1024:3} KiB shared"
        )
    for arch, (kind, size) in product((80, 90), _configs.AMPERE):
        found = [resources(launch, arch) for launch in pass_variants(arch, kind, size)]
        registers = [x.registers for x in found]
        print(
            f"sm_{arch} pass {kind:8} {size:6} {len(found):2} variants: "
            f"{min(registers):3} to {max(registers):3} registers, "
            f"{sum(x.stack > 0 for x in found)} spill, "
            f"{max(x.shared for x in found) // 1024:3} KiB shared"
        )
    for arch, kind in product((80, 90), ("chain", "tensor")):
        for name, launch in tile_launches(kind).items():
            used = resources(launch, arch)
            print(
                f"sm_{arch} {kind:6} {name:17} {used.registers:3} registers, "
                f"{used.stack} bytes spilled, {used.shared / 1024:g} KiB shared"
            )
    for arch, (name, launch) in product((80, 90), entry_launches().items()):
        used = resources(launch, arch)
        print(
            f"sm_{arch} entries {name:18} {used.registers:3} registers, "
            f"{used.stack} bytes spilled, {used.shared / 1024:g} KiB shared"
        )
    for arch, height in product((80, 90), _configs.CANONICAL):
        for name, launch in canonical_launches(height).items():
            used = resources(launch, arch)
            print(
                f"sm_{arch} {height:2} {name:27} {used.registers:3} registers, "
                f"{used.stack} bytes spilled, {used.shared / 1024:g} KiB shared"
            )


if __name__ == "__main__":
    main()
