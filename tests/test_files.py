"""A file gives back what was saved, or is refused."""

import copy
import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from models import Chain, Mapped, masked, settle, small
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn

import snows
from snows.layers import SparseConv2d, SparseLinear
from snows.packing import Packed
from snows.results.formats import VERSION


@pytest.fixture
def chain(tmp_path):
    net, x = masked(settle(Chain())), torch.randn(3, 4, 7, 5)
    path = tmp_path / "model.safetensors"
    snows.save(small(net, x), path)
    return net, path


def rewritten(path, metadata=None, tensors=None):
    """The file with its metadata or tensors changed, and the right checksum."""
    from snows.results.storage import digest

    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["snows"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata:
        metadata(content)
    if tensors:
        tensors(found)
    text = json.dumps(content, sort_keys=True)
    path.write_bytes(to_bytes(found, {"snows": text, "sha256": digest(dict(sorted(found.items())), text)}))
    return path


@pytest.mark.parametrize("pattern", [snows.NM(2, 4), snows.NM(1, 4), snows.Unstructured(0.8)], ids=str)
def test_what_was_saved_comes_back_exactly(tmp_path, pattern):
    for net, x in (
        (settle(Chain()), torch.randn(3, 4, 7, 5)),
        (settle(Mapped()), {"pixel_values": torch.randn(2, 3, 16, 16)}),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)),
    ):
        net = masked(net, pattern)
        deployed = small(net, x)
        other = (
            type(net)()
            if not isinstance(net, nn.TransformerEncoderLayer)
            else nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        )
        before = copy.deepcopy(other.state_dict())
        snows.save(deployed, tmp_path / "model.safetensors")
        loaded = snows.load(tmp_path / "model.safetensors", other)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items()), "the model was changed"
        assert loaded.state_dict().keys() == deployed.network.state_dict().keys()
        assert all(torch.equal(v, deployed.network.state_dict()[k]) for k, v in loaded.state_dict().items())
        with torch.no_grad():
            want, got = (n(**x) if isinstance(x, dict) else n(x) for n in (deployed.network, loaded))
        for a, b in zip(*((y.values() if isinstance(y, dict) else [y]) for y in (want, got)), strict=True):
            assert torch.equal(a, b)


def test_half_precision_layers_made_by_hand_and_the_meta_device(tmp_path):
    net = (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding="valid", dilation=2), nn.Flatten(), nn.Linear(8 * 4, 6)
        )
        .eval()
        .bfloat16()
    )
    net[0].weight.data *= snows.NM(2, 4).mask(net[0].weight.abs())
    net[2].weight.data *= snows.NM(1, 4).mask(net[2].weight.abs())
    sparse = nn.Sequential(
        SparseConv2d.from_dense(net[0], activation="relu"), net[1], SparseLinear.from_dense(net[2])
    )
    snows.save(sparse, tmp_path / "x.safetensors")
    loaded = snows.load(tmp_path / "x.safetensors", copy.deepcopy(net).to("meta"))
    x = torch.randn(2, 4, 8, 8).bfloat16()
    with torch.no_grad():
        assert torch.equal(loaded(x), sparse(x))
    assert loaded[0].activation == "relu"


def test_the_file_is_plain_safetensors_of_the_packed_size(chain):
    _, path = chain
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        content = json.loads(file.metadata()["snows"])
    assert names == {
        "first.values",
        "first.codes",
        "first.bias",
        "second.values",
        "second.codes",
        "second.bias",
    }
    settings = {
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "padding_mode": "zeros",
        "innermost": False,
    }
    assert content["edits"] == [
        {"kind": "fold", "convolution": "first", "norm": "first_norm"},
        {"kind": "fold", "convolution": "second", "norm": "second_norm"},
        {
            "kind": "pack",
            "layer": "first",
            "pattern": "2:4",
            "shape": [8, 4, 3, 3],
            "activation": "relu",
            "absorbs": "act",
            "settings": settings,
        },
        {
            "kind": "pack",
            "layer": "second",
            "pattern": "2:4",
            "shape": [8, 8, 1, 1],
            "activation": "gelu",
            "absorbs": "last_act",
            "settings": settings | {"padding": [0, 0]},
        },
    ]
    assert content["version"] == VERSION


def test_a_file_of_another_network_is_refused_by_name(chain):
    _, path = chain
    other = Chain()
    other.second = nn.Conv2d(8, 6, 1)
    with pytest.raises(
        ValueError, match=r"second has a weight of \(6, 8, 1, 1\), the file one of \(8, 8, 1, 1\)"
    ):
        snows.load(path, other)
    other = Chain()
    other.first.stride = (2, 2)
    with pytest.raises(ValueError, match=r"first has the stride \(2, 2\), the file \[1, 1\]"):
        snows.load(path, other)
    with pytest.raises(ValueError, match="there is no module "):
        snows.load(path, nn.Sequential(nn.Conv2d(4, 8, 3)))
    wider = Chain()
    wider.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"missing extra\.weight"):
        snows.load(path, wider)
    changed = Chain()
    changed.act = nn.Tanh()
    with pytest.raises(ValueError, match="act is a Tanh, no relu"):
        snows.load(path, changed)


def test_what_is_no_such_file_is_refused(chain, tmp_path):
    net, path = chain
    with pytest.raises(ValueError, match="there is no file"):
        snows.load(tmp_path / "nothing", net)
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(to_bytes(net.state_dict()))
    with pytest.raises(ValueError, match=r"not written by snows\.save"):
        snows.load(foreign, net)
    foreign.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        snows.load(foreign, net)
    content = path.read_bytes()
    for length in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        foreign.write_bytes(content[:length])
        with pytest.raises(ValueError, match="load: "):
            snows.load(foreign, net)
    foreign.write_bytes(struct.pack("<Q", 2**62) + content[8:])  # a header that claims to be enormous
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        snows.load(foreign, net)
    with pytest.raises(ValueError, match="expected a model with packed layers"):
        snows.save(net, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_metadata_and_tensors_that_disagree_are_refused(chain):
    net, path = chain
    content = path.read_bytes()
    first = lambda m: next(x for x in m["edits"] if x.get("layer") == "first")
    cases = [
        (
            lambda m: m.update(version=VERSION + 1),
            None,
            f"has format {VERSION + 1}, this snows reads up to {VERSION}",
        ),
        (
            lambda m: first(m).update(pattern="1:4"),
            None,
            r"first: .* expected \(8, 9\) values, got \(8, 18\)|first: .* codes",
        ),
        (lambda m: first(m).update(pattern="3:2"), None, "load: |NM: "),
        (lambda m: first(m).update(shape=[8, 4, 3, 10**12]), None, "shape of first is"),
        (lambda m: first(m).update(activation="tanh"), None, "metadata of .* is damaged"),
        (lambda m: first(m).update(absorbs="first_norm"), None, "first_norm is a Absorbed, no relu"),
        (lambda m: m["edits"].remove(first(m)), None, "unexpected first.values|missing first.weight"),
        (lambda m: m.pop("edits"), None, "metadata of .* is damaged"),
        (lambda m: m["edits"][0].update(norm="first"), None, "first is a Conv2d, no BatchNorm2d"),
        (lambda m: m["edits"][0].update(kind="import"), None, "metadata of .* is damaged"),
        (
            lambda m: m["edits"].append({"kind": "open", "module": "act"}),
            None,
            "act is a ReLU, no MultiheadAttention",
        ),
        (None, lambda t: t.update({"first.codes": torch.zeros_like(t["first.codes"])}), "codes"),
        (None, lambda t: t.update({"first.codes": t["first.codes"][:-1]}), "codes"),
        (
            None,
            lambda t: t.update({"first.values": t["first.values"].to(torch.int32)}),
            "first.values is torch.int32",
        ),
        (None, lambda t: t.update({"first.bias": torch.zeros(3)}), "first.bias is"),
        (None, lambda t: t.pop("second.codes"), "missing second.codes"),
    ]
    for metadata, tensors, sentence in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            snows.load(rewritten(path, metadata, tensors), net)


def as_format(version):
    """Turn metadata into what format 1 or 2 held."""

    def edit(metadata):
        edits = metadata.pop("edits")
        metadata.update(version=version, layers={}, identities=[], opened=[])
        if version == 2:
            metadata["remainders"] = []
        for x in edits:
            if x["kind"] == "pack":
                metadata["layers"][x["layer"]] = {k: x[k] for k in ("pattern", "shape", "activation")} | x[
                    "settings"
                ]
                metadata["identities"] += [x["absorbs"]] if x["absorbs"] else []
            elif x["kind"] == "open":
                metadata["opened"].append(x["module"])
            else:
                metadata["identities"].append(x.get("norm") or x["module"])

    return edit


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_older_formats_load(tmp_path, version):
    for net, x in (
        (settle(Chain()), torch.randn(3, 4, 7, 5)),
        (settle(Mapped()), {"pixel_values": torch.randn(2, 3, 16, 16)}),
    ):
        path = tmp_path / "model.safetensors"
        deployed = small(masked(net), x).network
        snows.save(deployed, path)
        rewritten(path, as_format(version))
        loaded = snows.load(path, net)
        with torch.no_grad():
            want, got = (n(**x) if isinstance(x, dict) else n(x) for n in (deployed, loaded))
        for a, b in zip(*((y.values() if isinstance(y, dict) else [y]) for y in (want, got)), strict=True):
            assert torch.equal(a, b)
        snows.save(loaded, path)  # in today's format
        assert snows.load(path, net).state_dict().keys() == loaded.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.pop("identities"), "identities is None"),
        (lambda m: m.update(remainders=["first"]), "first is a Conv2d, no BatchNorm2d"),
        (lambda m: m.update(opened=[3]), r"opened is \[3\]"),
        (lambda m: m.update(layers=[]), r"layers is \[\]"),
        (lambda m: m["layers"]["first"].pop("stride"), "stride of first is None"),
    ],
)
def test_damaged_metadata_of_an_older_format_is_refused(chain, change, sentence):
    net, path = chain
    with pytest.raises(ValueError, match=sentence):
        snows.load(rewritten(path, lambda m: (as_format(2)(m), change(m))), net)


def test_ten_thousand_damaged_files_are_refused_or_load_what_was_saved(tmp_path, request):
    net, path = masked(nn.Sequential(nn.Linear(8, 4), nn.ReLU())), tmp_path / "model.safetensors"
    snows.save(small(net, torch.randn(2, 8)), path)
    content, generator = path.read_bytes(), random.Random(0)
    want = snows.load(path, net).state_dict()
    memory = Path("/dev/shm")
    damaged = (
        memory if memory.is_dir() else tmp_path
    ) / f"snows-damaged-{os.getpid()}.safetensors"  # on a disk the writing takes longest
    header = 8 + struct.unpack("<Q", content[:8])[0]
    request.addfinalizer(lambda: damaged.unlink(missing_ok=True))
    refused = 0
    for _ in range(10_000):
        bytes_ = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 8))):
            where = generator.randrange(min(len(bytes_), generator.choice((8, header, len(content)))))
            action = generator.random()
            if action < 0.7:
                bytes_[where] ^= 1 << generator.randrange(8)
            elif action < 0.8:
                bytes_[where] = generator.randrange(256)
            elif action < 0.9:
                del bytes_[where : where + generator.choice((1, 4, 64))]
            else:
                bytes_[where:where] = bytes_[where : where + generator.choice((1, 4, 64))]
        damaged.write_bytes(bytes_)
        try:
            loaded = snows.load(damaged, net)
        except ValueError:
            refused += 1
        else:  # a change that means nothing: a space for another, or one of the certificate
            state = loaded.state_dict()
            assert state.keys() == want.keys()
            assert all(torch.equal(v, want[k]) for k, v in state.items())
    assert refused > 9_000


def test_a_path_that_cannot_be_written_leaves_nothing(chain, tmp_path):
    net, path = chain
    loaded = snows.load(path, net)
    with pytest.raises(ValueError, match=r"save: .* cannot be written"):
        snows.save(loaded, tmp_path / "no" / "such" / "folder.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        snows.save(loaded, tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "taken"]


def test_a_layers_packed_tensors_reach_the_file_as_they_are(tmp_path):
    weight = torch.tensor([[-0.0, 5, 0, 0], [0, 0, 7, 8.0]])
    mask = torch.tensor([[True, True, False, False], [False, False, True, True]])
    packed = snows.packing.pack(weight, mask, snows.NM(2, 4))
    net = nn.Sequential(SparseLinear(Packed(*packed)))
    snows.save(net, tmp_path / "x.safetensors")
    loaded = snows.load(tmp_path / "x.safetensors", nn.Sequential(nn.Linear(4, 2, bias=False)))
    assert torch.equal(
        loaded[0].values.view(torch.int32), packed.values.view(torch.int32)
    )  # the zero's sign too
    assert torch.equal(loaded[0].codes, packed.codes)


VALUES = (
    None,
    True,
    0,
    -1,
    1.5,
    "x",
    "",
    [],
    [1],
    [None, None],
    [2**40, 1],
    [0, 0],
    [-1, -1],
    {},
    {"a": 1},
    float("nan"),
    10**30,
)


def test_every_field_of_the_metadata_may_be_wrong(chain):
    """Whatever stands in it under a right checksum: one sentence, or the network that was saved."""
    net, path = chain
    content = path.read_bytes()
    loaded = snows.load(path, net)
    tried = refused = 0
    edits = json.loads(safe_open(path, "pt").metadata()["snows"])["edits"]
    fields = [("version",), ("edits",)]
    fields += [("edits", i) for i in range(len(edits))] + [
        ("edits", i, key) for i, entry in enumerate(edits) for key in entry
    ]
    fields += [
        ("edits", i, "settings", key) for i, entry in enumerate(edits) for key in entry.get("settings", ())
    ]
    for field in fields:
        for value in (*VALUES, KeyError):

            def edit(metadata, field=field, value=value):
                for key in field[:-1]:
                    metadata = metadata[key]
                if value is KeyError:
                    metadata.pop(field[-1])
                else:
                    metadata[field[-1]] = value

            path.write_bytes(content)
            rewritten(path, edit)
            tried += 1
            try:
                found, said = snows.load(path, net), ""
            except ValueError as error:
                found, said = loaded, str(error)
            assert not said or (said.startswith("load: ") and "\n" not in said), (field, value, said)
            assert found.state_dict().keys() == loaded.state_dict().keys(), (field, value)
            refused += bool(said)
    assert tried > 300
    assert refused > 0.95 * tried


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_network_that_is_one_packed_layer_comes_back(tmp_path, kind):
    dense = nn.Linear(8, 6) if kind == "linear" else nn.Conv2d(8, 6, 3)
    dense.weight.data *= snows.NM(2, 4).mask(dense.weight.data.abs())
    layer = (SparseLinear if kind == "linear" else SparseConv2d).from_dense(dense, snows.NM(2, 4)).eval()
    snows.save(layer, tmp_path / "x.safetensors")
    other = nn.Linear(8, 6) if kind == "linear" else nn.Conv2d(8, 6, 3)
    loaded = snows.load(tmp_path / "x.safetensors", other)
    assert type(loaded) is type(layer)
    x = torch.randn(2, 8) if kind == "linear" else torch.randn(2, 8, 5, 5)
    assert torch.equal(loaded(x), layer(x))
    with pytest.raises(ValueError, match="does not match the model"):
        snows.load(tmp_path / "x.safetensors", nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "first.values",
            lambda x: x.index_fill_(0, torch.tensor([0]), torch.nan),
            "first.values is not finite",
        ),
        ("first.bias", lambda x: x.fill_(torch.inf), "first.bias is not finite"),
        (
            "first.values",
            lambda x: x.half(),
            "its torch.float32 is of several types in the file: torch.float16, torch.float32",
        ),
        (
            "head.bias",
            lambda x: x.double(),
            "its torch.float32 is of several types in the file: torch.float32, torch.float64",
        ),
    ],
)
def test_numbers_that_no_deployment_writes_are_refused(chain, name, change, sentence):
    net, path = chain
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    name = name if name in keys else next(k for k in keys if k.endswith("bias") and k != "first.bias")
    with pytest.raises(ValueError, match=sentence):
        snows.load(rewritten(path, None, lambda t: t.update({name: change(t[name].clone())})), net)


class Counting(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_state_that_is_no_tensor_does_no_harm(tmp_path):
    net = nn.Sequential(Counting(8, 8), nn.ReLU(), Counting(8, 8), nn.ReLU(), Counting(8, 4)).eval()
    batches = [torch.randn(16, 8) for _ in range(4)]
    pruned, _ = snows.prune(net, batches, snows.NM(2, 4), out=tmp_path / "run", progress=False)
    snows.prune(net, batches, snows.NM(2, 4), out=tmp_path / "run", resume=True, progress=False)
    fast = small(pruned, batches[0])
    snows.save(fast, tmp_path / "x.safetensors")
    loaded = snows.load(tmp_path / "x.safetensors", net)
    assert torch.equal(loaded(batches[0]), fast.network(batches[0]))


class Tied(nn.Module):
    """One weight that two layers have."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.c, self.head = nn.Conv2d(8, 16, 3), nn.Linear(16, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.c((self.a(x) + self.b(x.neg())).relu()).relu().mean((2, 3)))


def test_a_weight_of_two_layers_stays_one_in_a_budget_and_in_its_file(tmp_path):
    torch.manual_seed(0)
    net, batches = Tied().eval(), [torch.randn(8, 3, 8, 8) for _ in range(4)]
    goal = snows.Budget(0.7, of="bytes", using=("channels",), multiple=1, floor=0)
    pruned = snows.prune(net, batches, goal, solver=None, progress=False)
    packed = snows.deploy(pruned.network, batches[0], objective="size", progress=False)
    assert packed.report.dense_bytes == sum(x.nbytes for x in pruned.network.parameters())
    assert packed.report.sparse_bytes <= 0.7 * sum(x.nbytes for x in net.parameters())
    for made in (pruned, packed):
        snows.save(made, tmp_path / "tied.safetensors")
        again = snows.load(tmp_path / "tied.safetensors", Tied())
        assert again.a.weight is again.b.weight
        assert torch.equal(again(batches[0]), made.network(batches[0]))
