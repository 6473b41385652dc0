"""ONNX: what is written computes the same; what cannot be written is one sentence with its cause."""

import pytest
import torch
from models import Mapped, packed_layer, settle
from test_implants import CASES, implanted
from torch import nn

from snows.networks.batches import Batch
from snows.results.onnx import export_onnx

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class WithClass(nn.Module):
    """Returns class numbers beside the logits."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        logits = self.head(x)
        return logits.argmax(1), logits


def test_class_numbers_among_the_outputs(tmp_path):
    net = WithClass().eval()
    assert export_onnx(net, torch.randn(3, 6), tmp_path / "x.onnx") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    x = torch.randn(7, 6)
    numbers, logits = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = net(x)
    assert torch.equal(torch.from_numpy(numbers), wanted[0])
    torch.testing.assert_close(torch.from_numpy(logits), wanted[1], rtol=1e-4, atol=1e-5)


def test_a_mapping_of_any_number_of_images(tmp_path):
    net = settle(Mapped())
    export_onnx(net, {"pixel_values": torch.randn(2, 3, 16, 16)}, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    x = torch.randn(5, 3, 16, 16)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = list(net(pixel_values=x).values())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-3, atol=1e-4)


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x) if x.sum() > 0 else self.head(-x)


class Fails(nn.Module):
    def forward(self, x):
        if torch.compiler.is_exporting():
            raise RuntimeError("\x1b[31mnot in a graph\x1b[0m\nand more lines")
        return x * 2


@pytest.mark.parametrize(
    ("net", "sentence"),
    [
        (Decides(), "its forward decides by the numbers in a tensor, which a graph cannot: "),
        (Fails(), "RuntimeError: not in a graph"),
    ],
)
def test_what_cannot_be_exported_says_why_in_a_line(tmp_path, net, sentence):
    with pytest.raises(ValueError, match=r"export: .* could not be written \(") as caught:
        export_onnx(net.eval(), torch.ones(2, 6), tmp_path / "x.onnx")
    text = str(caught.value)
    assert sentence in text
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text) < 500
    assert not list(tmp_path.iterdir())


def test_a_packed_network_is_refused_by_the_layer_s_name(tmp_path):
    net = packed_layer()
    with pytest.raises(
        ValueError, match="expected a network without packed layers, but 0 is one; ONNX has no operation"
    ):
        export_onnx(net, torch.randn(2, 8), tmp_path / "x.onnx")


@pytest.mark.parametrize("case", CASES)
def test_a_thin_network_computes_the_same(tmp_path, case):
    make, ranks, batch = CASES[case]
    net, x = implanted(make(), ranks), batch()
    assert export_onnx(net, x, tmp_path / "x.onnx") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    image = Batch.of(x).map(lambda t: torch.randn(5, *t.shape[1:]))
    found = session.run(
        None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), image.tensors(), strict=True)}
    )
    with torch.no_grad():
        wanted = image.through(net)
    for a, b in zip(found, wanted.values() if isinstance(wanted, dict) else [wanted], strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-3, atol=1e-4)
