"""Calls every op with arguments that do not belong together, in this process: run by test_bad_calls.py, which looks whether it lives.

Prints a line before each call, so that the last one is the one that killed it, and at the end what was neither refused nor right.
"""

import json
import sys

import torch

from snows import NM, SparseConv2d, SparseLinear, ops, reference
from snows.packing import pack

torch.set_num_threads(1)


def packed(*shape, n=2, m=4, dtype=torch.float32):
    weight = torch.randn(shape)
    weight *= NM(n, m).mask(weight.abs())
    return pack(weight.to(dtype), None, NM(n, m))


def calls():
    """For each op, arguments that it takes."""
    scores, vectors = torch.randn(6, 32), [torch.randn(4, 9) for _ in range(4)]
    state, grid = torch.rand(5, dtype=torch.float64), [torch.randn(2, 3, 8) for _ in range(4)]
    rz, target = (torch.rand(2, 3, dtype=torch.float64) for _ in range(2))
    linear, conv = packed(24, 64), packed(12, 16, 3, 3, n=1)
    orders = {"linear": SparseLinear(linear).order, "conv": SparseConv2d(conv).order}
    heads = [torch.randn(2, 5, 8) for _ in range(3)]
    out, kept = reference.attention(*heads, None, 0.3, False)
    x = torch.randn(4, 16)
    normal = reference.layer_norm(x, None, None, (16,), 1e-5)
    yield "nm_mask", (scores, 2, 4)
    yield "nm_select", (scores, 2, 4)
    yield "masked", (scores, torch.randint(0, 256, (24,), dtype=torch.uint8))
    yield "cg_direction", (*vectors[:3], state)
    yield "cg_update", (*vectors, state, 0.01)
    yield (
        "batched_cg_update",
        (*grid[:3], rz, grid[3], torch.rand(2, 3, 8) < 0.5, torch.rand(2, 8) + 1, target),
    )
    yield "gelu", (scores, "none")
    yield "gelu_curve", (scores, torch.randn(6, 32), "none")
    yield "affine_relu", (torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(4))
    yield "affine_relu_grad", (torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(4))
    yield "layer_norm", (x, torch.randn(16), torch.randn(16), [16], 1e-5)
    yield "layer_norm_grad", (x, x, *normal[1:], torch.randn(16), None, [16])
    yield "layer_norm_curve", (x, x, x, *normal[1:], torch.randn(16), None, [16])
    yield "attention", (*heads, None, 0.3, False)
    yield "attention_grad", (out, *heads, out, kept, None, 0.3)
    yield "attention_tangent", (*heads, *heads, out, kept, None, 0.3)
    yield "attention_curve", (out, *heads, *heads, out, kept, None, 0.3)
    for given in (linear, conv):
        shape, group = list(given.shape), given.group
        yield "unpack", (given.values, given.codes, shape, *group)
        yield "kernel_order", (given.values, given.codes, shape, *group)
    for tokens in (1, 7):
        yield (
            "sparse_linear",
            (
                torch.randn(tokens, 64),
                linear.values,
                linear.codes,
                torch.randn(24),
                [24, 64],
                2,
                4,
                "relu",
                orders["linear"],
            ),
        )
    yield (
        "sparse_conv2d",
        (
            torch.randn(2, 16, 8, 8),
            conv.values,
            conv.codes,
            torch.randn(12),
            [12, 16, 3, 3],
            1,
            4,
            [1, 1],
            [1, 1],
            [1, 1],
            "none",
            orders["conv"],
        ),
    )


def wrong(value, generator):
    """Something else of the same type, mostly."""
    pick = int(torch.randint(0, 12, (), generator=generator))
    if isinstance(value, torch.Tensor):
        flat = value.flatten()
        return [
            flat[: flat.numel() // 2].clone(),
            flat[:0].clone(),
            torch.cat([flat, flat]),
            value.double() if value.dtype != torch.float64 else value.float(),
            value.to(torch.uint8),
            value.reshape(-1)[:1].squeeze(),
            value[None].clone(),
            value.transpose(0, -1),
            value.to("meta"),
            torch.full_like(value, 127 if not value.is_floating_point() else torch.nan),
            torch.randn_like(value.float()).to(value.dtype) * 100,
            value.repeat_interleave(2, 0)[::2] if value.ndim else value,
        ][pick]
    if isinstance(value, bool | str):
        return value if isinstance(value, bool) else "nothing"
    if isinstance(value, int):
        return [-1, 0, 1, 3, 7, 31, 32, 33, 64, 2**31 - 1, 2**31, -(2**62)][pick]
    if isinstance(value, float):
        return [0.0, -1.0, float("nan"), float("inf")][pick % 4]
    if isinstance(value, list):
        changed = list(value)
        where = int(torch.randint(0, len(value), (), generator=generator))
        changed[where] = [-1, 0, 1, 2, 5, 1000, 2**31 - 1, 2**31, 2**40, -(2**40), 2**62, value[where] + 1][
            pick
        ]
        return (
            [changed, value[:-1], [*value, 1]][
                int(torch.randint(0, 6, (), generator=generator)) % 6 // 4 + (pick == 11)
            ]
            if pick > 9
            else changed
        )
    return torch.randn(3)  # for a tensor that was left out


def same(found, wanted):
    pairs = zip(
        found if isinstance(found, tuple) else (found,),
        wanted if isinstance(wanted, tuple) else (wanted,),
        strict=True,
    )
    return all(
        a is None
        or (
            a.shape == b.shape
            and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4 * size(b), equal_nan=True)
        )
        for a, b in pairs
    )


def size(x):
    """Of the numbers in a tensor, at least 1."""
    finite = x.double()[x.double().isfinite()]
    return max(1.0, finite.abs().max().item()) if finite.numel() else 1.0


def clones(arguments):
    return [
        x.clone()
        if isinstance(x, torch.Tensor) and not x.is_meta and x.is_contiguous() and x.dtype != torch.int32
        else x
        for x in arguments
    ]


def main(rounds):
    generator = torch.Generator().manual_seed(0)
    tried, refused, odd, names = 0, 0, [], set()
    for name, arguments in calls():
        names.add(name)
        op = getattr(torch.ops.snows, name)
        changed_in_place = name in ("cg_direction", "cg_update", "batched_cg_update")
        op(*clones(arguments))  # what is right is taken
        for number in range(rounds * len(arguments)):
            bad = list(arguments)
            bad[number % len(arguments)] = wrong(bad[number % len(arguments)], generator)
            said = f"{name} {number}: argument {number % len(arguments)} is {str(bad[number % len(arguments)])[:60]!r}".replace(
                "\n", " "
            )
            print(said, flush=True)
            tried += 1
            copied = clones(bad)
            try:
                found = op(*copied)
            except Exception:
                refused += 1
                continue
            unsound = (
                name == "unpack" and number % len(arguments) == 1
            )  # codes that pack never writes: any places in the weight will do
            if (
                unsound
                or name == "kernel_order"
                or changed_in_place
                or any(isinstance(x, torch.Tensor) and x.is_meta for x in bad)
            ):
                continue  # opaque; nothing is returned; nothing was computed
            try:
                wanted = getattr(reference, name)(*clones(bad))
            except Exception as error:
                odd.append(f"{said}: taken, but the reference says {type(error).__name__}: {error}"[:300])
                continue
            if not same(found, wanted):
                odd.append(f"{said}: not the reference's result")
    print(
        json.dumps({"tried": tried, "refused": refused, "odd": odd, "missing": sorted(set(ops.OPS) - names)})
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
