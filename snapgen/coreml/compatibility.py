"""What a Core ML package asks of the Neural Engine: its operations, their MACs, and what would not run there.

Reads the program from the package's own file, weights left where they are. Apple does not say what its engine takes,
and "it changes based on device generation, operating system version, tensor sizes" (github.com/apple/coremltools,
issue 1780). The lists here are what is public, each entry with its source; a compute plan on the device has the last
word. Sources:

[catalog] github.com/sbryngelson/ANEForge, docs/op-catalog.md: operations by chip, probed on the engine itself
[guide] ane-guide.readthedocs.io, chapters 4 and 17 (arXiv 2606.22283): limits by axis, measured on an M1
[whisperkit] *.mlcomputeplan.json of Whisper packages at huggingface.co/TerminatorPower/whisperkit-coreml: Core ML's own
[apple] machinelearning.apple.com/research/neural-engine-transformers
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from snapgen.coreml.mil import MILOp, MILProgram

LONGEST = 16_384
"""Elements along height or width up to the A15 ([guide] 17); 65,536 from the A16 ([catalog])."""


MOST_CHANNELS = 65_536
"""[guide] 17."""


MOST_AXES = 4
"""Core ML takes five, but a program of rank 5 failed to compile for the engine and the same in rank 4 ran wholly there
(github.com/FluidInference/FluidAudio, pull request 679); [apple]: "4D and channels-first"."""


WIDEST_KERNEL = 13
"""[guide] 17."""


TRANSPOSES = 3
"""Transpositions that an attention may have. Core ML's attention takes heads as (…, tokens, width) and convolutions
want channels first, so queries (with self-attention's keys), values and the result each cross once; in attention to a
context, queries, keys with values, and the result."""


TAKEN: Mapping[str, str] = {
    **dict.fromkeys(("conv", "linear", "scaled_dot_product_attention"), "[catalog] conv, matmul"),
    **dict.fromkeys(("add", "sub", "mul", "real_div"), "[catalog] elementwise; add: [whisperkit]"),
    **dict.fromkeys(("silu", "gelu", "sigmoid", "tanh"), "[catalog] activations; gelu: [whisperkit]"),
    **dict.fromkeys(("layer_norm", "instance_norm", "batch_norm"), "[catalog] norms; layer, batch: [whisperkit]"),
    **dict.fromkeys(("reshape", "expand_dims", "squeeze", "concat", "split", "transpose"), "[catalog] structural"),
    **dict.fromkeys(("reduce_mean", "reduce_sum", "reduce_max", "sqrt", "rsqrt", "abs"), "[catalog] reductions"),
    "slice_by_index": "[catalog]: folds into its reader where its bounds are constant",
    "upsample_nearest_neighbor": "[catalog]: native from the A14",
    "matmul": "[catalog]",
}
"""Operations that the Neural Engine runs, and who says so."""


REFUSED: Mapping[str, str] = {
    "gather": "[whisperkit]: Core ML keeps embeddings on the CPU",
    "gather_along_axis": "coremltools issue 1103: runs on the CPU",
    "softmax": "an attention that was taken apart; its matrix of scores leaves the chip ([apple], third principle)",
    "einsum": "[catalog]: becomes a chain of transpositions and products; write the products",
    "cos": "[catalog]: native from the A15 alone",
    "sin": "[catalog]: native from the A15 alone",
    "cast": "a needless pass: [guide] 17, all that the engine computes is float16",
    "identity": "a needless copy",
    "tile": "[catalog]: by 2, 3, 4 and 8 alone; join copies instead",
    "square": "beyond 255 a square overflows float16; use a native norm",
    "shape": "[catalog]: unsupported everywhere; shapes must be known beforehand",
    "range_1d": "[catalog]: host-computed constants instead",
    "reduce_prod": "[catalog]: unsupported everywhere",
    "pad": "[whisperkit]: on the CPU; let the convolution pad",
}
"""Operations that fall off the Neural Engine, or that nothing of ours should need; and why."""


def violations(program: MILProgram) -> list[str]:
    """What in a program would fall off the Neural Engine or is needless: a line each, which names the operation."""
    found = [f"{op.kind} {op.name}: {problem}" for op in program.operations for problem in _problems(op)]
    counts = program.counts()
    allowed = TRANSPOSES * counts["scaled_dot_product_attention"]
    if counts["transpose"] > allowed:
        found.append(f"{counts['transpose']} transpositions; {TRANSPOSES} for each attention make {allowed}")
    makers = {tensor.name: op for op in program.operations for tensor in op.outputs}
    uses = Counter(tensor.name for op in program.operations for tensor in op.operands)
    for op in program.operations:
        before = [makers[tensor.name] for tensor in op.operands if tensor.name in makers]
        again = op.kind in ("reshape", "transpose") and before and before[0].kind == op.kind
        if again and uses[before[0].outputs[0].name] == 1:
            found.append(f"{op.kind} {op.name}: follows another; one does the work of both")
    return found


def _problems(op: MILOp) -> Iterator[str]:
    if op.kind in REFUSED:
        yield REFUSED[op.kind]
    elif op.kind not in TAKEN:
        yield "not known to run on the Neural Engine"
    if not any(True for _ in op.operands):
        yield "works on constants alone; compute it beforehand"
    if op.kind == "conv" and max(op.inputs["weight"][0].shape[2:]) > WIDEST_KERNEL:
        yield f"a kernel wider than {WIDEST_KERNEL}"
    for tensor in (*op.operands, *op.outputs):
        if tensor.dtype != "FLOAT16":
            yield f"{tensor.name} is {tensor.dtype}, not FLOAT16"
        if len(tensor.shape) > MOST_AXES:
            yield f"{tensor.name} has {len(tensor.shape)} axes, more than {MOST_AXES}"
        if any(size > LONGEST for size in tensor.shape[-2:]) or any(size > MOST_CHANNELS for size in tensor.shape):
            yield f"{tensor.name} is {tensor.shape}: too long for some engines"
    if op.kind in ("reshape", "transpose", "slice_by_index") and op.inputs["x"][0].shape == op.outputs[0].shape:
        perm = op.inputs["perm"][0].ints if op.kind == "transpose" else ()
        if op.kind != "transpose" or perm == tuple(range(len(perm))):
            yield "changes nothing"
