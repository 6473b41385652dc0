"""The papers' command on data that the test makes: every case names a network that its library knows, and rows are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def test_a_case_runs_is_kept_and_goes_on(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("cat", "dog"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(6):
                Image.fromarray(generator.integers(0, 255, (16, 18, 3), np.uint8)).save(
                    tmp_path / split / kind / f"{i}.png"
                )
    (tmp_path / "paper_net.py").write_text("""
import torch
from torch import nn
def net():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), *head
    return nn.Sequential(*layers).eval()
""")
    out = tmp_path / "paper.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        ROOT / "bench" / "paper.py",
        "--case",
        "resnet20-cifar10",
        "--model",
        "paper_net:net",
        "--data",
        tmp_path,
        "--samples",
        "12",
        "--batch",
        "4",
        "--out",
        out,
        "--device",
        "cpu",
    ]
    for patterns, expected in (("2:4", ["2:4"]), ("2:4,0.5", ["2:4", "0.5"])):
        run = subprocess.run(
            [*map(str, command), "--patterns", patterns], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        rows = json.loads(out.read_text())["resnet20-cifar10"]
        assert [row["pattern"] for row in rows] == expected
        assert len(run.stdout.splitlines()) == 1  # the row that was missing
    for row in rows:
        assert row["images"] == 12
        assert 0 <= row["snows divergence"] <= row["magnitude divergence"] + 1e-3
        assert row["calibration"] == 12


def test_every_case_names_a_network_that_its_library_knows():
    from conftest import define_torchvision_schemas

    define_torchvision_schemas()
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import paper
    finally:
        sys.path.remove(str(ROOT / "bench"))
    for case in paper.CASES.values():
        kind, _, name = case.model.partition(":")
        if kind == "torchvision":
            name, _, weights = name.partition(":")
            assert weights in models.get_model_weights(name).__members__
        elif kind == "timm":
            assert name.startswith("hf-hub:") or timm.is_model_pretrained(name)
        else:
            assert callable(getattr(paper, name))
