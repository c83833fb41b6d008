"""Instructions that compilers emit rarely, each in a kernel of its own, against what they mean.

python tests/standin/cuda/try_ptx.py build/cuda-standin-VERSION/libcuda.so.1
"""

import ctypes
import struct
import sys

cuda = ctypes.CDLL(sys.argv[1])
HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"


def check(result):
    assert result == 0, result


def load(text):
    module = ctypes.c_void_p()
    return cuda.cuModuleLoadData(ctypes.byref(module), (HEAD + text).encode()), module


def run(body, *inputs, threads=1, blocks=1, before="", shared=0):
    """The u64 that each thread leaves in %out, which the body sets from %i0, %i1 …"""
    text = f"""{before}
    .visible .entry k(.param .u64 to{"".join(f",.param .u64 in{n}" for n in range(len(inputs)))}) {{
      .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>, %f<9>; .reg .b64 %d<9>, %i<9>, %out, %at;
      .reg .b32 %tid, %cta, %n;
      {"".join(f"ld.param.u64 %i{n}, [in{n}]; " for n in range(len(inputs)))}
      {"".join(f"cvt.u32.u64 %r{n}, %i{n}; " for n in range(len(inputs)))}
      mov.u32 %tid, %tid.x; mov.u32 %cta, %ctaid.x; mov.u32 %n, %ntid.x;
      mov.u64 %out, 0;
      {body}
      mad.lo.u32 %n, %cta, %n, %tid;
      ld.param.u64 %at, [to]; mad.wide.u32 %at, %n, 8, %at; st.global.u64 [%at], %out; ret;
    }}"""
    result, module = load(text)
    check(result)
    kernel, to = ctypes.c_void_p(), ctypes.c_uint64()
    check(cuda.cuModuleGetFunction(ctypes.byref(kernel), module, b"k"))
    count = threads * blocks
    check(cuda.cuMemAlloc_v2(ctypes.byref(to), ctypes.c_size_t(8 * count)))
    values = [to, *[ctypes.c_uint64(a & (2**64 - 1)) for a in inputs]]
    pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(a) for a in values])
    check(cuda.cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, shared, None, pointers, None))
    out = (ctypes.c_uint64 * count)()
    check(cuda.cuMemcpyDtoH_v2(out, to, ctypes.c_size_t(8 * count)))
    return list(out)


def expect(body, expected, *inputs, **options):
    found = run(body, *inputs, **options)
    wanted = expected if isinstance(expected, list) else [expected] * len(found)
    wanted = [a & (2**64 - 1) for a in wanted]
    if found != wanted:
        wrong.append(body)
        print("WRONG", body, [hex(a) for a in found[:8]], "not", [hex(a) for a in wanted[:8]])


def f32(value):
    return struct.unpack("I", struct.pack("f", value))[0]


wrong = []
U = "cvt.u64.u32 %out, %r9;"
S = "cvt.s64.s32 %out, %r9;"
# Bits.
expect("prmt.b32 %r9, %r0, %r1, 0x7531;" + U, 0x88664422, 0x44332211, 0x88776655)
expect("prmt.b32 %r9, %r0, %r1, 0x9c04;" + U, 0x00001155, 0x44332211, 0x88776655)
expect("bfe.u32 %r9, %r0, 4, 8;" + U, 0xAB, 0xCDEFFAB4)
expect("bfe.s32 %r9, %r0, 4, 8;" + S, -85, 0xCDEFFAB4)
expect("bfe.s32 %r9, %r0, 28, 8;" + S, -4, 0xC0000000)
expect("bfe.s32 %r9, %r0, 4, 0;" + S, 0, 0xFFFFFFFF)
expect("bfi.b32 %r9, %r0, %r1, 8, 12;" + U, 0xFFFBCDFF, 0xABCD, 0xFFFFFFFF)
expect("bfi.b64 %out, %i0, %i1, 60, 12;", 0xDFFFFFFFFFFFFFFF, 0xABCD, -1)
expect("bfind.u32 %r9, %r0;" + U, 19, 0x000ABCDE)
expect("bfind.s32 %r9, %r0;" + U, 3, -9)
expect("bfind.shiftamt.u32 %r9, %r0;" + U, 12, 0x000ABCDE)
expect("bfind.u32 %r9, 0;" + U, 0xFFFFFFFF)
expect("brev.b32 %r9, %r0;" + U, 0x80000001, 0x80000001)
expect("clz.b64 %r9, %i0;" + U, 60, 15)
expect("popc.b64 %r9, %i0;" + U, 64, -1)
expect("lop3.b32 %r9, %r0, %r1, %r2, 0x96;" + U, 5 ^ 9 ^ 12, 5, 9, 12)
expect("lop3.b32 %r9, %r0, %r1, %r2, 0xCA;" + U, (6 & 9) | (~6 & 12), 6, 9, 12)
expect("shf.l.wrap.b32 %r9, %r0, %r1, 40;" + U, 0x33445588, 0x8899AABB, 0x22334455)
expect("shf.r.clamp.b32 %r9, %r0, %r1, 40;" + U, 0x22334455, 0x8899AABB, 0x22334455)
expect("shr.s32 %r9, %r0, 99;" + S, -1, -5)
expect("shl.b32 %r9, %r0, 32;" + U, 0, 5)
expect("cnot.b32 %r9, %r0;" + U, 1, 0)
# Integers.
expect("mul.hi.s32 %r9, %r0, %r1;" + S, (-7 * 2000000000) >> 32, -7, 2000000000)
expect("mul.hi.u64 %out, %i0, %i1;", (2**63 * 10) >> 64, 2**63, 10)
expect("mul.wide.s32 %out, %r0, %r1;", -7 * 2000000000, -7, 2000000000)
expect("add.cc.u32 %r8, %r0, %r1; addc.u32 %r9, 1, 2;" + U, 4, 0xFFFFFFFF, 1)
expect("sub.cc.u32 %r8, %r0, %r1; subc.u32 %r9, 5, 2;" + U, 2, 0, 1)
expect(
    "mad.lo.cc.u32 %r8, %r0, %r1, 2; madc.hi.u32 %r9, %r0, %r1, 7;" + U, 7 + 1 + 1, 0xFFFFFFFF, 2
)
expect("add.sat.s32 %r9, %r0, %r1;" + S, 2**31 - 1, 2**31 - 5, 99)
expect("sad.u32 %r9, %r0, %r1, 10;" + U, 17, 2, 9)
expect("rem.s32 %r9, %r0, %r1;" + S, -1, -7, 3)
expect("div.s32 %r9, %r0, %r1;" + S, -(2**31), -(2**31), -1)
expect("dp4a.s32.s32 %r9, %r0, %r1, 100;" + S, 100 + 1 - 2 * 3 + 1, 0x0001FE01, 0x04010301)
expect("vote.sync.any.pred %p1, 1, -1; selp.u64 %out, 7, 8, %p1;", 7)
expect("min.s16x2 %r9, %r0, %r1;" + U, 0xFFFF0001, 0xFFFF0002, 0x00050001)
# Floating point.
one, third = f32(1), f32(1 / 3)
expect("add.rp.f32 %r9, %r0, %r1;" + U, one + 1, one, f32(1e-30))
expect("add.rz.f32 %r9, %r0, %r1;" + U, one, one, f32(1e-30))
expect("div.rm.f32 %r9, %r0, %r1;" + U, third - 1, one, f32(3))
expect("add.sat.f32 %r9, %r0, %r1;" + U, one, one, one)
expect("mul.ftz.f32 %r9, %r0, %r1;" + U, 0x80000000, f32(-1e-38), f32(0.5))
expect("mul.f32 %r9, %r0, %r1;" + U, f32(-0.5e-38), f32(-1e-38), f32(0.5))
expect("min.f32 %r9, %r0, %r1;" + U, one, one, 0x7FC00000)
expect("min.NaN.f32 %r9, %r0, %r1; and.b32 %r9, %r9, 0x7FC00000;" + U, 0x7FC00000, one, 0x7FC00000)
expect("max.f32 %r9, %r0, %r1;" + U, 0, 0x80000000, 0)
expect("min.xorsign.abs.f32 %r9, %r0, %r1;" + U, f32(-1), f32(-2), f32(1))
expect("copysign.f32 %r9, %r0, %r1;" + U, f32(-2), f32(-1), f32(2))
expect("cvt.rzi.u32.f32 %r9, %r0;" + U, 0, f32(-3.5))
expect("cvt.rni.s32.f32 %r9, %r0;" + S, 2, f32(2.5))
expect("cvt.rzi.s32.f32 %r9, %r0;" + S, 2**31 - 1, f32(3e9))
expect("cvt.sat.u8.s32 %r9, %r0;" + U, 0, -4)
expect("cvt.sat.s8.s32 %r9, %r0;" + S, 127, 400)
expect("cvt.s8.s32 %r9, %r0;" + S, -112, 400)
expect("cvt.rn.bf16x2.f32 %r9, %r0, %r1;" + U, 0x3F804000, one, f32(2))
expect("cvt.rna.tf32.f32 %r9, %r0;" + U, 0x3F802000, 0x3F801000)
expect("fma.rn.f16x2 %r9, %r0, %r1, %r2;" + U, 0x44004900, 0x40004000, 0x3C004200, 0x40004400)
expect("set.lt.f32.s32 %r9, %r0, %r1;" + U, one, -1, 1)
expect("slct.b32.f32 %r9, 3, 4, %r0;" + U, 4, f32(-0.5))
expect("setp.lt.and.s32 %p1|%p2, %r0, %r1, !%p3; selp.u64 %out, 1, 2, %p2;", 2, 1, 2)
expect("setp.eq.u32 %p1, 1, 1; @%p1 setp.eq.u32 %p1|%p2, 1, 2; selp.u64 %out, 1, 2, %p2;", 1)
expect("testp.subnormal.f32 %p1, %r0; selp.u64 %out, 1, 2, %p1;", 1, 5)
expect("mov.b64 %out, {%r1, %r0};", 5 << 32 | 9, 5, 9)
expect("mov.b64 {_, %r9}, %i0;" + U, 5, 5 << 32 | 9)
# Flow.
TABLE = """$T: .branchtargets $A, $B, $C; brx.idx %r0, $T;
  $A: mov.u64 %out, 10; bra $E; $B: mov.u64 %out, 11; bra $E; $C: mov.u64 %out, 12; $E:"""
for n in range(3):
    expect(TABLE, 10 + n, n)
TWICE = """.func (.param .b32 back) twice(.param .b32 of) { .reg .b32 %r<3>;
  ld.param.b32 %r1, [of]; add.s32 %r2, %r1, %r1; st.param.b32 [back], %r2; ret; }"""
CALL = """{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r0;
  call.uni (b), twice, (a); ld.param.b32 %r0, [b]; }"""
expect(CALL + CALL + "mov.u32 %r9, %r0;" + U, 28, 7, before=TWICE)
expect("{ .reg .b32 %r9; mov.u32 %r9, 4; } mov.u32 %r8, 3; mov.u32 %r9, %r8;" + U, 3)
expect("@!%p1 mov.u64 %out, 3; setp.eq.u32 %p1, 1, 1; @%p1 add.u64 %out, %out, 1;", 4)
# Memory.
GLOBAL = """.global .align 4 .u32 table[3] = {7, 8, 9}; .const .f64 c = 0d3FF8000000000000;
  .global .u64 p = table;"""
expect("ld.global.u32 %r9, [table+8];" + U, 9, before=GLOBAL)
expect("ld.const.b64 %out, [c];", 0x3FF8000000000000, before=GLOBAL)
expect("ld.global.u64 %d1, [p]; ld.u32 %r9, [%d1+4];" + U, 8, before=GLOBAL)
expect(
    ".local .b8 room[16]; mov.u64 %d1, room; cvta.local.u64 %d2, %d1; st.u32 [%d2+4], %tid;"
    "ld.local.u32 %r9, [%d1+4];" + U,
    list(range(40)),
    threads=40,
)
SHARED = ".extern .shared .align 16 .b8 mine[]; .shared .u32 sum;"
expect(
    """mov.u32 %r1, mine; shl.b32 %r2, %tid, 2; add.u32 %r1, %r1, %r2; st.shared.u32 [%r1], %tid;
  bar.sync 0; xor.b32 %r2, %r2, 252; mov.u32 %r1, mine; add.u32 %r1, %r1, %r2;
  ld.shared.u32 %r9, [%r1];"""
    + U,
    [63 - n for n in range(64)] * 2,
    threads=64,
    blocks=2,
    shared=256,
    before=SHARED,
)
expect(
    "st.shared.u32 [sum], 0; barrier.sync 0; atom.shared.add.u32 %r8, [sum], %tid; bar.sync 0;"
    "ld.shared.u32 %r9, [sum];" + U,
    96 * 95 // 2,
    threads=96,
    before=SHARED,
)
expect(
    "st.shared.u32 [sum], 5; atom.shared.cas.b32 %r8, [sum], 5, 9;"
    "atom.shared.inc.u32 %r7, [sum], 9;"
    "ld.shared.u32 %r9, [sum]; mad.lo.u32 %r9, %r7, 100, %r9;" + U,
    900,
    before=SHARED,
)
# Together.
LANE = (
    "shfl.sync.{} %r9|%p1, %tid, {}, {}, -1; selp.u32 %r8, 100, 0, %p1; add.u32 %r9, %r9, %r8;" + U
)
expect(LANE.format("up.b32", 3, 0), [n + 97 if n >= 3 else n for n in range(32)], threads=32)
expect(LANE.format("down.b32", 3, 31), [n + 103 if n < 29 else n for n in range(32)], threads=32)
expect(LANE.format("bfly.b32", 5, 31), [(n ^ 5) + 100 for n in range(32)], threads=32)
expect(LANE.format("idx.b32", 2, (24 << 8) | 7), [n // 8 * 8 + 102 for n in range(32)], threads=32)
ODD = "and.b32 %r1, %tid, 1; setp.eq.u32 %p1, %r1, 1;"
expect(ODD + "vote.sync.ballot.b32 %r9, %p1, -1;" + U, 0xAAAAAAAA, threads=32)
expect(ODD + "vote.sync.all.pred %p2, %p1, -1; selp.u64 %out, 1, 2, %p2;", 2, threads=32)
expect(
    ODD + "@%p1 bra $X; vote.sync.ballot.b32 %r9, 1, 0x55555555; bra $Y;"
    "$X: vote.sync.ballot.b32 %r9, 1, 0xAAAAAAAA; $Y:" + U,
    [0x55555555, 0xAAAAAAAA] * 16,
    threads=32,
)
expect("redux.sync.max.s32 %r9, %tid, -1;" + U, 31, threads=32)
expect(ODD + "match.any.sync.b32 %r9, %r1, -1;" + U, [0x55555555, 0xAAAAAAAA] * 16, threads=32)
expect("elect.sync %r9|%p1, -1; selp.u64 %out, 1, 0, %p1;", [1] + [0] * 31, threads=32)
expect(ODD + "bar.red.popc.u32 %r9, 0, %p1;" + U, 48, threads=96)
expect(
    "setp.lt.u32 %p1, %tid, 32; @%p1 bra $X; bar.sync 1, 64; $X: bar.sync 0; mov.u64 %out, 1;",
    1,
    threads=96,
)
expect(
    """.shared .u32 flag; st.shared.u32 [flag], 0; bar.sync 0; setp.eq.u32 %p1, %tid, 63;
  @%p1 st.shared.u32 [flag], 1; $W: ld.volatile.shared.u32 %r1, [flag]; setp.eq.u32 %p2, %r1, 0;
  @%p2 bra $W; mov.u64 %out, 1;""",
    1,
    threads=64,
)
MATRIX = """.shared .align 16 .b8 m[512]; mov.u32 %r1, m; mad.lo.u32 %r1, %tid, 16, %r1;
  mul.lo.u32 %r2, %tid, 8;
  mov.u32 %r3, 0; $L: add.u32 %r4, %r2, %r3; cvt.u16.u32 %h1, %r4; mad.lo.u32 %r5, %r3, 2, %r1;
  st.shared.b16 [%r5], %h1; add.u32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, 8; @%p1 bra $L; bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r1];
  mov.b64 %out, {{%r6, %r9}};"""
expect(
    MATRIX.format(""),
    [(193 + 2 * n) << 48 | (192 + 2 * n) << 32 | (2 * n + 1) << 16 | 2 * n for n in range(32)],
    threads=32,
)
expect(
    MATRIX.format(".trans"),
    [
        (192 + a + 8) << 48 | (192 + a) << 32 | (a + 8) << 16 | a
        for a in [n % 4 * 16 + n // 4 for n in range(32)]
    ],
    threads=32,
)

# What is not known is not computed.
for text in [
    "tensormap.replace %r1;",
    "add.s32.mystery %r1, %r2, %r3;",
    "mma.sync.aligned %r1;",
    "max.s32 %r1, %r2, %r3, %r4;",
    "ld.global.u32 %r1, [nobody];",
    "add.s32 %q1, 1, 2;",
]:
    kernel = ".visible .entry k() { .reg .b32 %r<9>; " + text + " ret; }"
    if load(kernel)[0] != 218:
        wrong.append(text)
        print("LOADED", text)


def fault_of(body, threads):
    """What the driver says of a kernel that ends early; 0 if it does not."""
    try:
        run(body, threads=threads)
    except AssertionError as error:
        cuda.standin_cuda_fault(0)  # which nothing undoes on a card
        return error.args[0]
    return 0


print("expected to end early: an address, a trap, threads that wait for ever")
for body, threads in (
    ("ld.global.u32 %r9, [%d1];", 1),
    ("trap;", 1),
    ("setp.eq.u32 %p1, %tid, 0; @%p1 shfl.sync.idx.b32 %r9, %r8, 0, 31, -1; bar.sync 0;", 32),
):
    if fault_of(body, threads) != 719:  # the launch failed
        wrong.append(body)
        print("NO FAULT", body)
print("wrong:", len(wrong))
sys.exit(len(wrong))
