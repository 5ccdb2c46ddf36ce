"""Compile every kernel launch for GPUs that are not here, and print what the compilers made of each, as JSON lines.

    python tests/kernels/kernel_compile.py sm_90 gfx942        (TRITON_INTERPRET must not be set)

The operations themselves are called, on CPU tensors; each launch they make is recorded and compiled for the named
architecture, with the tiles, the divisibility and the constants that a launch there would have. No driver and no GPU
takes part: the compilers are in Triton's wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from miniclip.kernels import tiles
from miniclip.kernels.add_layer_norm import add_layer_norm
from miniclip.kernels.attention import attention, attention_varlen
from miniclip.kernels.bias_quick_gelu import bias_quick_gelu
from miniclip.kernels.contrastive_loss import contrastive_loss
from miniclip.kernels.similarity import similarity_softmax, similarity_topk

TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in tiles.ARCHITECTURES if name.startswith("sm_")}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def dense(length: int, causal: bool, dtype=HALF, d: int = 64):
    return lambda: attention(torch.empty(1, length, 3, 2, d, dtype=dtype), causal)


def packed(max_len: int, causal: bool, dtype=HALF, d: int = 64):
    starts = torch.tensor([0, max_len], dtype=torch.int32)
    return lambda: attention_varlen(torch.empty(max_len, 3, 2, d, dtype=dtype), starts, max_len, causal)


def classes(n: int, m: int, width: int, k: int, dtype=HALF):
    x, c, scale = torch.empty(n, width, dtype=dtype), torch.empty(m, width, dtype=dtype), torch.ones(())
    return lambda: similarity_topk(x, c, scale, k) if k else similarity_softmax(x, c, scale)


def loss(n: int, width: int, dtype=HALF):
    image = torch.empty(n, width, dtype=dtype, requires_grad=True)
    return lambda: contrastive_loss(image, image, torch.ones(())).backward()


def rows(width: int, dtype=HALF):
    x, parameter = torch.empty(2, width, dtype=dtype), torch.empty(width)
    return lambda: (add_layer_norm(x, x, parameter, parameter), bias_quick_gelu(x, parameter.to(dtype)))


CASES = {
    "attention 16": dense(16, True),
    "attention 9 packed": packed(9, True),
    "attention 16 packed": packed(16, True),
    "attention 50": dense(50, False),
    "attention 32 packed": packed(32, True, BRAIN),
    "attention 77": dense(77, True, BRAIN),
    "attention 257": dense(257, False),
    "attention 577 d 128": dense(577, True, d=128),
    "top 5 for 1": classes(1, 1000, 512, 5),
    "top 5 for 256": classes(256, 1000, 512, 5, BRAIN),
    "top 16 for 50000": classes(50_000, 21_841, 768, 16),
    "top 5 in float32": classes(1000, 1000, 512, 5, FLOAT),
    "softmax for 1000": classes(1000, 1000, 512, 0),
    "loss 512": loss(4096, 512, BRAIN),
    "loss 768": loss(4096, 768),
    "rows 768": rows(768),
}


def launches(case: str, architecture: str) -> list[tuple[JITFunction, dict]]:
    """What one of CASES launches on an architecture: kernels, and their arguments by name."""
    recorded = []

    def record(self, *args, grid, warmup, **kwargs):
        recorded.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    run, find = JITFunction.run, tiles.architecture
    JITFunction.run, tiles.architecture = record, lambda device: architecture
    try:
        CASES[case]()
    finally:
        JITFunction.run, tiles.architecture = run, find
    return recorded


def compile_launch(kernel: JITFunction, arguments: dict, target: GPUTarget):
    """Compile as a launch would: an int of 1 is a constant, and what 16 divides, addresses included, is known to be."""
    types = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    types |= {torch.int32: "*i32", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[i,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = types[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if special and value % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=arguments)


def resources(compiled, target: GPUTarget, disassemble: bool) -> dict:
    """Bytes of shared memory, of stack and of spills a thread; tensor memory's columns; matrix instructions.

    disassemble: count the instructions too, which takes longer than compiling.
    """
    found = {"shared": compiled.metadata.shared, "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0}
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        found["stack"] = int(re.search(r"\.private_segment_fixed_size: (\d+)", text)[1])
        found["spills"] = int(re.search(r"\.vgpr_spill_count: (\d+)", text)[1])
        return found | {"matrix": sorted(set(re.findall(r"v_mfma_f32\w+", text)))}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, sass = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            if wanted
            else ""
            for option, wanted in (("--dump-resource-usage", True), ("--dump-sass", disassemble))
        )
    found["registers"], found["stack"] = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    found["spills"] = int(re.search(r"LOCAL:(\d+)", text)[1])
    matrix = set(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma\b", compiled.asm["ptx"]))
    if disassemble:
        found["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))
    return found | {"matrix": sorted(matrix)}


def main(arguments: list[str]) -> None:
    disassemble, seen = "--instructions" in arguments, {}
    for architecture in [name for name in arguments if name in TARGETS] or TARGETS:
        for case in CASES:
            for kernel, given in launches(case, architecture):
                target = TARGETS[architecture]
                options = {name: given[name] for name in given if name not in kernel.arg_names}
                row = {"architecture": architecture, "case": case, "kernel": kernel.__name__, "options": options}
                row["tile"] = [given.get(name) for name in ("ROWS", "COLUMNS", "num_warps", "num_stages")]
                row["largest"] = max(x.numel() for x in given.values() if isinstance(x, torch.Tensor))
                compiled = compile_launch(kernel, given, target)
                if compiled.hash not in seen:
                    seen[compiled.hash] = resources(compiled, target, disassemble)
                print(json.dumps(row | {"hash": compiled.hash} | seen[compiled.hash]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
