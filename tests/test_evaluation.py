"""Scores against numbers worked out by hand, and batches in every form and place."""

import math

import pytest
import torch
from torch import nn

import snows
from snows.evaluation import compare, evaluate, logits_of


class Given(nn.Module):
    """Returns its input as logits."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.anchor


LOGITS = torch.tensor(
    [[9.0, 1, 2, 3, 4, 5, 0], [0, 9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6, 7], [3, 2, 1, 0, 0, 0, 9]]
)
LABELS = torch.tensor([0, 5, 0, -1])  # right; among five; neither; not known


def test_scores_are_those_worked_out_by_hand():
    scores = evaluate(Given(), [(LOGITS[:3], LABELS[:3]), (LOGITS[3:], LABELS[3:])])
    assert scores[:3] == (4, pytest.approx(100 / 3), pytest.approx(200 / 3))
    assert math.isnan(scores.agreement)
    assert math.isnan(scores.divergence)
    other = LOGITS.flip(1)  # another first choice in all rows but none
    p, q = other.softmax(1).double(), LOGITS.softmax(1).double()
    scores = evaluate(Given(), [LOGITS], [other])
    assert scores.agreement == 0
    assert scores.divergence == pytest.approx((p * (p.log() - q.log())).sum(1).mean().item(), rel=1e-6)
    assert math.isnan(scores.top1)


@pytest.mark.parametrize(
    "batch",
    [
        (LOGITS, LABELS),
        [LOGITS, LABELS],
        {"x": LOGITS, "labels": LABELS},
        {"x": LOGITS, "label": LABELS.tolist()},
        (LOGITS, LABELS.int()),
    ],
    ids=["tuple", "list", "mapping", "a list of numbers", "int32"],
)
def test_labels_are_read_from_every_form_of_batch(batch):
    assert evaluate(Given(), [batch]).top1 == pytest.approx(100 / 3)


def test_two_networks_are_measured_on_the_same_images():
    class Last(Given):
        def forward(self, x):
            return super().forward(x).flip(1)

    dense, other = compare(Given(), Last(), [(LOGITS, LABELS)])
    assert dense == pytest.approx(evaluate(Given(), [(LOGITS, LABELS)]), nan_ok=True)
    assert other == pytest.approx(evaluate(Last(), [(LOGITS, LABELS)], [LOGITS]), nan_ok=True)


def test_batches_and_labels_travel_to_the_network():
    moved = []

    class Recorded(torch.Tensor):
        def to(self, *args, **kwargs):
            moved.append(args[0])
            return super().to(*args, **kwargs).as_subclass(torch.Tensor)

    net = Given()
    assert evaluate(
        net, [(LOGITS.as_subclass(Recorded), LABELS.as_subclass(Recorded))]
    ).top1 == pytest.approx(100 / 3)
    assert moved == [net.anchor.device] * 2
    logits = logits_of(Given().double().to("meta"), LOGITS.double())
    assert logits.is_meta


@pytest.mark.parametrize(
    ("net", "batches", "reference", "sentence"),
    [
        (Given(), [(LOGITS, LABELS[:2])], None, r"a class number for each of 4 images, got labels of \(2,\)"),
        (Given(), [(LOGITS, [{"boxes": 1}] * 4)], None, "expected labels to be class numbers, got list"),
        (Given(), [LOGITS[None]], None, r"logits of \(images, classes\), got a tensor of \(1, 4, 7\)"),
        (nn.Linear(3, 2), [LOGITS], None, "cannot run a batch"),
        (Given(), [LOGITS], [LOGITS[:, :3]], r"reference logits of \(4, 7\), got \(4, 3\)"),
        (Given(), [(LOGITS, LABELS + 2)], None, "class numbers below 7, the model's outputs, got 7"),
        (Given(), [LOGITS], [], "reference logits for every batch, got fewer"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(net, batches, reference, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(net, batches, reference)


def test_it_is_public():
    assert snows.evaluate is evaluate
