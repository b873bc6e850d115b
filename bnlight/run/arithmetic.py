"""Arithmetic in a config: `${bnlight.eval:32 / ${data.batch_size}}` is 0.5 where the batch size is 64."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

import omegaconf
from omegaconf import OmegaConf

MOST_DIGITS = 300  # of a power's whole number
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "round": round,
    "int": int,
    "float": float,
    "ceil": math.ceil,
    "floor": math.floor,
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
}


def evaluate(*parts: Any) -> bool | int | float:
    """The value of an expression of numbers, `+ - * / // % **`, parentheses, and the functions above.

    Whole numbers stay whole where that is exact: 8 / 4 is 2, 8 / 3 is 2.666..., sqrt(16) is 4.0. One comparison of two
    such values (`< <= > >= == !=`) is true or false. An expression
    with parentheses or commas is put in quotes: `${bnlight.eval:'sqrt(${data.batch_size}) * 0.1'}`. No code is run.

    Raises ValueError for anything else, with the expression as it was after its interpolations.
    """
    text = ", ".join(map(str, parts))  # without quotes, OmegaConf has split it at its commas
    try:
        value = _answer(ast.parse(text.strip(), mode="eval").body)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("the result is not finite")
    except (ValueError, ArithmeticError, TypeError, SyntaxError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(
            f"bnlight.eval cannot compute '{text}': {reason}. It knows numbers, + - * / // % **, one < <= > >= == "
            f"or !=, parentheses and {', '.join(FUNCTIONS)}"
        ) from None
    return value


def _answer(node: ast.expr) -> bool | int | float:
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            return COMPARISONS[type(op)](_value(left), _value(right))
    return _value(node)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
            if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Pow):
                return _signed_power(node, inner)
            return -_value(inner) if isinstance(sign, ast.USub) else _value(inner)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            a, b = _value(left), _value(right)
            whole = isinstance(a, int) and isinstance(b, int) and b != 0 and a % b == 0
            return a // b if whole else a / b
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            result: int | float = OPERATORS[type(op)](_value(left), _value(right))
            return result
        case ast.Call(func=ast.Name(id=name), args=given, keywords=[]) if name in FUNCTIONS:
            called: int | float = FUNCTIONS[name](*map(_value, given))
            return called
    raise ValueError(f"'{ast.unparse(node)}' is no number")


def _signed_power(node: ast.UnaryOp, power: ast.BinOp) -> int | float:
    """`-3 ** 2` is -9, but may have been `${x} ** 2` with x = -3: only with parentheses is it clear."""
    if power.col_offset == node.col_offset + 1:
        raise ValueError("a sign before a power: write (-3) ** 2 or -(3 ** 2), with quotes around it all")
    inside = _value(power)
    return -inside if isinstance(node.op, ast.USub) else inside


def _power(base: int | float, exponent: int | float) -> int | float:
    if isinstance(base, int) and abs(base) > 1 and exponent * math.log10(abs(base)) > MOST_DIGITS:
        raise ValueError("the power is too large")
    result: Any = base**exponent
    if isinstance(result, complex):
        raise ValueError("a root of a negative number")
    whole: int | float = result
    return whole


def register() -> None:
    """Make `${bnlight.eval:2 * 3}` known to OmegaConf."""
    add_resolver("bnlight.eval", evaluate)


def add_resolver(name: str, function: Callable[..., Any]) -> None:
    """OmegaConf 2.4 has another name for its function for this."""
    renamed = omegaconf.__version__ >= "2.4"
    add: Any = OmegaConf.register_resolver if renamed else OmegaConf.register_new_resolver
    add(name, function, replace=True)
