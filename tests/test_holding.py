"""Held networks against masked gradient descent written out by hand in float64, under every optimizer and wrapper."""

import copy
import gc
import math
import pickle
import weakref
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import snows
from snows import Pruned
from snows.networks.implants import Implant
from snows.networks.masks import give_mask, kept_mask

X, Y = torch.randn(24, 6, dtype=torch.float64), torch.randn(24, 3, dtype=torch.float64)
Plain = namedtuple("Plain", "weights biases masks")


def network(pruned=True):
    """Two Linear layers in float64, half of each weight masked as `prune` does it."""
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    for layer in (net[0], net[2]) if pruned else ():
        mask = torch.rand_like(layer.weight) < 0.5
        layer.weight.data[~mask] = 0
        give_mask(layer, mask)
    return net


def masked(net):
    """The weights off their masks, of all layers."""
    return torch.cat([m.weight.detach()[~kept_mask(m)] for m in net.modules() if kept_mask(m) is not None])


def loss(net, x=X, y=Y):
    return (net(x) - y).square().mean()


def train(net, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()


# ---------------------------------------------------------------- by hand


def plain(net):
    layers = net[0], net[2]
    copies = [[x.detach().clone() for x in (m.weight, m.bias)] for m in layers]
    return Plain(*zip(*copies, strict=True), [kept_mask(m) for m in layers])


def gradients(p, x=X, y=Y):
    """Of the mean square error of a masked network of two layers, by the chain rule."""
    (w1, w2), (b1, b2), (m1, m2) = p
    hidden = torch.tanh(x @ w1.T + b1)
    out = 2 * (hidden @ w2.T + b2 - y) / y.numel()
    inner = (out @ w2) * (1 - hidden**2)
    return [inner.T @ x * m1, out.T @ hidden * m2], [inner.sum(0), out.sum(0)]


def same(net, p):
    for layer, weight, bias in zip((net[0], net[2]), p.weights, p.biases, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-12, atol=1e-12)


def test_sgd_with_momentum_and_weight_decay_is_masked_sgd():
    net = network()
    p = plain(net)
    snows.hold(net)
    train(net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.01), 1000)
    assert masked(net).count_nonzero() == 0
    momenta = [torch.zeros_like(x) for x in (*p.weights, *p.biases)]
    for _ in range(1000):
        found = [x for both in gradients(p) for x in both]
        for x, g, v in zip((*p.weights, *p.biases), found, momenta, strict=True):
            v.mul_(0.9).add_(g + 0.01 * x)
            x.sub_(0.05 * v)
    same(net, p)


def test_adamw_is_masked_adamw():
    net = network()
    p = plain(net)
    snows.hold(net)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1)
    train(net, optimizer, 100)
    first = [torch.zeros_like(x) for x in (*p.weights, *p.biases)]
    second = [torch.zeros_like(x) for x in first]
    for step in range(1, 101):
        found = [x for both in gradients(p) for x in both]
        for x, g, m, v in zip((*p.weights, *p.biases), found, first, second, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            x.mul_(1 - 0.01 * 0.1)
            x.sub_(0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    same(net, p)
    train(
        net, optimizer, 900
    )  # in which it divides rounding errors by small gradients: no two ways agree to 1e-12
    assert masked(net).count_nonzero() == 0


def test_clipping_and_accumulation_see_the_gradient_of_the_masked_network():
    net = network()
    p = plain(net)
    snows.hold(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        for part in (slice(0, 12), slice(12, 24)):
            (loss(net, X[part], Y[part]) / 2).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        optimizer.step()
        found = [x for both in gradients(p) for x in both]
        norm = math.sqrt(sum(float(x.square().sum()) for x in found))
        assert norm > 0.05
        for x, g in zip((*p.weights, *p.biases), found, strict=True):
            x.sub_(0.5 * g * 0.05 / (norm + 1e-6))
    assert masked(net).count_nonzero() == 0
    same(net, p)


# ---------------------------------------------------------------- optimizers


class Noisy(torch.optim.SGD):
    """Adds noise to every weight (Welling and Teh 2011)."""

    def step(self, closure=None):
        super().step()
        with torch.no_grad():
            for group in self.param_groups:
                for x in group["params"]:
                    x.add_(0.01 * torch.randn_like(x))


class Sign(torch.optim.Optimizer):
    """Steps by the sign of the momentum (Chen et al. 2023)."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for x in self.param_groups[0]["params"]:
            momentum = self.state[x].setdefault("momentum", torch.zeros_like(x))
            x.sub_(0.01 * (0.9 * momentum + 0.1 * x.grad).sign() + 1e-4 * x)
            momentum.mul_(0.99).add_(0.01 * x.grad)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "noisy": lambda p: Noisy(p, 0.01),
    "sign": Sign,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_whatever_the_optimizer_remembers(name):
    """It has stepped before the network was pruned, so that what it remembers is not zero off the masks."""
    net = network(pruned=False)
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 5)
    for layer, mask in zip((net[0], net[2]), (torch.rand(16, 6) < 0.5, torch.rand(3, 16) < 0.5), strict=True):
        layer.weight.data[~mask] = 0
        give_mask(layer, mask)
    optimizer.zero_grad()
    with snows.hold(net) as handle:
        before = [x.detach().clone() for x in net.parameters()]
        for _ in range(10):
            train(net, optimizer, 1)
            assert masked(net).count_nonzero() == 0
        assert all((a != b).any() for a, b in zip(before, net.parameters(), strict=True))
    assert handle.weights == ("0.weight", "2.weight")
    train(net, optimizer, 2)
    assert masked(net).count_nonzero() > 40, "let go, they move: the test can fail"


def test_lbfgs_calls_its_closure_many_times_within_a_step():
    net = network()
    snows.hold(net)
    optimizer = torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe")
    at_first = loss(net).item()

    def closure():
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        assert masked(net).count_nonzero() == 0
        return value

    for _ in range(3):
        optimizer.step(closure)
    assert masked(net).count_nonzero() == 0
    assert loss(net).item() < 0.5 * at_first


def test_an_update_written_by_hand_sees_a_masked_gradient():
    net = network()
    snows.hold(net)
    for _ in range(3):
        net.zero_grad()
        loss(net).backward()
        with torch.no_grad():
            for x in net.parameters():
                x.sub_(0.1 * x.grad)
    assert masked(net).count_nonzero() == 0


def test_optimizers_that_step_within_the_backward_pass():
    net = network()
    optimizers = {x: torch.optim.SGD([x], 0.1, momentum=0.9) for x in net.parameters()}

    def step(x):
        optimizers[x].step()
        optimizers[x].zero_grad()

    for x in net.parameters():
        x.register_post_accumulate_grad_hook(step)  # runs before ours
    snows.hold(net)
    before = net[0].weight.detach().clone()
    for _ in range(3):
        loss(net).backward()
    assert masked(net).count_nonzero() == 0
    assert not torch.equal(before, net[0].weight)


def test_another_networks_step_leaves_a_waiting_graph_alone():
    """As between the two networks of a GAN: a weight changed in place could not be differentiated any more."""
    ours, theirs = network(), network(pruned=False)
    snows.hold(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    waiting = loss(ours)
    train(theirs, optimizer, 1)
    waiting.backward()
    assert ours[0].weight.grad[~kept_mask(ours[0])].count_nonzero() == 0


def test_a_layer_that_is_trained_later():
    net = network()
    net[0].weight.requires_grad_(False)
    snows.hold(net)
    assert not net[0].weight.requires_grad
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    before = net[0].weight.detach().clone()
    train(net, optimizer, 2)
    assert torch.equal(before, net[0].weight)
    net[0].weight.requires_grad_(True)
    loss(net).backward()
    assert net[0].weight.grad[~kept_mask(net[0])].count_nonzero() == 0
    train(net, optimizer, 2)
    assert not torch.equal(before, net[0].weight)
    assert masked(net).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_no_number_is_cleared_too(dtype, layout):
    net = nn.Conv2d(8, 6, 3).to(dtype)
    mask = torch.rand_like(net.weight, dtype=torch.float32) < 0.5
    net.weight.data[~mask] = 0
    give_mask(net, mask)
    snows.hold(net)
    net.to(memory_format=layout)
    kept, where = net.weight.detach()[mask], (~mask).nonzero()
    net.weight.grad = torch.zeros_like(net.weight)
    for value, place in zip((math.nan, math.inf, -1.0), where, strict=False):
        net.weight.grad[tuple(place)] = value
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert torch.equal(net.weight.detach()[mask], kept)
    off = net.weight.detach()[~mask]
    assert off.count_nonzero() == 0
    assert not off.signbit().any()


def test_mixed_precision_and_overflow():
    """What overflows off the mask is no part of the network; what overflows elsewhere skips the step."""
    net = network().float()
    snows.hold(net)
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    mask, before = kept_mask(net[0]), net[0].weight.detach().clone()
    for overflows, moves in ((~mask, True), (mask, False)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(net, X.float(), Y.float())
        hook = net[0].weight.register_hook(lambda g, where=overflows: g.masked_fill(where, math.inf))
        scaler.scale(value).backward()
        hook.remove()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, net[0].weight) is not moves
        assert masked(net).count_nonzero() == 0
        before = net[0].weight.detach().clone()


# ---------------------------------------------------------------- networks


def test_the_mask_and_the_weight_may_move_and_be_exchanged():
    net = network()
    snows.hold(net)
    net.float()
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(net, X.float(), Y.float()).backward()
        optimizer.step()
    assert net[0].weight.dtype == torch.float32
    assert masked(net).count_nonzero() == 0


def test_copies_hold_nothing_and_keep_their_masks():
    net = network()
    keys = list(net.state_dict())
    net.handle = snows.hold(net)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    assert list(net.state_dict()) == keys
    for other in copies:
        assert torch.equal(kept_mask(other[0]), kept_mask(net[0]))
        assert other.handle.weights == ()
        other.handle.remove()
        train(other, torch.optim.SGD(other.parameters(), 0.1), 2)
        assert masked(other).count_nonzero() > 40
    train(net, torch.optim.SGD(net.parameters(), 0.1), 2)
    assert masked(net).count_nonzero() == 0


def test_an_average_of_held_weights_has_their_zeros():
    net = network()
    snows.hold(net)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        train(net, torch.optim.AdamW(net.parameters(), 0.1), 1)
        average.update_parameters(net)
    assert masked(average).count_nonzero() == 0
    assert masked(average).numel() > 40


def test_a_network_held_twice_is_held_until_both_let_go():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    outer = snows.hold(net)
    with snows.hold(net):
        pass
    train(net, optimizer, 2)
    assert masked(net).count_nonzero() == 0
    assert repr(outer) == "Held(2 weights)"
    outer.remove()
    outer.remove()
    assert repr(outer) == "Held(2 weights, removed)"
    train(net, optimizer, 2)
    assert masked(net).count_nonzero() > 40


def test_hooks_do_not_keep_a_network():
    net = network()
    snows.hold(net)
    train(net, torch.optim.SGD(net.parameters(), 0.1), 1)
    seen = weakref.ref(net[0])
    del net
    gc.collect()
    assert seen() is None


def test_zeros_of_a_network_without_masks_become_its_masks():
    net = network()
    bare = network(pruned=False)
    bare.load_state_dict(net.state_dict())
    bare.append(nn.Linear(3, 3).double())
    nn.init.zeros_(bare[3].weight)  # as an adapter begins
    handle = snows.hold(bare)
    assert handle.weights == ("0.weight", "2.weight")
    assert torch.equal(kept_mask(bare[0]), kept_mask(net[0]))
    train(bare, torch.optim.AdamW(bare.parameters(), 0.1), 3)
    assert masked(bare).numel() == masked(net).numel()
    assert masked(bare).count_nonzero() == 0
    assert bare[3].weight.count_nonzero() == 9


def test_attention_is_held():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    apart = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
    names = []
    for net, parts in ((attention, ["in_proj"]), (apart, ["q_proj", "k_proj", "v_proj"])):
        masks = {f"{x}_weight": torch.rand_like(net.get_parameter(f"{x}_weight")) < 0.5 for x in parts}
        for name, mask in masks.items():
            net.get_parameter(name).data[~mask] = 0
        names += snows.hold(net).weights
        optimizer = torch.optim.AdamW(net.parameters(), 0.1)
        for _ in range(3):
            other = torch.randn(2, 5, 8 if net is attention else 4)
            net(torch.randn(2, 5, 8), other, other)[0].square().sum().backward()
            optimizer.step()
        for name, mask in masks.items():
            assert torch.equal(net.get_parameter(name) != 0, mask)
    assert names == ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]


def test_a_weight_of_two_layers():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    net[2].weight = net[0].weight
    mask = torch.rand(6, 6) < 0.5
    net[0].weight.data[~mask] = 0
    give_mask(net[0], mask)
    snows.hold(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        net(X).square().sum().backward()
        optimizer.step()
    assert torch.equal(net[2].weight != 0, mask)


def test_what_needs_no_hold_gets_a_handle_that_does_nothing():
    thin = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    Implant("0", 2).apply(thin)
    masking = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    torch_prune.l1_unstructured(masking[0], "weight", 0.5)
    cut = snows.prune(
        nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval(),
        [X.float()],
        snows.Structured(0.5, multiple=1, using=("neurons",)),
        solver=None,
        progress=False,
    ).network
    for net in (thin, masking, cut):
        with snows.hold(net) as handle:
            assert handle.weights == ()
            assert repr(handle) == "Held(0 weights)"
    train(masking, torch.optim.AdamW(masking.parameters(), 0.1), 3)
    torch_prune.remove(masking[0], "weight")
    assert (masking[0].weight == 0).sum() == 48


class Sharded(torch.Tensor):
    """A tensor of another kind, as those of `torch.distributed.tensor` are."""


def test_what_cannot_be_held_is_refused():
    packed = nn.Sequential(snows.SparseLinear.from_dense(network()[0].float()), nn.Tanh())
    computed, changed, sharded = network(), network(), network()
    nn.utils.parametrizations.weight_norm(computed[2])
    changed[0].weight.data += 1
    sharded[0].weight = nn.Parameter(sharded[0].weight.detach().as_subclass(Sharded))
    for net, sentence in (
        (packed, "got 0, which is packed; hold and train the pruned network, then deploy it"),
        (packed[0], "got the network, which is packed"),
        (network(pruned=False), "expected a pruned network, got one without masks and without zeros"),
        (computed, "the weight of 2 is computed by a parametrisation; remove it first"),
        (changed, "the weight of 0 to be zero off its mask, .* multiply it by its pruning_mask"),
        (sharded, "the weight of 0 to lie whole on one device, got a Sharded"),
    ):
        with pytest.raises(ValueError, match=sentence):
            snows.hold(net)


def test_a_refusal_and_an_end_leave_no_masks():
    bare = network(pruned=False)
    bare.load_state_dict(network().state_dict())
    bare.append(snows.SparseLinear.from_dense(network()[0].float()))
    with pytest.raises(ValueError, match="got 3, which is packed"):
        snows.hold(bare)
    assert kept_mask(bare[0]) is None
    del bare[3]
    with snows.hold(bare):
        assert kept_mask(bare[0]) is not None
    assert kept_mask(bare[0]) is None
    train(bare, torch.optim.SGD(bare.parameters(), 0.1), 1)
    assert snows.mask_of(bare[0]).double().mean() > 0.9  # an ordinary step moves what was held
    again = network(pruned=False)
    again.load_state_dict(network().state_dict())
    first, second = snows.hold(again), snows.hold(again)
    first.remove()
    train(again, torch.optim.SGD(again.parameters(), 0.1), 1)
    assert masked(again).count_nonzero() == 0  # the second holds still
    second.remove()
    assert kept_mask(again[0]) is None
    net = network()
    snows.hold(Pruned(net, None, {})).remove()
    assert kept_mask(net[0]) is not None  # which `prune` gave
    with pytest.raises(TypeError, match="hold: expected a network, got list"):
        snows.hold([net])


def test_complex_weights_are_held():
    net = nn.Linear(4, 4, dtype=torch.complex128)
    mask = torch.eye(4, dtype=torch.bool)
    net.weight.data[~mask] = 0
    snows.hold(net)
    net(torch.ones(4, dtype=torch.complex128)).abs().sum().backward()
    torch.optim.SGD(net.parameters(), 0.1, momentum=0.9).step()
    assert net.weight.detach()[~mask].count_nonzero() == 0
    assert net.weight.detach()[mask].count_nonzero() == 4


# ---------------------------------------------------------------- compilers and processes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Dynamo imports
@pytest.mark.parametrize("first", ["hold", "compile"])
def test_a_compiled_network_and_a_compiled_step(first):
    torch.compiler.reset()
    net = network(pruned=False)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    train(net, optimizer, 2)  # its memory is not zero off the masks
    for layer, mask in zip((net[0], net[2]), (torch.rand(16, 6) < 0.5, torch.rand(3, 16) < 0.5), strict=True):
        layer.weight.data[~mask] = 0
        give_mask(layer, mask)
    twin = copy.deepcopy(net)
    other = torch.optim.Adam(twin.parameters(), 0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    if first == "hold":
        snows.hold(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    if first == "compile":
        dense = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
        loss(compiled).backward()
        step()  # compiled without hooks
        net.load_state_dict(dense[0])
        optimizer.load_state_dict(dense[1])
        assert snows.hold(compiled).weights == ("_orig_mod.0.weight", "_orig_mod.2.weight")
    for _ in range(4):
        optimizer.zero_grad()
        loss(compiled).backward()
        step()
        assert masked(net).count_nonzero() == 0
    snows.hold(twin)
    train(twin, other, 4)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # compiled, Adam counts steps in float32


def noisy_sum(state, bucket):
    """A sum over processes that is not exact, as compressed ones are not."""
    noise = 0.01 * torch.ones_like(bucket.buffer())
    sum_ = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
    return sum_.then(lambda x: x.value()[0] / 2 + noise)


def process(rank, folder):
    """One of two: half of the batch each, three ways to run DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    start = torch.load(f"{folder}/start.pt", weights_only=False)
    mine, found = slice(12 * rank, 12 * rank + 12), []
    for views, before, noise in ((False, True, False), (True, False, False), (True, True, True)):
        net = copy.deepcopy(start["net"])
        if before:
            snows.hold(net)
        ddp = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=views)
        if not before:
            snows.hold(ddp)
        if noise:
            ddp.register_comm_hook(None, noisy_sum)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(10):
            optimizer.zero_grad()
            loss(ddp, start["x"][mine], start["y"][mine]).backward()
            optimizer.step()
        found.append((int(masked(net).count_nonzero()), net.state_dict()))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch runs in one process")
def test_two_processes_train_as_one(tmp_path):
    net = network()
    torch.save({"net": net, "x": X, "y": Y}, tmp_path / "start.pt")
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)  # a fork may inherit a lock that is held
    snows.hold(net)
    train(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.01), 10)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for ways in both:
        assert [wrong for wrong, _ in ways] == [0, 0, 0]
        for _, state in ways[:2]:
            for key, value in net.state_dict().items():
                torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(both[0][2][1]["0.weight"], net[0].weight)
