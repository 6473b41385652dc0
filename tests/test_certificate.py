"""A file's claims are what is in it, and a file that is no longer what it was claimed to be is found."""

import json
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from models import QUICK, Chain, Mapped, small
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from test_budget import Sparse
from test_cli import pictures, prune_tiny, run, tiny  # noqa: F401  # pictures is a fixture
from test_latency import Counting
from torch import nn

import snows
from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.tables import Timetable
from snows.evaluation import Seen, compare
from snows.layers.base import PackedLayer
from snows.results.certificate import KEY, SEAL, Certificate, amend, seal
from snows.results.claims import Timed
from snows.results.files import write_network
from snows.results.findings import FAILS, HOLDS, MACS
from snows.results.origin import Origin
from snows.verification import DIFFERS, judgement


def read(path):
    """Tensors and metadata of a file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def claims(path):
    return json.loads(read(path)[1][KEY])


def changed(path, tensors=None, metadata=None, certificate=None, sealed=False):
    """Write a file anew with something changed; `sealed` makes the certificate's digest right again, and the edits'."""
    from snows.results.storage import digest

    found, texts = read(path)
    for change, what in ((tensors, found), (metadata, texts)):
        if change:
            change(what)
    if certificate:
        content = json.loads(texts[KEY])
        certificate(content)
        texts[KEY] = json.dumps(content)
    if sealed:
        texts[SEAL] = seal(found, texts, texts[KEY])
        if "snows" in texts:
            texts["sha256"] = digest(dict(sorted(found.items())), texts["snows"])
    path.write_bytes(to_bytes(found, texts))


def failed(found):
    """What does not hold."""
    return [x.of for x in found.findings if x.verdict == FAILS]


def settled(net):
    """A network with statistics that are not the initial ones."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def pruned(kind):
    """A dense network, its batches, and a pruned network with its file's content."""
    torch.manual_seed(0)
    if kind in ("attention", "cut and low rank"):
        net, batches = settled(Mapped()), [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(3)]
    else:
        net, batches = settled(Chain()), [torch.randn(4, 4, 7, 5) for _ in range(3)]
    goal = {
        "2:4": snows.NM(2, 4),
        "attention": snows.NM(2, 4),
        "packed": snows.NM(2, 4),
        "unstructured": snows.Unstructured(0.7),
        "cut": snows.Structured(0.5, multiple=1),
        "low rank": snows.Structured(0.4, using=("low-rank",), multiple=1),
        "cut and low rank": snows.Structured(0.3, multiple=1),
        "cut and packed": snows.Structured(0.7, using=("channels",), multiple=4, then=snows.NM(2, 4)),
    }[kind]
    every = {"only": lambda name, module: module.weight.shape[1] % 4 == 0}
    rule = {} if isinstance(goal, snows.Structured) and goal.then is None else {"select": snows.magnitude}
    given = {} if isinstance(goal, snows.Structured) else every
    found = snows.prune(net, batches, goal, solver=None, progress=False, **rule, **given)
    return net, batches, small(found.network, batches[0]) if "packed" in kind else found


def counted(net, batch):
    """The multiplications of one sample of a network of Linear, Conv2d and attention, by hooks."""
    total, hooks = 0, []

    def count(module, inputs, output):
        nonlocal total
        total += output.numel() * math.prod(module.weight.shape[1:])

    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        net(batch[:1])
    for hook in hooks:
        hook.remove()
    return total


KINDS = (
    "2:4",
    "attention",
    "packed",
    "unstructured",
    "cut",
    "low rank",
    "cut and low rank",
    "cut and packed",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_claimed_holds(tmp_path, kind):
    net, batches, found = pruned(kind)
    path = tmp_path / "model.safetensors"
    write_network(path, found.network, found.report)
    tensors, claim = load_file(path), claims(path)
    assert claim["bytes"] == sum(x.nbytes for x in tensors.values())
    dense = {  # the weights, unpacked by the layers themselves
        name: module.unpack().weight if isinstance(module, PackedLayer) else module.weight
        for name, module in found.network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | PackedLayer)
    }
    if kind == "attention":
        dense["attention.in_proj"] = net.attention.in_proj_weight  # its module has it under another name
        rows = {x["name"]: x for x in claim["layers"]}
        assert rows["attention.in_proj_weight"]["zeros"] == dense["attention.in_proj"].numel() // 2
    else:
        zeros = {f"{name}.weight": int((x == 0).sum()) for name, x in dense.items()}
        assert claim["zeros"] == sum(zeros.values())
        assert {x["name"]: x.get("zeros", 0) for x in claim["layers"]} == {
            x["name"]: zeros[x["name"]] for x in claim["layers"]
        }
        plain = [p.numel() for p in found.network.parameters()]
        packed = [m for m in found.network.modules() if isinstance(m, PackedLayer)]
        plain += [math.prod(m.shape) + (0 if m.bias is None else m.bias.numel()) for m in packed]
        assert claim["parameters"] == sum(plain)
        if "low rank" in kind:
            assert claim["macs"] == found.report.macs[1] < found.report.macs[0]
            factors = [x for x in dense if x.endswith((".0", ".1")) and f"{x.rpartition('.')[0]}.1" in dense]
            assert {f"{x}.weight" for x in factors} <= {x["name"] for x in claim["layers"]}
            assert factors
        elif not packed:
            assert claim["macs"] == counted(found.network, batches[0])
    if "2:4" in kind or "packed" in kind:
        assert claim["layers"]
        assert all(x["pattern"] == "2:4" for x in claim["layers"])
    else:
        assert kind == "attention" or not any("pattern" in x for x in claim["layers"])
    if "low rank" not in kind:
        assert all(("kept" in x) == ("cut" in kind) for x in claim["layers"])
    alone, beside = snows.verify(path), snows.verify(path, net, batches, stopwatch=QUICK)
    for verification in (alone, beside):
        assert verification.holds, str(verification)
        assert failed(verification) == []
    assert [x.verdict for x in alone.findings if x.of == MACS] == ["not checked: no model was given"]
    for of in ("dense network: tensors", "dense network: architecture", MACS):
        assert [x.verdict for x in beside.findings if x.of == of] == [HOLDS]
    if "snows" not in read(path)[1]:
        net.load_state_dict(tensors)  # anywhere
        assert read(path)[1]["format"] == "pt"
    written = path.read_bytes()
    write_network(path, found.network, found.report)
    assert path.read_bytes() == written


def test_what_is_not_known_is_not_claimed(tmp_path):
    net = nn.Sequential(nn.Linear(8, 4))
    net[0].weight.data[:, ::2] = 0
    path = tmp_path / "model.safetensors"
    write_network(path, net.eval())
    assert set(claims(path)) == {"bytes", "layers", "parameters", "snows", "torch", "version", "zeros"}
    assert snows.verify(path, net).holds


def test_another_dense_network_is_found(tmp_path):
    net, _, found = pruned("cut")
    snows.save(found, tmp_path / "x.safetensors")
    other = settled(Chain())
    other.load_state_dict(net.state_dict())
    assert snows.verify(tmp_path / "x.safetensors", other).holds
    other.second_norm.weight.data[0] += 1
    assert failed(snows.verify(tmp_path / "x.safetensors", other)) == ["dense network: tensors"]
    assert snows.verify(tmp_path / "x.safetensors", other, reference=net).holds
    with pytest.raises(ValueError, match="does not match the model"):
        snows.verify(tmp_path / "x.safetensors", nn.Sequential(nn.Linear(4, 4)).eval())


def test_a_loaded_network_says_where_it_came_from(tmp_path):
    net, batches, found = pruned("cut and packed")
    snows.save(found, tmp_path / "x.safetensors")
    snows.save(snows.load(tmp_path / "x.safetensors", settled(Chain())), tmp_path / "y.safetensors")
    known = Origin.of(net, [snows.networks.batches.Batch.of(x) for x in batches])
    for name in "xy":
        content = claims(tmp_path / f"{name}.safetensors")
        assert content["data"] == known.data
        assert (content["architecture"], content["dense"]) == (known.architecture, known.tensors)


# ---------------------------------------------------------------- tampering


def one_weight(tensors):
    tensors["2.weight"].view(-1)[int(tensors["2.weight"].view(-1).nonzero()[0])] += 0.5


def one_zero(tensors):
    weight = tensors["2.weight"].view(-1)
    weight[int((weight == 0).nonzero()[0])] = 0.5


def said(certificate):
    certificate["zeros"] += 1


@pytest.fixture
def made(monkeypatch, capsys, tmp_path, pictures):  # noqa: F811
    """The folder of a run, judged and deployed."""
    asked = ("--pattern", "2:4", "--samples", 4, "--select", "magnitude", "--horizon", 0)
    code, text = run(monkeypatch, capsys, *prune_tiny(pictures, tmp_path), *asked)
    assert code == 0, text
    deploy = ("deploy", tmp_path / "run", "--objective", "size", "--batch-size", 2, "--trust")
    code, text = run(monkeypatch, capsys, *deploy)
    assert code == 0, text
    return tmp_path / "run"


def verified(monkeypatch, capsys, *args):
    monkeypatch.setattr(Stopwatch, "race", partial(Stopwatch.race, QUICK))
    monkeypatch.setattr("snows.verification.verify.__kwdefaults__", {"reference": None, "stopwatch": QUICK})
    return run(monkeypatch, capsys, "verify", *args)


TAMPERED = {
    "a weight": ({"tensors": one_weight}, "digest of certificate and tensors"),
    "a zero": ({"tensors": one_zero}, "2.weight"),
    "a zero, sealed": ({"tensors": one_zero, "sealed": True}, "2.weight"),
    "the text": ({"certificate": said}, "digest of certificate and tensors"),
    "the text, sealed": ({"certificate": said, "sealed": True}, "zeros"),
    "bytes": ({"certificate": lambda x: x.update(bytes=1), "sealed": True}, "bytes of all tensors"),
    "MACs": ({"certificate": lambda x: x.update(macs=1), "sealed": True}, MACS),
    "dense": ({"certificate": lambda x: x.update(dense="0"), "sealed": True}, "dense network: tensors"),
    "others": ({"certificate": lambda x: x.update(others=["2.bias"]), "sealed": True}, "parameters"),
    "pattern": ({"certificate": lambda x: x["layers"][0].update(pattern="1:4"), "sealed": True}, "2.weight"),
    "divergence": (
        {"certificate": lambda x: x["judged"][0].update(divergence=1.0), "sealed": True},
        "divergence, 5 images of",
    ),
    "a layer": (
        {"certificate": lambda x: x["layers"].append({"name": "9.weight", "shape": [2]}), "sealed": True},
        "9.weight",
    ),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_file_that_was_changed_is_found(monkeypatch, capsys, made, how):
    change, line = TAMPERED[how]
    path = made / "model.safetensors"
    code, text = verified(monkeypatch, capsys, path, "--trust")
    assert code == 0, text
    assert FAILS not in text
    changed(path, **change)
    code, text = verified(monkeypatch, capsys, path, "--trust")
    assert code == 1, text
    assert any(line in x and FAILS in x for x in text.splitlines()), text
    assert "Traceback" not in text


def test_the_certificate_of_another_file_is_found(monkeypatch, capsys, made, tmp_path):
    _, texts = read(made / "packed.safetensors")
    mine = {key: texts[key] for key in (KEY, SEAL)}
    path = made / "model.safetensors"
    changed(path, metadata=lambda x: x.update(mine))
    code, text = verified(monkeypatch, capsys, path)
    assert code == 1, text
    assert any("digest of certificate" in x and FAILS in x for x in text.splitlines())
    assert any("bytes of all tensors" in x and FAILS in x for x in text.splitlines())


@pytest.mark.parametrize("sealed", [False, True], ids=["", "sealed"])
def test_kept_indices_that_were_changed_are_found(monkeypatch, capsys, tmp_path, sealed):
    _, _, found = pruned("cut")
    path = tmp_path / "model.safetensors"
    snows.save(found, path)

    def others(metadata):
        content = json.loads(metadata["snows"])
        (entry,) = (x for x in content["edits"] if x["kind"] == "take")
        selection = next(x for x in entry["selections"] if ["first.weight", 0] in x["tensors"])
        gone = sorted(set(range(selection["size"])) - set(selection["left"]))
        selection["left"] = sorted([*selection["left"][1:], gone[0]])
        metadata["snows"] = json.dumps(content, sort_keys=True)

    changed(path, metadata=others, sealed=sealed)
    assert "first.weight" in failed(snows.verify(path))
    assert not snows.verify(path, settled(Chain())).holds
    code, text = verified(monkeypatch, capsys, path)
    assert code == 1, text
    assert any("first.weight" in x and FAILS in x for x in text.splitlines())


def test_tensors_of_another_size_than_the_kept_indices_are_found(tmp_path):
    _, _, found = pruned("cut")
    path = tmp_path / "model.safetensors"
    snows.save(found, path)
    changed(path, tensors=lambda x: x.update({"first_norm.bias": x["first_norm.bias"][1:]}), sealed=True)
    assert "kept indices" in failed(snows.verify(path))


def test_a_packed_layer_that_was_changed_is_found(monkeypatch, capsys, made):
    path = made / "packed.safetensors"
    code, text = verified(monkeypatch, capsys, path, "--trust")
    assert code == 0, text
    assert "dense network: tensors" in text
    changed(path, tensors=lambda x: x["2.codes"].bitwise_not_(), sealed=True)
    code, text = verified(monkeypatch, capsys, path, "--trust")
    assert code == 1, text
    assert any("2.weight" in x and FAILS in x for x in text.splitlines())


# ---------------------------------------------------------------- what cannot be verified


def without(path):
    """A file as an older version wrote it."""
    tensors, texts = read(path)
    texts = {key: x for key, x in texts.items() if key not in (KEY, SEAL, "format")}
    path.write_bytes(to_bytes(tensors, texts or None))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without, "has no certificate; it was written by an older snows or by another program"),
        (lambda path: path.unlink(), "verify: there is no file"),
        (lambda path: path.write_bytes(b"nothing"), "is not a whole safetensors file"),
        (partial(changed, metadata=lambda x: x.update({KEY: "{"})), "the certificate of .* cannot be read"),
        (partial(changed, metadata=lambda x: x.update({KEY: "[" * 9999})), "cannot be read"),
        (partial(changed, certificate=lambda x: x.update(version=9)), "it has format 9, this snows reads up"),
        (partial(changed, certificate=lambda x: x.update(zeros="many")), "expected zeros to be of type int"),
        (partial(changed, certificate=lambda x: x.pop("bytes")), "cannot be read .*bytes"),
    ],
)
@pytest.mark.parametrize("name", ["model", "packed"])
def test_bad_input_is_one_sentence_and_exit_code_2(monkeypatch, capsys, made, name, spoil, sentence):
    path = made / f"{name}.safetensors"
    spoil(path)
    code, text = verified(monkeypatch, capsys, path)
    assert code == 2, text
    assert len(text.strip().splitlines()) == 1
    with pytest.raises(ValueError, match=sentence):
        snows.verify(path)


def test_files_of_older_versions_load(made):
    for name in ("model", "packed"):
        without(made / f"{name}.safetensors")
    tiny().load_state_dict(load_file(made / "model.safetensors"))
    assert Origin.beside(snows.load(made / "packed.safetensors", tiny())) == Origin()


def test_a_thousand_edited_certificates_are_read_or_refused(made):
    path = made / "model.safetensors"
    tensors, texts = read(path)
    generator, refused, found = random.Random(0), 0, 0
    for _ in range(1000):
        text = list(texts[KEY])
        for _ in range(generator.choice((1, 2, 8))):
            text[generator.randrange(len(text))] = generator.choice('0123456789"{}[]:,-.eaN')
        path.write_bytes(to_bytes(tensors, {**texts, KEY: "".join(text)}))
        try:
            found += not snows.verify(path).holds
        except ValueError:
            refused += 1
    assert refused > 100
    assert found > 100
    assert refused + found >= 990  # a digit may have become itself


# ---------------------------------------------------------------- images and times


def test_what_was_judged_is_claimed_and_judged_again(monkeypatch, capsys, made, tmp_path, pictures):  # noqa: F811
    path = made / "model.safetensors"
    (claim,) = claims(path)["judged"]
    scores = json.loads((made / "scores.json").read_text())
    assert (claim["images"], claim["asked"], claim["samples"]) == (5, 1000, 4)
    assert (claim["top1"], claim["dense_top1"]) == (scores["pruned"], scores["dense"])
    code, text = verified(monkeypatch, capsys, path, "--trust")
    assert code == 0, text
    assert any("divergence" in x and HOLDS in x for x in text.splitlines())
    for options, why in (
        (("--images", 2), "these are other images, 2 of"),
        (("--images", 0), "no images were given"),
        (("--batch-size", 3), HOLDS),
    ):
        code, text = verified(monkeypatch, capsys, path, "--trust", *options)
        assert code == 0, text
        row = next(x for x in text.splitlines() if "divergence" in x)
        assert why in row
    code, text = verified(monkeypatch, capsys, path)
    assert code == 0, text
    assert "names test_cli:tiny, Python code that would be imported and called; add --trust" in text
    assert "no model was given" in text
    own = ("--model", "test_cli:tiny", "--data", pictures, "--crop", 32)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    code, text = verified(monkeypatch, capsys, copy, *own)
    assert code == 0, text
    assert any("divergence" in x and HOLDS in x for x in text.splitlines())


def test_one_image_in_a_thousand_may_differ(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2000, 8)
    path, labels = tmp_path / "x.safetensors", torch.randint(0, 4, (2000,))
    write_network(path, net)
    seen = Seen([(x, labels)])
    known = judgement("here", seen, *compare(net, net, seen))
    for off, holds in ((0, True), (0.1, True), (0.16, False)):  # of 2,000 images two may
        amend(path, judged=[replace(known, top1=known.top1 + off)])
        assert snows.verify(path, net, [(x[:900], labels[:900]), (x[900:], labels[900:])]).holds == holds
    amend(path, judged=[replace(known, divergence=1e-5)])
    assert not snows.verify(path, net, [(x, labels)]).holds
    amend(path, judged=[replace(known, divergence=1e-5)])
    assert snows.verify(path, net, [(x, (labels + 1) % 4)]).holds  # they are not the images


def test_the_milliseconds_that_were_asked_for_are_claimed(monkeypatch, capsys, tmp_path, pictures):  # noqa: F811
    monkeypatch.setattr(Stopwatch, "race", Counting.race)  # milliseconds by multiplications
    asked = ("--structured", "0.8", "--of", "latency", "--multiple", 1, "--at-a-time", 3)
    code, text = run(monkeypatch, capsys, *prune_tiny(pictures, tmp_path), *asked, "--judge", 0)
    assert code == 0, text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    claim = claims(tmp_path / "run" / "model.safetensors")
    (timed,) = claim["timed"]
    assert (timed["milliseconds"], timed["images"], timed["runtime"]) == (report["small_ms"], 3, "eager")
    assert "judged" not in claim
    assert "seconds" not in json.dumps(claim).replace("milliseconds", "")


@pytest.mark.parametrize(
    ("asked", "claimed"),
    [
        (("--budget", "{ms}ms", "--using", "channels,neurons"), True),
        (("--budget", "0.9", "--of", "latency", "--using", "nm,unstructured"), False),  # of packed layers
        (
            ("--budget", "0.8", "--of", "latency", "--using", "channels,neurons", "--latency", "{table}"),
            False,
        ),
        (("--budget", "0.8", "--using", "channels,neurons"), False),
    ],
)
def test_milliseconds_are_claimed_where_the_network_in_the_file_took_them(
    monkeypatch,
    capsys,
    tmp_path,
    pictures,  # noqa: F811
    asked,
    claimed,
):
    monkeypatch.setattr(Stopwatch, "race", Sparse.race)
    monkeypatch.setattr("snows.choosing.structure.has_kernel", lambda *args: True)
    table = tmp_path / "new" / "times.json"
    known = ("--model", "test_cli:tiny", "--data", pictures, "--crop", 32)
    code, text = run(monkeypatch, capsys, "measure", *known, "--out", table, "--at-a-time", 4)
    assert code == 0, text
    ms = 0.8 * Timetable.read(table).whole
    options = (x.format(ms=ms, table=table) for x in asked)
    command = (*prune_tiny(pictures, tmp_path), *options, "--multiple", 1, "--at-a-time", 4, "--judge", 0)
    code, text = run(monkeypatch, capsys, *command)
    assert code == 0, text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = claims(tmp_path / "run" / "model.safetensors").get("timed", [])
    assert [(x["milliseconds"], x["images"]) for x in found] == ([(report["small_ms"], 4)] if claimed else [])


def test_a_model_that_is_not_at_hand_leaves_what_the_file_tells(monkeypatch, capsys, made):
    source = json.loads((made / "source.json").read_text())
    (made / "source.json").write_text(json.dumps(source | {"model": "nowhere:net"}))
    code, text = verified(monkeypatch, capsys, made / "model.safetensors", "--trust")
    assert code == 0, text
    assert "what the file alone tells is checked: model: nowhere:net" in text
    given = ("--model", "nowhere:net")
    code, text = verified(monkeypatch, capsys, made / "model.safetensors", "--trust", *given)
    assert code == 2, text
    assert len(text.strip().splitlines()) == 1


def test_times_are_compared_on_the_same_machine_alone(tmp_path):
    class Told(Stopwatch):
        def race(self, runs, seconds=0.0, undecided=None):
            return Race([(x,) for x in self.tells])

    Told.tells = 9.5, 10.0, 10.5, 10.0

    net, batches, found = pruned("packed")
    path = tmp_path / "x.safetensors"
    snows.save(found, path)
    (timed,) = [Timed(**x) for x in claims(path)["timed"]]
    assert timed.milliseconds == found.report.sparse_ms
    assert (timed.images, timed.threads, timed.device) == (4, torch.get_num_threads(), "cpu")
    for changes, verdict in (
        ({"milliseconds": 11.4}, HOLDS),
        ({"milliseconds": 11.6}, DIFFERS),
        ({"milliseconds": 8.4}, DIFFERS),
        ({"machine": "an abacus"}, "not checked: another machine: 4 images at a time on "),
        ({"threads": 99}, "not checked: another machine: "),
        ({"runtime": "steam"}, "not checked: the network does not run so here"),
    ):
        amend(path, timed=[replace(timed, **changes)])
        verification = snows.verify(path, net, batches, stopwatch=Told())
        (row,) = (x for x in verification.findings if x.of.startswith("milliseconds"))
        assert row.verdict.startswith(verdict)
        assert ("times that differ: 1" in verification.summary()) == (verdict == DIFFERS)
        assert verification.holds
    Told.tells = 6.0, 10.0, 14.0, 10.0
    for milliseconds, verdict in (
        (11, HOLDS),
        (12, "not checked: half of the times here lie between "),
        (14, DIFFERS),
    ):
        amend(path, timed=[replace(timed, milliseconds=float(milliseconds))])
        verification = snows.verify(path, net, batches, stopwatch=Told())
        (row,) = (x for x in verification.findings if x.of.startswith("milliseconds"))
        assert row.verdict.startswith(verdict)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.attention(x, x, x, need_weights=False)[0])


def test_the_pattern_that_was_asked_of_an_attention_is_claimed(tmp_path):
    """Its projections have other names while it is pruned."""
    torch.manual_seed(0)
    net, batches = Attends().eval(), [torch.randn(4, 5, 6) for _ in range(4)]
    asked = {"attention.in_proj": snows.NM(3, 8), "attention.out_proj": snows.NM(2, 4)}
    snows.prune(net, batches, asked, solver=None, progress=False, out=tmp_path)
    path = tmp_path / "model.safetensors"
    assert {x["name"]: x["pattern"] for x in claims(path)["layers"]} == {
        "attention.in_proj_weight": "3:8",
        "attention.out_proj.weight": "2:4",
    }
    assert snows.verify(path, net).holds


def test_nothing_is_added_to_a_file_that_was_changed(tmp_path):
    net = nn.Sequential(nn.Linear(8, 4)).eval()
    path = tmp_path / "x.safetensors"
    write_network(path, net)
    changed(path, tensors=lambda x: x["0.bias"].add_(1))
    with pytest.raises(ValueError, match="got none or a changed file"):
        amend(path, macs=3)
    save_file(net.state_dict(), path)
    with pytest.raises(ValueError, match="got none or a changed file"):
        amend(path, macs=3)


def test_a_certificate_is_read_as_it_was_written(tmp_path):
    _, _, found = pruned("cut and packed")
    path = tmp_path / "x.safetensors"
    snows.save(found, path)
    _, texts = read(path)
    assert Certificate.read(path, texts[KEY]).text() == texts[KEY]
