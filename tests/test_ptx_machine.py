"""The PTX interpreter's threads, memory and warp-wide instructions against the PTX ISA, by its sections."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from ptx_fragment import run

from ptx import BankCounter, GlobalMemory, PtxError, load

LANES = np.arange(32, dtype=np.uint32)
RANDOM = np.random.default_rng(0)


# "Control Flow Instructions"


def test_divergent_threads_meet_again() -> None:
    """A loop whose trips differ by thread, with a branch inside; then all exchange values."""
    body = """
      mov.u32 %r1, 0; mov.u32 %r2, 0;
    $LOOP: setp.ge.u32 %p1, %r1, %in0; @%p1 bra $DONE;
      and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra $EVEN;
      add.u32 %r2, %r2, 100; bra.uni $NEXT;
    $EVEN: add.u32 %r2, %r2, 1;
    $NEXT: add.u32 %r1, %r1, 1; bra.uni $LOOP;
    $DONE: shfl.sync.bfly.b32 %out, %r2, 1, 0x1f, 0xffffffff;
    """
    trips = LANES % 7
    expected = trips // 2 * 100 + (trips + 1) // 2
    assert (run(body, trips) == expected[LANES ^ 1]).all()


def test_guards_leave_registers_alone() -> None:
    body = "mov.u32 %out, 5; setp.lt.u32 %p1, %in0, 4; @%p1 mov.u32 %out, 6; @!%p1 add.u32 %out, %out, 2;"
    assert run(body, LANES[:6]).tolist() == [6, 6, 6, 6, 7, 7]


def test_inner_scopes() -> None:
    """Registers of a block in braces are its own."""
    body = "mov.u32 %r1, 3; { .reg .b32 %r1; mov.u32 %r1, 9; } { .reg .b32 t; mov.u32 t, %r1; add.u32 %out, t, 1; }"
    assert run(body, LANES).tolist() == [4] * 32


def test_runaway_kernels_end() -> None:
    text = ".version 8.7\n.target sm_80\n.entry run() {\n$L: bra $L;\n}\n"
    with pytest.raises(PtxError, match="runs for too long"):
        load(text, "run").launch((1, 1, 1), (32, 1, 1), [], GlobalMemory(), step_limit=1000)


# "Data Movement and Conversion Instructions: ld, st"


def test_vectors_and_extension() -> None:
    """Elements are extended to wider registers by their type; a vector is one access."""
    body = """ld.global.v2.u16 {%r1, %r2}, [%address0]; ld.global.s8 %r3, [%address0+1];
              ld.global.v4.u8 {%h1, %h2, %h3, %h4}, [%address0]; cvt.u32.u16 %r4, %h4;
              mov.u32 %out0, %r1; mov.u32 %out1, %r2; mov.u32 %out2, %r3; mov.u32 %out3, %r4;"""
    words = RANDOM.integers(0, 2**32, 32, np.uint32)
    out = run(body, words, per_thread=4)
    assert (out[:, 0] == words & 0xFFFF).all()
    assert (out[:, 1] == words >> 16).all()
    assert (out[:, 2].view(np.int32) == words.view(np.int8)[1::4]).all()
    assert (out[:, 3] == words >> 24).all()


def test_generic_addresses_and_local_memory() -> None:
    body = """cvta.shared.u64 %d1, buffer; mad.wide.u32 %d1, %thread, 4, %d1; st.u32 [%d1], %in0;
              mov.u64 %d2, depot; cvta.local.u64 %d3, %d2; st.u32 [%d3+4], %in0; ld.local.u32 %r2, [%d2+4];
              ld.u32 %r3, [%d1]; ld.u32 %r4, [%address0]; add.u32 %out, %r2, %r3; add.u32 %out, %out, %r4;"""
    shared = ".shared .align 4 .b8 buffer[128]; .local .align 8 .b8 depot[8];"
    assert (run(body, LANES + 7, shared=shared) == 3 * (LANES + 7)).all()


def test_global_findings() -> None:
    with pytest.raises(
        PtxError, match=r"line \d+: ld.global(.|\n)*out of bounds: a read of 4 bytes at offset 128 of input 0"
    ):
        run("ld.global.u32 %out, [%address0+4];", LANES)
    with pytest.raises(PtxError, match="read-only memory: a write of 4 bytes to input 0"):
        run("st.global.u32 [%address0], 1;", LANES)
    with pytest.raises(PtxError, match="misaligned: an access of 8 bytes"):
        run("ld.global.v2.u32 {%r1, %r2}, [%input+4];", LANES)


def test_unknown_instructions_name_themselves() -> None:
    for line, name in (("frobnicate.u32 %out, 1;", "frobnicate"), ("add.cc.u32 %out, %in0, 1;", ".cc")):
        with pytest.raises(
            PtxError, match=rf"run, line \d+: {line.split()[0]}(.|\n)*not known to the interpreter: {name}"
        ):
            run(line, LANES)


# "Parallel Synchronization and Communication Instructions"

STORE = """mov.u32 %r1, buffer; mad.lo.u32 %r2, %thread, 4, %r1; st.shared.u32 [%r2], %in0;
           xor.b32 %r3, %thread, {other}; mad.lo.u32 %r3, %r3, 4, %r1;"""
BUFFER = ".shared .align 16 .b8 buffer[256];"
WIDE = np.arange(64, dtype=np.uint32)


def test_barriers_order_accesses() -> None:
    body = STORE.format(other=63) + "bar.sync 0; ld.shared.u32 %out, [%r3];"
    assert (run(body, WIDE, shared=BUFFER) == 63 - WIDE).all()
    body = STORE.format(other=1) + "bar.warp.sync 0xffffffff; ld.shared.u32 %out, [%r3];"
    assert (run(body, WIDE, shared=BUFFER) == (WIDE ^ 1)).all()


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        (STORE.format(other=63) + "ld.shared.u32 %out, [%r3];", "race: a read of shared memory"),
        (STORE.format(other=1) + "ld.shared.u32 %out, [%r3];", "race: a read of shared memory"),
        (
            STORE.format(other=63) + "bar.warp.sync 0xffffffff; ld.shared.u32 %out, [%r3];",
            "race: a read of shared memory at 252 by thread 0, which thread 63 writes",
        ),
        (
            STORE.format(other=63) + "bar.sync 0; ld.shared.u32 %out, [%r3]; st.shared.u32 [%r2], 1;",
            "race: a write of shared memory",
        ),
        ("mov.u32 %r1, buffer; st.shared.u32 [%r1], %thread;", "race: threads write different values"),
        ("mov.u32 %r1, buffer; ld.shared.u32 %out, [%r1];", "which nobody has written"),
        ("mov.u32 %r1, buffer; st.shared.u32 [%r1+256], 1;", "out of bounds: a write of 4 bytes at 256 of 256"),
        ("mov.u32 %r1, buffer; st.shared.u32 [%r1+2], 1;", "misaligned: a write of 4 bytes of shared memory at 2"),
        ("setp.lt.u32 %p1, %thread, 8; @%p1 bra $A; bar.sync 0; bra.uni $B; $A: bar.sync 0; $B:", "divergent barrier"),
        ("setp.lt.u32 %p1, %thread, 8; @%p1 ret; bar.sync 0;", "a barrier, but 8 threads have ended"),
        ("bar.warp.sync 0x0000ffff;", "expected the lanes of its mask 0x0000ffff, got 0xffffffff"),
    ],
)
def test_findings(body: str, finding: str) -> None:
    with pytest.raises(PtxError, match=finding):
        run(body + "\nmov.u32 %r9, 0;", WIDE, shared=BUFFER)


def test_same_value_by_several_threads() -> None:
    """No race: it does not matter whose write comes last."""
    run("mov.u32 %r1, buffer; st.shared.u32 [%r1], 7;", WIDE, shared=BUFFER)


def test_atomics() -> None:
    """atom gives what was there before; a thread after the other."""
    out = run("and.b32 %r1, %thread, 1; mad.wide.u32 %d1, %r1, 4, %output; atom.global.add.u32 %r2, [%d1], 3;", WIDE)
    assert out[:3].tolist() == [96, 96, 0]
    body = "atom.global.cas.b32 %r2, [%output], 0, %in0; red.global.max.u32 [%output+4], %in0;"
    assert run(body, WIDE + 5)[:2].tolist() == [5, 68]


# "Data Movement and Conversion Instructions: Asynchronous copy"

COPY = """mov.u32 %r1, buffer; mad.lo.u32 %r2, %thread, 16, %r1; mad.wide.u32 %d1, %thread, 16, %input;
          mov.u64 %d2, %d1; cp.async.cg.shared.global [%r2], [%d2], 16; cp.async.commit_group;"""
WORDS = RANDOM.integers(0, 2**32, 256, np.uint32)
KILOBYTE = ".shared .align 16 .b8 buffer[1024];"


def test_copies_arrive_when_waited_for() -> None:
    """wait_group N leaves the last N groups; sizes of the source leave zeros behind it."""
    read = "cp.async.wait_group 0; ld.shared.v4.u32 {%out0, %out1, %out2, %out3}, [%r2];"
    assert (run(COPY + read, WORDS, threads=32, per_thread=4, shared=KILOBYTE) == WORDS[:128].reshape(32, 4)).all()
    second = "add.u32 %r3, %r2, 512; cp.async.ca.shared.global [%r3], [%d2+512], 4; cp.async.commit_group;"
    read = "cp.async.wait_group 1; ld.shared.u32 %out, [%r2];"
    assert (run(COPY + second + read, WORDS, threads=32, shared=KILOBYTE) == WORDS[:128:4]).all()
    part = (
        COPY.replace(", 16; cp", ", 16, 8; cp") + "cp.async.wait_all; ld.shared.v4.u32 {%r5, %out0, %out1, %r6}, [%r2];"
    )
    out = run(part, WORDS, threads=32, per_thread=2, shared=KILOBYTE)
    assert (out[:, 0] == WORDS[1:128:4]).all()
    assert (out[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("behind", "finding"),
    [
        ("ld.shared.u32 %out, [%r2];", "a read of .* before the cp.async to it was waited for"),
        ("st.shared.u32 [%r2], 1;", "a write of .* before the cp.async to it was waited for"),
        ("cp.async.ca.shared.global [%r2], [%d2], 16;", "a cp.async .* before the cp.async to it was waited for"),
        (
            "cp.async.cg.shared.global [%r2+512], [%d2], 16; cp.async.commit_group; cp.async.wait_group 1; "
            "ld.shared.u32 %out, [%r2+512];",
            "a read of .* before the cp.async to it was waited for",
        ),
        ("bar.sync 0; cp.async.wait_group 0; xor.b32 %r3, %r2, 16; ld.shared.u32 %out, [%r3];", "race: a read"),
        (
            "cp.async.wait_group 0; bar.sync 0; xor.b32 %r3, %r2, 16; ld.shared.u32 %out, [%r3]; "
            "cp.async.cg.shared.global [%r2], [%d2], 16;",
            "race: a write of shared memory",
        ),
    ],
)
def test_copies_too_early(behind: str, finding: str) -> None:
    with pytest.raises(PtxError, match=finding):
        run(COPY + behind, WORDS, threads=32, shared=KILOBYTE)


# "Data Movement and Conversion Instructions: shfl.sync", "vote.sync", "redux.sync"


def test_shuffles() -> None:
    """Segments of c[12:8]; lanes whose source lies outside keep their own value and get false."""

    def shuffle(mode: str, by: int, c: int) -> tuple[list[int], list[int]]:
        body = f"shfl.sync.{mode}.b32 %out0|%p1, %in0, {by}, {c}, 0xffffffff; selp.u32 %out1, 1, 0, %p1;"
        out = run(body, LANES * 10, per_thread=2)
        return (out[:, 0] // 10).tolist(), out[:, 1].tolist()

    whole, eights = 0x1F, 0x181F
    assert shuffle("bfly", 5, whole) == ([i ^ 5 for i in range(32)], [1] * 32)
    assert shuffle("down", 3, whole) == ([i + 3 if i < 29 else i for i in range(32)], [1] * 29 + [0] * 3)
    assert shuffle("up", 3, 0) == ([i - 3 if i >= 3 else i for i in range(32)], [0] * 3 + [1] * 29)
    assert shuffle("idx", 9, eights)[0] == [i // 8 * 8 + 1 for i in range(32)]
    assert shuffle("down", 2, eights) == (
        [i + 2 if i % 8 < 6 else i for i in range(32)],
        [int(i % 8 < 6) for i in range(32)],
    )
    half = "setp.lt.u32 %p1, %thread, 16; @%p1 shfl.sync.idx.b32 %out, %in0, {lane}, 0x1f, 0x0000ffff;"
    assert run(half.format(lane=3), LANES)[:16].tolist() == [3] * 16
    with pytest.raises(PtxError, match="thread 0 asks for the value of thread 20, which is not in its mask"):
        run(half.format(lane=20), LANES)
    with pytest.raises(PtxError, match="expected the lanes of its mask 0xffffffff, got 0x0000ffff"):
        run(half.format(lane=3).replace("0x0000ffff", "0xffffffff"), LANES)


def test_votes_and_reductions() -> None:
    body = """setp.gt.u32 %p1, %in0, 29; vote.sync.ballot.b32 %out0, %p1, 0xffffffff;
              vote.sync.any.pred %p2, %p1, 0xffffffff; vote.sync.all.pred %p3, %p1, 0xffffffff;
              selp.u32 %r1, 2, 0, %p2; selp.u32 %r2, 1, 0, %p3; or.b32 %out1, %r1, %r2;
              redux.sync.add.s32 %out2, %in0, 0xffffffff; redux.sync.max.u32 %out3, %in0, 0xffffffff;"""
    out = run(body, np.concatenate([LANES, LANES + 30]), per_thread=4)
    assert out[0].tolist() == [0xC0000000, 2, 496, 31]
    assert out[40].tolist() == [0xFFFFFFFF, 3, 496 + 960, 61]


# "Warp Level Matrix Multiply-Accumulate Instructions"


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(trans: str) -> None:
    """Row addresses of matrix i come from lanes 8 i to 8 i + 7; thread t gets elements (t / 4, 2 (t % 4) + 0, 1)."""
    halves = RANDOM.integers(0, 2**16, (32, 8), np.uint16)
    words = halves.view(np.uint32).ravel()
    body = (
        COPY.replace("cg", "cg")
        + f"""cp.async.wait_all; bar.warp.sync 0xffffffff;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%out0, %out1, %out2, %out3}}, [%r2];"""
    )
    out = run(body, words, threads=32, per_thread=4, shared=KILOBYTE).view(np.uint16).reshape(32, 4, 2)
    for t in range(32):
        for m in range(4):
            matrix = halves[8 * m : 8 * m + 8]
            matrix = matrix.T if trans else matrix
            assert out[t, m].tolist() == [matrix[t // 4, t % 4 * 2], matrix[t // 4, t % 4 * 2 + 1]]


def fragments(depth: int, bits: int) -> tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
    """Row and column of every element of A and of B, per lane, as the ISA's formulas have them."""
    of_a, of_b = [], []
    per_register = 32 // bits
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        a, b = [], []
        for i in range(16 * depth // 32):
            register, element = divmod(i, per_register)
            row = group if register % 2 == 0 else group + 8
            a.append((row, member * per_register + element + (register // 2) * 4 * per_register))
        for i in range(8 * depth // 32):
            register, element = divmod(i, per_register)
            b.append((member * per_register + element + register * 4 * per_register, group))
        of_a.append(a)
        of_b.append(b)
    return of_a, of_b


def test_fragment_formulas() -> None:
    """For m16n8k16 of 16 bits as the ISA spells them: row, column of a_i and of b_i."""
    of_a, of_b = fragments(16, 16)
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            assert of_a[lane][i] == (row, member * 2 + (i & 1) + (8 if i >= 4 else 0))
        for i in range(4):
            assert of_b[lane][i] == (member * 2 + (i & 1) + (8 if i >= 2 else 0), group)


@pytest.mark.parametrize(
    ("depth", "types", "bits"),
    [
        (16, "f32.f16.f16.f32", 16),
        (8, "f32.f16.f16.f32", 16),
        (16, "f32.bf16.bf16.f32", 16),
        (8, "f32.bf16.bf16.f32", 16),
        (8, "f32.tf32.tf32.f32", 32),
        (4, "f32.tf32.tf32.f32", 32),
        (32, "s32.s8.s8.s32", 8),
        (16, "s32.s8.s8.s32", 8),
        (32, "s32.u8.s8.s32", 8),
    ],
)
def test_mma(depth: int, types: str, bits: int) -> None:
    """Small integers, so that every order of the sum gives the same bits."""
    is_float = types.startswith("f32")
    low = 0 if "u8" in types else -8
    a, b = RANDOM.integers(low, 8, (16, depth)), RANDOM.integers(-8, 8, (depth, 8))
    c = RANDOM.integers(-8, 8, (16, 8))

    def encoded(x: np.ndarray) -> np.ndarray:
        kinds = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
        kind = kinds.get(types.split(".")[1], torch.int8)
        return torch.from_numpy(x).to(kind).view({8: torch.int8, 16: torch.int16, 32: torch.int32}[bits]).numpy()

    of_a, of_b = fragments(depth, bits)
    words_a = np.array([[encoded(a)[place] for place in lane] for lane in of_a]).view(np.uint32)
    words_b = np.array([[encoded(b)[place] for place in lane] for lane in of_b]).view(np.uint32)
    accumulator = np.float32 if is_float else np.int32
    places = [[(t // 4 + i // 2 * 8, t % 4 * 2 + i % 2) for i in range(4)] for t in range(32)]
    words_c = np.array([[c[place] for place in lane] for lane in places]).astype(accumulator)
    columns = [*words_a.T, *words_b.T, *words_c.T]
    names = [f"%in{i}" for i in range(len(columns))]
    na, nb = words_a.shape[1], words_b.shape[1]
    groups = (names[:na], names[na : na + nb], names[na + nb :])
    operands = ", ".join("{" + ", ".join(group) + "}" for group in groups)
    body = f"mma.sync.aligned.m16n8k{depth}.row.col.{types} {{%out0, %out1, %out2, %out3}}, {operands};"
    out = run(body, *columns, result=accumulator, per_thread=4)
    expected = a @ b + c
    for t in range(32):
        assert out[t].tolist() == [expected[place] for place in places[t]]


def test_partial_warps_cannot_multiply() -> None:
    body = """setp.lt.u32 %p1, %thread, 16; @!%p1 bra $END;
      mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r3}, {%f1, %f2, %f3, %f4};
    $END:"""
    with pytest.raises(PtxError, match="expected all lanes of the warp"):
        run(body, LANES)


# Banks of shared memory.


@pytest.mark.parametrize(
    ("stride", "width", "cycles", "ideal"),
    [
        (4, 4, 1, 1),
        (8, 4, 2, 1),
        (128, 4, 32, 1),
        (0, 4, 1, 1),
        (8, 8, 2, 2),
        (16, 16, 4, 4),
        (80, 16, 4, 4),
        (64, 16, 16, 4),
    ],
)
def test_bank_conflicts(stride: int, width: int, cycles: int, ideal: int) -> None:
    registers = ", ".join(f"%r{i}" for i in range(2, 2 + width // 4))
    kind, vector = ("", registers) if width == 4 else (f".v{width // 4}", f"{{{registers}}}")
    banks = BankCounter()
    values = "mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0; mov.u32 %r5, 0; mov.u32 %r1, buffer;"
    body = f"{values} mad.lo.u32 %r1, %thread, {stride}, %r1; st.shared{kind}.b32 [%r1], {vector};"
    run(body, LANES, shared=".shared .align 16 .b8 buffer[4096];", banks=banks)
    assert banks.total() == {"st": (cycles, ideal)}


# Launches.


def test_grids_and_parameters() -> None:
    text = """.version 8.7\n.target sm_80\n.address_size 64
    .visible .entry run(.param .u8 run_param_0, .param .align 8 .b8 run_param_1[16], .param .f32 run_param_2) {
      .reg .b32 %r<9>; .reg .b64 %d<3>; .reg .b16 %h<2>; .reg .pred %p<2>;
      ld.param.u8 %h1, [run_param_0]; cvt.u32.u16 %r1, %h1; ld.param.u64 %d1, [run_param_1+8];
      mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %ctaid.x; mad.lo.u32 %r5, %r2, %r3, %r4;
      mov.u32 %r6, %tid.y; mad.lo.u32 %r6, %r5, %ntid.y, %r6; mad.lo.u32 %r6, %r6, %ntid.x, %tid.x;
      mad.wide.u32 %d2, %r6, 4, %d1; mad.lo.u32 %r6, %r6, %r1, 0; st.global.u32 [%d2], %r6; ret;
    }"""
    out, memory = np.zeros(2 * 3 * 5 * 2, np.uint32), GlobalMemory()
    address = memory.add_array(out, True, "out")
    kernel = load(text, "run")
    kernel.launch((2, 3, 1), (5, 2, 1), [b"\3", struct.pack("QQ", 0, address), struct.pack("f", 1)], memory)
    assert out.tolist() == [3 * i for i in range(60)]
    with pytest.raises(PtxError, match=r"expected parameters of \[1, 16, 4\] bytes, got \[1\]"):
        kernel.launch((1, 1, 1), (1, 1, 1), [b"\3"], memory)
