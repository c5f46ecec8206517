"""A few words for writing kernels in LLVM's intermediate language: vectors, loops, tiles.

All arrays are of fp32, by pointer and offset in values; vectors are of eight values, which LLVM
maps to what the processor has. A kernel says itself what is a register and in which order sums
run, so its bits depend on no tile, no thread and no company. The text is written as it goes, in
one pass: a tree of objects for every instruction takes longer to make than the machine code.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

LANES = 8  # values of a vector: the registers of AVX2; two of NEON's

_FLOAT, _INT, _BOOL, _POINTER = "float", "i64", "i1", "ptr"
_VECTOR, _BOOLS = f"<{LANES} x float>", f"<{LANES} x i1>"


class Value(NamedTuple):
    """What an instruction made, or a constant."""

    name: str
    kind: str  #: its type


Number = Value | int


class Module:
    """Functions that become machine code together."""

    def __init__(self) -> None:
        self.functions: list[Function] = []
        self.intrinsics: set[str] = set()

    def __str__(self) -> str:
        return "\n".join([*sorted(self.intrinsics), *map(str, self.functions)])


class Function:
    """A function that is being written: void(pointers, then 64-bit integers)."""

    def __init__(
        self, module: Module, name: str, arrays: Sequence[str], numbers: Sequence[str]
    ) -> None:
        self.module, self.name = module, name
        self.arrays, self.numbers = tuple(arrays), tuple(numbers)
        self._named = {each: Value(f"%{each}", _POINTER) for each in arrays}
        self._named |= {each: Value(f"%{each}", _INT) for each in numbers}
        self._lines, self._count, self._block = ["entry:"], 0, "entry"
        module.functions.append(self)

    def __str__(self) -> str:
        given = [f"ptr noalias %{each}" for each in self.arrays]
        given += [f"i64 %{each}" for each in self.numbers]
        body = "\n".join(self._lines)
        return f"define void @{self.name}({', '.join(given)}) {{\n{body}\n}}"

    def __getitem__(self, name: str) -> Value:
        return self._named[name]

    def end(self) -> None:
        self._lines.append("ret void")

    # Whole numbers

    def add(self, a: Number, b: Number) -> Number:
        if isinstance(a, int):
            a, b = b, a
        if isinstance(b, int):
            if isinstance(a, int):
                return a + b
            if b == 0:
                return a
        return self._new(_INT, f"add nsw i64 {_number(a)}, {_number(b)}")

    def sub(self, a: Number, b: Number) -> Number:
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return self._new(_INT, f"sub nsw i64 {_number(a)}, {_number(b)}")

    def mul(self, a: Number, b: Number) -> Number:
        if isinstance(a, int):
            a, b = b, a
        if isinstance(b, int):
            if isinstance(a, int):
                return a * b
            if b in (0, 1):
                return a if b else 0
        return self._new(_INT, f"mul nsw i64 {_number(a)}, {_number(b)}")

    def least(self, a: Number, b: Number) -> Value:
        return self.either(self.below(a, b), _value(a), _value(b))

    def most(self, a: Number, b: Number) -> Value:
        return self.either(self.below(a, b), _value(b), _value(a))

    def halved(self, a: Number) -> Value:
        return self._new(_INT, f"ashr i64 {_number(a)}, 1")

    def divided(self, a: Number, b: Number) -> Value:
        """a // b of numbers that are not negative."""
        return self._new(_INT, f"sdiv i64 {_number(a)}, {_number(b)}")

    def rest(self, a: Number, b: Number) -> Value:
        return self._new(_INT, f"srem i64 {_number(a)}, {_number(b)}")

    def below(self, a: Number, b: Number) -> Value:
        return self._new(_BOOL, f"icmp slt i64 {_number(a)}, {_number(b)}")

    def within(self, a: Number, size: Number) -> Value:
        """0 ≤ a < size."""
        # As a number without a sign, one below zero is larger than any size.
        return self._new(_BOOL, f"icmp ult i64 {_number(a)}, {_number(size)}")

    # Memory

    def at(self, array: Value, offset: Number) -> Value:
        """The part of an array of fp32 from an offset on."""
        if offset == 0:
            return array
        place = f"getelementptr inbounds float, ptr {array.name}, i64 {_number(offset)}"
        return self._new(_POINTER, place)

    def load(self, array: Value, offset: Number = 0) -> Value:
        return self._new(_VECTOR, f"load {_VECTOR}, ptr {self.at(array, offset).name}, align 4")

    def store(self, vector: Value, array: Value, offset: Number = 0) -> None:
        place = self.at(array, offset).name
        self._lines.append(f"store {vector.kind} {vector.name}, ptr {place}, align 4")

    def store_one(self, vector: Value, array: Value, offset: Number) -> None:
        """The first lane alone."""
        self.store(self._first(vector), array, offset)

    def everywhere(self, array: Value, offset: Number = 0) -> Value:
        """One value of an array in all lanes."""
        place = self.at(array, offset).name
        return self.splat(self._new(_FLOAT, f"load float, ptr {place}, align 4"))

    def index(self, table: Value, offset: Number) -> Value:
        """A whole number of a table of 64-bit ones."""
        place = f"getelementptr inbounds i64, ptr {table.name}, i64 {_number(offset)}"
        return self._new(_INT, f"load i64, ptr {self._new(_POINTER, place).name}, align 8")

    # Vectors

    def either(self, condition: Value, a: Value, b: Value) -> Value:
        """`a` where the condition holds, in each lane of it: vectors, pointers or numbers."""
        chosen = f"select {condition.kind} {condition.name}, {a.kind} {a.name}, {b.kind} {b.name}"
        return self._new(a.kind, chosen)

    def splat(self, value: Value | float) -> Value:
        if isinstance(value, float):
            return _constant([value] * LANES)
        first = f"insertelement {_VECTOR} poison, float {value.name}, i32 0"
        return self._shuffled(self._new(_VECTOR, first), [0] * LANES)

    def plus(self, a: Value, b: Value) -> Value:
        return self._both("fadd", a, b)

    def minus(self, a: Value, b: Value) -> Value:
        return self._both("fsub", a, b)

    def times(self, a: Value, b: Value) -> Value:
        return self._both("fmul", a, b)

    def quotient(self, a: Value, b: Value) -> Value:
        return self._both("fdiv", a, b)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a·b + c, rounded once."""
        return self._intrinsic("llvm.fma", a, b, c)

    def between(self, a: Value, b: Value, part: Value) -> Value:
        """a + part·(b − a)."""
        return self.fma(self.minus(b, a), part, a)

    def total(self, vector: Value) -> Value:
        """The sum of all lanes, in all lanes."""
        for step in (4, 2, 1):
            vector = self.plus(vector, self._shuffled(vector, _partners(step)))
        return vector

    def lowest(self, vector: Value) -> Value:
        """The least of all lanes, in all lanes."""
        for step in (4, 2, 1):
            other = self._shuffled(vector, _partners(step))
            vector = self.either(self.lower(other, vector), other, vector)
        return vector

    def lower(self, a: Value, b: Value) -> Value:
        return self._new(_BOOLS, f"fcmp olt {_VECTOR} {a.name}, {b.name}")

    def equal(self, a: Value, b: Value) -> Value:
        return self._new(_BOOLS, f"fcmp oeq {_VECTOR} {a.name}, {b.name}")

    def counted(self, number: Number) -> Value:
        """A whole number as fp32, in all lanes."""
        return self.splat(self._new(_FLOAT, f"sitofp i64 {_number(number)} to float"))

    def lanes(self, first: int) -> Value:
        """first, first + 1, …"""
        return _constant([float(first + lane) for lane in range(LANES)])

    def inverse_root(self, vector: Value) -> Value:
        """1/√ of the first lane, in all lanes."""
        root = self._intrinsic("llvm.sqrt", self._first(vector))
        return self.splat(self.quotient(Value("1.0", _FLOAT), root))

    def clamp(self, vector: Value, limit: float) -> Value:
        low = self._intrinsic("llvm.maxnum", vector, self.splat(-limit))
        return self._intrinsic("llvm.minnum", low, self.splat(limit))

    def _first(self, vector: Value) -> Value:
        return self._new(_FLOAT, f"extractelement {_VECTOR} {vector.name}, i32 0")

    def _shuffled(self, vector: Value, order: Sequence[int]) -> Value:
        lanes = ", ".join(f"i32 {lane}" for lane in order)
        given = f"{_VECTOR} {vector.name}, {_VECTOR} poison, <{LANES} x i32> <{lanes}>"
        return self._new(_VECTOR, f"shufflevector {given}")

    def _both(self, name: str, a: Value, b: Value) -> Value:
        return self._new(a.kind, f"{name} {a.kind} {a.name}, {b.name}")

    def _intrinsic(self, name: str, *given: Value) -> Value:
        kind = given[0].kind
        name += ".v8f32" if kind == _VECTOR else ".f32"
        self.module.intrinsics.add(f"declare {kind} @{name}({', '.join([kind] * len(given))})")
        return self._new(kind, f"call {kind} @{name}({_given(given)})")

    # Control

    def call(self, function: Function, given: Sequence[Number]) -> None:
        self._lines.append(f"call void @{function.name}({_given(map(_value, given))})")

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """The body where the condition holds."""
        body, after = self._label(), self._label()
        self._branch(condition, body, after)
        with self._part(body, after):
            yield
        self._begin(after)

    @contextlib.contextmanager
    def branches(
        self, condition: Value
    ) -> Iterator[tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
        """A body for where the condition holds, and one for where it does not."""
        holds, fails, after = self._label(), self._label(), self._label()
        self._branch(condition, holds, fails)
        yield self._part(holds, after), self._part(fails, after)
        self._begin(after)

    @contextlib.contextmanager
    def loop(self, start: Number, stop: Number, step: int = 1) -> Iterator[Value]:
        """The body for start, start + step, … below stop, which may be none."""
        body, after, before = self._label(), self._label(), self._block
        self._branch(self.below(start, stop), body, after)
        self._begin(body)
        index, place = self._phi(_INT)
        yield index
        following = self.add(index, step)
        self._lines[place] += (
            f"[{_number(start)}, %{before}], [{_number(following)}, %{self._block}]"
        )
        self._branch(self.below(following, stop), body, after)
        self._begin(after)

    def fold(
        self,
        count: Number,
        step: int,
        values: Sequence[Value],
        body: Callable[[Value, Sequence[Value]], Sequence[Value]],
    ) -> list[Value]:
        """values = body(index, values) for index 0, step, … below count > 0, kept in registers."""
        inner, after, before = self._label(), self._label(), self._block
        self._lines.append(f"br label %{inner}")
        self._begin(inner)
        index, place = self._phi(_INT)
        kept = [self._phi(value.kind) for value in values]
        made = list(body(index, [phi for phi, _ in kept]))
        following = self.add(index, step)
        end = self._block
        self._lines[place] += f"[0, %{before}], [{_number(following)}, %{end}]"
        for (_, line), value, new in zip(kept, values, made, strict=True):
            self._lines[line] += f"[{value.name}, %{before}], [{new.name}, %{end}]"
        self._branch(self.below(following, count), inner, after)
        self._begin(after)
        return made

    def tiles(self, count: Number, size: int, body: Callable[[Number, int], None]) -> None:
        """body(first, how many) over `count` pixels, in tiles of `size`.

        The last tile reaches back over pixels that are done already, which a body has to bear;
        fewer pixels than a tile go one by one.
        """
        if size == 1:
            with self.loop(0, count) as first:
                body(first, 1)
            return
        with self.branches(self.below(count, size)) as (single, tiled):
            with tiled:
                last = self.sub(count, size)
                with self.loop(0, count, size) as start:
                    body(self.least(start, last), size)
            with single, self.loop(0, count) as first:
                body(first, 1)

    def _new(self, kind: str, instruction: str) -> Value:
        self._count += 1
        name = f"%.{self._count}"
        self._lines.append(f"{name} = {instruction}")
        return Value(name, kind)

    def _phi(self, kind: str) -> tuple[Value, int]:
        """A value whose sources are not known yet, and the line that is to name them."""
        return self._new(kind, f"phi {kind} "), len(self._lines) - 1

    def _label(self) -> str:
        self._count += 1
        return f"block.{self._count}"

    def _begin(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label

    def _branch(self, condition: Value, holds: str, fails: str) -> None:
        self._lines.append(f"br i1 {condition.name}, label %{holds}, label %{fails}")

    @contextlib.contextmanager
    def _part(self, label: str, after: str) -> Iterator[None]:
        self._begin(label)
        yield
        self._lines.append(f"br label %{after}")


def _partners(step: int) -> list[int]:
    """The lanes that are `step` away."""
    return [lane ^ step for lane in range(LANES)]


def _number(number: Number) -> str:
    return number.name if isinstance(number, Value) else str(number)


def _value(number: Number) -> Value:
    return number if isinstance(number, Value) else Value(str(number), _INT)


def _given(values: Iterable[Value]) -> str:
    return ", ".join(f"{each.kind} {each.name}" for each in values)


def _constant(values: Sequence[float]) -> Value:
    """A vector; LLVM takes a value of fp32 by the octets of the double that it is equal to."""
    single = struct.unpack(f"<{LANES}f", struct.pack(f"<{LANES}f", *values))
    octets = (struct.pack(">d", value).hex().upper() for value in single)
    return Value(f"<{', '.join(f'float 0x{each}' for each in octets)}>", _VECTOR)
