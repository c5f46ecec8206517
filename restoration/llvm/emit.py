"""A few words for writing kernels in LLVM's intermediate language: vectors, loops, tiles.

All arrays are of fp32, by pointer and offset in values; vectors are of eight values, which LLVM
maps to what the processor has. A kernel says itself what is a register and in which order sums
run, so its bits depend on no tile, no thread and no company.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import ir

LANES = 8  # values of a vector: the registers of AVX2; two of NEON's

FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
_INT = ir.IntType(64)
_LANE = ir.IntType(32)
_POINTER = ir.PointerType()
_MASK = ir.VectorType(_LANE, LANES)

Value = Any  # of llvmlite, which has no types
Number = Any  # the same, or an int


class Function:
    """A function that is being written: void(pointers, then 64-bit integers)."""

    def __init__(
        self, module: ir.Module, name: str, arrays: Sequence[str], numbers: Sequence[str]
    ) -> None:
        self.module = module
        kinds = [_POINTER] * len(arrays) + [_INT] * len(numbers)
        self.ir = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
        self.builder = ir.IRBuilder(self.ir.append_basic_block("entry"))
        self._named = dict(zip([*arrays, *numbers], self.ir.args, strict=True))
        for array in self.ir.args[: len(arrays)]:
            array.add_attribute("noalias")

    def __getitem__(self, name: str) -> Value:
        return self._named[name]

    def end(self) -> None:
        self.builder.ret_void()

    # Whole numbers

    def add(self, a: Number, b: Number) -> Value:
        return self.builder.add(_number(a), _number(b), flags=("nsw",))

    def sub(self, a: Number, b: Number) -> Value:
        return self.builder.sub(_number(a), _number(b), flags=("nsw",))

    def mul(self, a: Number, b: Number) -> Value:
        return self.builder.mul(_number(a), _number(b), flags=("nsw",))

    def least(self, a: Number, b: Number) -> Value:
        a, b = _number(a), _number(b)
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def most(self, a: Number, b: Number) -> Value:
        a, b = _number(a), _number(b)
        return self.builder.select(self.builder.icmp_signed("<", a, b), b, a)

    def halved(self, a: Value) -> Value:
        return self.builder.ashr(a, _number(1))

    def divided(self, a: Number, b: Number) -> Value:
        """a // b of numbers that are not negative."""
        return self.builder.sdiv(_number(a), _number(b))

    def rest(self, a: Number, b: Number) -> Value:
        return self.builder.srem(_number(a), _number(b))

    def below(self, a: Number, b: Number) -> Value:
        return self.builder.icmp_signed("<", _number(a), _number(b))

    # Memory

    def at(self, array: Value, offset: Number) -> Value:
        """The part of an array of fp32 from an offset on."""
        return self.builder.gep(array, [_number(offset)], inbounds=True, source_etype=FLOAT)

    def load(self, array: Value, offset: Number = 0) -> Value:
        vector = self.builder.load(self.at(array, offset), typ=VECTOR)
        vector.align = 4
        return vector

    def store(self, vector: Value, array: Value, offset: Number = 0) -> None:
        self.builder.store(vector, self.at(array, offset)).align = 4

    def store_one(self, vector: Value, array: Value, offset: Number) -> None:
        """The first lane alone."""
        first = self.builder.extract_element(vector, ir.Constant(_LANE, 0))
        self.builder.store(first, self.at(array, offset)).align = 4

    def everywhere(self, array: Value, offset: Number = 0) -> Value:
        """One value of an array in all lanes."""
        return self.splat(self.builder.load(self.at(array, offset), typ=FLOAT))

    def index(self, table: Value, offset: Number) -> Value:
        """A whole number of a table of 64-bit ones."""
        place = self.builder.gep(table, [_number(offset)], inbounds=True, source_etype=_INT)
        return self.builder.load(place, typ=_INT)

    # Vectors

    def either(self, condition: Value, a: Value, b: Value) -> Value:
        return self.builder.select(condition, a, b)

    def splat(self, value: Value) -> Value:
        if isinstance(value, float):
            return ir.Constant(VECTOR, [value] * LANES)
        nothing = ir.Constant(VECTOR, ir.Undefined)
        first = self.builder.insert_element(nothing, value, ir.Constant(_LANE, 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(_MASK, [0] * LANES))

    def plus(self, a: Value, b: Value) -> Value:
        return self.builder.fadd(a, b)

    def minus(self, a: Value, b: Value) -> Value:
        return self.builder.fsub(a, b)

    def times(self, a: Value, b: Value) -> Value:
        return self.builder.fmul(a, b)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a·b + c, rounded once."""
        return self._intrinsic("llvm.fma", a, b, c)

    def between(self, a: Value, b: Value, part: Value) -> Value:
        """a + part·(b − a)."""
        return self.fma(self.minus(b, a), part, a)

    def total(self, vector: Value) -> Value:
        """The sum of all lanes, in all lanes."""
        for step in (4, 2, 1):
            other = self.builder.shuffle_vector(vector, vector, _partners(step))
            vector = self.plus(vector, other)
        return vector

    def lowest(self, vector: Value) -> Value:
        """The least of all lanes, in all lanes."""
        for step in (4, 2, 1):
            other = self.builder.shuffle_vector(vector, vector, _partners(step))
            vector = self.either(self.lower(other, vector), other, vector)
        return vector

    def lower(self, a: Value, b: Value) -> Value:
        return self.builder.fcmp_ordered("<", a, b)

    def equal(self, a: Value, b: Value) -> Value:
        return self.builder.fcmp_ordered("==", a, b)

    def counted(self, number: Value) -> Value:
        """A whole number as fp32, in all lanes."""
        return self.splat(self.builder.sitofp(number, FLOAT))

    def lanes(self, first: int) -> Value:
        """first, first + 1, …"""
        return ir.Constant(VECTOR, [float(first + lane) for lane in range(LANES)])

    def inverse_root(self, vector: Value) -> Value:
        """1/√ of the first lane, in all lanes."""
        first = self.builder.extract_element(vector, ir.Constant(_LANE, 0))
        root = self._intrinsic("llvm.sqrt", first)
        return self.splat(self.builder.fdiv(ir.Constant(FLOAT, 1.0), root))

    def clamp(self, vector: Value, limit: float) -> Value:
        low = self._intrinsic("llvm.maxnum", vector, self.splat(-limit))
        return self._intrinsic("llvm.minnum", low, self.splat(limit))

    def quotient(self, a: Value, b: Value) -> Value:
        return self.builder.fdiv(a, b)

    def _intrinsic(self, name: str, *given: Value) -> Value:
        kind = given[0].type
        name += ".v8f32" if kind == VECTOR else ".f32"
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [kind] * len(given)), name)
        return self.builder.call(function, given)

    # Control

    def call(self, function: Function, given: Sequence[Number]) -> None:
        self.builder.call(function.ir, [_number(each) for each in given])

    @contextlib.contextmanager
    def loop(self, start: Number, stop: Number, step: int = 1) -> Iterator[Value]:
        """The body for start, start + step, … below stop, which may be none."""
        builder = self.builder
        start, stop = _number(start), _number(stop)
        before = builder.block
        body, after = self._blocks("body", "after")
        builder.cbranch(builder.icmp_signed("<", start, stop), body, after)
        builder.position_at_end(body)
        index = builder.phi(_INT)
        index.add_incoming(start, before)
        yield index
        following = self.add(index, step)
        index.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, stop), body, after)
        builder.position_at_end(after)

    def fold(
        self,
        count: Number,
        step: int,
        values: Sequence[Value],
        body: Callable[[Value, Sequence[Value]], Sequence[Value]],
    ) -> list[Value]:
        """values = body(index, values) for index 0, step, … below count > 0, kept in registers."""
        builder = self.builder
        before = builder.block
        inner, after = self._blocks("fold", "folded")
        builder.branch(inner)
        builder.position_at_end(inner)
        index = builder.phi(_INT)
        index.add_incoming(_number(0), before)
        kept = [builder.phi(value.type) for value in values]
        for phi, value in zip(kept, values, strict=True):
            phi.add_incoming(value, before)
        made = list(body(index, kept))
        following = self.add(index, step)
        index.add_incoming(following, builder.block)
        for phi, value in zip(kept, made, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(self.below(following, count), inner, after)
        builder.position_at_end(after)
        return made

    def tiles(self, count: Value, size: int, body: Callable[[Value, int], None]) -> None:
        """body(first, how many) over `count` pixels, in tiles of `size`.

        The last tile reaches back over pixels that are done already, which a body has to bear;
        fewer pixels than a tile go one by one.
        """
        if size == 1:
            with self.loop(0, count) as first:
                body(first, 1)
            return
        whole = self.builder.icmp_signed(">=", count, _number(size))
        with self.builder.if_else(whole) as (tiled, single):
            with tiled:
                last = self.sub(count, size)
                with self.loop(0, count, size) as start:
                    body(self.least(start, last), size)
            with single, self.loop(0, count) as first:
                body(first, 1)

    def _blocks(self, *names: str) -> list[Value]:
        return [self.ir.append_basic_block(name) for name in names]


def _partners(step: int) -> Value:
    """The lanes that are `step` away."""
    return ir.Constant(_MASK, [lane ^ step for lane in range(LANES)])


def _number(value: Number) -> Value:
    return ir.Constant(_INT, value) if isinstance(value, int) else value
