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
from snows.networks.pairing import paired, unpaired
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
        return [
            len(
                Horizon(net, layer, k, inputs).outputs(
                    net.get_submodule(layer).weight.detach(), stream_to(net, inputs, layer)
                )
            )
            for k in (0, 1, 2, 100, "end")
        ]

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
    for one, other in zip(found.values(), (a, a.relu(), net[2](a.relu())), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("name", nets())
def test_a_late_start_gives_the_outputs_of_the_whole_pass(name):
    net, inputs = nets()[name]
    open_attention(net)
    trace = Trace.of(net, inputs)
    plan = Schedule(net, trace)
    late = Stream(plan, inputs)
    for layer in trace.start:
        late.advance(layer)
        weight = torch.randn_like(net.get_submodule(layer).weight)
        for k in (0, 4, "end"):
            horizon = Horizon(net, layer, k, late)
            found = horizon.outputs(weight, late)
            whole = horizon.outputs(weight, Stream(plan, inputs))
            assert list(found) == list(whole)
            assert len(found) >= 1
            for operation in found:
                assert torch.allclose(found[operation], whole[operation], rtol=1e-12, atol=1e-12)
        with torch.no_grad(), plain_forward():
            end = output_tensors(
                functional_call(net, {f"{layer}.weight": weight}, inputs.args, inputs.kwargs)
            )
            own = output_tensors(net(*inputs.args, **inputs.kwargs))
        matched = list(horizon.outputs(weight, late).values())
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
        targets = {name: y + torch.randn_like(y) for name, y in horizon.outputs(at, stream).items()}
        loss = Reconstruction(horizon, stream, targets)
        at = at + 0.1 * torch.randn_like(at)
        probe = torch.randn_like(at)
        for operator, oracle in (
            (GaussNewton(loss, at), dense_gauss_newton(loss, at)),
            (Hessian(loss, at), dense_hessian(loss, at)),
        ):
            found, expected = (operator @ probe).flatten(), oracle @ probe.flatten()
            assert (found - expected).norm() <= 1e-8 * expected.norm()


def test_gauss_newton_is_the_hessian_of_a_relu_network():
    net = settle(ResNet20()).double()
    inputs = Batch.of(torch.randn(2, 1, 28, 28).double())
    stream = stream_to(net, inputs, "layer2.0.conv1")
    horizon = Horizon(net, "layer2.0.conv1", 8, stream)
    at = net.get_submodule("layer2.0.conv1").weight.detach()
    loss = Reconstruction(
        horizon, stream, {k: y + 0.1 * torch.randn_like(y) for k, y in horizon.outputs(at, stream).items()}
    )
    v = torch.randn_like(at)
    a, b = GaussNewton(loss, at) @ v, Hessian(loss, at) @ v
    assert (a - b).norm() <= 1e-10 * b.norm()


def test_the_loss_divides_each_term_by_its_targets_variance():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    inputs = Batch.of(torch.randn(6, 3).double())
    stream = stream_to(net, inputs, "0")
    horizon = Horizon(net, "0", "end", stream)
    weight = torch.randn(4, 3).double()
    targets = {name: torch.randn_like(y) for name, y in horizon.outputs(weight, stream).items()}
    net.requires_grad_(False)
    a = inputs.args[0] @ weight.T + net[0].bias
    outputs = [a, a.relu(), net[2](a.relu())]
    plain = [float(((f - y) ** 2).mean()) for f, y in zip(outputs, targets.values(), strict=True)]
    variances = [float(((y - y.mean()) ** 2).mean()) for y in targets.values()]
    scaled = Reconstruction(horizon, stream, targets)
    assert scaled(weight).item() == pytest.approx(
        sum(p / v for p, v in zip(plain, variances, strict=True)), rel=1e-10
    )
    for e, weighed, variance in zip(
        scaled.residuals(weight), scaled.weigh(scaled.residuals(weight)), variances, strict=True
    ):
        assert torch.allclose(weighed, 2 * e / (variance * e.numel()), rtol=1e-10)
    unscaled = Reconstruction(
        horizon, stream, targets, {name: Metric.plain(y, "none") for name, y in targets.items()}
    )
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
    wanted = [
        masked_least_squares(X[g], Y[g], rows(mask).view(groups, -1, X.shape[2])[g]) for g in range(groups)
    ]
    assert torch.allclose(rows(found.weight), torch.cat(wanted), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(inplace=True)], ids=["tanh", "relu in place"])
def test_sensitivities_are_metrics_of_noise_pulled_back_from_the_output(activation):
    net = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)).double().eval()
    x = torch.randn(5, 3).double()
    names = ["0:linear", f"1:{'tanh' if isinstance(activation, nn.Tanh) else 'relu'}", "2:linear"]
    found = OutputSensitivity(net, Batch.of(x), 0).of(names)
    first = net[0](x).detach().requires_grad_()
    second = activation(first.clone()).detach().requires_grad_()
    output = net[2](second).detach()
    z = (
        torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        / (10 * output.var(unbiased=False)).sqrt()
    )
    by_second = z @ net[2].weight.detach()
    (by_first,) = torch.autograd.grad(activation(first.clone()), first, by_second)
    for metric, gradients in zip(found.values(), (by_first, by_second, z), strict=True):
        wanted = Metric.from_gradients(gradients, -1)
        scale = gradients.square().sum()
        assert metric.channel == 1
        assert (metric.matrix(gradients.shape[1]) - wanted.matrix(gradients.shape[1])).norm() <= 1e-6 * scale


def test_sensitivities_tell_the_channels_of_any_layout():
    """A convolution, its activation, attention's heads, LayerNorm: the height of each basis is the count of channels."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.qkv, self.head = (
                nn.Conv2d(3, 5, 3),
                nn.LayerNorm(5),
                nn.Linear(5, 18),
                nn.Linear(6, 4),
            )

        def forward(self, x):
            x = self.norm(self.conv(x).relu().flatten(2).transpose(1, 2))
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.head(x.tanh())

    net = Net().eval()
    batch = Batch.of(torch.randn(2, 3, 6, 6))
    operations = Horizon(net, "conv", "end", batch).operations
    assert operations == [
        "conv:conv2d",
        ":relu",
        "norm:layer_norm",
        "qkv:linear",
        ":scaled_dot_product_attention",
        ":tanh",
        "head:linear",
    ]
    found = OutputSensitivity(net, batch, 0).of(operations)
    assert [(m.channel, m.basis.shape[0]) for m in found.values()] == [
        (1, 5),
        (1, 5),
        (2, 5),
        (2, 18),
        (3, 3),
        (2, 6),
        (2, 4),
    ]
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.movedim(1, -1),
        lambda x: x.transpose(1, 3),
        lambda x: x.permute(0, 2, 3, 1).contiguous(),
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: x,
        lambda x: F.avg_pool2d(x, 2),
        lambda x: x[:, :, 1:],
        lambda x: x + 1,
    ],
    ids=["permute", "movedim", "transpose", "copied", "flattened", "as it is", "pooled", "cut", "added"],
)
def test_the_channels_of_an_operation_are_followed_from_its_input(move):
    """Between a convolution and its activation they move to another dimension, or stay in theirs."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.side = nn.Conv2d(3, 5, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.conv(x)
            self.side(x.mean((2, 3)))  # channels of another branch, last
            return F.gelu(move(y))

    found = OutputSensitivity(Net().eval(), Batch.of(torch.randn(2, 3, 8, 9)), 0).of([":gelu"])
    assert found[":gelu"].basis.shape[0] == 5


def test_an_operation_that_the_output_does_not_depend_on_has_no_weight():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            self.b(x)
            return self.c(x)

    found = OutputSensitivity(Net().eval(), Batch.of(torch.randn(6, 3)), 0)
    assert [m.is_zero for m in found.of(["a:linear", "b:linear", "c:linear"]).values()] == [
        False,
        True,
        False,
    ]
    assert found.of(["b:linear"]) == {}


def test_an_output_that_is_constant_depends_on_nothing():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    nn.init.zeros_(net[2].weight)
    assert OutputSensitivity(net, Batch.of(torch.randn(6, 3)), 0).of(["0:linear", "1:tanh"]) == {}


@pytest.mark.parametrize("rows", [200, 7], ids=["more rows than channels", "fewer"])
def test_a_metric_is_the_gram_with_its_small_eigenvalues_averaged(rows):
    gradients = torch.randn(rows, 12).double() * torch.linspace(3, 0.1, 12).double()
    metric = Metric.from_gradients(gradients, 1, torch.Generator().manual_seed(0), smoothing=0.5)
    values, vectors = torch.linalg.eigh(gradients.T @ gradients)
    small = values <= 0.3 * values.mean()
    values[small] = values[small].mean()
    wanted = (vectors * (values + 0.5 * values.mean())) @ vectors.T
    found = metric.floor * torch.eye(12).double() + metric.basis @ metric.basis.T
    assert (found - wanted).norm() <= 1e-8 * wanted.norm()


def test_a_wide_metric_finds_the_directions_that_count():
    basis = torch.linalg.qr(torch.randn(300, 5).double()).Q
    gradients = (
        torch.randn(900, 5).double() @ (basis * torch.tensor([9.0, 7, 5, 4, 3])).T
        + 0.01 * torch.randn(900, 300).double()
    )
    metric = Metric.from_gradients(gradients, -1, torch.Generator().manual_seed(0), rank=16)
    gram = gradients.T @ gradients
    assert metric.basis.shape == (300, 5)
    assert torch.allclose(
        (metric.basis @ metric.basis.T - gram).norm(), torch.tensor(0.0).double(), atol=1e-2 * gram.norm()
    )


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_loss_measures_each_term_by_its_metric(rank, layout):
    net = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
        .double()
        .eval()
        .to(memory_format=layout)
    )
    stream = stream_to(net, Batch.of(torch.randn(3, 2, 6, 6).double().to(memory_format=layout)), "0")
    horizon = Horizon(net, "0", "end", stream)
    weight = torch.randn(4, 2, 3, 3).double()
    with torch.no_grad():
        outputs = horizon.outputs(weight, stream)
    targets = {name: torch.randn_like(y) for name, y in outputs.items()}
    metrics = {
        name: Metric(0.3 * k, torch.randn(y.shape[1], rank).double(), 1)
        for k, (name, y) in enumerate(outputs.items())
    }
    wanted, gradients = 0.0, []
    for name, y in targets.items():
        f, metric = outputs[name], metrics[name]
        G = metric.floor * torch.eye(f.shape[1]).double() + metric.basis @ metric.basis.T
        wanted += torch.einsum("bchw,cd,bdhw->bhw", f - y, G, f - y).mean().item()
        gradients.append(2 * torch.einsum("bchw,cd->bdhw", f - y, G) / (f.numel() / f.shape[1]))
    loss = Reconstruction(horizon, stream, targets, metrics)
    assert loss(weight).item() == pytest.approx(wanted, rel=1e-10)
    if rank == 0:  # the first metric is nothing, and its term left out
        del gradients[0]
    for weighed, expected in zip(loss.weigh(loss.residuals(weight)), gradients, strict=True):
        assert torch.allclose(weighed, expected, rtol=1e-10, atol=1e-14)
    nothing = Reconstruction(horizon, stream, targets, dict.fromkeys(targets, Metric(0.0)))
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


# ---------------------------------------------------------------- names pair networks


class Block(nn.Module):
    """Two layers with a functional activation between; `extra` more of them in front."""

    def __init__(self, extra=0):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.act, self.extra = nn.Tanh(), extra

    def forward(self, x):
        y = self.first(x)
        for _ in range(self.extra):
            y = torch.sigmoid(y) - 0.5
        return self.third(self.act(self.second(F.relu(y))))


def test_an_operation_more_in_one_network_shifts_nothing():
    """What both networks call by one name is matched; of the others the report says which they are."""
    dense, other = Block().double().eval(), Block(extra=1).double().eval()
    other.load_state_dict(dense.state_dict())
    batch = Batch.of(torch.randn(5, 6).double())
    traces = Trace.of(dense, batch), Trace.of(other, batch)
    assert unpaired(*traces) == [":sigmoid"]  # the subtraction is no operation of a horizon
    horizon = Horizon(other, "first", "end", batch, paired(*traces))
    assert horizon.operations == ["first:linear", ":relu", "second:linear", "act:tanh", "third:linear"]
    weight = other.first.weight.detach()
    theirs = horizon.outputs(weight, stream_to(dense, batch, "first"))
    with torch.no_grad():
        y = F.linear(batch.args[0], weight, dense.first.bias)
        assert torch.allclose(theirs[":relu"], y.relu())
        assert torch.allclose(theirs["second:linear"], dense.second(y.relu()))
        assert torch.allclose(theirs["third:linear"], dense(batch.args[0]))


def test_an_operation_that_is_called_more_often_in_one_network_is_not_matched():
    dense, other = Block(extra=1).eval(), Block(extra=2).eval()
    batch = Batch.of(torch.randn(5, 6))
    horizon = Horizon(other, "first", "end", batch, paired(Trace.of(dense, batch), Trace.of(other, batch)))
    assert ":sigmoid" not in horizon.operations
    assert ":sigmoid#1" not in horizon.operations
    assert horizon.operations[-1] == "third:linear"


def test_names_are_the_same_in_a_pass_that_starts_late():
    """A shared activation, called in two modules, is told apart by where it is called."""
    act = nn.ReLU()

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), act

        def forward(self, x):
            return self.act(self.layer(self.act(x)))

    net = nn.Sequential(Part(), Part()).eval()
    batch = Batch.of(torch.randn(3, 4))
    names = [event.name for event in Trace.of(net, batch).events]
    assert names == [
        "0.act:relu",
        "0.layer:linear",
        "0.act#1:relu",
        "1/0.act:relu",
        "1.layer:linear",
        "1/0.act#1:relu",
    ]
    late = stream_to(net, batch, "1.layer")
    assert Horizon(net, "1.layer", 1, late).operations == ["1.layer:linear", "1/0.act#1:relu"]
    assert Horizon(net, "0.layer", "end", batch).operations == names[1:]


# ---------------------------------------------------------------- what cannot be differentiated as it stands


class Within(nn.Module):
    """A layer, an operation, and a layer."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.third, self.between = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
            between,
        )

    def forward(self, x):
        return self.third(self.between(self.second(self.first(x).tanh())).relu())


def test_a_no_grad_inside_the_network_is_lifted():
    net = Within(torch.no_grad()(lambda y: y * 2)).double().eval()
    stream = stream_to(net, Batch.of(torch.randn(5, 6).double()), "second")
    horizon = Horizon(net, "second", "end", stream)
    assert horizon.operations == ["second:linear", ":relu", "third:linear"]
    at = net.second.weight.detach()
    loss = Reconstruction(horizon, stream, {name: y + 1 for name, y in horizon.outputs(at, stream).items()})
    v = torch.randn_like(at)
    found, wanted = (GaussNewton(loss, at) @ v).flatten(), dense_gauss_newton(loss, at) @ v.flatten()
    assert (found - wanted).norm() <= 1e-8 * wanted.norm()


def overwrite(y):
    """As in a detection head: in place over what a sigmoid made."""
    z = torch.sigmoid(y)
    z[:, :4] = z[:, :4] * 2
    return z


def test_a_change_in_place_of_what_a_derivative_needs():
    net = Within(overwrite).double().eval()
    stream = stream_to(net, Batch.of(torch.randn(5, 6).double()), "second")
    horizon = Horizon(net, "second", "end", stream)
    at = net.second.weight.detach()
    targets = {name: y + 1 for name, y in horizon.outputs(at, stream).items()}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        GaussNewton(Reconstruction(horizon, stream, targets), at)
    horizon.tolerant = True
    loss = Reconstruction(horizon, stream, targets)
    v = torch.randn_like(at)
    found, wanted = (GaussNewton(loss, at) @ v).flatten(), dense_gauss_newton(loss, at) @ v.flatten()
    assert (found - wanted).norm() <= 1e-8 * wanted.norm()


def test_a_horizon_ends_before_what_has_no_second_derivative():
    net = Within(lambda y: torch.cdist(y.unsqueeze(0), y.unsqueeze(0))[0] @ y).double().eval()
    stream = stream_to(net, Batch.of(torch.randn(5, 6).double()), "second")
    horizon = Horizon(net, "second", "end", stream)
    at = net.second.weight.detach()
    assert horizon.operations == ["second:linear", ":relu", "third:linear"]
    assert horizon.shorten(at, stream) == ":relu"
    assert horizon.operations == ["second:linear"]
    loss = Reconstruction(horizon, stream, {name: y + 1 for name, y in horizon.outputs(at, stream).items()})
    v = torch.randn_like(at)
    assert ((GaussNewton(loss, at) @ v).flatten() - dense_gauss_newton(loss, at) @ v.flatten()).norm() <= 1e-8


def test_hardsigmoid_is_the_clamp_that_it_is():
    net = Within(nn.Hardsigmoid()).double().eval()
    stream = stream_to(net, Batch.of(3 * torch.randn(5, 6).double()), "second")
    horizon = Horizon(net, "second", "end", stream)
    at = net.second.weight.detach()
    found = horizon.outputs(at, stream)
    with torch.no_grad():
        y = net.second(net.first(stream.batch.args[0]).tanh())
        assert torch.allclose(found["between:hardsigmoid"], F.hardsigmoid(y), atol=1e-12)
    loss = Reconstruction(horizon, stream, {name: y + 1 for name, y in found.items()})
    v = torch.randn_like(at)
    product, wanted = (GaussNewton(loss, at) @ v).flatten(), dense_gauss_newton(loss, at) @ v.flatten()
    assert (product - wanted).norm() <= 1e-8 * wanted.norm()
