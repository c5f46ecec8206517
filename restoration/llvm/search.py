"""Kernel of the search for the nearest code: no tokens × codes matrix is ever held."""

from __future__ import annotations

from restoration.llvm.emit import LANES, Function, Module, Number, Value
from restoration.llvm.naf import CHUNK
from restoration.llvm.product import Product, Source, multiply

NEAREST = (("tokens", "scratch", "weight", "bias", "nearest"), ("first", "stop"))
SCRATCH = 2 * CHUNK * LANES  # values that :func:`nearest` works on beside its arrays


def nearest(module: Module, dim: int, codes: int) -> Function:
    """The code of the lowest score for tokens first … stop − 1 (N, dim), as a number in fp32.

    Scores are bias + weight·token, of which each lane keeps the least and its code; of equal ones
    the first code wins. Codes are whole vectors, and fewer than fp32 counts exactly.
    """
    f = Function(module, "nearest", *NEAREST)
    product = Product(dim, codes)
    least, where = f["scratch"], f.at(f["scratch"], CHUNK * LANES)

    def compare(token: Number, block: Value, scores: list[Value]) -> None:
        place = f.mul(token, LANES)
        best, code = f.load(least, place), f.load(where, place)
        first = f.counted(f.mul(block, product.block))
        for v, score in enumerate(scores):
            better = f.lower(score, best)
            best = f.either(better, score, best)
            code = f.either(better, f.plus(first, f.lanes(v * LANES)), code)
        f.store(best, least, place)
        f.store(code, where, place)

    with f.loop(f["first"], f["stop"], CHUNK) as start:
        count = f.least(f.sub(f["stop"], start), CHUNK)
        with f.loop(0, f.mul(count, LANES), LANES) as place:
            f.store(f.splat(float("inf")), least, place)
            f.store(f.splat(0.0), where, place)
        tokens = Source(f.at(f["tokens"], f.mul(start, dim)), dim, dim)
        multiply(f, product, [tokens], (f["weight"], f["bias"]), count, compare)
        with f.loop(0, count) as token:
            scores, codes_of = f.at(least, f.mul(token, LANES)), f.at(where, f.mul(token, LANES))
            best = f.load(scores)
            found = f.equal(best, f.lowest(best))
            code = f.lowest(f.either(found, f.load(codes_of), f.splat(float(codes))))
            f.store_one(code, f["nearest"], f.add(start, token))
    f.end()
    return f
