"""Compile every Triton kernel ahead of time, without a GPU, and print what came out, one JSON object a line.

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
HEAD = {"WIDTH": 64, "DEPTH": 64, "ROWS": 32, "COLUMNS": 32, "BIAS": False}
SIZES = " queries keys width depth by_head by_query by_key scale"
# kernel: the pointers in the loss's dtype, others as name:type, constants, warps
KERNELS = {
    ("masked", "masked_kernel"): ("weight bits:*u8 out", "n", {"BYTES": 128}, 4),
    ("gelu", "gelu_kernel"): ("x value slope", "n", {"TANH": False, "BLOCK": 1024}, 4),
    ("gelu", "gelu_curve_kernel"): ("x g out", "n", {"TANH": True, "BLOCK": 1024}, 4),
    ("affine_relu", "affine_relu_kernel"): ("x scale shift out", "channels positions", {"BLOCK": 1024}, 4),
    ("affine_relu", "affine_relu_grad_kernel"): ("g y scale out", "channels positions", {"BLOCK": 1024}, 4),
    ("layer_norm", "layer_norm_kernel"): ("x weight bias out mean:*fp32 rstd:*fp32", "n eps",
                                          {"WEIGHT": True, "BIAS": True, "BLOCK": 1024}, 4),
    ("layer_norm", "layer_norm_grad_kernel"): ("g x mean:*fp32 rstd:*fp32 before after out", "n",
                                               {"BEFORE": True, "AFTER": True, "BLOCK": 1024}, 4),
    ("layer_norm", "layer_norm_curve_kernel"): ("g v x mean:*fp32 rstd:*fp32 before after out", "n",
                                                {"BEFORE": True, "AFTER": True, "BLOCK": 1024}, 4),
    ("attention", "attention_kernel"): ("q k v bias out kept:*fp32", SIZES, HEAD, 4),
    ("attention", "attention_tangent_kernel"): ("dq dk dv q k v out kept:*fp32 bias result", SIZES, HEAD, 4),
    ("attention", "attention_grad_query_kernel"): ("g q k v out kept:*fp32 bias grad", SIZES, HEAD, 4),
    ("attention", "attention_grad_key_kernel"): ("g q k v out kept:*fp32 bias grad_k grad_v", SIZES, HEAD, 4),
}  # fmt: skip
REAL = {"eps", "scale"}


def compiled(file, name, dtype, arch):
    pointers, numbers, constants, warps = KERNELS[file, name]
    constants = dict(constants) | ({"PRECISION": "tf32x3" if dtype == "fp32" else "tf32"} if file == "attention" else {})
    signature = {}
    for pointer in pointers.split():
        argument, _, kind = pointer.partition(":")
        signature[argument] = kind or f"*{dtype}"
    signature |= {n: "fp32" if n in REAL and f"{n}" not in signature else "i32" for n in numbers.split()}
    kernel = getattr(import_module(f"snows.kernels.{file}"), name)
    even = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a, kind in signature.items() if kind != "fp32"}
    signature |= {c: "constexpr" for c in constants}
    ordered = {a: signature[a] for a in kernel.arg_names}
    values = {(kernel.arg_names.index(c),): v for c, v in constants.items()}
    source = ASTSource(kernel, ordered, constexprs=values, attrs=even)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def measured(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", f.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "stack": found["STACK"], "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
            "wide loads": len(re.findall(r"\b(?:LDG\.E\S*\.128|LDGSTS\S*\.128)", code)), "loads": len(re.findall(r"\bLDG\S*|LDGSTS\S*", code)),
            "wide stores": len(re.findall(r"\bSTG\.E\S*\.128", code)), "tensor core": len(re.findall(r"\b(?:HMMA|HGMMA)\b\S*", code))}


for arch in (80, 90):
    for file, name in KERNELS:
        for dtype in ("fp32", "bf16"):
            kernel = compiled(file, name, dtype, arch)
            print(json.dumps({"kernel": name, "dtype": dtype, "arch": arch, "shared": kernel.metadata.shared,
                              **measured(kernel.asm["cubin"])}), flush=True)
sys.exit(0)
