"""Compares jitted JAX programs on the CUDA device that is played with the same on the CPU.

python tests/standin/cuda/rehearse.py python tests/standin/cuda/try_kernels.py [part of a name]
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

CASES = {}
FLOATS = ["float32", "float64", "float16", "bfloat16"]
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


def case(name, function, *arguments, tolerance=None):
    assert name not in CASES, name
    CASES[name] = (function, arguments, tolerance)


def words(text):
    return text.split()


def numbers(shape, dtype, seed=0, low=-3, high=3):
    random = np.random.default_rng(seed)
    if jnp.issubdtype(dtype, jnp.floating):
        return random.uniform(low, high, shape).astype(dtype)
    if dtype == "bool":
        return random.random(shape) < 0.5
    info = np.iinfo(dtype)
    return random.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def odd(dtype):
    """Numbers with all that is special about floating point."""
    info = jnp.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 3.5, np.inf, -np.inf, np.nan, 1e-3, 1e4]
    special += [float(info.max), float(info.tiny), 127.5, -128.5, 3e9, -3e9]
    with np.errstate(all="ignore"):
        return np.asarray(special, np.float64).astype(dtype)


# Elementwise.
for dtype in FLOATS:
    dtype = jnp.dtype(dtype)
    x, y = numbers(3000, dtype), numbers(3000, dtype, 1)
    pairs = [np.ravel(a) for a in np.meshgrid(odd(dtype), odd(dtype))]
    for (
        name
    ) in words("""exp log log1p expm1 sin cos tan tanh sinh cosh sqrt cbrt arctan arcsinh floor
        ceil round trunc abs sign negative square reciprocal isnan isfinite exp2"""):
        case(f"{name} {dtype}", getattr(jnp, name), x)
        if name not in {"sinh", "cosh", "tan"}:
            case(f"{name} odd {dtype}", getattr(jnp, name), odd(dtype))
    for name in ["erf", "erf_inv", "lgamma", "digamma", "rsqrt", "logistic"]:
        case(f"{name} {dtype}", getattr(jax.lax, name), x / 4)
    for (
        name
    ) in words("""add subtract multiply divide maximum minimum copysign arctan2 less less_equal
        equal not_equal greater fmax fmin"""):
        case(f"{name} odd {dtype}", getattr(jnp, name), *pairs)
    case(f"power {dtype}", jnp.power, abs(x), y)
    case(f"remainder {dtype}", jnp.remainder, x, y)
    case(f"clip {dtype}", lambda x: jnp.clip(x, -1, 1), odd(dtype))
    case(f"where {dtype}", lambda x, y: jnp.where(x > y, x, 2 * y), x, y)
    case(f"nextafter {dtype}", jnp.nextafter, x, y) if dtype.itemsize > 2 else None
    case(f"softmax {dtype}", jax.nn.softmax, x.reshape(30, 100))
    case(f"gelu {dtype}", jax.nn.gelu, x)
    for to in FLOATS + INTEGERS + ["bool"]:
        # Of numbers that fit: else a conversion is each machine's own.
        fit = np.abs(numbers(1000, np.dtype("float64"), 2, -100, 100)).astype(dtype)
        case(f"{dtype} to {to}", lambda x, to=to: x.astype(to), fit)
for dtype in INTEGERS:
    x, y = numbers(3000, dtype), numbers(3000, dtype, 1)
    shift = (numbers(3000, "uint8") % 8).astype(dtype)
    for (
        name
    ) in words("""add subtract multiply bitwise_and bitwise_or bitwise_xor maximum minimum less
        greater_equal"""):
        case(f"{name} {dtype}", getattr(jnp, name), x, y)
    for name in ["floor_divide", "remainder"]:
        case(f"{name} {dtype}", getattr(jnp, name), x, np.where(y == 0, 1, y).astype(dtype))
    for name in ["population_count", "clz", "bitwise_not", "sign"]:
        case(f"{name} {dtype}", getattr(jax.lax, name), x)
    for name in ["shift_left", "shift_right_arithmetic", "shift_right_logical"]:
        case(f"{name} {dtype}", getattr(jax.lax, name), x, shift)
    for to in FLOATS + INTEGERS + ["bool"]:
        case(f"{dtype} to {to}", lambda x, to=to: x.astype(to), x)
case("complex multiply", lambda x: x * jnp.exp(1j * x), numbers(1000, np.dtype("float64")))

# Reductions and scans.
for size in [1, 7, 32, 33, 1000, 1024, 4097, 100000]:
    x = numbers(size, np.dtype("float32"))
    for name in words("""sum mean max min argmax argmin prod std any all"""):
        given = x if name != "prod" else 1 + x / size
        case(f"{name} of {size}", getattr(jnp, name), given, tolerance=2e-5)
    case(f"cumsum of {size}", jnp.cumsum, x, tolerance=2e-3)
    case(f"sum of {size} float64", jnp.sum, x.astype(np.float64))
    case(f"sum of {size} int32", jnp.sum, numbers(size, "int32"))
    case(f"sum of {size} bfloat16", jnp.sum, x.astype(jnp.bfloat16), tolerance=0.3)
for shape in [(3, 5), (64, 64), (128, 1000), (1000, 128), (5, 33, 70), (2, 3, 4, 5)]:
    x = numbers(shape, np.dtype("float32"))
    for axis in range(len(shape)):
        for name in words("""sum max argmin cumsum cumprod sort argsort flip"""):
            at = f"{name} of {shape} over {axis}"
            case(at, lambda x, n=name, a=axis: getattr(jnp, n)(x, axis=a), x, tolerance=1e-4)
    case(f"transpose of {shape}", lambda x: jnp.transpose(x) + 1, x)
    case(f"transpose of {shape} bfloat16", lambda x: jnp.transpose(x) + 1, x.astype(jnp.bfloat16))
    case(f"transpose of {shape} float64", lambda x: jnp.transpose(x) + 1, x.astype(np.float64))
case("logsumexp", jax.nn.logsumexp, numbers((50, 300), np.dtype("float64")))
case(
    "normalise",
    lambda x: (x - x.mean(0)) / (x.std(0) + 1e-6),
    numbers((300, 40), np.dtype("float32")),
)
case("median", jnp.median, numbers(999, np.dtype("float32")))
case("top_k", lambda x: jax.lax.top_k(x, 5), numbers((4, 200), np.dtype("float32")))
case("histogram", lambda x: jnp.histogram(x, 20)[0], numbers(5000, np.dtype("float64")))
case("cummax", jax.lax.cummax, numbers((40, 50), np.dtype("float32")))
case("associative scan", lambda x: jax.lax.associative_scan(jnp.add, x), numbers(1000, "int32"))
case(
    "reduce window",
    lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (3, 3), (2, 2), "SAME"),
    numbers((40, 50), np.dtype("float32")),
)

# Places.
at = np.random.default_rng(3).integers(0, 500, 4000)
for dtype in ["float32", "float64", "int32", "int64", "float16", "bfloat16", "uint8", "int16"]:
    x = numbers(4000, jnp.dtype(dtype))
    base = numbers(500, jnp.dtype(dtype), 1)
    loose = {"float16": 0.1, "bfloat16": 1.0, "float32": 1e-4}.get(dtype)
    case(f"scatter add {dtype}", lambda b, x: b.at[at].add(x), base, x, tolerance=loose)
    case(f"scatter max {dtype}", lambda b, x: b.at[at].max(x), base, x)
    case(f"scatter min {dtype}", lambda b, x: b.at[at].min(x), base, x)
    case(f"gather {dtype}", lambda b: b[at], base)
    case(f"sort {dtype}", jnp.sort, x)
    case(f"cumsum {dtype}", jnp.cumsum, x // 100, tolerance=loose and 100 * loose)
    case(f"concatenate {dtype}", lambda x, y: jnp.concatenate([x, y[:77], x[::-1]]), x, base)
    case(f"pad {dtype}", lambda x: jnp.pad(x, (3, 70), constant_values=1), x)
case(
    "scatter mul",
    lambda b, x: b.at[at].multiply(x),
    np.ones(500),
    1 + numbers(4000, np.dtype("float64")) / 99,
)
case(
    "segment sum",
    lambda x: jax.ops.segment_sum(x, at, 500),
    numbers((4000, 3), np.dtype("float64")),
)
case(
    "segment sum float32",
    lambda x: jax.ops.segment_sum(x, at, 500),
    numbers((4000, 3), np.dtype("float32")),
    tolerance=1e-4,
)
case(
    "sort with keys",
    lambda k, x: jax.lax.sort((k, x), num_keys=1),
    numbers(5000, "int32"),
    np.arange(5000),
)
case("sort rows", lambda x: jnp.sort(x, axis=0), numbers((100, 30), np.dtype("float64")))
case("unique", lambda x: jnp.unique(x, size=20, fill_value=-1), at % 17)
case("searchsorted", lambda x: jnp.searchsorted(jnp.sort(x), x), numbers(300, np.dtype("float32")))
case(
    "dynamic slice",
    lambda x, i: jax.lax.dynamic_slice(x, (i, 2), (3, 4)),
    numbers((20, 9), np.dtype("float32")),
    5,
)
case(
    "dynamic update",
    lambda x, y, i: jax.lax.dynamic_update_slice(x, y, (i, 2)),
    numbers((20, 9), np.dtype("float32")),
    numbers((3, 4), np.dtype("float32"), 1),
    5,
)
case(
    "nonzero",
    lambda x: jnp.nonzero(x > 0, size=200, fill_value=-1),
    numbers(300, np.dtype("float32")),
)
case("roll", lambda x: jnp.roll(x, 7, 1), numbers((20, 33), np.dtype("float32")))
case("one hot", lambda i: jax.nn.one_hot(i, 500), at[:100])
case(
    "iota and triangles",
    lambda x: jnp.tril(x) + jnp.arange(33),
    numbers((33, 33), np.dtype("float32")),
)
case(
    "constants",
    lambda x: x + jnp.asarray(np.sin(np.arange(3000.0))),
    numbers(3000, np.dtype("float64")),
)
case(
    "bitcast",
    lambda x: jax.lax.bitcast_convert_type(x, jnp.uint8),
    numbers(300, np.dtype("float32")),
)

# Randomness.
case("random normal", lambda: jax.random.normal(jax.random.key(1), (10000,)), tolerance=1e-5)
case(
    "random normal float32",
    lambda: jax.random.normal(jax.random.key(1), (999,), jnp.float32),
    tolerance=1e-5,
)
case("random uniform", lambda: jax.random.uniform(jax.random.key(2), (100, 101)))
case("random bits", lambda: jax.random.bits(jax.random.key(3), (1001,), "uint8"))
case("random integers", lambda: jax.random.randint(jax.random.key(3), (1001,), -5, 99))
case("random permutation", lambda: jax.random.permutation(jax.random.key(4), 1000))
case("random gamma", lambda: jax.random.gamma(jax.random.key(4), 2.5, (100,)), tolerance=1e-8)

# Loops.
case(
    "while",
    lambda x: jax.lax.while_loop(lambda x: x.sum() < 1000, lambda x: x * 1.5, x),
    np.ones(10),
)
case("fori", lambda x: jax.lax.fori_loop(0, 20, lambda i, x: x * 0.9 + i, x), np.ones(100))
case(
    "scan",
    lambda x: jax.lax.scan(lambda c, x: (c * 0.5 + x.sum(), c * x), 0.0, x),
    numbers((30, 10), np.dtype("float64")),
)
case(
    "cond", lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), numbers(10, np.dtype("float64"))
)
case("switch", lambda i, x: jax.lax.switch(i, [jnp.sin, jnp.cos, jnp.exp], x), 2, np.ones(10))
case(
    "grad",
    jax.grad(lambda x: jnp.sum(jnp.sin(x) ** 2 * jnp.exp(-x))),
    numbers(500, np.dtype("float64")),
)
case(
    "hessian",
    jax.hessian(lambda x: jnp.sum(jnp.sin(x) * x[::-1] ** 2)),
    numbers(20, np.dtype("float64")),
)
case(
    "vmap",
    jax.vmap(lambda x, y: jnp.sort(x * y).cumsum()),
    *[numbers((40, 20), np.dtype("float64"), i) for i in (0, 1)],
)
case(
    "map", lambda x: jax.lax.map(lambda x: jnp.sum(x) * x, x), numbers((20, 7), np.dtype("float64"))
)
small = [numbers(shape, np.dtype("float64")) for shape in [(7, 3), (3, 5), (7, 4, 3), (3,)]]
case("matrix product", lambda x, y: x @ y, small[0], small[1])
case(
    "matrix product float32",
    lambda x, y: x @ y,
    *[a.astype("float32") for a in small[:2]],
    tolerance=1e-5,
)
case("einsum", lambda x, y: jnp.einsum("abi,ij->abj", x, y), small[2], small[1])
case("outer", lambda x, y: jnp.einsum("ai,i->a", x, y), small[0], small[3])
case("norm", lambda x: jnp.linalg.norm(x, axis=1), small[0])
case("cross", lambda x: jnp.cross(x, jnp.roll(x, 1, 0)), small[0])
case("determinant", lambda x: jnp.linalg.det(x[:3]), small[0])


# Molecules.
def lattice(count):
    points = np.stack(np.meshgrid(*[np.arange(count)] * 3), -1).reshape(-1, 3) * 1.2
    positions = points + np.random.default_rng(5).normal(0, 0.03, points.shape)
    distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
    return positions, np.stack(np.nonzero((distances < 2.5) & (distances > 0)))


def energy(positions, pairs, valid):
    vectors = positions[pairs[1]] - positions[pairs[0]]
    squares = jnp.where(valid, jnp.sum(vectors**2, -1), 1.0)
    sixth = 1 / squares**3
    each = jnp.where(valid, 2 * (sixth**2 - sixth), 0.0)
    return jax.ops.segment_sum(each, pairs[0], len(positions)).sum()


def verlet(positions, velocities, pairs, valid):
    forces = jax.grad(lambda x: -energy(x, pairs, valid))

    def step(state, _):
        positions, velocities, force = state
        velocities += 0.002 * force
        positions += 0.004 * velocities
        force = forces(positions)
        velocities += 0.002 * force
        total = energy(positions, pairs, valid) + 0.5 * jnp.sum(velocities**2)
        return (positions, velocities, force), total

    return jax.lax.scan(step, (positions, velocities, forces(positions)), length=50)


for count in [3, 6]:
    for dtype in ["float64", "float32"]:
        positions, pairs = lattice(count)
        room = pairs.shape[1] + 100
        valid = np.arange(room) < pairs.shape[1]
        pairs = np.pad(pairs, ((0, 0), (0, 100)))
        positions = positions.astype(dtype)
        still = np.zeros_like(positions)
        loose = 2e-3 if dtype == "float32" else None
        case(
            f"energy of {count**3} {dtype}",
            jax.value_and_grad(energy),
            positions,
            pairs,
            valid,
            tolerance=loose,
        )
        case(
            f"verlet of {count**3} {dtype}", verlet, positions, still, pairs, valid, tolerance=loose
        )


def difference(found, expected, tolerance):
    """What is wrong, else an empty text."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{found.dtype}{found.shape}, not {expected.dtype}{expected.shape}"
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        wrong = int(np.sum(found != expected))
        first = np.argmax(np.ravel(found != expected))
        return (
            f"{wrong}: {np.ravel(found)[first]}, not {np.ravel(expected)[first]}" if wrong else ""
        )
    defaults = {
        "float64": 1e-12,
        "complex128": 1e-12,
        "float32": 3e-6,
        "float16": 4e-3,
        "bfloat16": 3e-2,
    }
    tolerance = tolerance or defaults[str(expected.dtype)]
    wide = [
        a.astype(np.complex128 if a.dtype.kind == "c" else np.float64) for a in (found, expected)
    ]
    close = np.isclose(*wide, rtol=tolerance, atol=tolerance, equal_nan=True)
    if close.all():
        return ""
    worst = np.argmax(~np.ravel(close))
    return f"{np.sum(~close)}: {np.ravel(found)[worst]}, not {np.ravel(expected)[worst]} at {worst}"


def main():
    wanted = sys.argv[1:] or [""]
    cpu, cuda = jax.devices("cpu")[0], jax.devices("cuda")[0]
    failures, slowest, ran = 0, [], 0
    started = time.perf_counter()
    for name, (function, arguments, tolerance) in CASES.items():
        if not any(part in name for part in wanted):
            continue
        ran += 1
        results = []
        try:
            for device in (cpu, cuda):
                with jax.default_device(device):
                    compiled = jax.jit(function).lower(*jax.device_put(arguments, device)).compile()
                    before = time.perf_counter()
                    out = compiled(*jax.device_put(arguments, device))
                    results.append([np.asarray(leaf) for leaf in jax.tree.leaves(out)])
            slowest.append((time.perf_counter() - before, name))
            wrong = [difference(b, a, tolerance) for a, b in zip(*results, strict=True)]
            text = "; ".join(filter(None, wrong))
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:300]}"
        if text:
            failures += 1
            print(f"WRONG {name}: {text}", flush=True)
    print(f"{ran - failures} of {ran} right in {time.perf_counter() - started:.0f} s")
    print(
        "slowest:", ", ".join(f"{name} {seconds:.3f} s" for seconds, name in sorted(slowest)[-6:])
    )
    sys.exit(1 if failures else 0)


main()
