"""Compile every Triton kernel ahead of time, without a GPU, and print what came out, one JSON object a line.

    python tests/compile_kernels.py 80:fp32 90:bf16

Run by test_kernels.py in a process of its own, where Triton's interpreter is off.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HEAD = {"ROWS": 32, "COLUMNS": 32, "BIAS": True}  # and the widest head that the launcher takes
SIZES = " queries keys width depth by_head by_query by_key scale"
# kernel: the pointers in the loss's dtype, others as name:type, constants, warps
KERNELS = {
    ("masked", "masked_kernel"): ("weight bits:*u8 out", "n", {"BYTES": 128}, 4),
    ("unpack", "count_kernel"): ("codes:*u8 counts:*i64", "size", {"BLOCK": 1024}, 4),
    ("unpack", "unpack_kernel"): ("values codes:*u8 starts:*i64 out", "columns blocks stored size", {"N": 2, "M": 4, "WIDTH": 2, "BLOCK": 1024}, 4),
    ("gelu", "gelu_kernel"): ("x value slope", "n", {"TANH": False, "BLOCK": 1024}, 4),
    ("gelu", "gelu_curve_kernel"): ("x g out", "n", {"TANH": True, "BLOCK": 1024}, 4),
    ("affine_relu", "affine_relu_grad_kernel"): ("g y scale out", "channels positions", {"BLOCK": 1024}, 4),
    ("layer_norm", "layer_norm_kernel"): ("x weight bias out mean:*fp32 rstd:*fp32", "n eps",
                                          {"WEIGHT": True, "BIAS": True, "BLOCK": 1024}, 4),
    ("layer_norm", "layer_norm_grad_kernel"): ("g x mean:*fp32 rstd:*fp32 before after out", "n",
                                               {"BEFORE": True, "AFTER": True, "BLOCK": 1024}, 4),
    ("layer_norm", "layer_norm_curve_kernel"): ("g v x mean:*fp32 rstd:*fp32 before after out", "n",
                                                {"BEFORE": True, "AFTER": True, "BLOCK": 1024}, 4),
    ("attention", "attention_kernel"): ("q k v bias out kept:*fp32", SIZES, HEAD, 8),
    ("attention", "attention_tangent_kernel"): ("dq dk dv q k v out kept:*fp32 bias result", SIZES, HEAD | {"ROWS": 16}, 8),
    ("attention", "attention_grad_query_kernel"): ("g q k v out kept:*fp32 bias grad", SIZES, HEAD, 8),
    ("attention", "attention_grad_key_kernel"): ("g q k v out kept:*fp32 bias grad_k grad_v", SIZES, HEAD, 8),
}  # fmt: skip
REAL = {"eps", "scale"}


def compiled(file, name, dtype, arch):
    pointers, numbers, constants, warps = KERNELS[file, name]
    if file == "attention":
        width = 64 if dtype == "fp32" else 128
        constants = constants | {
            "WIDTH": width,
            "DEPTH": width,
            "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        }
    kernel = getattr(import_module(f"snows.kernels.{file}"), name)
    signature = {p.partition(":")[0]: p.partition(":")[2] or f"*{dtype}" for p in pointers.split()}
    signature |= {n: "fp32" if n in REAL else "i32" for n in numbers.split()} | dict.fromkeys(
        constants, "constexpr"
    )
    at = {argument: (kernel.arg_names.index(argument),) for argument in signature}
    source = ASTSource(
        kernel,
        {argument: signature[argument] for argument in kernel.arg_names},
        constexprs={at[c]: value for c, value in constants.items()},
        attrs={
            at[a]: [["tt.divisibility", 16]]
            for a, kind in signature.items()
            if kind == "i32" or kind[0] == "*"
        },
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": 1 if file == "attention" else 3},
    )


def measured(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run(
            [TOOLS / "nvdisasm", "-c", f.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide loads": len(re.findall(r"\b(?:LDG\.E\S*\.128|LDGSTS\S*\.128)", code)),
        "loads": len(re.findall(r"\bLDG\S*|LDGSTS\S*", code)),
        "wide stores": len(re.findall(r"\bSTG\.E\S*\.128", code)),
        "tensor core": len(re.findall(r"\b(?:HMMA|HGMMA)\b\S*", code)),
    }


for arch, dtype in (pair.split(":") for pair in sys.argv[1:]):
    for file, name in KERNELS:
        kernel = compiled(file, name, dtype, int(arch))
        print(
            json.dumps(
                {
                    "kernel": name,
                    "dtype": dtype,
                    "arch": int(arch),
                    "shared": kernel.metadata.shared,
                    **measured(kernel.asm["cubin"]),
                }
            ),
            flush=True,
        )
