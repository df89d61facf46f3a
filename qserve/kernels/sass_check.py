"""Guards against a silent compiler fault: registers reused while a wgmma in flight still reads them.

A register-fed wgmma (IGMMA in SASS) reads its weights' registers until its group retires at
`WARPGROUP.DEPBAR`. ptxas 13.0 sometimes gives such a register to another instruction before that,
without a warning, and the product is garbage. `hazards` walks every path through a kernel's machine
code and reports each write to a register of a group in flight.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_FUNCTION = re.compile(r"\n\s*Function : (\S+)")
_REGISTER = re.compile(r"R(\d+)")
_OPERANDS_OF_GMMA = 4
"""Registers of the weights' operand."""

_NO_DESTINATION = (
    "ST", "RED", "BAR", "BRA", "SYNCS", "WARP", "DEPBAR", "R2UR", "ISETP", "FSETP", "DSETP",
    "MEMBAR", "UTMA", "UBLK", "ERRBAR", "CGAERRBAR", "PLOP3", "EXIT", "VOTEU", "NOP", "RET", "CALL",
    "BSYNC", "BSSY", "LDGSTS", "LDGDEPBAR", "FENCE", "UCGABAR", "CCTL", "USETMAXREG", "ACQBULK",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    conditional: bool
    opcode: str
    operands: str

    @property
    def is_gmma(self) -> bool:
        """Whether it is a warpgroup multiply."""
        return "GMMA" in self.opcode

    def read_by_gmma(self) -> tuple[int, ...]:
        """The weights' registers of a register-fed multiply: its second operand, if a register."""
        second = self.operands.split(",")[1].strip()
        match = _REGISTER.fullmatch(second.split(".")[0])
        return _span(int(match[1]), _OPERANDS_OF_GMMA) if match else ()

    def written(self) -> tuple[int, ...]:
        """Registers it writes: from its first operand that is one, as wide as the opcode says."""
        if self.opcode.startswith(_NO_DESTINATION) or self.is_gmma or self.opcode.startswith("U"):
            return ()
        match = re.match(r"(?:!?U?P\w+,\s*)*R(\d+)\b", self.operands)
        return _span(int(match[1]), _width(self.opcode)) if match else ()


@dataclass(frozen=True)
class Hazard:
    """A write to a register that a multiply in flight still reads."""

    function: str
    instruction: Instruction

    def __str__(self) -> str:
        at = self.instruction
        return f"{self.function} /*{at.address:04x}*/ {at.opcode} {at.operands}"


@dataclass(frozen=True)
class _State:
    """Registers read by multiplies not yet closed into a group, and by the groups in flight."""

    open: frozenset[int] = frozenset()
    groups: tuple[frozenset[int], ...] = ()

    def after(self, instruction: Instruction) -> _State:
        if instruction.is_gmma:
            read = self.open | frozenset(instruction.read_by_gmma())
            if "gsb0" in instruction.operands:
                return _State(frozenset(), (*self.groups, read))
            return _State(read, self.groups)
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            pending = int(instruction.operands.split(",")[-1].strip(), 16)
            return _State(self.open, self.groups[-pending:] if pending else ())
        return self

    def reads(self, registers: tuple[int, ...]) -> bool:
        return any(r in group for group in (self.open, *self.groups) for r in registers)


def hazards(sass: str) -> list[Hazard]:
    """Every hazard in what `disassemble` returns."""
    return [
        Hazard(name, instruction)
        for name, instructions in _functions(sass)
        for instruction in _walk(instructions)
    ]


def count_multiplies(sass: str) -> int:
    """Register-fed warpgroup multiplies in what `disassemble` returns."""
    return sum(
        bool(instruction.is_gmma and instruction.read_by_gmma())
        for _, instructions in _functions(sass)
        for instruction in instructions
    )


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin, as cuobjdump prints it; raises FileNotFoundError where there is none."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _cuobjdump() -> str:
    """On the PATH, or the one that Triton's wheel carries."""
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if found is None or not Path(found).exists():
        raise FileNotFoundError("no cuobjdump: install the CUDA toolkit or `pip install triton`")
    return found


def _functions(sass: str) -> Iterator[tuple[str, list[Instruction]]]:
    parts = _FUNCTION.split(sass)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        yield (
            name,
            [
                Instruction(int(address, 16), bool(predicate), opcode, operands.strip())
                for address, predicate, opcode, operands in _LINE.findall(body)
            ],
        )


def _walk(instructions: list[Instruction]) -> list[Instruction]:
    """Instructions that write a register in flight, on any path."""
    index_of = {instruction.address: i for i, instruction in enumerate(instructions)}
    found: dict[int, Instruction] = {}
    seen: set[tuple[int, _State]] = set()
    pending = [(0, _State())]
    while pending:
        place = pending.pop()
        index, state = place
        if place in seen or index >= len(instructions):
            continue
        seen.add(place)
        instruction = instructions[index]
        if state.reads(instruction.written()):
            found[instruction.address] = instruction
        state = state.after(instruction)
        pending += [(successor, state) for successor in _successors(instruction, index, index_of)]
    return [found[address] for address in sorted(found)]


def _successors(instruction: Instruction, index: int, index_of: dict[int, int]) -> Iterator[int]:
    ends = instruction.opcode.startswith(("BRA", "EXIT", "RET")) and not instruction.conditional
    if not ends or ".DIV" in instruction.opcode or ".ANY" in instruction.opcode:
        yield index + 1
    target = re.search(r"0x([0-9a-f]+)", instruction.operands)
    if instruction.opcode.startswith("BRA") and target:
        yield index_of[int(target[1], 16)]


def _span(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def _width(opcode: str) -> int:
    """Consecutive registers an instruction writes."""
    if opcode.startswith("LDSM"):
        return int(opcode.rsplit(".", 1)[-1]) if opcode[-1].isdigit() else 1
    if ".128" in opcode:
        return 4
    return (
        2
        if ".64" in opcode or "WIDE" in opcode or opcode.startswith(("DADD", "DMUL", "I2F.F64"))
        else 1
    )
