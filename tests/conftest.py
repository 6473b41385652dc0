import math
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when Triton is first imported, which timm and torchvision do where it comes with torch
    )

sys.path.insert(0, str(Path(__file__).parent))
collect_ignore = ["compile_kernels.py"]  # a program of its own


@pytest.fixture(autouse=True)
def _times_scatter(monkeypatch):
    """No test refuses times that scatter, for a machine may be busy; those of the refusal ask for it."""
    monkeypatch.setattr("snows.choosing.timed.NOISE", math.inf)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random numbers, and unwritten memory shows as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def define_torchvision_schemas():
    """A CPU build of torch has no `torchvision::nms`, which `import torchvision` looks for."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [n for n in sys.modules if n.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        define_torchvision_schemas.kept = library
