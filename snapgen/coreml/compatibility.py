"""Checks which operations of a Core ML program would not run on the Neural Engine.

Apple does not document what its engine supports, and "it changes based on device generation, operating system version,
tensor sizes" (github.com/apple/coremltools, issue 1780). The lists here are public knowledge, each entry with its
source. Only a compute plan on the device is authoritative. Sources:

[catalog] github.com/sbryngelson/ANEForge, docs/op-catalog.md: operations by chip, probed on the engine itself
[guide] ane-guide.readthedocs.io, chapters 4 and 17 (arXiv 2606.22283): limits by axis, measured on an M1
[whisperkit] Core ML's *.mlcomputeplan.json of Whisper packages at huggingface.co/TerminatorPower/whisperkit-coreml
[apple] machinelearning.apple.com/research/neural-engine-transformers
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from snapgen.coreml.mil import MILOp, MILProgram, read_program
from snapgen.coreml.package import PackageSummary

MAX_SIDE = 16_384
"""Elements along height or width up to the A15 ([guide] 17); 65,536 from the A16 ([catalog])."""


MAX_CHANNELS = 65_536
"""Limit of [guide] 17."""


MAX_AXES = 4
"""Axes of a tensor. Core ML supports five, but a program of rank 5 failed to compile for the engine while the same
program in rank 4 ran on it completely (github.com/FluidInference/FluidAudio, pull request 679); [apple]: "4D and
channels-first"."""


MAX_KERNEL = 13
"""Limit of [guide] 17."""


TRANSPOSES_PER_ATTENTION = 3
"""Transpositions that an attention needs. Core ML's attention takes heads as (…, tokens, width) and convolutions take
channels first. In self-attention, queries with keys, values, and the result are transposed once each; in
cross-attention queries, keys with values, and the result."""


SUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(("conv", "linear", "scaled_dot_product_attention"), "[catalog] conv, matmul"),
    **dict.fromkeys(("add", "sub", "mul", "real_div"), "[catalog] elementwise; add: [whisperkit]"),
    **dict.fromkeys(("silu", "gelu", "sigmoid", "tanh"), "[catalog] activations; gelu: [whisperkit]"),
    **dict.fromkeys(("layer_norm", "instance_norm", "batch_norm"), "[catalog] norms; layer, batch: [whisperkit]"),
    **dict.fromkeys(("reshape", "expand_dims", "squeeze", "concat", "split", "transpose"), "[catalog] structural"),
    **dict.fromkeys(("reduce_mean", "reduce_sum", "reduce_max", "sqrt", "rsqrt", "abs"), "[catalog] reductions"),
    "slice_by_index": "[catalog]: is fused with its consumer if its bounds are constant",
    "upsample_nearest_neighbor": "[catalog]: native from the A14",
    "matmul": "[catalog]",
}
"""Operations that the Neural Engine runs, with their sources."""


UNSUPPORTED: Mapping[str, str] = {
    "gather": "[whisperkit]: Core ML keeps embeddings on the CPU",
    "gather_along_axis": "coremltools issue 1103: runs on the CPU",
    "softmax": "a decomposed attention; its matrix of scores leaves the chip ([apple], third principle)",
    "einsum": "[catalog]: becomes a chain of transpositions and products; write the products",
    "cos": "[catalog]: native only from the A15",
    "sin": "[catalog]: native only from the A15",
    "cast": "an unnecessary pass: [guide] 17, the engine computes only in float16",
    "identity": "an unnecessary copy",
    "tile": "[catalog]: by 2, 3, 4 and 8 only; concatenate copies instead",
    "square": "beyond 255 a square overflows float16; use a native norm",
    "shape": "[catalog]: unsupported everywhere; shapes must be static",
    "range_1d": "[catalog]: use constants computed on the host",
    "reduce_prod": "[catalog]: unsupported everywhere",
    "pad": "[whisperkit]: on the CPU; let the convolution pad",
}
"""Operations that do not run on the Neural Engine or that our nets should not need, with the reason."""


def summarize_package(path: Path) -> PackageSummary:
    """The summary of an ``.mlpackage``.

    Raises:
        InputError: as `snapgen.coreml.mil.read_program`.
    """
    program = read_program(path)
    return summarize_program(program, path, violations(program))


def summarize_program(
    program: MILProgram, path: Path, problems: Sequence[str], decomposed: Mapping[str, int] | None = None
) -> PackageSummary:
    """The summary of a package whose program is read; for the arguments see `PackageSummary`."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return PackageSummary(
        name=path.name,
        size_bytes=size,
        macs=program.macs,
        operations=len(program.operations),
        operation_counts=dict(program.counts().most_common()),
        layouts=dict(program.layouts().most_common()),
        violations=tuple(problems),
        resident_bytes=size + program.peak_bytes,
        decomposed=decomposed or {},
    )


def violations(program: MILProgram) -> list[str]:
    """Operations that would not run on the Neural Engine or are unnecessary: one line each, with the operation."""
    if any(tensor.dtype == "FLOAT32" for tensor in program.inputs):
        return ["computes in float32, and the Neural Engine in float16 alone"]
    lines = [f"{op.kind} {op.name}: {problem}" for op in program.operations for problem in _problems(op)]
    counts = program.counts()
    allowed = TRANSPOSES_PER_ATTENTION * counts["scaled_dot_product_attention"]
    if counts["transpose"] > allowed:
        problem = f"{TRANSPOSES_PER_ATTENTION} for each attention make {allowed}"
        lines.append(f"{counts['transpose']} transpositions; {problem}")
    producers = {tensor.name: op for op in program.operations for tensor in op.outputs}
    uses = Counter(tensor.name for op in program.operations for tensor in op.operands)
    for op in program.operations:
        inputs_from = [producers[tensor.name] for tensor in op.operands if tensor.name in producers]
        repeats = op.kind in ("reshape", "transpose") and inputs_from and inputs_from[0].kind == op.kind
        if repeats and uses[inputs_from[0].outputs[0].name] == 1:
            lines.append(f"{op.kind} {op.name}: follows another; one can do the work of both")
    return lines


def _problems(op: MILOp) -> Iterator[str]:
    if op.kind in UNSUPPORTED:
        yield UNSUPPORTED[op.kind]
    elif op.kind not in SUPPORTED:
        yield "not known to run on the Neural Engine"
    if not any(True for _ in op.operands):
        yield "has only constant inputs; precompute it"
    if op.kind == "conv" and max(op.inputs["weight"][0].shape[2:]) > MAX_KERNEL:
        yield f"a kernel wider than {MAX_KERNEL}"
    for tensor in (*op.operands, *op.outputs):
        if tensor.dtype != "FLOAT16":
            yield f"{tensor.name} is {tensor.dtype}, not FLOAT16"
        if len(tensor.shape) > MAX_AXES:
            yield f"{tensor.name} has {len(tensor.shape)} axes, more than {MAX_AXES}"
        if any(size > MAX_SIDE for size in tensor.shape[-2:]) or any(size > MAX_CHANNELS for size in tensor.shape):
            yield f"{tensor.name} is {tensor.shape}: too long for some engines"
    if op.kind in ("reshape", "transpose", "slice_by_index") and op.inputs["x"][0].shape == op.outputs[0].shape:
        perm = op.inputs["perm"][0].ints if op.kind == "transpose" else ()
        if op.kind != "transpose" or perm == tuple(range(len(perm))):
            yield "changes nothing"
