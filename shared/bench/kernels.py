"""Compile a chapter's kernels for several GPUs, none of which needs to be present, and report their resource usage.

    python -m shared.bench.kernels                             # prints JSON: each kernel of the first chapter that has it, all GPUs
    python -m shared.bench.kernels v07 --targets sm_80 sm_90   # the kernels of one chapter, or only some GPUs
    python -m shared.bench.kernels --write                     # also writes the result

Triton's cuobjdump reads registers and stack (where registers are spilled) from the machine code; Triton reports shared memory.

Reads: the kernel's chapter. Writes: docs/results/kernels.json.
"""
import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from shared.chapters import CHAPTERS, Chapter, find, first_with
from shared.programs import run
from shared.results import write

# T4, A100, GeForce RTX 30 series, H100.
TARGETS = {"sm_75": 75, "sm_80": 80, "sm_86": 86, "sm_90": 90}
# Llama 3.2 1B has 32 query heads, 8 KV heads and 64 elements per head; Qwen3 0.6B has 16, 8 and 128.
LLAMA = {"GROUP": 4, "NUM_KV_HEADS": 8, "BLOCK_SIZE": 16, "HEAD_DIM": 64, "PADDED_DIM": 64}
QWEN = LLAMA | {"GROUP": 2, "HEAD_DIM": 128, "PADDED_DIM": 128}
DECODE, PREFILL = {"TILE_ROWS": 16}, {"TILE_ROWS": 64}
ROTATE_LLAMA = {"NORM": False, "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HALF": 32, "PADDED_HALF": 32, "num_warps": 1, "enable_fp_fusion": False}
PRODUCT = {"BIAS": False, "SIZE_IN": 2048, "SIZE_OUT": 2048, "TILE_OUT": 64, "TILE_IN": 64}
ROTATE_QWEN = ROTATE_LLAMA | {"NORM": True, "NUM_HEADS": 16, "HALF": 64, "PADDED_HALF": 64}
# Each kernel with the module it is in and its constants, then the model's dtype and that of the output: splits write
# float32 parts.
KERNELS = {
    "llama_decode": ("paged_attention", "_attend_kernel", LLAMA | DECODE),
    "llama_decode_split": ("paged_attention", "_attend_kernel", LLAMA | DECODE, "bf16", "fp32"),
    "llama_prefill": ("paged_attention", "_attend_kernel", LLAMA | PREFILL),
    "qwen_decode": ("paged_attention", "_attend_kernel", QWEN | DECODE),
    "qwen_prefill": ("paged_attention", "_attend_kernel", QWEN | PREFILL),
    "qwen_prefill_float32": ("paged_attention", "_attend_kernel", QWEN | {"TILE_ROWS": 32}, "fp32"),
    "llama_combine": ("paged_attention", "_combine_kernel", {"HEAD_DIM": 64, "PADDED_DIM": 64, "PADDED_SPLITS": 16}),
    "llama_write": ("paged_attention", "_write_kernel", {"HEAD_DIM": 64, "SIZE": 512, "PADDED_SIZE": 512}),
    "llama_norm": ("fused", "_norm_kernel", {"ADD": True, "SIZE": 2048, "PADDED_SIZE": 2048}),
    "llama_rotate": ("fused", "_rotate_kernel", ROTATE_LLAMA),
    "qwen_rotate": ("fused", "_rotate_kernel", ROTATE_QWEN),
    "llama_gate": ("fused", "_gate_kernel", {"SIZE": 8192, "TILE": 1024}),
    "llama_product_few": ("product", "_product_kernel", PRODUCT | {"TILE_ROWS": 16}),
    "llama_product_many": ("product", "_product_kernel", PRODUCT | {"TILE_ROWS": 64}),
    "llama_product_float32": ("product", "_product_kernel", PRODUCT | {"TILE_ROWS": 32, "TILE_IN": 32}, "fp32"),
}
TYPES = {
    "block_tables_ptr": "*i32",
    "query_starts_ptr": "*i32",
    "context_lens_ptr": "*i32",
    "slot_mapping_ptr": "*i64",
    "lse_ptr": "*fp32",
    "parts_ptr": "*fp32",
    "scale": "fp32",
    "eps": "fp32",
}
OF_MODEL = ("stride_q", "stride_k", "stride_v", "stride_gate", "stride_up")


def kernels_of(chapter: Chapter) -> list[str]:
    """The names of those of KERNELS that a chapter has."""
    files = {path.stem: path.read_text() for path in (chapter.path / "kernels").glob("*.py")}
    return [name for name, (file, kernel, *_) in KERNELS.items() if f"def {kernel}(" in files.get(file, "")]


def compiled(chapter: Chapter, target: int, *kernel, **types) -> dict:
    """The resource usage of what binary_of returns for these arguments."""
    binary = binary_of(chapter, target, *kernel, **types)
    usage = resources(binary.asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "shared_bytes": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
    }


def binary_of(
    chapter: Chapter, target: int, file: str, kernel: str, constants: dict, dtype: str = "bf16", out_dtype: str | None = None
):
    """A kernel on a GPU of this compute capability, compiled for the arguments a launch passes.

    Tensors begin at multiples of 16 bytes, and strides that a model fixes are multiples of 16 elements.
    out_dtype is the output's; None means dtype.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"milestones.{chapter.name}.kernels.{file}")
    function = getattr(module, kernel)
    options = {name: constants[name] for name in ("num_warps", "enable_fp_fusion") if name in constants}
    # A later version of a kernel may no longer have all of them.
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    tile_dtype = {"bf16": triton.language.bfloat16, "fp32": triton.language.float32}[dtype]
    if kernel == "_product_kernel":
        constants = constants | {"TILE_DTYPE": tile_dtype}
    if kernel == "_attend_kernel":
        tile_keys = module.choose_tile(constants["PADDED_DIM"], tile_dtype.primitive_bitwidth // 8)
        constants = constants | {"TILE_KEYS": tile_keys, "TILE_DTYPE": tile_dtype}
    types = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in function.arg_names} | TYPES
    if out_dtype is not None:
        types["out_ptr"] = f"*{out_dtype}"
    types |= {name: "constexpr" for name in constants}
    signature = {name: types[name] for name in function.arg_names}
    aligned = [name.endswith("_ptr") or name.startswith(OF_MODEL) for name in function.arg_names]
    attrs = {(i,): [["tt.divisibility", 16]] for i, is_aligned in enumerate(aligned) if is_aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """The resource usage that cuobjdump reports for machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.kernels", description="Compile the kernels and report their resource usage.")
    parser.add_argument("chapter", nargs="?", metavar="vNN", help="default: of each kernel, the first that has it")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/")
    args = parser.parse_args(argv)
    if args.write and argv != ["--write"]:
        parser.error("--write allows no other argument, since the texts show the default chapters and all targets")
    try:
        chapters = [find(args.chapter)] if args.chapter else CHAPTERS
    except ValueError as error:
        parser.error(str(error))
    # From the last chapter to the first, so that the first one with a kernel stays.
    chapter_of = {name: chapter for chapter in reversed(chapters) for name in kernels_of(chapter)}
    if not chapter_of:
        parser.error(f"{chapters[0].id} has no kernels; name {first_with('attention').id} or a later chapter")
    # Interpreted functions cannot be compiled.
    os.environ["TRITON_INTERPRET"] = "0"
    usage = {
        name: {target: compiled(chapter_of[name], TARGETS[target], *kernel) for target in args.targets}
        for name, kernel in KERNELS.items()
        if name in chapter_of
    }
    print(json.dumps(usage, indent=2))
    if args.write:
        import triton

        write("kernels", {"triton": triton.__version__} | usage, "python -m shared.bench.kernels --write")
    return 0


if __name__ == "__main__":
    run(main)
