from __future__ import annotations

from pathlib import Path

import pytest

from snapgen.coreml.compatibility import violations
from snapgen.coreml.mil import MILOp, MILProgram, MILValue, read_program
from snapgen.errors import InputError


def value(
    name: str, *shape: int, dtype: str = "FLOAT16", constant: bool = False, ints: tuple[int, ...] = ()
) -> MILValue:
    return MILValue(name, dtype, shape, constant, ints)


def program(*operations: MILOp) -> MILProgram:
    return MILProgram((), operations, (operations[-1].outputs[0].name,))


def one(kind: str, x: MILValue, out: MILValue, **others: MILValue) -> MILOp:
    return MILOp(kind, "it", {"x": (x,)} | {name: (tensor,) for name, tensor in others.items()}, (out,))


IMAGE = value("x", 1, 8, 4, 4)


def test_what_the_engine_takes_is_passed_over() -> None:
    assert violations(program(one("silu", IMAGE, value("y", 1, 8, 4, 4)))) == []


@pytest.mark.parametrize(
    ("operation", "told"),
    [
        (one("gather", IMAGE, value("y", 1, 8)), "embeddings on the CPU"),
        (one("softmax", IMAGE, value("y", 1, 8, 4, 4)), "a decomposed attention"),
        (one("cumsum", IMAGE, value("y", 1, 8, 4, 4)), "not known to run"),
        (one("silu", value("x", 1, dtype="FLOAT32"), value("y", 1)), "x is FLOAT32"),
        (one("silu", IMAGE, value("y", 1, dtype="INT32")), "y is INT32"),
        (one("reshape", IMAGE, value("y", 1, 2, 4, 4, 4)), "y has 5 axes"),
        (one("reshape", value("x", 1, 4, 128, 256), value("y", 1, 4, 1, 32_768)), "too long"),
        (one("reshape", IMAGE, value("y", 1, 8, 4, 4)), "changes nothing"),
        (one("silu", value("c", 1, constant=True), value("y", 1)), "constant inputs"),
        (one("conv", IMAGE, value("y", 1, 8, 4, 4), weight=value("w", 8, 8, 15, 15, constant=True)), "kernel wider"),
        (one("transpose", IMAGE, value("y", 1, 4, 8, 4), perm=value("p", 4, ints=(0, 2, 1, 3))), "1 transpositions"),
    ],
)
def test_what_falls_off_the_engine_or_is_needless_is_told(operation: MILOp, told: str) -> None:
    assert any(told in line for line in violations(program(operation)))


def test_two_moves_that_could_be_one_are_told() -> None:
    first = one("reshape", IMAGE, value("y", 1, 8, 1, 16))
    second = one("reshape", value("y", 1, 8, 1, 16), value("z", 1, 2, 4, 16))
    assert any("follows another" in line for line in violations(program(first, second)))
    assert violations(program(first, one("silu", value("y", 1, 8, 1, 16), value("z", 1, 8, 1, 16)))) == []


def test_macs_are_counted_by_hand() -> None:
    def constant(*shape: int) -> MILValue:
        return value("w", *shape, constant=True)

    depthwise = one("conv", IMAGE, value("y", 1, 8, 2, 2), weight=constant(8, 1, 3, 3))
    assert depthwise.macs == 8 * 2 * 2 * 9
    assert one("linear", value("x", 1, 5, 6), value("y", 1, 5, 7), weight=constant(7, 6)).macs == 5 * 6 * 7
    product = one("matmul", value("x", 2, 3, 5), value("z", 2, 3, 4), y=value("y", 2, 5, 4))
    assert product.macs == 2 * 3 * 4 * 5
    attention = MILOp(
        "scaled_dot_product_attention",
        "it",
        {"query": (value("q", 1, 2, 6, 4),), "key": (value("k", 1, 2, 3, 4),), "value": (value("v", 1, 2, 3, 5),)},
        (value("y", 1, 2, 6, 5),),
    )
    assert attention.macs == 2 * 6 * 3 * (4 + 5)
    assert one("silu", IMAGE, IMAGE).macs == 0


def test_a_file_that_is_no_package_is_told(tmp_path: Path) -> None:
    (tmp_path / "it.mlpackage").mkdir()
    with pytest.raises(InputError, match="cannot be read as a Core ML package"):
        read_program(tmp_path / "it.mlpackage")
