import pytest
import torch
import torch.nn.functional as F
from models import Branches, Mapped, settle
from oracles import dense_gauss_newton, dense_hessian, masked_least_squares
from test_network import nets
from torch import nn
from torch.func import functional_call

from snows import Newton, network
from snows.horizon import Horizon, Reconstruction
from snows.network import Plan, Stream, as_inputs, learn_order
from snows.operators import GaussNewton, Hessian
from snows.sparsity import MaskedWeight, rows
from snows.zoo.models import ResNet20


def stream_to(net, inputs, layer):
    stream = Stream(Plan(net, learn_order(net, inputs)), inputs)
    stream.advance(layer)
    return stream


def test_operations_are_counted_by_what_depends_on_the_weight():
    net = settle(Branches()).double()
    inputs = as_inputs(torch.randn(2, 3, 9, 10).double())

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
    inputs = as_inputs(torch.randn(1, 4, 3, 3))
    horizon = Horizon(net, "a", 100, inputs)
    assert len(horizon.outputs(net.a.weight.detach(), stream_to(net, inputs, "a"))) == 6


def test_matched_outputs_are_as_they_were_before_anything_changed_them_in_place():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).double().eval()
    inputs = as_inputs(torch.randn(2, 3, 5, 5).double())
    weight = net[0].weight.detach()
    found = Horizon(net, "0", 2, inputs).outputs(weight, stream_to(net, inputs, "0"))
    a = F.conv2d(inputs.args[0], weight, net[0].bias)
    for one, other in zip(found, (a, a.relu(), net[2](a.relu())), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("name", nets())
def test_a_late_start_gives_the_outputs_of_the_whole_pass(name):
    net, inputs = nets()[name]
    network.open_attention(net)
    order = learn_order(net, inputs)
    plan = Plan(net, order)
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
        with torch.no_grad(), network.plain_forward():
            end = network.output_tensors(functional_call(net, {f"{layer}.weight": weight}, inputs.args, inputs.kwargs))
            own = network.output_tensors(net(*inputs.args, **inputs.kwargs))
        matched = horizon.outputs(weight, late)
        depends = [x for x, y in zip(end, own, strict=True) if not torch.equal(x, y)]
        assert depends
        for x in depends:
            assert any(x.shape == y.shape and torch.allclose(x, y, rtol=1e-10, atol=1e-10) for y in matched)


@pytest.mark.parametrize("name", ["branches", "mapped"])
@pytest.mark.parametrize("k", [0, 3, "end"])
def test_curvature_through_a_horizon_against_dense_matrices(name, k):
    net, inputs = nets()[name]
    network.open_attention(net)
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
    inputs = as_inputs(torch.randn(2, 1, 28, 28).double())
    stream = stream_to(net, inputs, "layer2.0.conv1")
    horizon = Horizon(net, "layer2.0.conv1", 8, stream)
    at = net.get_submodule("layer2.0.conv1").weight.detach()
    loss = Reconstruction(horizon, stream, [y + 0.1 * torch.randn_like(y) for y in horizon.outputs(at, stream)])
    v = torch.randn_like(at)
    a, b = GaussNewton(loss, at) @ v, Hessian(loss, at) @ v
    assert (a - b).norm() <= 1e-10 * b.norm()


def test_the_loss_divides_each_term_by_its_targets_variance():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    inputs = as_inputs(torch.randn(6, 3).double())
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
    squares = [w * r.square().sum().item() for w, r in zip(scaled.weights, scaled.residuals(weight), strict=True)]
    assert sum(squares) == pytest.approx(scaled(weight).item(), rel=1e-12)
    unscaled = Reconstruction(horizon, stream, targets, [1.0] * len(targets))
    assert unscaled(weight).item() == pytest.approx(sum(plain), rel=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_newton_step_at_k_0_is_masked_least_squares_for_a_convolution(groups):
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=False)).double().eval()
    inputs = as_inputs(torch.randn(5, 4, 6, 6).double())
    stream = stream_to(net, inputs, "0")
    horizon = Horizon(net, "0", 0, stream)
    weight = net[0].weight.detach()
    mask = torch.rand_like(weight) < 0.5
    with torch.no_grad():
        loss = Reconstruction(horizon, stream, horizon.outputs(weight, stream))
    newton = Newton(preconditioner="none", rtol=1e-12, max_iterations=400, damping=1e-13)
    found, *_ = newton.solve([loss], MaskedWeight(weight * mask, mask), held=loss)
    X = torch.cat(list(network.patches(stream.call)), dim=1)
    Y = X @ rows(weight).view(groups, -1, X.shape[2]).transpose(1, 2)
    wanted = [masked_least_squares(X[g], Y[g], rows(mask).view(groups, -1, X.shape[2])[g]) for g in range(groups)]
    assert torch.allclose(rows(found.weight), torch.cat(wanted), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(inplace=True)], ids=["tanh", "relu in place"])
def test_the_output_factor_is_the_second_moment_of_the_pulled_back_noise(activation):
    """Averaged over many draws it is Σ_positions Jᵀ J, here by the dense Jacobian of the horizon in the layer's output."""
    net = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)).double().eval()
    inputs = as_inputs(torch.randn(5, 3).double())
    stream = stream_to(net, inputs, "0")
    horizon = Horizon(net, "0", "end", stream)
    weight = net[0].weight.detach()
    loss = Reconstruction(horizon, stream, [torch.randn_like(y) for y in horizon.outputs(weight, stream)])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([loss.output_factor(weight, 1, generator)[0] for _ in range(3000)]).mean(0)

    def later(a):
        h = activation(a.clone())
        return torch.cat([s**0.5 * y.flatten() for s, y in zip(loss.weights, (a, h, net[2](h)), strict=True)])

    with torch.no_grad():
        a = net[0](inputs.args[0])
    J = torch.autograd.functional.jacobian(later, a).reshape(-1, 5, 4)
    expected = torch.einsum("rpi,rpj->ij", J, J)
    assert (draws - expected).norm() <= 0.05 * expected.norm()


def test_a_network_is_left_as_it_was():
    net = settle(Mapped())
    network.open_attention(net)
    inputs = as_inputs({"pixel_values": torch.randn(2, 3, 12, 12)})
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.requires_grad for p in net.parameters()]
    stream = stream_to(net, inputs, "mlp.0")
    Horizon(net, "mlp.0", "end", stream).outputs(torch.randn(32, 16), stream)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == grads
    assert not any("forward" in m.__dict__ for m in net.modules())
