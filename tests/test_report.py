"""Reports are JSON, names are data, and what was edited by hand is refused with a sentence."""

import json
import math

import pytest
import torch
from models import small
from rich.console import Console
from torch import nn

import snows
from snows.choosing.measuring import Race, Stopwatch
from snows.results.deployment import DeployedLayer, Deployment
from snows.results.report import LayerReport, Report
from snows.results.story import run_page

NAMES = ("[/red]", "a[relu]", "[bold]x[/bold]", r"back\[slash")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        for layer in self.children():
            x = layer(x).relu()
        return x


def test_names_are_data(capsys):
    net, batches = Named().eval(), [torch.randn(8, 8) for _ in range(4)]
    sparse, report = snows.prune(net, batches, snows.NM(2, 4))
    deployed = small(sparse, batches[0])
    for text in (str(report), run_page(report)):
        assert all(name in text for name in NAMES)
    assert all(
        name in str(deployed.report) for name in NAMES[1:3]
    )  # the first and the last layer have no zeros


@pytest.mark.parametrize("width", [60, 100])
def test_the_end_of_a_long_name_is_shown(width):
    name = "features." + "stage." * 20 + "block.7.conv"
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed with the test
    console.print(Report([LayerReport(name, (64, 64, 3, 3), "2:4", 18432)]).table())
    lines = [
        line.strip("│ ").split("│")[0].strip()
        for line in console.export_text().splitlines()
        if line.startswith("│")
    ]
    assert "".join(lines) == name
    console.file.close()


def reports():
    prune = Report(
        [
            LayerReport("a", (4, 4), "2:4", 8, before=0.1, after=0.05, stop="x"),
            LayerReport("b", (2, 2), "dense", 4, "excluded"),
        ],
        20,
        {"seed": 1, "share": math.nan},
        ["a note"],
    )
    deploy = Deployment(
        [DeployedLayer("a", (4, 4), "2:4", "native", 1.0, 0.5, 64, 40)], dense_ms=1.0, notes=["n"]
    )
    return {"prune": (Report, prune), "deploy": (Deployment, deploy)}


@pytest.mark.parametrize("kind", reports())
def test_a_report_is_json_without_nan_and_comes_back(kind):
    cls, report = reports()[kind]
    text = report.to_json()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["layers"][0]["name"] == "a"
    again = cls.from_json(text)
    assert str(again) == str(report)
    assert [x.shape for x in again.layers] == [x.shape for x in report.layers]


CHANGES = {
    "no object": lambda c: [],
    "no layers": lambda c: c.pop("layers") and None,
    "layers of another kind": lambda c: c.update(layers=[1]),
    "a name that is a number": lambda c: c["layers"][0].update(name=3),
    "a shape that is null": lambda c: c["layers"][0].update(shape=None),
    "a shape of texts": lambda c: c["layers"][0].update(shape=["4", "4"]),
    "an unknown entry": lambda c: c["layers"][0].update(colour="red"),
    "a missing entry": lambda c: c["layers"][0].pop("name"),
    "notes of numbers": lambda c: c.update(notes=[1]),
    "a reason that is true": lambda c: c["layers"][0].update(reason=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", reports())
def test_an_edited_report_is_refused_with_a_sentence(kind, change):
    cls, report = reports()[kind]
    content = json.loads(report.to_json())
    changed = CHANGES[change](content)
    with pytest.raises(ValueError, match=r"expected|there is no entry|missing") as caught:
        cls.from_json(json.dumps(changed if change == "no object" else content))
    assert "\n" not in str(caught.value)


def test_the_stop_of_a_default_run_is_its_setting():
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    _, report = snows.prune(net, [torch.randn(32, 16) for _ in range(4)], snows.NM(2, 4), progress=False)
    assert {x.stop for x in report.layers if not x.reason} == {"5 iterations, as set"}


class Told(Stopwatch):
    """A stopwatch that shows what it is told."""

    def __init__(self, layers, whole):
        super().__init__()
        self.__dict__.update(layers=layers, whole=whole)

    def layer(self, runs, undecided):
        return Race(self.layers)

    def network(self, runs, undecided):
        return Race(self.whole)


def test_deploy_says_where_times_scatter(monkeypatch):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 4)).eval()
    for layer in net:
        layer.weight.data *= snows.NM(2, 4).mask(layer.weight.abs())
    monkeypatch.setattr(snows.SparseLinear, "kernel", "native")

    def notes(layers, whole, **settings):
        return snows.deploy(
            net, torch.randn(3, 8), stopwatch=Told(layers, whole), progress=False, **settings
        ).report.notes

    steady, wild = [(2.0, 1.0)] * 5, [(2.0, 1.0), (1.0, 2.0), (3.0, 1.0), (1.0, 3.0), (2.0, 1.0)]
    assert notes(steady, [(3.0, 2.0, 1.0)] * 5) == []
    (note,) = notes(wild, [(3.0, 2.0, 1.0)] * 5)
    assert note.startswith("The times of 3 of 3 kinds of layer scatter by more than 10 %")
    (note,) = notes(steady, [(3.0, *x) for x in wild])
    assert note.startswith("The times of the whole network scatter")
    assert notes(wild, [(3.0, *x) for x in wild], objective="size") == []
