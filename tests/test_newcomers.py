"""What somebody met who came with a network and data of their own; each is one sentence, or works."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from models import settle
from test_cli import pictures, run, tiny  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snows
from snows import NM
from snows.evaluation import evaluate, logits_of
from snows.results.report import LayerReport, Report
from snows.sources.images import Data

NET = ["--model", "test_newcomers:cnn", "--pattern", "2:4"]


def cnn():
    torch.manual_seed(0)
    blocks = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
    ]
    return settle(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))


def shuffled():
    images = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.arange(24) % 2), batch_size=6, shuffle=True)


def test_a_shuffled_loader_is_drawn_by_the_seed(monkeypatch, capsys, tmp_path):
    command = [
        "prune",
        *NET,
        "--data",
        "test_newcomers:shuffled",
        "--samples",
        18,
        "--judge",
        0,
        "--out",
        tmp_path,
    ]
    code, text = run(monkeypatch, capsys, *command)
    assert code == 0, text
    code, text = run(monkeypatch, capsys, *command, "--resume")
    assert code == 0, text
    code, text = run(monkeypatch, capsys, *command, "--resume", "--seed", 1)
    assert code == 2
    assert "another seed, set of calibration data (is it shuffled anew each time?)" in text
    state = torch.get_rng_state()
    first, second = (Data("x", stream=shuffled()).draw(18, 6, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_samples_all_are_taken_where_there_are_few(monkeypatch, capsys, tmp_path, pictures):  # noqa: F811
    command = ["prune", *NET, "--data", pictures, "--crop", 16, "--judge", 0]
    code, text = run(monkeypatch, capsys, *command, "--out", tmp_path / "a")
    assert code == 0, text
    assert "calibration images, all that " in text
    code, text = run(monkeypatch, capsys, *command, "--samples", 4000, "--out", tmp_path / "b")
    assert code == 2
    assert "ask for fewer with --samples" in text


def test_how_pictures_are_prepared_is_told(monkeypatch, capsys, tmp_path, pictures):  # noqa: F811
    command = ["prune", *NET, "--data", pictures, "--judge", 0, "--samples", 4]
    code, text = run(monkeypatch, capsys, *command, "--out", tmp_path / "a")
    assert code == 0, text
    assert "pictures: shorter side to 256, the middle 224 square, mean (0.485, 0.456, 0.406)" in text
    assert "the network does not say how, --crop, --resize, --mean and --std do" in text
    code, text = run(
        monkeypatch, capsys, *command, "--crop", 16, "--mean", "0.5,0.5,0.5", "--out", tmp_path / "b"
    )
    assert "the middle 16 square, mean (0.5, 0.5, 0.5)" in text
    assert "does not say how" not in text


def test_that_the_result_will_not_be_judged_is_told_before_pruning(monkeypatch, capsys, tmp_path, pictures):  # noqa: F811
    command = [
        "prune",
        "--model",
        "zoo:resnet20",
        "--data",
        "hf:nothing-of-this-name",
        "--pattern",
        "2:4",
        "--out",
        tmp_path,
    ]
    code, text = run(monkeypatch, capsys, *command)
    assert code == 2
    command = [
        "prune",
        *NET,
        "--data",
        pictures,
        "--crop",
        16,
        "--samples",
        4,
        "--labels",
        tmp_path / "none",
        "--out",
        tmp_path / "a",
    ]
    code, text = run(monkeypatch, capsys, *command)
    assert code == 0, text
    assert text.index("the result will not be judged") < text.index("1/1 3: 2:4")


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = cnn()

    @torch.no_grad()
    def forward(self, x):
        return self.net(x)


def test_a_forward_under_no_grad():
    batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    sparse, report = snows.prune(Whole().eval(), batches, NM(2, 4), progress=False)
    plain, _ = snows.prune(cnn(), batches, NM(2, 4), progress=False)
    assert [x.steps for x in report.layers if not x.reason] == [1]
    assert torch.equal(sparse.net[3].weight, plain[3].weight)


def test_the_reference_may_be_the_network_itself():
    dense, other = cnn(), cnn()
    other[3].weight.data *= 0.9
    batches = [(torch.randn(6, 3, 8, 8), torch.arange(6) % 2) for _ in range(2)]
    by_logits = evaluate(other, batches, [logits_of(dense, x) for x, _ in batches])
    assert evaluate(other, batches, dense) == by_logits
    assert by_logits.divergence > 0


@pytest.mark.parametrize("labels", [torch.zeros(6), torch.zeros(6, dtype=torch.bool)], ids=["float", "bool"])
def test_labels_that_are_no_whole_numbers_are_refused(labels):
    with pytest.raises(ValueError, match="expected class numbers as whole numbers, got labels of torch"):
        evaluate(cnn(), [(torch.randn(6, 3, 8, 8), labels)])


def test_zeros_that_are_not_kept_are_told():
    net, batches = cnn(), [torch.randn(4, 3, 8, 8) for _ in range(4)]
    net[3].weight.data *= torch.rand_like(net[3].weight) < 0.1
    _, report = snows.prune(net, batches, NM(2, 4), select=snows.magnitude, solver=None, progress=False)
    assert any(
        x == "1 of the pruned layers were sparse before, 3 for one, and their zeros are not kept; "
        "prune(model, batches, None, select=model) keeps them."
        for x in report.notes
    )
    _, report = snows.prune(net, batches, None, select=net, solver=None, progress=False)
    assert not report.notes


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.scale, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
            nn.Linear(8, 2),
        )
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))
        nn.init.zeros_(self.scale.weight)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.scale(self.branch(x))
        return self.head(F.conv2d(x, self.kernel).mean((2, 3)))


def test_a_branch_that_is_switched_off_and_a_bare_parameter_are_told():
    batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    _, report = snows.prune(Idle().eval(), batches, NM(2, 4), select=snows.magnitude, progress=False)
    rows = {x.name: x for x in report.layers}
    assert (
        rows["kernel"].reason == "a parameter used by a function: only Linear and Conv2d modules are pruned"
    )
    assert rows["kernel"].size == 64
    assert rows["branch"].before == 0
    assert any(
        x.startswith("1 of the pruned layers, branch for one, do not change what is matched")
        for x in report.notes
    )


def test_a_report_with_a_negative_number_is_refused():
    content = json.loads(Report([LayerReport("a", (4, 4), "2:4", 8)]).to_json())
    content["layers"][0]["kept"] = -5
    with pytest.raises(ValueError, match="layer 0: expected kept to be at least 0, got -5"):
        Report.from_json(json.dumps(content))
    assert asdict(LayerReport("a", (4, 4), "2:4", 8))["kept"] == 8


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"snows {snows.__version__}\n")


def test_a_deployment_that_packs_nothing_says_what_gained():
    net = cnn()
    net[3].weight.data *= NM(2, 4).mask(net[3].weight.abs())
    report = snows.deploy(net, torch.randn(2, 3, 8, 8), progress=False).report
    packed = any(not x.reason for x in report.layers)
    assert ("what is gained is from folded normalisations" in report.summary()) != packed
    assert "layers are timed alone, equal ones once" in report.summary()
    assert tiny()


class Twice(nn.Module):
    """One attention under two names, and called under both."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        self.first = self.second = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.first(x, x, x)[0]
        x = x + self.mid(x)
        return self.head((x + self.second(x, x, x)[0]).mean(1))


def test_an_attention_under_two_names_is_one(tmp_path):
    torch.manual_seed(0)
    net, batches = Twice().eval(), [torch.randn(16, 8, 16) for _ in range(4)]
    pruned = snows.prune(net, batches, NM(2, 4))
    assert list(pruned.masks) == ["mid"]  # the attention's projections are called twice
    packed = snows.deploy(pruned.network, batches[0], objective="size")
    cut = snows.prune(net, batches, snows.Structured(0.5))
    heads = cut.network.first.heads
    assert heads < net.first.num_heads
    assert cut.network.second.out_proj.weight.shape == (32, 8 * heads)
    for found in (packed, cut):
        path = tmp_path / "network.safetensors"
        snows.save(found, path)
        loaded = snows.load(path, Twice())
        for network in (found.network, loaded):
            assert network.first is network.second
        assert torch.equal(loaded(batches[0]), found.network(batches[0]))
