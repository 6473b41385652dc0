"""What people really pass: lists of pictures, replaced forwards, autocast, compiled and scripted modules, masks of torch's own pruning."""

import threading
import types
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import settle
from torch import nn
from torch.nn.utils import prune as torch_prune

import snows
from snows import NM
from snows.networks.batches import Batch
from snows.networks.layers import copied

quiet = partial(snows.prune, select=snows.magnitude, progress=False, solver=snows.Newton(max_iterations=3))


def block(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def small():
    torch.manual_seed(0)
    return settle(
        nn.Sequential(
            block(3, 8), block(8, 8), block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
        )
    )


def images(*sizes):
    torch.manual_seed(1)
    return [torch.randn(n, 3, 12, 12) for n in sizes or (6, 6, 6, 6)]


class Pictures(nn.Module):
    """Takes a list of pictures of any sizes, as detection networks do."""

    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, pictures):
        return self.net(torch.stack([F.interpolate(p[None], (12, 12))[0] for p in pictures]))


@pytest.mark.parametrize(
    "wrap",
    [lambda p: p, lambda p: (p, [{"boxes": 0}] * len(p)), lambda p: {"pictures": p}],
    ids=["list", "pair", "mapping"],
)
def test_a_list_of_pictures_is_one_input_whose_samples_are_the_pictures(wrap):
    lists = [list(x) for x in images()]
    wanted, report = quiet(small(), images(), NM(2, 4))
    sparse, found = quiet(Pictures().eval(), [wrap(x) for x in lists], NM(2, 4))
    for a, b in zip(wanted.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [x.reason for x in found.layers] == [x.reason for x in report.layers]


def test_samples_of_lists_and_tensors_are_split_alike():
    pictures = [torch.full((3, 4 + i, 4), float(i)) for i in range(5)]
    inputs = Batch((pictures,), {"weights": torch.arange(5.0), "scale": torch.tensor(2.0)})
    assert inputs.samples() == 5
    parts = inputs.split(2)
    assert [[int(p[0, 0, 0]) for p in x.args[0]] for x in parts] == [[0, 1], [2, 3], [4]]
    assert [x.kwargs["weights"].tolist() for x in parts] == [[0, 1], [2, 3], [4]]
    assert all(x.kwargs["scale"].item() == 2 for x in parts)
    assert (
        Batch((torch.ones(4, 1), torch.ones(3, 1)), {}).split(2)[0].samples() == 4
    )  # they do not agree: whole


def test_images_and_labels_in_a_list_are_a_pair():
    x = torch.randn(4, 3, 5, 5)
    assert Batch.of([x, torch.zeros(4, dtype=torch.long)]).args[0] is x


def test_batches_stay_on_the_host_and_travel_when_they_are_used(monkeypatch):
    """However many batches there are, few of their copies on the device are alive at a time."""
    alive, most = weakref.WeakSet(), 0

    class Here(torch.Tensor):
        pass

    def travel(self, device):
        nonlocal most
        copies = [x.clone().as_subclass(Here) for x in self.args]
        alive.update(copies)
        most = max(most, len(alive))
        return Batch(tuple(copies), self.kwargs)

    wanted, _ = quiet(small(), images(*[4] * 12), NM(2, 4))
    monkeypatch.setattr(Batch, "to", travel)
    sparse, _ = quiet(small(), images(*[4] * 12), NM(2, 4))
    assert 0 < most <= 5
    for a, b in zip(wanted.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- networks that are not what they seem


def test_a_forward_that_captured_its_module_is_refused():
    """Its copy would compute with the original's weights, whatever pruning wrote into the copy."""
    for path in ("", "1.0"):
        net = small()
        module, original = net.get_submodule(path), net.get_submodule(path).forward
        module.forward = lambda x, original=original: original(x)
        before = module.forward
        module.forward = lambda x, before=before: before(
            x
        )  # default arguments capture nothing that a closure would show
        module.forward = (lambda f: lambda x: f(x) * 1.0)(original)
        with pytest.raises(
            ValueError,
            match=f"the forward of {path or 'the model'} was replaced by a function that holds on to its module",
        ):
            quiet(net, images(), NM(2, 4))
        net.get_submodule("2.0").weight.data *= NM(2, 4).mask(net.get_submodule("2.0").weight.abs())
        with pytest.raises(ValueError, match="holds on to its module"):
            snows.deploy(net, images()[0], progress=False)


def test_a_forward_that_is_bound_to_its_module_is_copied_with_it():
    net = small()
    net.forward = types.MethodType(lambda self, x: 2 * nn.Sequential.forward(self, x), net)
    sparse, _ = quiet(net, images(), NM(2, 4))
    with torch.no_grad():
        torch.testing.assert_close(sparse(images()[0]), 2 * nn.Sequential.forward(sparse, images()[0]))
        assert not torch.equal(sparse(images()[0]), net(images()[0]))


def test_autocast_around_changes_nothing():
    wanted, _ = quiet(small(), images(), NM(2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sparse, _ = quiet(small(), images(), NM(2, 4))
        deployed = snows.deploy(sparse, images()[0], objective="size", progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(wanted.state_dict().values(), sparse.state_dict().values(), strict=True)
    )
    assert deployed.report.difference < 1e-5


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x)


class Held(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.net, self.kept = small(), kept

    def forward(self, x):
        return self.net(x)


def compiled_inside():
    net = small()
    net[1] = torch.compile(net[1], backend="eager")
    return net


def held_outputs():
    y = small()(images()[0])
    return Held([y]).eval()


REFUSED = {
    "autocast inside": (
        lambda: Casting().eval(),
        r"but net\.0\.0 runs under torch\.autocast inside the model's forward",
    ),
    "a compiled submodule": (compiled_inside, r"but 1 is compiled; pass 1\._orig_mod in the place of 1"),
    "TorchScript": (lambda: torch.jit.trace(small(), images()[0]), "the model is TorchScript"),
    "exported": (
        lambda: torch.export.export(small(), (images()[0],)).module(),
        "the model was made by torch.export",
    ),
    "a lock": (lambda: Held(threading.Lock()).eval(), "cannot be copied: its kept is a lock"),
    "kept outputs": (held_outputs, "cannot be copied: its kept is a list"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("verb", ["prune", "deploy"])
def test_what_cannot_be_copied_or_watched_is_named(name, verb):
    make, message = REFUSED[name]
    if (name, verb) == ("autocast inside", "deploy"):
        return  # packed layers run under autocast
    net = make()
    with pytest.raises(ValueError, match=message) as caught:
        quiet(net, images(), NM(2, 4)) if verb == "prune" else snows.deploy(net, images()[0], progress=False)
    assert "\n" not in str(caught.value)


def test_an_exported_program_is_no_module():
    program = torch.export.export(small(), (images()[0],))
    with pytest.raises(
        TypeError, match=r"got ExportedProgram; pass the nn\.Module that it was exported from"
    ):
        quiet(program, images(), NM(2, 4))


# ---------------------------------------------------------------- layers that stay dense, and why


def test_tied_weights_that_are_left_out_do_no_harm():
    net = small()
    net[2][0], net[2][1], net[5] = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)
    net[2][0].weight = net[1][0].weight
    net.eval()
    sparse, report = quiet(net, images(), NM(2, 4), only=lambda name, module: name != "0.0")
    told = {x.name: x.reason for x in report.layers if x.reason.startswith("it ")}
    assert told == {"1.0": "it shares its weight with 2.0", "2.0": "it shares its weight with 1.0"}
    assert [x.name for x in report.layers if not x.reason] == ["5"]
    assert sparse[2][0].weight is sparse[1][0].weight
    assert torch.equal(sparse[1][0].weight, net[1][0].weight)


def six(wrap=lambda net: None):
    net = nn.Sequential(*(x for _ in range(6) for x in (nn.Linear(16, 16), nn.ReLU())))
    wrap(net)
    return net.eval()


def tie(first, second):
    def tied(net):
        net[second].weight = net[first].weight

    return tied


ENDS = {
    "the last shares": (
        tie(0, 10),
        {"0": "it shares its weight with 10", "10": "it shares its weight with 0"},
    ),
    "the last is computed": (
        lambda net: torch.nn.utils.parametrizations.weight_norm(net[10]),
        {"0": "first layer", "10": "its weight is computed by a parametrisation; "},
    ),
    "the first is computed": (
        lambda net: torch.nn.utils.parametrizations.weight_norm(net[0]),
        {"0": "its weight is computed by a parametrisation; ", "10": "last layer"},
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_no_other_layer_stands_for_the_first_or_the_last(name):
    wrap, expected = ENDS[name]
    _, report = quiet(six(wrap), [torch.randn(16, 16) for _ in range(4)], NM(2, 4))
    told = {x.name: x.reason for x in report.layers if x.reason}
    assert told.keys() == expected.keys()
    assert all(told[x].startswith(expected[x]) for x in expected)


def test_layers_that_shared_before_a_cut_stay_dense_after_it():
    goal = snows.Structured(0.8, then=snows.Unstructured(0.5))
    _, report = quiet(six(tie(2, 6)), [torch.randn(16, 16) for _ in range(4)], goal)
    told = {x.name: x.reason for x in report.layers if x.name in ("2", "6")}
    assert told == {"2": "it shares its weight with 6", "6": "it shares its weight with 2"}
    pruned = [x for x in report.layers if x.name in ("4", "8")]
    assert sum(x.kept for x in pruned) == round(sum(x.size for x in pruned) / 2)


def test_a_pruned_network_may_have_a_zero_in_a_layer_that_shares():
    net, batches = six(tie(2, 6)), [torch.randn(16, 16) for _ in range(4)]
    with torch.no_grad():
        net[2].weight[0, 0] = 0
    once = quiet(net, batches, NM(2, 4), solver=None)
    again = quiet(net, batches, None, select=once.network, solver=None)
    assert list(again.masks) == list(once.masks) == ["4", "8"]
    assert all(torch.equal(again.masks[x], once.masks[x]) for x in once.masks)
    assert again.network[6].weight is again.network[2].weight
    assert torch.equal(again.network[2].weight, net[2].weight)
    with pytest.raises(ValueError, match=r"2 cannot be pruned \(it shares its weight with 6\)"):
        quiet(net, batches, None, select=net)  # has no other zero
    with torch.no_grad():
        once.network[2].weight[1] = 0  # pruned by somebody else, which would be lost
    with pytest.raises(ValueError, match=r"2 cannot be pruned \(it shares its weight with 6\)"):
        quiet(net, batches, None, select=once.network)


def test_what_keeps_a_layer_that_is_asked_for_is_told_before_what_was_excluded():
    batches = [torch.randn(16, 16) for _ in range(4)]
    with pytest.raises(ValueError, match=r"no layer is left to prune \(8: it shares its weight with 10\)"):
        quiet(six(tie(8, 10)), batches, NM(2, 4), only=["8"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (torch.nn.utils.weight_norm, "torch.nn.utils.remove_weight_norm"),
        (torch.nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm"),
        (torch.nn.utils.parametrizations.weight_norm, "torch.nn.utils.parametrize.remove_parametrizations"),
    ],
    ids=["weight_norm", "spectral_norm", "parametrisation"],
)
def test_a_computed_weight_is_named_with_what_removes_it(wrap, advice):
    net = small()
    wrap(net[1][0])
    net.eval()
    sparse, report = quiet(net, images(), NM(2, 4))
    assert [x.name for x in report.layers if not x.reason] == ["2.0"]
    (told,) = [x.reason for x in report.layers if x.name == "1.0"]
    assert (told.startswith("its weight is computed by "), told.endswith(advice)) == (True, True)
    assert sparse.state_dict().keys() == net.state_dict().keys()
    if advice.endswith("parametrizations"):
        torch.nn.utils.parametrize.remove_parametrizations(net[1][0], "weight")
    else:
        (torch.nn.utils.remove_weight_norm if "weight" in advice else torch.nn.utils.remove_spectral_norm)(
            net[1][0]
        )
    _, report = quiet(net, images(), NM(2, 4))  # the advice works
    assert [x.name for x in report.layers if not x.reason] == ["1.0", "2.0"]


class Standardised(nn.Conv2d):
    """As in timm's BiT: the weight is standardised before it is used."""

    def forward(self, x):
        w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std(
            (1, 2, 3), keepdim=True
        )
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


def test_layers_that_are_left_alone_are_in_the_report_with_the_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.standard = nn.Conv2d(3, 8, 3), Standardised(8, 8, 3)
            self.up, self.mid, self.line = (
                nn.ConvTranspose2d(8, 8, 2, 2),
                nn.Conv2d(8, 8, 3),
                nn.Conv1d(8, 8, 1),
            )
            self.unused, self.last = nn.Linear(4, 4), nn.Linear(8, 3)

        def forward(self, x):
            x = self.mid(self.up(self.standard(self.first(x)).relu())).relu()
            return self.last(self.line(x.flatten(2)).mean(2))

    _, report = quiet(Net().eval(), images(), NM(2, 4))
    assert {x.name: x.reason for x in report.layers} == {
        "first": "first layer",
        "mid": "",
        "last": "last layer",
        "standard": "its weight is computed before use",
        "unused": "never runs",
        "up": "a ConvTranspose2d: only Linear and Conv2d are pruned",
        "line": "a Conv1d: only Linear and Conv2d are pruned",
    }


def test_a_budget_that_takes_nothing_from_a_layer_says_so():
    _, report = quiet(small(), images(), snows.Unstructured(0.0006), solver=None)  # one weight of 1,728
    spared = [x for x in report.layers if x.reason == "the budget takes nothing from it"]
    assert len(spared) == 1
    assert spared[0].kept == spared[0].size
    assert report.zeros == 1
    assert report.prunable == 8 * 8 * 9 + 16 * 8 * 9
    assert "nan" not in str(report)


def test_a_budget_leaves_every_layer_a_weight():
    sparse, report = quiet(small(), images(), snows.Unstructured(0.999), cap=1.0, solver=None)
    assert all(x.kept >= 1 for x in report.layers)
    assert sum(x.size - x.kept for x in report.layers if not x.reason) == round(0.999 * (576 + 1152))
    with torch.no_grad():
        assert sparse(images()[0]).isfinite().all()


# ---------------------------------------------------------------- masks from elsewhere


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64], ids=str)
def test_masks_of_zeros_and_ones_under_the_weights_own_key(dtype):
    mask = torch.rand(8, 8, 3, 3) < 0.5
    wanted, _ = quiet(small(), images(), None, select={"1.0": mask})
    sparse, _ = quiet(small(), images(), None, select={"1.0.weight": mask.to(dtype)})
    assert all(
        torch.equal(a, b)
        for a, b in zip(wanted.state_dict().values(), sparse.state_dict().values(), strict=True)
    )


MASKED = {
    "a layer that is left out": {"1.0": "weight", "2.0": "weight"},
    "an all-ones mask": {"1.0": "ones", "2.0": "weight"},
    "a bias alone": {"5": "bias", "2.0": "weight"},
    "a normalisation": {"1.1": "weight", "2.0": "weight"},
}


@pytest.mark.parametrize("name", MASKED)
def test_parametrisations_of_torchs_own_pruning_come_back_as_they_were(name):
    net = small()
    for layer, what in MASKED[name].items():
        module = net.get_submodule(layer)
        if what == "ones":
            torch_prune.identity(module, "weight")
        else:
            torch_prune.random_unstructured(module, what, 0.5)
    net(images()[0])
    sparse, report = quiet(net, images(), None, select=net, only=lambda name, module: name == "2.0")
    assert [x.name for x in report.layers if not x.reason] == ["2.0"]
    assert list(sparse.state_dict()) == list(net.state_dict())
    untouched = {
        key: value
        for key, value in net.state_dict().items()
        if not key.startswith("2.") and "running" not in key
    }
    assert all(torch.equal(sparse.state_dict()[key], value) for key, value in untouched.items())
    mask = net[2][0].weight_mask
    assert torch.equal(sparse[2][0].weight_mask, mask)
    assert not torch.equal(sparse[2][0].weight_orig, net[2][0].weight_orig)
    with torch.no_grad():
        sparse(images()[0])
        assert not sparse[2][0].weight[mask == 0].any()
    if name == "a layer that is left out":
        row = next(x for x in report.layers if x.name == "1.0")
        assert (row.reason, row.kept) == ("excluded", 288)


def test_a_bias_mask_alone_does_not_ask_for_masks():
    net = small()
    torch_prune.random_unstructured(net[5], "bias", 0.5)
    sparse, report = quiet(net, images(), NM(2, 4))
    assert [x.name for x in report.layers if not x.reason] == ["1.0", "2.0"]
    assert torch.equal(sparse[5].bias_mask, net[5].bias_mask)


def test_a_mask_on_the_projections_of_attention():
    net = settle(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    torch_prune.random_unstructured(net.self_attn, "in_proj_weight", 0.5)
    batches = [torch.randn(4, 6, 8) for _ in range(4)]
    sparse, report = quiet(net, batches, None, select=net)
    assert [x.name for x in report.layers if not x.reason] == ["self_attn.in_proj"]
    assert list(sparse.state_dict()) == list(net.state_dict())
    assert torch.equal(sparse.self_attn.in_proj_weight_mask, net.self_attn.in_proj_weight_mask)
    assert not torch.equal(sparse.self_attn.in_proj_weight_orig, net.self_attn.in_proj_weight_orig)


# ---------------------------------------------------------------- deploy


def sparse_small():
    net = small()
    net[1][0].weight.data *= NM(2, 4).mask(net[1][0].weight.abs())
    return net


def test_a_first_parameter_of_another_dtype_does_not_choose_the_examples():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.net = nn.Parameter(torch.ones(1, dtype=torch.float64)), sparse_small()

        def forward(self, x):
            return self.net(x)

    assert (
        snows.deploy(Scaled().eval(), images()[0], objective="size", progress=False).report.difference < 1e-5
    )


def test_where_nothing_can_be_compared_nothing_is_folded_and_the_report_says_so():
    class Argmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = sparse_small()

        def forward(self, x):
            return self.net(x).argmax(1)

    net = Argmax().eval()
    deployed = snows.deploy(net, images()[0], objective="size", progress=False)
    assert deployed.report.difference != deployed.report.difference
    assert "nothing was compared" in str(deployed.report)
    assert deployed.report.folded == []
    assert torch.equal(deployed.network(images()[0]), net(images()[0]))


def test_extra_state_that_is_no_tensor_does_no_harm():
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = sparse_small()

        def forward(self, x):
            return self.net(x)

        def get_extra_state(self):
            return {"epoch": 3}

        def set_extra_state(self, state):
            assert state == {"epoch": 3}

    deployed = snows.deploy(Extra().eval(), images()[0], objective="size", progress=False)
    assert deployed.report.dense_bytes == sum(x.nbytes for x in sparse_small().state_dict().values())


def test_a_network_whose_eps_is_zero_and_a_channel_constant():
    net = small()
    net[1][1].eps = 0.0
    with torch.no_grad():
        net[1][0].weight[3] = 0
    sparse, _ = quiet(net, images(), NM(2, 4))
    assert sparse[1][1].running_var.isfinite().all()
    assert sparse[1][1].running_var[3] == net[1][1].running_var[3]
    with torch.no_grad():
        assert sparse(images()[0]).isfinite().all()


def test_copied_names_what_cannot_be_copied():
    net = nn.Sequential(nn.Linear(2, 2), Held(threading.Lock()))
    with pytest.raises(ValueError, match=r"1\.kept is a lock"):
        copied(net)
