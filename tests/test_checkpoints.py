"""Checkpoints as people have them: what is taken from them, and what is refused, by name."""

import argparse
import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from snows.sources.checkpoints import load_weights


def net():
    return nn.Sequential(
        collections.OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), head=nn.Linear(4, 2))
    )


def wanted():
    """Weights that no initialisation gives."""
    state = net().state_dict()
    return {name: torch.full_like(x, i + 1) for i, (name, x) in enumerate(state.items())}


def prefixed(prefix, state=None):
    return {prefix + k: v for k, v in (state or wanted()).items()}


def without_counters(state):
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


OTHER = {k: torch.zeros_like(v) for k, v in wanted().items()}
SHAPES = {
    "plain": wanted(),
    "data parallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled in parallel": prefixed("module._orig_mod."),
    "a compiled part": {k.replace("conv.", "conv._orig_mod."): v for k, v in wanted().items()},
    "lightning": {
        "state_dict": prefixed("model."),
        "epoch": 3,
        "pytorch-lightning_version": "2.6",
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
    },
    "lightning with a loss": {
        "state_dict": prefixed("net.") | {"loss.weight": torch.ones(3), "metric.total": torch.ones(1)}
    },
    "two networks": {"state_dict": prefixed("model.") | prefixed("teacher.", OTHER)},
    "nested": {"model": wanted(), "optimizer": {"state": {}}, "epoch": 1},
    "nested twice": {"checkpoint": 1, "model_state_dict": {"state_dict": prefixed("module.")}},
    "parameters": {"params": wanted()},
    "averaged": {"state_dict": OTHER, "state_dict_ema": wanted()},
    "averaged, as deit": {"model": OTHER, "model_ema": wanted()},
    "torch's averaged model": prefixed("module.") | {"n_averaged": torch.tensor(7)},
    "ema": prefixed("ema."),
    "arguments beside it": {"state_dict": wanted(), "args": argparse.Namespace(lr=0.1, name="x")},
    "numpy's scalars beside it": {
        "state_dict": wanted(),
        "best": np.float64(76.5),
        "epoch": np.int64(3),
        "curve": np.ones(3),
    },
    "without counters": without_counters(wanted()),
    "half": {k: v.half() if v.is_floating_point() else v for k, v in wanted().items()},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_checkpoint_is_read(kind, tmp_path):
    torch.save(SHAPES[kind], tmp_path / "x.pt")
    found = net()
    load_weights(found, tmp_path / "x.pt")
    state = found.state_dict()
    for name, value in wanted().items():
        if kind == "without counters" and name.endswith("num_batches_tracked"):
            assert state[name] == 0
        else:
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_safetensors_are_read(prefix, tmp_path):
    save_file(prefixed(prefix), tmp_path / "x.safetensors")
    found = net()
    load_weights(found, tmp_path / "x.safetensors")
    assert all(torch.equal(v, wanted()[k]) for k, v in found.state_dict().items())


def test_a_network_s_own_prefix_stays(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = net()

    torch.save(prefixed("model."), tmp_path / "x.pt")
    torch.save(prefixed("module.model."), tmp_path / "y.pt")
    for file in ("x.pt", "y.pt"):
        found = Wrapped()
        load_weights(found, tmp_path / file)
        assert torch.equal(found.model.head.weight, wanted()["head.weight"])


class Config:
    lr = 0.1


def quantised():
    return {**wanted(), "head.weight": torch.quantize_per_tensor(torch.ones(2, 4), 0.1, 0, torch.qint8)}


WRONG = {
    "of another shape": (
        {**wanted(), "head.weight": torch.ones(3, 4)},
        "does not match the model: of another shape head.weight",
    ),
    "of another network": (
        {"a": torch.ones(2), "b": torch.ones(2)},
        "missing conv.weight, conv.bias, bn.weight.* and more; unexpected a, b",
    ),
    "integer keys": (
        {0: torch.ones(3), 1: torch.ones(2)},
        "expected .* names and tensors, got the key 0 of type int",
    ),
    "sparse": ({**wanted(), "head.weight": torch.ones(2, 4).to_sparse()}, "head.weight is sparse"),
    "complex": (
        {**wanted(), "head.weight": torch.ones(2, 4, dtype=torch.complex64)},
        "head.weight is complex",
    ),
    "meta": ({**wanted(), "head.weight": torch.ones(2, 4, device="meta")}, "head.weight is without content"),
    "no tensors": ({"epoch": 3}, r"hold a state_dict of tensors, got dict of \['epoch'\]"),
    "a list": ([1, 2], "hold a state_dict of tensors, got list"),
    "a tensor": (torch.ones(3), "hold a state_dict of tensors, got Tensor"),
    "a class": (
        {"state_dict": wanted(), "config": Config()},
        "holds a test_checkpoints.Config beside its tensors, which would run code",
    ),
    "a module": (
        net(),
        r"holds a torch.nn.modules.container.Sequential beside its tensors, which would run code",
    ),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [*WRONG, "quantised"])
def test_what_cannot_be_loaded_is_one_sentence_and_changes_nothing(kind, tmp_path):
    content, sentence = WRONG[kind] if kind in WRONG else (quantised(), "head.weight is quantised")
    torch.save(content, tmp_path / "x.pt")
    found = net()
    before = {k: v.clone() for k, v in found.state_dict().items()}
    with pytest.raises(ValueError, match=sentence) as caught:
        load_weights(found, tmp_path / "x.pt")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in found.state_dict().items())


def test_files_that_are_none(tmp_path):
    (tmp_path / "bytes").write_bytes(b"nothing")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print))
    torch.save(wanted(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:500])
    for name in ("bytes", "code.pt", "cut.pt"):
        with pytest.raises(ValueError, match="neither safetensors nor a whole checkpoint of tensors alone"):
            load_weights(net(), tmp_path / name)
    for name in ("missing", "."):
        with pytest.raises(ValueError, match="there is no file"):
            load_weights(net(), tmp_path / name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_program_is_no_checkpoint(tmp_path):
    torch.jit.trace(net().conv.eval(), torch.ones(1, 3, 8, 8)).save(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match="is a TorchScript program; expected a checkpoint"):
        load_weights(net(), tmp_path / "x.pt")


def test_state_of_other_kinds_does_no_harm(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    torch.save(Extra(2, 2).state_dict(), tmp_path / "x.pt")
    load_weights(Extra(2, 2), tmp_path / "x.pt")
    assert Path(tmp_path / "x.pt").exists()
