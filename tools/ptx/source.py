"""PTX text as instructions: the grammar, without a meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from ptx.errors import PtxError
from ptx.types import TYPES, Type


@dataclass(frozen=True)
class Register:
    """A register, or a special one such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bits of a floating one (`float_bits` of them, else 0)."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter or label."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    elements: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """d|p: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """!p"""

    operand: Register


Operand = Register | Immediate | Symbol | Address | Vector | Pair | Negated
SINK = Symbol("_")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    name : str
        Its first word: "ld".
    modifiers : tuple of str
        The words behind it: ("global", "v4", "b32").
    operands : tuple
        As they are written; destinations come first.
    guard : Register or Negated or None
        The predicate that it is executed under.
    line : int
        Of the PTX text, from 1.
    text : str
        All of it.
    """

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | Negated | None
    line: int
    text: str

    def types(self) -> list[Type]:
        """Those among the modifiers, in their order."""
        return [TYPES[word] for word in self.modifiers if word in TYPES]


@dataclass(frozen=True)
class Variable:
    """Memory with a name. `size`: bytes, 0 where the launch tells it."""

    name: str
    space: str
    alignment: int
    size: int
    data: bytes = b""


@dataclass
class Entry:
    """A kernel, as it is written.

    Attributes
    ----------
    parameters : list of Variable
        In their order.
    registers : dict
        Type of each register; of those that are declared as a range, `ranges` has the prefix.
    ranges : dict
        Type by prefix: "%r" for ``.reg .b32 %r<9>``.
    variables : list of Variable
        Shared and local memory that is declared inside.
    labels : dict
        Index of the instruction behind a label.
    """

    name: str
    parameters: list[Variable]
    registers: dict[str, Type] = field(default_factory=dict)
    ranges: dict[str, Type] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)

    def type_of(self, register: str) -> Type:
        """The type that a register is declared with."""
        if register in self.registers:
            return self.registers[register]
        prefix = register.split("@")[0].rstrip("0123456789")
        if prefix not in self.ranges:
            raise PtxError(f"expected a declared register, got {register}")
        return self.ranges[prefix]


@dataclass
class Module:
    """A PTX file: its kernels by name, and variables of the module."""

    target: str
    entries: dict[str, Entry]
    variables: list[Variable]


_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<string>"[^"]*")
      | (?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+\.\d+|\d+U?)
      | (?P<word>[%$._a-zA-Z][\w$.:]*[\w$]|[%$_a-zA-Z])
      | (?P<mark>[{}()\[\],;:@!|+<>=-])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def _tokens(text: str) -> list[_Token]:
    found, place, line = [], 0, 1
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise PtxError(f"line {line}: expected PTX, got {text[place : place + 20]!r}")
        if match.lastgroup != "space":
            found.append(_Token(str(match.lastgroup), match[0], line))
        line += match[0].count("\n")
        place = match.end()
    return found


def _integer(text: str) -> int:
    text = text.rstrip("U")
    octal = len(text) > 1 and text[0] == "0" and text.isdigit()
    return int(text, 8 if octal else 0)


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.lines = text.split("\n")
        self.place = 0
        self.scopes: list[dict[str, str]] = []  # of the function's body: names that are declared in a block
        self.num_scopes = 0

    # Tokens.

    def peek(self, ahead: int = 0) -> _Token:
        if self.place + ahead >= len(self.tokens):
            raise PtxError("expected more PTX, got the end of it")
        return self.tokens[self.place + ahead]

    def next(self) -> _Token:
        token = self.peek()
        self.place += 1
        return token

    def accept(self, text: str) -> bool:
        if self.place < len(self.tokens) and self.peek().text == text:
            self.place += 1
            return True
        return False

    def expect(self, text: str) -> None:
        token = self.next()
        if token.text != text:
            raise PtxError(f"line {token.line}: expected {text!r}, got {token.text!r}")

    def skip_block(self) -> None:
        depth = 0
        while True:
            text = self.next().text
            depth += {"{": 1, "}": -1}.get(text, 0)
            if text == "}" and depth == 0:
                return

    # The file.

    def module(self) -> Module:
        module = Module("", {}, [])
        while self.place < len(self.tokens):
            token = self.next()
            if token.text == ".target":
                module.target = self.next().text
                self.skip_rest(token.line)
            elif token.text in (".version", ".address_size", ".file", ".loc"):
                self.skip_rest(token.line)
            elif token.text in (".visible", ".extern", ".weak", ".common"):
                continue
            elif token.text == ".entry":
                entry = self.entry()
                module.entries[entry.name] = entry
            elif token.text in (".shared", ".global", ".const"):
                module.variables.append(self.variable(token.text[1:]))
            elif token.text == ".section":
                self.skip_block()
            elif token.text == ".func":
                raise PtxError(f"line {token.line}: functions are not known to the interpreter, got .func")
            else:
                raise PtxError(f"line {token.line}: expected a directive, got {token.text!r}")
        return module

    def skip_rest(self, line: int) -> None:
        while self.place < len(self.tokens) and self.peek().line == line:
            self.place += 1

    def variable(self, space: str) -> Variable:
        """What stands behind the state space: alignment, type, name, size, data."""
        alignment, kind, is_pointer = 0, TYPES["b8"], False
        while (token := self.next()).text.startswith("."):
            if token.text == ".align":
                number = _integer(self.next().text)
                alignment = alignment if is_pointer else number  # of a pointer, what it points to is aligned to it
            elif token.text == ".ptr":
                is_pointer = True
            elif token.text[1:] in TYPES:
                kind = TYPES[token.text[1:]]
            elif token.text not in (".global", ".shared", ".const"):
                raise PtxError(f"line {token.line}: expected a type, got {token.text}")
        count, data = 1, b""
        if self.accept("["):
            count = 0 if self.peek().text == "]" else _integer(self.next().text)
            self.expect("]")
        if self.accept("="):
            data = self.data(kind)
        if space != "param":
            self.expect(";")
        return Variable(token.text, space, alignment or kind.bytes, count * kind.bytes, data)

    def data(self, kind: Type) -> bytes:
        numbers = []
        several = self.accept("{")
        while True:
            immediate = self.operand()
            if not isinstance(immediate, Immediate):
                raise PtxError(f"line {self.peek().line}: expected numbers as data, got {immediate}")
            numbers.append(immediate.value)
            if not several or not self.accept(","):
                break
        if several:
            self.expect("}")
        return b"".join((n & ((1 << kind.bits) - 1)).to_bytes(kind.bytes, "little") for n in numbers)

    def entry(self) -> Entry:
        entry = Entry(self.next().text, [])
        if self.accept("("):
            while not self.accept(")"):
                self.expect(".param")
                entry.parameters.append(self.variable("param"))
                self.accept(",")
        while self.peek().text != "{":  # .reqntid and its like
            self.next()
        self.expect("{")
        self.scopes = [{}]
        while self.scopes:
            self.statement(entry)
        return entry

    def statement(self, entry: Entry) -> None:
        token = self.peek()
        if self.accept("{"):
            self.scopes.append({})
            self.num_scopes += 1
        elif self.accept("}"):
            self.scopes.pop()
        elif self.accept(";"):
            pass
        elif token.text in (".loc", ".file"):
            self.skip_rest(token.line)
        elif token.text == ".pragma":
            while self.next().text != ";":
                pass
        elif token.text == ".reg":
            self.place += 1
            self.declare_registers(entry)
        elif token.text in (".shared", ".local"):
            self.place += 1
            entry.variables.append(self.variable(token.text[1:]))
        elif token.text.startswith("."):
            raise PtxError(f"line {token.line}: a directive that is not known to the interpreter, got {token.text}")
        elif token.kind == "word" and self.peek(1).text == ":":
            self.place += 2
            if token.text in entry.labels:
                raise PtxError(f"line {token.line}: expected labels that differ, got {token.text} again")
            entry.labels[token.text] = len(entry.instructions)
        else:
            entry.instructions.append(self.instruction(entry))

    def rename(self, name: str, declare: bool = False) -> str:
        """A name of its own for what is declared in an inner block."""
        if declare and len(self.scopes) > 1:
            self.scopes[-1][name] = f"{name}@{self.num_scopes}"
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def declare_registers(self, entry: Entry) -> None:
        kind = TYPES[self.next().text[1:]]
        while True:
            name = self.next().text
            if self.accept("<"):
                count = _integer(self.next().text)
                self.expect(">")
                if len(self.scopes) == 1:
                    entry.ranges[name] = kind
                else:
                    for i in range(count):
                        entry.registers[self.rename(f"{name}{i}", declare=True)] = kind
            else:
                entry.registers[self.rename(name, declare=True)] = kind
            if not self.accept(","):
                break
        self.expect(";")

    def instruction(self, entry: Entry) -> Instruction:
        guard: Register | Negated | None = None
        line = self.peek().line
        if self.accept("@"):
            is_negated = self.accept("!")
            register = Register(self.rename(self.next().text))
            guard = Negated(register) if is_negated else register
        name, *modifiers = self.next().text.split(".")
        operands: list[Operand] = []
        while not self.accept(";"):
            operands.append(self.operand(entry))
            if self.accept("|"):
                operands[-1] = Pair(operands[-1], self.operand(entry))
            if self.peek().text != ";":
                self.expect(",")
        words = tuple(word for modifier in modifiers for word in modifier.split("::") if word)
        text = self.lines[line - 1].strip()
        return Instruction(name, words, tuple(operands), guard, line, text)

    def operand(self, entry: Entry | None = None) -> Operand:
        token = self.next()
        if token.text == "{":
            elements = [self.operand(entry)]
            while self.accept(","):
                elements.append(self.operand(entry))
            self.expect("}")
            return Vector(tuple(elements))
        if token.text == "[":
            base, offset = self.operand(entry), 0
            if self.accept("+") or self.peek().text == "-":
                offset = self.signed()
            self.expect("]")
            return Address(base, offset)
        if token.text == "!":
            return Negated(Register(self.rename(self.next().text)))
        if token.text == "-":
            number = self.operand()
            if not isinstance(number, Immediate) or number.float_bits:
                raise PtxError(f"line {token.line}: expected an integer behind '-', got {number}")
            return Immediate(-number.value)
        if token.kind == "number":
            if token.text[1:2] in ("f", "F", "d", "D") and token.text[0] == "0":
                return Immediate(int(token.text[2:], 16), 4 * len(token.text[2:]))
            return Immediate(_integer(token.text))
        if token.kind == "word":
            name = self.rename(token.text)
            is_register = name.startswith("%") or (entry is not None and name in entry.registers)
            return Register(name) if is_register else Symbol(name)
        raise PtxError(f"line {token.line}: expected an operand, got {token.text!r}")

    def signed(self) -> int:
        sign = -1 if self.accept("-") else 1
        return sign * _integer(self.next().text)


def parse(text: str) -> Module:
    """The kernels and variables of a PTX file."""
    return _Parser(text).module()


def immediate_bits(immediate: Immediate, bits: int) -> np.generic:
    """A constant as an operand of so many bits."""
    dtype = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    if immediate.float_bits == 64 and bits == 32:
        value = np.frombuffer(immediate.value.to_bytes(8, "little"), np.float64)[0]
        return np.float32(value).view(np.uint32)
    if immediate.float_bits == 32 and bits == 64:
        value32 = np.frombuffer(immediate.value.to_bytes(4, "little"), np.float32)[0]
        return np.float64(value32).view(np.uint64)
    return dtype(immediate.value & ((1 << bits) - 1))
