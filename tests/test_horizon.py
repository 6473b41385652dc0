import pytest
import torch
import torch.nn.functional as F
from models import Branches, Mapped, settle
from oracles import dense_gauss_newton, dense_hessian, masked_least_squares
from test_network import nets
from torch import nn
from torch.func import functional_call

from snows import Newton
from snows.matching import moments
from snows.matching.horizon import Horizon
from snows.matching.losses import Reconstruction
from snows.matching.metrics import Metric, OutputSensitivity
from snows.networks.attention import open_attention, plain_forward
from snows.networks.batches import Batch, output_tensors
from snows.networks.stream import Schedule, Stream
from snows.networks.trace import Trace
from snows.solving.operators import GaussNewton, Hessian
from snows.sparsity import MaskedWeight, rows
from snows.zoo.models import ResNet20


def stream_to(net, inputs, layer):
    stream = Stream(Schedule(net, Trace.of(net, inputs)), inputs)
    stream.advance(layer)
    return stream


def test_operations_are_counted_by_what_depends_on_the_weight():
    net = settle(Branches()).double()
    inputs = Batch.of(torch.randn(2, 3, 9, 10).double())

    def counts(layer):
        return [len(Horizon(net, layer, k, inputs).outputs(net.get_submodule(layer).weight.detach(), stream_to(net, inputs, layer)))
                for k in (0, 1, 2, 100, "end")]

    # from `left`: hardswish, depthwise, relu, point, sigmoid, head; the parallel branch `right` is not counted
    assert counts("left") == [1, 2, 3, 7, 7]
    # from `stem`: relu, left, right, hardswish, depthwise, relu, point, sigmoid, head
    assert counts("stem") == [1, 2, 3, 10, 10]
    assert counts("head") == [1, 1, 1, 1, 1]


def test_a_shared_activation_counts_every_time():
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.c(self.relu(self.b(self.relu(self.a(x))))) + x)

    net = Bottleneck().eval()
    inputs = Batch.of(torch.randn(1, 4, 3, 3))
    horizon = Horizon(net, "a", 100, inputs)
    assert len(horizon.outputs(net.a.weight.detach(), stream_to(net, inputs, "a"))) == 6


def test_matched_outputs_are_as_they_were_before_anything_changed_them_in_place():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).double().eval()
    inputs = Batch.of(torch.randn(2, 3, 5, 5).double())
    weight = net[0].weight.detach()
    found = Horizon(net, "0", 2, inputs).outputs(weight, stream_to(net, inputs, "0"))
    a = F.conv2d(inputs.args[0], weight, net[0].bias)
    for one, other in zip(found, (a, a.relu(), net[2](a.relu())), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("name", nets())
def test_a_late_start_gives_the_outputs_of_the_whole_pass(name):
    net, inputs = nets()[name]
    open_attention(net)
    order = Trace.of(net, inputs)
    plan = Schedule(net, order)
    late = Stream(plan, inputs)
    for layer in order.layers:
        late.advance(layer)
        weight = torch.randn_like(net.get_submodule(layer).weight)
        for k in (0, 4, "end"):
            horizon = Horizon(net, layer, k, late)
            found = horizon.outputs(weight, late)
            whole = horizon.outputs(weight, Stream(plan, inputs))
            assert len(found) == len(whole) >= 1
            for a, b in zip(found, whole, strict=True):
                assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        with torch.no_grad(), plain_forward():
            end = output_tensors(functional_call(net, {f"{layer}.weight": weight}, inputs.args, inputs.kwargs))
            own = output_tensors(net(*inputs.args, **inputs.kwargs))
        matched = horizon.outputs(weight, late)
        depends = [x for x, y in zip(end, own, strict=True) if not torch.equal(x, y)]
        assert depends
        for x in depends:
            assert any(x.shape == y.shape and torch.allclose(x, y, rtol=1e-10, atol=1e-10) for y in matched)


@pytest.mark.parametrize("name", ["branches", "mapped"])
@pytest.mark.parametrize("k", [0, 3, "end"])
def test_curvature_through_a_horizon_against_dense_matrices(name, k):
    net, inputs = nets()[name]
    open_attention(net)
    for layer in ("right.0", "point", "depthwise") if name == "branches" else ("attention.in_proj", "mlp.0"):
        stream = stream_to(net, inputs, layer)
        horizon = Horizon(net, layer, k, stream)
        at = net.get_submodule(layer).weight.detach()
        targets = [y + torch.randn_like(y) for y in horizon.outputs(at, stream)]
        loss = Reconstruction(horizon, stream, targets)
        at = at + 0.1 * torch.randn_like(at)
        probe = torch.randn_like(at)
        for operator, oracle in ((GaussNewton(loss, at), dense_gauss_newton(loss, at)), (Hessian(loss, at), dense_hessian(loss, at))):
            found, expected = (operator @ probe).flatten(), oracle @ probe.flatten()
            assert (found - expected).norm() <= 1e-8 * expected.norm()


def test_gauss_newton_is_the_hessian_of_a_relu_network():
    net = settle(ResNet20()).double()
    inputs = Batch.of(torch.randn(2, 1, 28, 28).double())
    stream = stream_to(net, inputs, "layer2.0.conv1")
    horizon = Horizon(net, "layer2.0.conv1", 8, stream)
    at = net.get_submodule("layer2.0.conv1").weight.detach()
    loss = Reconstruction(horizon, stream, [y + 0.1 * torch.randn_like(y) for y in horizon.outputs(at, stream)])
    v = torch.randn_like(at)
    a, b = GaussNewton(loss, at) @ v, Hessian(loss, at) @ v
    assert (a - b).norm() <= 1e-10 * b.norm()


def test_the_loss_divides_each_term_by_its_targets_variance():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    inputs = Batch.of(torch.randn(6, 3).double())
    stream = stream_to(net, inputs, "0")
    horizon = Horizon(net, "0", "end", stream)
    weight = torch.randn(4, 3).double()
    targets = [torch.randn_like(y) for y in horizon.outputs(weight, stream)]
    net.requires_grad_(False)
    a = inputs.args[0] @ weight.T + net[0].bias
    outputs = [a, a.relu(), net[2](a.relu())]
    plain = [float(((f - y) ** 2).mean()) for f, y in zip(outputs, targets, strict=True)]
    variances = [float(((y - y.mean()) ** 2).mean()) for y in targets]
    scaled = Reconstruction(horizon, stream, targets)
    assert scaled(weight).item() == pytest.approx(sum(p / v for p, v in zip(plain, variances, strict=True)), rel=1e-10)
    for e, weighed, variance in zip(scaled.residuals(weight), scaled.weigh(scaled.residuals(weight)), variances, strict=True):
        assert torch.allclose(weighed, 2 * e / (variance * e.numel()), rtol=1e-10)
    unscaled = Reconstruction(horizon, stream, targets, [Metric.plain(y, "none") for y in targets])
    assert unscaled(weight).item() == pytest.approx(sum(plain), rel=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_newton_step_at_k_0_is_masked_least_squares_for_a_convolution(groups):
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=False)).double().eval()
    inputs = Batch.of(torch.randn(5, 4, 6, 6).double())
    stream = stream_to(net, inputs, "0")
    horizon = Horizon(net, "0", 0, stream)
    weight = net[0].weight.detach()
    mask = torch.rand_like(weight) < 0.5
    with torch.no_grad():
        loss = Reconstruction(horizon, stream, horizon.outputs(weight, stream))
    newton = Newton(preconditioner="none", rtol=1e-12, max_iterations=400, damping=1e-13)
    found, *_ = newton.solve([loss], MaskedWeight(weight * mask, mask), held=loss)
    X = torch.cat(list(moments.patches(stream.call)), dim=1)
    Y = X @ rows(weight).view(groups, -1, X.shape[2]).transpose(1, 2)
    wanted = [masked_least_squares(X[g], Y[g], rows(mask).view(groups, -1, X.shape[2])[g]) for g in range(groups)]
    assert torch.allclose(rows(found.weight), torch.cat(wanted), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(inplace=True)], ids=["tanh", "relu in place"])
def test_sensitivities_are_metrics_of_noise_pulled_back_from_the_output(activation):
    net = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)).double().eval()
    x = torch.randn(5, 3).double()
    found = OutputSensitivity(net, Batch.of(x), torch.Generator().manual_seed(0)).of("0", [0, 1, 2])
    first = net[0](x).detach().requires_grad_()
    second = activation(first.clone()).detach().requires_grad_()
    output = net[2](second).detach()
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / (10 * output.var(unbiased=False)).sqrt()
    by_second = z @ net[2].weight.detach()
    (by_first,) = torch.autograd.grad(activation(first.clone()), first, by_second)
    for metric, gradients in zip(found, (by_first, by_second, z), strict=True):
        wanted = Metric.felt(gradients, -1)
        scale = gradients.square().sum()
        assert metric.channel == -1
        assert (metric.matrix(gradients.shape[1]) - wanted.matrix(gradients.shape[1])).norm() <= 1e-6 * scale


def test_sensitivities_tell_the_channels_of_any_layout():
    """A convolution, its activation, attention's heads, LayerNorm: the height of each basis is the count of channels."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.qkv, self.head = nn.Conv2d(3, 5, 3), nn.LayerNorm(5), nn.Linear(5, 18), nn.Linear(6, 4)

        def forward(self, x):
            x = self.norm(self.conv(x).relu().flatten(2).transpose(1, 2))
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.head(x.tanh())

    net = Net().eval()
    found = OutputSensitivity(net, Batch.of(torch.randn(2, 3, 6, 6)), torch.Generator().manual_seed(0)).of("conv", range(7))
    assert [(m.channel, m.basis.shape[0]) for m in found] == [(1, 5), (1, 5), (-1, 5), (-1, 18), (-1, 3), (-1, 6), (-1, 4)]
    assert all(p.requires_grad for p in net.parameters())


def test_an_operation_that_the_output_does_not_feel_has_no_weight():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            self.b(x)
            return self.c(x)

    found = OutputSensitivity(Net().eval(), Batch.of(torch.randn(6, 3)), torch.Generator().manual_seed(0))
    assert [m.nothing for m in found.of("a", [0, 1, 2])] == [False, True, False]
    assert found.of("b", [0]) == []


def test_an_output_that_is_constant_feels_nothing():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    nn.init.zeros_(net[2].weight)
    assert OutputSensitivity(net, Batch.of(torch.randn(6, 3)), torch.Generator().manual_seed(0)).of("0", [0, 1]) == []


@pytest.mark.parametrize("rows", [200, 7], ids=["more rows than channels", "fewer"])
def test_a_metric_is_the_gram_with_its_small_eigenvalues_averaged(rows):
    gradients = torch.randn(rows, 12).double() * torch.linspace(3, 0.1, 12).double()
    metric = Metric.felt(gradients, 1, torch.Generator().manual_seed(0), smoothing=0.5)
    values, vectors = torch.linalg.eigh(gradients.T @ gradients)
    small = values <= 0.3 * values.mean()
    values[small] = values[small].mean()
    wanted = (vectors * (values + 0.5 * values.mean())) @ vectors.T
    found = metric.floor * torch.eye(12).double() + metric.basis @ metric.basis.T
    assert (found - wanted).norm() <= 1e-8 * wanted.norm()


def test_a_wide_metric_finds_the_directions_that_count():
    basis = torch.linalg.qr(torch.randn(300, 5).double()).Q
    gradients = torch.randn(900, 5).double() @ (basis * torch.tensor([9.0, 7, 5, 4, 3])).T + 0.01 * torch.randn(900, 300).double()
    metric = Metric.felt(gradients, -1, torch.Generator().manual_seed(0), rank=16)
    gram = gradients.T @ gradients
    assert metric.basis.shape == (300, 5)
    assert torch.allclose((metric.basis @ metric.basis.T - gram).norm(), torch.tensor(0.0).double(), atol=1e-2 * gram.norm())


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_loss_measures_each_term_by_its_metric(rank, layout):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)).double().eval().to(memory_format=layout)
    stream = stream_to(net, Batch.of(torch.randn(3, 2, 6, 6).double().to(memory_format=layout)), "0")
    horizon = Horizon(net, "0", "end", stream)
    weight = torch.randn(4, 2, 3, 3).double()
    with torch.no_grad():
        outputs = horizon.outputs(weight, stream)
    targets = [torch.randn_like(y) for y in outputs]
    metrics = [Metric(0.3 * k, torch.randn(y.shape[1], rank).double(), 1) for k, y in enumerate(outputs)]
    wanted, gradients = 0.0, []
    for f, y, metric in zip(outputs, targets, metrics, strict=True):
        G = metric.floor * torch.eye(f.shape[1]).double() + metric.basis @ metric.basis.T
        wanted += torch.einsum("bchw,cd,bdhw->bhw", f - y, G, f - y).mean().item()
        gradients.append(2 * torch.einsum("bchw,cd->bdhw", f - y, G) / (f.numel() / f.shape[1]))
    loss = Reconstruction(horizon, stream, targets, metrics)
    assert loss(weight).item() == pytest.approx(wanted, rel=1e-10)
    if rank == 0:  # the first metric is nothing, and its term left out
        del gradients[0]
    for weighed, expected in zip(loss.weigh(loss.residuals(weight)), gradients, strict=True):
        assert torch.allclose(weighed, expected, rtol=1e-10, atol=1e-14)
    nothing = Reconstruction(horizon, stream, targets, [Metric(0.0)] * len(targets))
    assert nothing(weight) == 0


def test_a_network_is_left_as_it_was():
    net = settle(Mapped())
    open_attention(net)
    inputs = Batch.of({"pixel_values": torch.randn(2, 3, 12, 12)})
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.requires_grad for p in net.parameters()]
    stream = stream_to(net, inputs, "mlp.0")
    Horizon(net, "mlp.0", "end", stream).outputs(torch.randn(32, 16), stream)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == grads
    assert not any("forward" in m.__dict__ for m in net.modules())
