"""Compile the kernels for GPUs that need not be here, and say what they take.

    python -m shared.compile_kernels            # JSON
    python -m shared.compile_kernels --write    # commit it

Registers, shared memory and spills are read from the machine code, by the cuobjdump that comes with Triton.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = {"sm_80": 80, "sm_90": 90}
# Llama 3.2 1B has 32 query heads, 8 KV heads and 64 elements a head; Qwen3 0.6B 16, 8 and 128.
LLAMA = {"GROUP": 4, "NUM_KV_HEADS": 8, "HEAD_DIM": 64, "PADDED_DIM": 64}
QWEN = {"GROUP": 2, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "PADDED_DIM": 128}
SHAPES = {
    "llama_decode": LLAMA | {"TILE_ROWS": 16},
    "llama_prefill": LLAMA | {"TILE_ROWS": 64},
    "qwen_decode": QWEN | {"TILE_ROWS": 16},
    "qwen_prefill": QWEN | {"TILE_ROWS": 64},
}


def compiled(target: int, **constants) -> dict:
    """What the attention kernel takes on a GPU of this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from milestones.v06_triton_kernel.kernels.paged_attention import NUM_WARPS, TILE_KEYS, _attend_kernel

    constants = {
        "BLOCK_SIZE": 16,
        "TILE_KEYS": TILE_KEYS,
        "TILE_DTYPE": triton.language.bfloat16,
    } | constants
    types = {name: "*bf16" for name in ("out_ptr", "q_ptr", "k_cache_ptr", "v_cache_ptr")}
    types |= {name: "*i32" for name in ("block_tables_ptr", "query_starts_ptr", "context_lens_ptr")}
    types |= {"lse_ptr": "*fp32", "scale": "fp32"} | {name: "constexpr" for name in constants}
    signature = {name: types.get(name, "i32") for name in _attend_kernel.arg_names}
    source = ASTSource(fn=_attend_kernel, signature=signature, constexprs=constants)
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": NUM_WARPS})
    usage = resources(binary.asm["cubin"])
    return {
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"],
        "shared_bytes": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
    }


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


def main(argv: list[str]) -> int:
    # Interpreted functions cannot be compiled.
    os.environ["TRITON_INTERPRET"] = "0"
    results = {
        name: {target: compiled(number, **shape) for target, number in TARGETS.items()} for name, shape in SHAPES.items()
    }
    print(json.dumps(results, indent=2))
    if argv == ["--write"]:
        from .bench import write

        import triton

        write("kernels", {"triton": triton.__version__} | results, "python -m shared.compile_kernels --write")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
