"""The grammar of the expressions in an exported program: sizes, and guards on inputs.

torch hands the first to `sympy.sympify` and the second to `exec`, and both run any Python. So only numbers,
symbols, arithmetic, comparisons and calls of named mathematical functions pass; attribute access and every
other form of Python does not.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator

_MAX_LENGTH = 10_000
_MAX_DIGITS = 24
_MAX_EXPONENT = 64
_MAX_POWERS = 2
"""One power inside another; sympy works integers out, and three would make numbers without end."""
_MAX_TERMS = 512
"""Of an expression that is multiplied out, as sympy does to divide: 729 terms took it two seconds."""
_MAX_ARGUMENTS = 64
"""Of a maximum or a conjunction, whose arguments sympy compares pair by pair."""

_TEXT = re.compile(r"[A-Za-z0-9_ ()\[\]<>=!+\-*/%.,']*")
_SYMBOL = re.compile(r"[A-Za-z]\w*", re.ASCII)
_BARE_SYMBOL = re.compile(r"[a-z]{1,4}\d+|true|false|oo|int_oo")
_NUMBER = re.compile(r"[-+]?[0-9.]+(e[-+]?\d{1,4})?")

_POWERS = frozenset("Pow PowByNatural FloatPow LShift RShift".split())
_FUNCTIONS = _POWERS | frozenset(
    """Symbol Integer Float Rational Add Mul Max Min Mod PythonMod FloorDiv CleanDiv CeilDiv ModularIndexing
    Where IntTrueDiv FloatTrueDiv CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt RoundDecimal ToFloat
    Identity IsNonOverlappingAndDenseIndicator floor ceiling Abs Eq Ne Gt Ge Lt Le Equality Unequality
    GreaterThan LessThan StrictGreaterThan StrictLessThan And Or Not""".split()
)
_COMPARED_PAIR_BY_PAIR = frozenset({"Max", "Min", "And", "Or"})
_ASSUMPTIONS = frozenset("integer positive nonnegative negative nonpositive nonzero real zero".split())
_GUARD_METHODS = frozenset("size stride storage_offset numel dim".split())
_GUARD_FUNCTIONS = frozenset("max min abs".split())
_MATH_FUNCTIONS = frozenset("floor ceil trunc sqrt isnan".split())

_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_UNARY = (ast.UAdd, ast.USub, ast.Not)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def is_size_expression(text: object) -> bool:
    """Whether `text` is one that `sympy.sympify` may be given, as `srepr` or `str` writes a size."""
    return _passes(text, guard=False)


def is_guard(text: object) -> bool:
    """Whether `text` is a guard as torch.export writes it: `L['x'].size()[0] <= 8`."""
    return _passes(text, guard=True)


def _passes(text: object, *, guard: bool) -> bool:
    if not isinstance(text, str) or len(text) > _MAX_LENGTH or not _TEXT.fullmatch(text):
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    waiting: list[tuple[ast.expr, int]] = [(tree.body, 0)]
    while waiting:
        node, powers = waiting.pop()
        if _is_power(node):
            powers += 1
        if powers > _MAX_POWERS or not _fits(node, guard) or not _small_exponent(node):
            return False
        waiting.extend((operand, powers) for operand in _operands(node, guard))
    return guard or _is_soon_multiplied_out(tree.body)


def _fits(node: ast.expr, guard: bool) -> bool:
    """Whether this form is in the grammar; its operands are judged by themselves."""
    if isinstance(node, ast.Constant):
        return _is_number(node.value)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, _ARITHMETIC)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, _UNARY)
    if isinstance(node, ast.Compare):
        return all(isinstance(op, _COMPARISONS) for op in node.ops)
    if guard:
        return isinstance(node, ast.BoolOp) or _fits_guard(node)
    if isinstance(node, ast.Name):
        return bool(_BARE_SYMBOL.fullmatch(node.id)) or node.id in ("True", "False")
    return isinstance(node, ast.Call) and _fits_call(node)


def _fits_call(node: ast.Call) -> bool:
    if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
        return False
    name = node.func.id
    if name == "Symbol":
        of = node.args[0] if len(node.args) == 1 else None
        named = isinstance(of, ast.Constant) and isinstance(of.value, str) and _SYMBOL.fullmatch(of.value)
        return bool(named) and all(
            k.arg in _ASSUMPTIONS and isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool)
            for k in node.keywords
        )
    if name == "Float":
        of = node.args[0] if len(node.args) == 1 else None
        digits = isinstance(of, ast.Constant) and isinstance(of.value, str) and _NUMBER.fullmatch(of.value)
        return bool(digits) and all(
            k.arg == "precision" and isinstance(k.value, ast.Constant) and k.value.value in range(1, 1025)
            for k in node.keywords
        )
    # srepr writes the evaluate=False of an unevaluated sum
    return all(
        k.arg == "evaluate" and isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool)
        for k in node.keywords
    )


def _fits_guard(node: ast.expr) -> bool:
    """An input (`L['x'][0]`), a size of it (`.size()[0]`), or a call of a mathematical function."""
    if isinstance(node, ast.Subscript):
        index = node.slice
        # torch puts the whole guard between quotes once more; 'a''b' is one text, '''a'b''' holds a quote.
        return isinstance(index, ast.Constant) and (
            isinstance(index.value, int) or (isinstance(index.value, str) and "'" not in index.value)
        )
    if isinstance(node, ast.Name):
        return node.id == "L"
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "math" and node.attr == "inf"
    if not isinstance(node, ast.Call) or node.keywords:
        return False
    function = node.func
    if isinstance(function, ast.Name):
        return function.id in _GUARD_FUNCTIONS | {"Max", "Min"}
    if not isinstance(function, ast.Attribute):
        return False
    if isinstance(function.value, ast.Name) and function.value.id == "math":
        return function.attr in _MATH_FUNCTIONS
    return function.attr in _GUARD_METHODS and not node.args and isinstance(function.value, ast.Subscript)


def _operands(node: ast.expr, guard: bool) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        yield from (node.left, node.right)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Compare):
        yield from (node.left, *node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield from node.values
    elif isinstance(node, ast.Subscript):
        yield node.value
    elif isinstance(node, ast.Call):
        whole = isinstance(node.func, ast.Name) and node.func.id in ("Symbol", "Float")
        yield from () if whole and not guard else node.args
        # The input that a method is called on; the module `math` was named already.
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Subscript):
            yield node.func.value


def _is_soon_multiplied_out(tree: ast.expr) -> bool:
    """Guards are run as Python and not by sympy: this is for sizes."""
    try:
        return _terms(tree) <= _MAX_TERMS
    except RecursionError:
        return False


def _terms(node: ast.expr) -> int:
    """How many products the expression has, at most, once it is multiplied out."""
    counts = [_terms(operand) for operand in _operands(node, guard=False)]
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if name in _COMPARED_PAIR_BY_PAIR and len(counts) > _MAX_ARGUMENTS:
        return _MAX_TERMS + 1
    if _is_power(node):
        exponent = max(
            (
                abs(part.value)
                for part in _exponents(node)
                if isinstance(part, ast.Constant) and isinstance(part.value, int)
            ),
            default=1,
        )
        terms = math.comb(counts[0] + exponent - 1, exponent)  # multisets of that many of its terms
    elif name == "Mul" or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        terms = math.prod(counts)
    else:
        terms = sum(counts)
    return min(max(terms, 1), _MAX_TERMS + 1)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**_MAX_DIGITS)


def _is_power(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Pow)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POWERS


def _small_exponent(node: ast.expr) -> bool:
    """An exponent, or a number of bits, is a small number or a symbol: no product, sum or power in it."""
    if not _is_power(node):
        return True
    for part in _exponents(node):
        if isinstance(part, ast.BinOp) or (isinstance(part, ast.Call) and not _is_leaf(part)):
            return False
        number = part.value if isinstance(part, ast.Constant) else 0
        if isinstance(number, int | float) and abs(number) > _MAX_EXPONENT:
            return False
    return True


def _exponents(power: ast.expr) -> Iterator[ast.AST]:
    """All that stands in the exponent of a power."""
    if isinstance(power, ast.BinOp):
        yield from ast.walk(power.right)
    elif isinstance(power, ast.Call):
        yield from (part for argument in power.args[1:] for part in ast.walk(argument))


def _is_leaf(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id in ("Symbol", "Integer", "Float", "Rational")
