import copy

import pytest
import torch
import torch.nn.functional as F
from models import Branches, Mapped, PaddedConv, settle
from torch import nn

from snows.networks.attention import close_attention, open_attention, plain_forward
from snows.networks.batches import Batch
from snows.networks.layers import prunable
from snows.networks.stream import Schedule, Stream
from snows.networks.trace import Trace
from snows.zoo.models import ResNet20, ViT


def nets():
    torch.manual_seed(0)
    return {
        "branches": (settle(Branches()).double(), Batch.of(torch.randn(3, 3, 9, 10).double())),
        "mapped": (
            settle(Mapped()).double(),
            Batch.of({"pixel_values": torch.randn(2, 3, 12, 12).double(), "labels": 1}),
        ),
        "resnet": (
            settle(ResNet20()).double(),
            Batch.of((torch.randn(2, 1, 28, 28).double(), torch.zeros(2))),
        ),
        "vit": (settle(ViT(depth=2)).double(), Batch.of(torch.randn(2, 1, 28, 28).double())),
        "encoder": (
            settle(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)).double(),
            Batch.of(torch.randn(2, 5, 8).double()),
        ),
    }


def outputs_by_hook(net, inputs):
    """Every layer's output as a forward hook sees it."""
    seen = {}

    def hook(name):
        def keep(module, args, output):
            seen[name] = output.clone()

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in prunable(net).items()]
    with torch.no_grad():
        net(*inputs.args, **inputs.kwargs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", nets())
def test_a_stream_reaches_every_layer_with_its_real_call(name):
    net, inputs = nets()[name]
    open_attention(net)
    trace = Trace.of(net, inputs)
    with plain_forward():
        seen = outputs_by_hook(net, inputs)
    stream = Stream(Schedule(net, trace), inputs)
    assert set(trace.start) == set(seen) == set(prunable(net))
    for layer in trace.start:
        call = stream.advance(layer)
        module = net.get_submodule(layer)
        with torch.no_grad():
            again = (F.conv2d if isinstance(module, nn.Conv2d) else F.linear)(
                call.x, module.weight, module.bias, **call.settings
            )
        assert torch.allclose(again, seen[layer], rtol=0, atol=1e-12)


def test_a_stream_drops_what_nobody_reads_again():
    net, inputs = nets()["resnet"]
    stream = Stream(Schedule(net, Trace.of(net, inputs)), inputs)
    stream.advance("layer3.1.conv2")
    alive = {name for name, outputs in stream.on_device().memory.items() if not outputs[0].isnan().any()}
    # the residual of the block, and what the convolution reads
    assert alive == {"layer3.0", "layer3.1.relu1"}


def test_a_convolution_that_pads_itself_is_seen_as_it_acts():
    net = nn.Sequential(PaddedConv(3, 4, 3, stride=2))
    inputs = Batch.of(torch.randn(1, 3, 6, 6))
    call = Stream(Schedule(net, Trace.of(net, inputs)), inputs).advance("0")
    assert call.x.shape == (1, 3, 7, 7)
    assert call.settings["padding"] == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(batch_first=True),
        dict(batch_first=False),
        dict(batch_first=True, bias=False),
        dict(batch_first=True, kdim=6, vdim=10),
    ],
    ids=str,
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_open_attention_computes_what_the_closed_one_does(options, need_weights):
    closed = nn.MultiheadAttention(8, 2, **options).double().eval()
    if closed.in_proj_bias is not None:
        nn.init.normal_(closed.in_proj_bias)
    first = options["batch_first"]
    q = torch.randn(3, 4, 8).double()
    k = torch.randn(3, 5, options.get("kdim", 8)).double()
    v = torch.randn(3, 5, options.get("vdim", 8)).double()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    attn_mask = torch.randn(4, 5).double()
    arrange = (lambda x: x) if first else (lambda x: x.transpose(0, 1))
    calls = [
        ((arrange(q), arrange(k), arrange(v)), dict(key_padding_mask=padding)),
        ((arrange(q), arrange(k), arrange(v)), dict(attn_mask=attn_mask)),
        ((arrange(q), arrange(k), arrange(v)), dict(attn_mask=torch.randn(6, 4, 5) > 1.5)),
        ((arrange(q), arrange(k), arrange(v)), dict(average_attn_weights=False)),
    ]
    if "kdim" not in options:
        calls += [((arrange(q),) * 3, {}), ((q[0], k[0], v[0]), {})]
    holder = nn.ModuleDict({"a": closed})
    expected = [closed(*args, need_weights=need_weights, **kwargs) for args, kwargs in calls]
    keys = list(holder.state_dict())
    open_attention(holder)
    for (args, kwargs), (out, weights) in zip(calls, expected, strict=True):
        found, found_weights = holder["a"](*args, need_weights=need_weights, **kwargs)
        assert torch.allclose(found, out, atol=1e-12)
        assert (weights is None) == (found_weights is None)
        assert weights is None or torch.allclose(found_weights, weights, atol=1e-12)
    close_attention(holder)
    assert holder["a"] is closed
    assert list(holder.state_dict()) == keys


def test_writing_into_open_attention_reaches_the_closed_one():
    holder = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2).eval()})
    copied = copy.deepcopy(holder)
    open_attention(copied)
    with torch.no_grad():
        copied.get_submodule("a.in_proj").weight.zero_()
        copied.get_submodule("a.out_proj").weight.zero_()
    close_attention(copied)
    assert not copied["a"].in_proj_weight.any()
    assert not copied["a"].out_proj.weight.any()
    assert holder["a"].in_proj_weight.any()


def test_batches_of_every_kind():
    x = torch.ones(2)
    assert Batch.of(x).args == (x,)
    assert Batch.of((x, torch.zeros(2))).args == (x,)
    assert Batch.of({"pixel_values": x, "labels": x}).kwargs == {"pixel_values": x}
    with pytest.raises(TypeError, match="batches: expected"):
        Batch.of("images")
