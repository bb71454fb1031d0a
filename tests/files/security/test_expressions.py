"""The grammar of sizes and guards: what torch writes passes, what is more than arithmetic does not."""

from __future__ import annotations

import pytest

from bntool.files.security.expressions import is_guard, is_size_expression

SIZES = [
    "Symbol('s77', positive=True, integer=True)",
    "Mul(Integer(6), Max(Integer(1), Add(Symbol('s53', positive=True, integer=True), Integer(-2))))",
    "Add(Mul(Integer(6), FloorDiv(Symbol('s53', integer=True), Integer(2))), Integer(-6))",
    "Pow(Symbol('s1', integer=True), Integer(2))",
    "Float('1.5', precision=53)",
    "Mul(Rational(1, 2), ToFloat(Symbol('u0', integer=True)))",
    "Equality(Symbol('s0', integer=True), Integer(3))",
    "2*s0 + (s1 // 4) % 3 - 1",
    "s0**2 <= 64",
    "Mod(s0, 2)",
]
GUARDS = [
    "L['x'].size()[2] >= 3",
    "((24*L['x'].size()[0]*((-2) + L['x'].size()[2])) % (L['x'].size()[0]*((-6) + 3))) == 0",
    "L['flat_args'][0].size()[1] != 1",
    "not (L['n'] == 2 and math.floor(L['x'].size()[0] / 2) < 7)",
]
LARGE_SIZES = [
    "+".join(f"s{i}*s{i + 1}" for i in range(200)),
    "FloorDiv((s0 + 2*s1 + 1)**3*s2**64*s3*(s4 + 7), 64*s0)",
    "Max(" + ",".join(f"s{i}" for i in range(64)) + ")",
]  # fmt: skip
NO_SIZES = [
    "", "exec('1')", "__import__('os')", "s0.__class__", "(1).real", "[s0 for s0 in 1]", "lambda: 1", "s0[0]",
    "Symbol('a b')", "Symbol('__x__')(1)", "Symbol('s0', commutative=exec('1'))", "Function('f')(s0)",
    "eval", "E", "'a'", "s0 if s1 else s2", "9**9**9**9", "(s0**2)**(3**4)", "2**1000000",
    "2**(64*64*64)",
    "LShift(Integer(1), Integer(100000))", "1" * 30, "s0 # s1", "f'{s0}'", "s0; s1", "Max(*s0)",
    "s0\n+1",
    "s0 @ s1", "(s0 := 1)", "Integer('1')", "Float('exec', precision=53)", "Pow(1, 2, evaluate=exec)", "0j",
    "FloorDiv((s0+s1)**8*(s1+s2)**8*(s2+s3)**8*(s3+s4)**8, s0+s1)",
    "FloorDiv((s0+s1)**64*(s1+s2)**64, s0+s1)",
    "Mod(Pow(Add(Symbol('s0'), Symbol('s1'), Symbol('s2')), Integer(64)), Symbol('s0'))",
    "*".join(f"(s{i}+s{i + 1})" for i in range(10)),
    "Max(" + ",".join(f"s{i}" for i in range(65)) + ")",
    "+".join(f"s{i}" for i in range(1500)),
    "(" * 300 + "s0" + ")" * 300, "-" * 9000 + "1",
]  # fmt: skip
NO_GUARDS = [
    "True or exec('1')", "open('x', 'w')", "torch.os.system('x')", "L['x'].__class__", "L.x", "math.os",
    "L['''a'b''']", 'L["a"]', "L['x'].size(exec)", "L['x'].tofile()", "math.floor(*L)",
    "L['x'].size().size()",
    "x", "L[L]", "L['x'][0:1]", "L['a' + 'b']",
]  # fmt: skip


@pytest.mark.parametrize("text", SIZES + LARGE_SIZES)
def test_sizes_that_torch_writes_pass(text: str) -> None:
    assert is_size_expression(text)


@pytest.mark.parametrize("text", GUARDS)
def test_guards_that_torch_writes_pass(text: str) -> None:
    assert is_guard(text)


@pytest.mark.parametrize("text", NO_SIZES)
def test_nothing_else_passes_as_a_size(text: str) -> None:
    assert not is_size_expression(text)


@pytest.mark.parametrize("text", NO_GUARDS)
def test_nothing_else_passes_as_a_guard(text: str) -> None:
    assert not is_guard(text)


def test_a_text_is_needed() -> None:
    assert not is_size_expression(None)
    assert not is_guard(7)
