"""Programs of torch.export: they compute the same without this package; what cannot be one is a sentence."""

from collections import OrderedDict

import pytest
import torch
from models import Mapped, packed_layer, settle
from test_implants import CASES, implanted
from test_onnx import Decides
from torch import nn

import snows
from snows.results.program import export_program


class Own(OrderedDict):
    """A mapping of a package that no other process has."""


class Returning(Mapped):
    def forward(self, pixel_values):
        return Own(super().forward(pixel_values))


def test_a_thin_network_for_any_number_of_images(tmp_path):
    net, path = implanted(settle(Returning()), CASES["mapped"][1]), tmp_path / "x.pt2"
    found = export_program(net, {"pixel_values": torch.randn(2, 3, 16, 16)}, path)
    assert found.dynamic
    assert found.difference < 1e-5
    assert [x.name for x in tmp_path.iterdir()] == ["x.pt2"]
    program = torch.export.load(path)
    assert set(program.state_dict) == set(net.state_dict())
    for n in (1, 5):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad():
            wanted = net(x)
        outputs = program.module()(pixel_values=x)
        assert type(outputs) is dict
        assert type(wanted) is Own  # the network is as it was
        assert list(outputs) == list(wanted)
        for a, b in zip(outputs.values(), wanted.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Fixed(nn.Module):
    """Takes batches of four alone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x).view(4, 4) * torch.arange(4)


@pytest.mark.slow
def test_a_network_of_one_number_of_images(tmp_path):
    net, x = Fixed().eval(), torch.randn(4, 6)
    found = export_program(net, x, tmp_path / "x.pt2")
    assert not found.dynamic
    torch.testing.assert_close(torch.export.load(tmp_path / "x.pt2").module()(x), net(x))


class NeedsSnows(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return snows.ops.nm_mask(x * self.scale, 2, 4) * x


class Otherwise(nn.Module):
    """Computes something else when it is exported."""

    def forward(self, x):
        return x * 2 if torch.compiler.is_exporting() else x


@pytest.mark.parametrize(
    ("net", "sentence"),
    [
        (Decides(), r"cannot take the network \(its forward decides by the numbers in a tensor"),
        pytest.param(NeedsSnows(), r"the program does not run by itself \(", marks=pytest.mark.slow),
        pytest.param(
            Otherwise(),
            r"the program's outputs differ by 1\.0e\+00 of the largest; nothing was written",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_cannot_be_exported_says_why_in_a_line(tmp_path, net, sentence):
    with pytest.raises(ValueError, match=f"^export: (torch.export )?{sentence}") as caught:
        export_program(net.eval(), torch.ones(2, 8 if isinstance(net, NeedsSnows) else 6), tmp_path / "x.pt2")
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    assert not list(tmp_path.iterdir())


def test_a_packed_network_is_refused_by_the_layer_s_name(tmp_path):
    net = packed_layer()
    with pytest.raises(
        ValueError, match="expected a network without packed layers, but 0 is one; a program would need the"
    ):
        export_program(net, torch.randn(2, 8), tmp_path / "x.pt2")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="could not be written"):
        export_program(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4), tmp_path / "no" / "x.pt2")
