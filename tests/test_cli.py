import io
import json
import pickle
import re
import shlex
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from models import QUICK, small
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_latency import Counting
from torch import nn

import snows
from snows import cli, demo, ops, sources, zoo
from snows.choosing import candidates
from snows.choosing.measuring import Race, Stopwatch
from snows.deployment import deploy
from snows.results.machine import Machine
from snows.sources import Network, Plain


def run(monkeypatch, capsys, *args):
    """Exit code and what was printed."""
    monkeypatch.setattr("sys.argv", ["snows", *map(str, args)])
    monkeypatch.setattr(snows, "deploy", partial(deploy, stopwatch=QUICK))
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    return caught.value.code or 0, re.sub(r"\x1b\[[0-9;]*m", "", printed.out + printed.err)


def certificate(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["certificate"])


def half(module):
    """Every other weight of a Linear."""
    if isinstance(module, nn.Linear):
        module.weight.data[:, ::2] = 0


def tiny():
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), *head)


def other():
    net = tiny()
    nn.init.ones_(net[0].bias)
    return net


def fails():
    return 1 / 0


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(generator.integers(0, 255, (40, 30 + i, 3), np.uint8)).save(
                folder / kind / f"{i}.png"
            )
    (folder / "cat" / "broken.jpg").write_bytes(b"not a picture")
    return folder


def prune_tiny(pictures, folder):
    """The command that prunes `tiny` into a folder's `run`, without what is asked."""
    out = ("--out", folder / "run")
    return ("prune", "--model", "test_cli:tiny", "--data", pictures, "--crop", 32, *out)


@pytest.mark.parametrize(
    ("minutes", "code", "said"), [(5, 0, "The limit was 300 seconds"), (0, 2, "--minutes")]
)
def test_prune_takes_a_limit_of_time(monkeypatch, capsys, tmp_path, pictures, minutes, code, said):
    command = (*prune_tiny(pictures, tmp_path), "--pattern", "2:4", "--judge", 0, "--minutes", minutes)
    found, text = run(monkeypatch, capsys, *command)
    assert (found, said in " ".join(text.split())) == (code, True), text


@pytest.mark.parametrize(("share", "of"), [("70%", "macs"), ("0.7", "params"), ("0.8", "latency")])
def test_prune_takes_units_out(monkeypatch, capsys, tmp_path, pictures, share, of):
    if of == "latency":
        monkeypatch.setattr(Stopwatch, "race", Counting.race)  # milliseconds by multiplications
    code, text = run(
        monkeypatch,
        capsys,
        *prune_tiny(pictures, tmp_path),
        "--structured",
        share,
        "--of",
        of,
        "--multiple",
        1,
    )
    assert code == 0, text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    costs = {"macs": report["macs"], "params": report["parameters"]}.get(
        of, [report["dense_ms"], report["small_ms"]]
    )
    assert 0 < costs[1] < costs[0]
    if of != "latency":
        assert costs[1] <= float(share.removesuffix("%")) * (0.01 if "%" in share else 1) * costs[0]
    network = snows.load(tmp_path / "run" / "model.safetensors", tiny())
    assert sum(x.numel() for x in network.parameters()) < sum(x.numel() for x in tiny().parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "2:4", "--of", "params"], "--of: expected --budget or --structured beside it"),
        (["--pattern", "2:4", "--using", "channels"], "--using: expected --budget or --structured"),
        (["--pattern", "2:4", "--order", "hap"], "--order: expected --budget or --structured"),
        (["--pattern", "2:4", "--at-a-time", "8"], "--at-a-time: expected --budget or --structured"),
        (["--structured", "half"], "--structured: expected a share such as 0.5 or 50%, got half"),
        (["--structured", "150%"], "expected a share above 0 and below 1 that stays, got 1.5"),
        (["--budget", "fast"], "--budget: expected a share such as 0.5 or 50%, 12ms or 5MB, got fast"),
        (["--budget", "50%", "--structured", "50%"], "--structured: expected it alone, got --budget too"),
        (["--budget", "50%", "--pattern", "2:4"], "--pattern: expected it alone or beside --structured"),
        (["--budget", "50%", "--using", "magic"], "expected using to name some of channels, heads"),
        (["--structured", "50%", "--using", "nm"], "Structured: expected using to name some of channels"),
        (["--budget", "99999ms"], "expected fewer milliseconds than the network takes"),
        (["--budget", "99999MB"], "expected fewer megabytes than the network has"),
        (["--budget", "50%", "--latency", "none.json", "--of", "macs"], "--latency: expected"),
        (["--budget", "5ms", "--of", "macs"], "--of: expected latency"),
        (["--budget", "5MB", "--of", "latency"], "--of: expected bytes"),
        (["--budget", "50%", "--of", "latency", "--latency", "none.json"], "times: none.json cannot be read"),
        (["--frontier", "none.json", "--point", "2"], "frontier: none.json cannot be read"),
        (["--frontier", "none.json"], "--point: expected --frontier with a file and --point with a number"),
    ],
)
def test_options_that_do_not_belong_together(monkeypatch, capsys, tmp_path, pictures, options, message):
    code, text = run(monkeypatch, capsys, *prune_tiny(pictures, tmp_path), *options)
    assert code == 2
    assert message in " ".join(text.split())
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(("asked", "of"), [("60%", "macs"), ("0.001MB", "bytes"), ("70%", "nonzeros")])
def test_prune_by_a_budget(monkeypatch, capsys, tmp_path, pictures, asked, of):
    given = [] if of == "bytes" else ["--of", of]
    command = (*prune_tiny(pictures, tmp_path), "--budget", asked, *given, "--multiple", 1)
    code, text = run(monkeypatch, capsys, *command)
    assert code == 0, text
    network = snows.load(tmp_path / "run" / "model.safetensors", tiny()) if of == "bytes" else None
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    if of == "macs":
        assert report["macs"][1] <= 0.6 * report["macs"][0]
    assert any(x["kept"] < x["units"] for x in report["groups"])
    if network is not None:
        assert sum(x.numel() for x in network.parameters()) <= sum(x.numel() for x in tiny().parameters())


def test_measure_then_frontier_then_prune_a_point(monkeypatch, capsys, tmp_path, pictures):
    monkeypatch.setattr(Stopwatch, "race", Counting.race)  # milliseconds by multiplications
    where = ("--model", "test_cli:tiny", "--data", pictures, "--crop", 32)
    table, folder = tmp_path / "times.json", tmp_path / "frontier"
    code, text = run(monkeypatch, capsys, "measure", *where, "--out", table, "--at-a-time", 4)
    assert code == 0, text
    assert f"ms for 4 images at a time, eager, on {Machine.here('cpu')}; " in " ".join(text.split())
    command = ("frontier", *where, "--out", folder, "--latency", table, "--budgets", "90%,75%,60%")
    code, text = run(monkeypatch, capsys, *command, "--prune", 2, "--multiple", 1, "--judge", 4)
    assert code == 0, text
    assert "predicted loss" in text
    assert "judged on the same data as the calibration images" in " ".join(text.split())
    assert (folder / "point-0" / "model.safetensors").is_file()
    assert (folder / "point-2" / "model.safetensors").is_file()
    (claim,) = certificate(folder / "point-2" / "model.safetensors")["judged"]
    assert claim["images"] == 4
    # the table is taken for milliseconds without --of
    bare = prune_tiny(pictures, tmp_path / "bare")
    code, text = run(
        monkeypatch, capsys, *bare, "--budget", "75%", "--latency", table, "--multiple", 1, "--judge", 0
    )
    assert code == 0, text
    assert "Milliseconds are predicted" in text
    taken = ("--frontier", folder / "frontier.json", "--point", 1, "--judge", 0)
    code, text = run(
        monkeypatch, capsys, *prune_tiny(pictures, tmp_path), *taken, "--model", "test_cli:other"
    )
    assert code == 2
    assert "frontier: expected the network and weights that its points were chosen for" in " ".join(
        text.split()
    )
    code, text = run(monkeypatch, capsys, *prune_tiny(pictures, tmp_path), *taken)
    assert code == 0, text
    content = json.loads((folder / "frontier.json").read_text())["points"][1]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["macs"][1] == content["macs"]


def test_deploy_takes_over_what_a_budget_meant(monkeypatch, capsys, tmp_path, pictures):
    monkeypatch.setattr(Stopwatch, "race", Counting.race)
    command, run_ = prune_tiny(pictures, tmp_path), tmp_path / "run"
    asked = ("--budget", "75%", "--of", "latency", "--multiple", 1, "--judge", 0, "--at-a-time", 3)
    code, text = run(monkeypatch, capsys, *command, *asked)
    assert code == 0, text
    report = json.loads((run_ / "report.json").read_text())
    code, text = run(monkeypatch, capsys, "deploy", run_, "--trust")
    assert code == 0, text
    text = " ".join(text.split())
    assert "3 at a time on " in text
    assert f"before pruning the network took {report['dense_ms']:.4g} ms" in text
    code, text = run(monkeypatch, capsys, "deploy", run_, "--trust", "--batch-size", 2)
    assert "2 at a time on " in text
    assert "before pruning" not in text
    command = prune_tiny(pictures, tmp_path / "bytes")
    code, text = run(monkeypatch, capsys, *command, "--budget", "0.001MB", "--multiple", 1, "--judge", 0)
    assert code == 0, text
    assert re.search(r"0\.000\d+ of 0\.001\d+ million bytes, packed", text)
    code, text = run(monkeypatch, capsys, "deploy", tmp_path / "bytes" / "run", "--trust")
    assert code == 0, text
    zeros = [x for x in json.loads((tmp_path / "bytes" / "run" / "deployment.json").read_text())["layers"]]
    assert all(
        not x["reason"] or x["sparse_bytes"] >= x["dense_bytes"] for x in zeros
    )  # by size, not by speed


def test_what_is_measured_has_a_place_before_it_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(snows, "measure", None)
    (tmp_path / "file").touch()
    for out, said in (
        (tmp_path, "expected a file, got the folder"),
        (tmp_path / "file" / "x", "cannot be made"),
    ):
        code, text = run(monkeypatch, capsys, "measure", "--model", "test_cli:tiny", "--out", out)
        assert code == 2
        assert said in " ".join(text.split())


def test_prune_eval_report_and_resume(monkeypatch, capsys, tmp_path, pictures):
    out = tmp_path / "run"
    common = ["--model", "test_cli:tiny", "--data", pictures, "--crop", 32]
    prune = [
        "prune",
        *common,
        "--pattern",
        "2:4",
        "--out",
        out,
        "--samples",
        9,
        "--batch-size",
        2,
        "--horizon",
        "2",
        "--precision",
        "tf32",
    ]
    code, text = run(monkeypatch, capsys, *prune)
    assert code == 0, text
    assert "1 picture was left out: broken.jpg (no picture of a known format)" in text
    weight = load_file(out / "model.safetensors")["2.weight"]
    assert (weight.flatten(1).unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()
    assert torch.equal(load_file(out / "masks.safetensors")["2"], weight != 0)
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["pattern"] == "2:4"
    assert settings["solver"] == str(snows.Newton(precision="tf32"))
    before = (out / "model.safetensors").read_bytes()
    code, text = run(monkeypatch, capsys, *prune)
    assert code == 2
    assert "already holds a run" in text
    code, text = run(monkeypatch, capsys, *prune, "--resume")
    assert code == 0, text
    assert (out / "model.safetensors").read_bytes() == before
    code, text = run(monkeypatch, capsys, *prune, "--resume", "--seed", 1)
    assert code == 2
    assert "resume:" in text
    code, text = run(monkeypatch, capsys, "report", out)
    assert code == 0
    assert "2:4" in text
    assert "<svg" in (out / "report.html").read_text()
    code, text = run(monkeypatch, capsys, "eval", *common, "--weights", out / "model.safetensors")
    assert code == 0, text
    assert re.search(r"network +│ +(\d+) +│ ", text)[1] == "8"


def test_masks_from_a_file(monkeypatch, capsys, tmp_path, pictures):
    masks = {"2": torch.rand(8, 8, 1, 1) < 0.5}
    save_file(masks, tmp_path / "masks.safetensors")
    code, text = run(
        monkeypatch,
        capsys,
        "prune",
        "--model",
        "test_cli:tiny",
        "--data",
        pictures,
        "--crop",
        32,
        "--masks",
        tmp_path / "masks.safetensors",
        "--out",
        tmp_path / "run",
        "--samples",
        8,
    )
    assert code == 0, text
    weight = load_file(tmp_path / "run" / "model.safetensors")["2.weight"]
    assert not weight[~masks["2"]].any()
    assert weight[masks["2"]].all()


def test_info(monkeypatch, capsys):
    code, text = run(monkeypatch, capsys, "info")
    assert code == 0
    for op in ops.OPS:
        assert re.search(rf"op {op} +│? *CPU: {ops.implementation(op)}\b", text), op
    if ops.native.startswith("loaded"):
        capability = torch.backends.cpu.get_cpu_capability()
        images, few = (16, "2:4 up to 1") if capability == "AVX512" else (8, "2:4 up to 4")
        assert re.search(rf"packed layers, images innermost +│? *multiples of {images} images", text)
        assert (few in text) == (capability in ("AVX2", "AVX512"))


def test_eval_of_the_zoo(monkeypatch, capsys):
    code, text = run(
        monkeypatch,
        capsys,
        "eval",
        "--model",
        "zoo:resnet20",
        "--data",
        "zoo:fashion-mnist",
        "--batch-size",
        1000,
    )
    assert code == 0
    log = json.loads((zoo._FOLDER / "resnet20.log.json").read_text())
    assert f"{log['test']:.2f} %" in text


def test_eval_of_some_images(monkeypatch, capsys):
    options = ("--model", "zoo:resnet20", "--data", "zoo:fashion-mnist", "--images", 200)
    code, text = run(monkeypatch, capsys, "eval", *options)
    assert code == 0, text
    assert "on 200 of 10000 test images" in text
    images, labels = zoo.images("test")
    taken = [round(i * 9999 / 199) for i in range(200)]
    with torch.no_grad():
        right = int((zoo.load("resnet20")(images[taken]).argmax(1) == labels[taken]).sum())
    assert f"{right / 2:.2f} %" in text


def wrong(tmp_path, pictures):
    base = {
        "--model": "test_cli:tiny",
        "--data": pictures,
        "--pattern": "2:4",
        "--out": tmp_path / "out",
        "--crop": 32,
        "--samples": 8,
    }
    (tmp_path / "bytes").write_bytes(b"nothing")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print))
    (tmp_path / "empty").mkdir()
    for name, write in (("cut.safetensors", save_file), ("cut.pt", torch.save)):
        write(tiny().state_dict(), tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    save_file({"0.weight": torch.zeros(1), "extra": torch.zeros(1)}, tmp_path / "other.safetensors")
    return [
        (base | {"--pattern": "4:2"}, "NM: expected"),
        (base | {"--pattern": "most"}, "parse_pattern: expected"),
        (base | {"--pattern": "1.5"}, "sparsity between 0 and 1"),
        (base | {"--pattern": "3:7"}, "no layer is left"),
        (base | {"--samples": 99}, "asked for 99 images"),
        (base | {"--samples": 0}, "Invalid value for '--samples'"),
        (
            base | {"--select": "best"},
            "Invalid value for '--select': .*'best' is not one of 'alps', 'magnitude'",
        ),
        (base | {"--horizon": "far"}, "--horizon: expected"),
        (
            base | {"--targets": "none"},
            "Invalid value for '--targets': .*'none' is not one of 'dense', 'local'",
        ),
        (base | {"--model": "resnet"}, "model: expected zoo:NAME"),
        (base | {"--model": "zoo:resnet99"}, "zoo: expected one of"),
        (base | {"--model": "torchvision:resnet51"}, "model: torchvision:resnet51"),
        (base | {"--model": "nowhere:net"}, "model: nowhere:net"),
        (base | {"--data": tmp_path / "missing"}, "there is no folder"),
        (base | {"--data": tmp_path / "empty"}, "found no pictures"),
        (base | {"--data": f"cifar10:{tmp_path}"}, "expected data_batch_1.bin"),
        (base | {"--weights": tmp_path / "missing"}, "weights: there is no file"),
        (base | {"--weights": tmp_path / "bytes"}, "neither safetensors nor a whole checkpoint"),
        (base | {"--weights": tmp_path / "code.pt"}, "neither safetensors nor a whole checkpoint"),
        (base | {"--weights": tmp_path / "cut.safetensors"}, "neither safetensors nor a whole checkpoint"),
        (base | {"--weights": tmp_path / "cut.pt"}, "neither safetensors nor a whole checkpoint"),
        (
            base | {"--weights": tmp_path / "other.safetensors"},
            "missing 0.bias.*unexpected extra.*another shape 0.weight",
        ),
        (base | {"--masks": tmp_path / "bytes"}, "--masks: .* is not a safetensors file"),
        (base | {"--mean": "grey"}, "--mean: expected numbers"),
        (base | {"--mean": "0.1,0.2"}, "expected three finite means"),
        (base | {"--crop": -3}, "Invalid value for '--crop'"),
        (base | {"--seed": -1}, "Invalid value for '--seed'"),
        (base | {"--horizon": "²"}, "--horizon: expected"),
        (base | {"--cap": 2, "--pattern": "0.5"}, "cap to be above 0 and at most 1, got 2"),
        (base | {"--pattern": "0.99"}, "raise the cap"),
        (base | {"--model": "zoo:resnet20"}, "cannot run a batch of torch.float32 of"),
        (base | {"--model": "test_cli:fails"}, "could not be built .division by zero"),
        (base | {"--model": ":net"}, "model: expected zoo:NAME"),
        (base | {"--out": tmp_path / "bytes" / "run"}, "out: .* cannot be written"),
    ]


with tempfile.TemporaryDirectory() as _folder:
    MISTAKES = len(wrong(Path(_folder), Path(_folder)))


@pytest.mark.parametrize("index", range(MISTAKES))
def test_a_mistake_is_one_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path, pictures, index):
    options, message = wrong(tmp_path, pictures)[index]
    code, text = run(monkeypatch, capsys, "prune", *(x for pair in options.items() for x in pair))
    assert code == 2, text
    assert re.search(message, text), text
    assert "Traceback" not in text
    assert not list((tmp_path / "out").rglob("*"))  # nothing half-written


def test_a_folder_of_somebody_elses_weights_is_left_alone(monkeypatch, capsys, tmp_path, pictures):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    code, text = run(
        monkeypatch,
        capsys,
        "prune",
        "--model",
        "test_cli:tiny",
        "--data",
        pictures,
        "--crop",
        32,
        "--pattern",
        "2:4",
        "--samples",
        8,
        "--out",
        tmp_path,
    )
    assert code == 2
    assert "which no run there has written" in text
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_eval_of_nothing_and_of_images_that_do_not_fit(monkeypatch, capsys, tmp_path, pictures):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"nothing")
    for options, message in (
        (("--model", "test_cli:tiny", "--data", tmp_path / "bad"), "none of the pictures"),
        (("--model", "zoo:resnet20", "--data", pictures, "--crop", 32), "cannot run a batch"),
        (
            ("--model", "test_cli:tiny", "--data", pictures, "--batch-size", 0),
            "Invalid value for '--batch-size'",
        ),
    ):
        code, text = run(monkeypatch, capsys, "eval", *options)
        assert code == 2, text
        assert message in text


@pytest.fixture
def pruned(monkeypatch, capsys, tmp_path, pictures):
    out = tmp_path / "pruned"
    code, text = run(
        monkeypatch,
        capsys,
        "prune",
        "--model",
        "test_cli:tiny",
        "--data",
        pictures,
        "--crop",
        32,
        "--pattern",
        "2:4",
        "--out",
        out,
        "--samples",
        8,
        "--select",
        "magnitude",
        "--horizon",
        0,
    )
    assert code == 0, text
    return out


def test_deploy_bench_export_and_eval_of_a_run(monkeypatch, capsys, pruned, pictures, tmp_path):
    packed, figures = tmp_path / "packed.safetensors", tmp_path / "figures.json"
    code, text = run(
        monkeypatch,
        capsys,
        "deploy",
        pruned,
        "--out",
        packed,
        "--objective",
        "size",
        "--batch-size",
        2,
        "--trust",
    )
    assert code == 0, text
    assert "1 of 1 layers with zeros are packed" in text
    assert (
        f"next: snows eval --model test_cli:tiny --data {pictures} --weights {packed} --crop 32"
        in text.splitlines()
    )
    weights = load_file(pruned / "model.safetensors")
    stored = load_file(packed)
    assert torch.equal(
        stored["2.values"].flatten(),
        weights["2.weight"].permute(0, 2, 3, 1)[weights["2.weight"].permute(0, 2, 3, 1) != 0],
    )
    scores = []
    for file in (packed, pruned / "model.safetensors"):
        code, text = run(
            monkeypatch,
            capsys,
            "eval",
            "--model",
            "test_cli:tiny",
            "--weights",
            file,
            "--data",
            pictures,
            "--crop",
            32,
            "--dense",
            pruned / "model.safetensors",
        )
        assert code == 0, text
        scores.append(re.findall(r"[\d.]+ %", text))
    assert scores[0] == scores[1]

    code, text = run(
        monkeypatch, capsys, "bench", pruned, "--batch-sizes", "1,3", "--out", figures, "--trust"
    )
    assert code == 0, text
    assert [batch["samples"] for batch in json.loads(figures.read_text())["batches"]] == [1, 3]

    onnx, program, dense = (tmp_path / name for name in ("x.onnx", "x.pt2", "dense.safetensors"))
    files = ["--onnx", onnx, "--torch", program, "--dense", dense]
    code, text = run(monkeypatch, capsys, "export", pruned, *files, "--trust")
    assert code == 0, text
    assert "for any number of images at a time" in text
    assert all(torch.equal(v, weights[k]) for k, v in load_file(dense).items())
    import onnxruntime

    net = tiny()
    net.load_state_dict(weights)
    x = torch.randn(5, 3, 32, 32)  # another number of images than it was exported with
    with torch.no_grad():
        want = net(x)
    torch.testing.assert_close(torch.export.load(program).module()(x), want, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(str(onnx))
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]),
        want,
        rtol=1e-4,
        atol=1e-5,
    )


def test_deploy_and_bench_race_in_the_runtime_that_the_goal_named(monkeypatch, capsys, pruned):
    monkeypatch.setattr(candidates, "ready", lambda net, example, runtime: net)
    deploy = ["deploy", pruned, "--objective", "size", "--batch-size", 2, "--trust"]

    def raced(*more):
        code, text = run(monkeypatch, capsys, *deploy, *more)
        assert code == 0, text
        found = json.loads((pruned / "deployment.json").read_text())
        return found["runtime"], [row["runtime"] for row in found["runtimes"]]

    assert raced() == ("eager", ["eager"])
    assert raced("--runtime", "fastest")[1] == ["eager", "compile"]
    path = pruned / "report.json"
    content = json.loads(path.read_text())
    content["settings"]["runtime"] = "compile"  # as `prune --of latency --runtime compile` writes it
    path.write_text(json.dumps(content))
    assert raced() == ("compile", ["compile"])
    assert raced("--runtime", "eager") == ("eager", ["eager"])
    code, text = run(monkeypatch, capsys, "bench", pruned, "--batch-sizes", "2", "--trust")
    assert code == 0, text
    assert json.loads((pruned / "bench.json").read_text())["batches"][0]["runtime"] == "compile"
    content["settings"]["runtime"] = ["x"]
    path.write_text(json.dumps(content))
    code, text = run(monkeypatch, capsys, *deploy)
    assert (code, "names no runtime (['x']); say which with --runtime" in text) == (2, True)


def test_what_deploy_bench_and_export_refuse(monkeypatch, capsys, pruned, tmp_path):
    out = tmp_path / "x.safetensors"
    for arguments, sentence in (
        (["deploy", tmp_path, "--out", out], "is not the folder of a finished run"),
        (["deploy", pruned, "--out", out, "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["deploy", pruned, "--out", out, "--batch-size", 0], "Invalid value for '--batch-size'"),
        (["deploy", pruned, "--out", out, "--batch-size", 99, "--trust"], "asked for 99 images, but"),
        (["deploy", pruned, "--out", out, "--objective", "fast"], "Invalid value for '--objective'"),
        (["deploy", pruned, "--out", out, "--runtime", "onnx"], "Invalid value for '--runtime'"),
        (["deploy", pruned, "--runtime", "cuda-graph", "--trust"], "a CUDA graph needs a network on a CUDA"),
        (
            ["deploy", pruned, "--out", tmp_path / "no" / "x", "--objective", "size", "--trust"],
            "cannot be written",
        ),
        (["deploy", pruned, "--out", pruned / "model.safetensors"], "is a file of the run itself"),
        (["bench", pruned, "--out", pruned / "run.json"], "is a file of the run itself"),
        (["export", pruned, "--dense", pruned / "." / "model.safetensors"], "is a file of the run itself"),
        (["bench", pruned, "--batch-sizes", "1,two"], "--batch-sizes: expected numbers"),
        (["export", pruned], "got none of them"),
        (["export", pruned, "--onnx", tmp_path / "no" / "x.onnx", "--trust"], "could not be written"),
        (["export", pruned, "--torch", tmp_path / "no" / "x.pt2", "--trust"], "could not be written"),
        (["export", pruned, "--torch", pruned / "model.safetensors"], "is a file of the run itself"),
    ):
        code, text = run(monkeypatch, capsys, *arguments)
        assert code == 2, text
        assert sentence in text
        assert "Traceback" not in text
    assert not out.exists()
    weights = (pruned / "model.safetensors").read_bytes()
    snows.save(
        small(nn.Sequential(nn.Linear(4, 4)).apply(half).eval(), torch.randn(2, 4)),
        pruned / "model.safetensors",
    )
    code, text = run(monkeypatch, capsys, "export", pruned, "--dense", out)
    assert code == 2
    assert "is packed" in text
    (pruned / "model.safetensors").write_bytes(weights)
    (pruned / "source.json").write_text("{}")
    code, text = run(monkeypatch, capsys, "deploy", pruned, "--out", out)
    assert code == 2
    assert "source.json is damaged" in text


def test_prune_ends_with_what_it_made_and_the_next_command(monkeypatch, capsys, tmp_path, pictures):
    out = tmp_path / "a run"
    options = [
        "--model",
        "test_cli:tiny",
        "--data",
        pictures,
        "--crop",
        32,
        "--pattern",
        "2:4",
        "--samples",
        4,
        "--select",
        "magnitude",
        "--horizon",
        0,
    ]
    code, text = run(monkeypatch, capsys, "prune", *options, "--out", out)
    assert code == 0, text
    lines = text.splitlines()
    (dense,), (pruned,) = (
        [re.findall(r"[\d.]+", x) for x in lines if name in x and "%" in x]
        for name in ("│ dense ", "│ pruned ")
    )
    net, images = (
        tiny().eval(),
        sources.load_data(str(pictures), Network(tiny(), "", Plain().override(crop=32)), "test"),
    )
    used = images.drawn(4, 0)
    ((x, labels),) = images.spread(1000, 100, used)
    after = tiny().eval()
    after.load_state_dict(load_file(out / "model.safetensors"))
    with torch.no_grad():
        first, second = net(x), after(x)
    assert dense == [str(len(x)), f"{100 * (first.argmax(1) == labels).double().mean():.2f}", "100.00"]
    assert pruned[:3] == [str(len(x)), f"{100 * (second.argmax(1) == labels).double().mean():.2f}", "100.00"]
    assert pruned[3] == f"{100 * (first.argmax(1) == second.argmax(1)).double().mean():.2f}"
    assert "which has no test split, but not of these images" in text
    assert f"next: snows deploy '{out}' --trust" in lines
    code, text = run(monkeypatch, capsys, "prune", *options, "--out", tmp_path / "b", "--judge", 0)
    assert code == 0, text
    assert "agreement" not in text
    code, text = run(
        monkeypatch, capsys, "prune", *options, "--out", tmp_path / "c", "--labels", tmp_path / "none"
    )
    assert code == 0, text  # what was pruned is there all the same
    assert "the result will not be judged: labels: expected a flat folder" in text
    assert (tmp_path / "c" / "model.safetensors").exists()


def test_code_that_somebody_else_s_folder_names_runs_only_when_told(monkeypatch, capsys, pruned, tmp_path):
    (tmp_path / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef net():\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = json.loads((pruned / "source.json").read_text())
    out = tmp_path / "x.safetensors"
    for entry in ("model", "data"):
        (pruned / "source.json").write_text(json.dumps(source | {"model": "zoo:vit"} | {entry: "evil:net"}))
        for command in (["deploy", "--out", out], ["bench"], ["export", "--dense", out]):
            code, text = run(monkeypatch, capsys, command[0], pruned, *command[1:])
            assert code == 2
            assert re.search(
                rf"source.json names evil:net, Python code that would be imported and called; add --trust .* --{entry}",
                text,
            )
    assert not (tmp_path / "ran").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil:net").touch()  # a file of that name makes it no folder of pictures
    (pruned / "source.json").write_text(json.dumps(source | {"model": "evil:net", "data": "evil:net"}))
    for options in ((), ("--model", "zoo:vit")):
        code, text = run(monkeypatch, capsys, "export", pruned, "--dense", out, *options)
        assert code == 2
        assert "add --trust" in text
    assert not (tmp_path / "ran").exists()
    (pruned / "source.json").write_text(
        json.dumps(source | {"model": "zoo:vit", "data": f"torchvision:MNIST:{tmp_path / 'theirs'}"})
    )
    code, text = run(monkeypatch, capsys, "bench", pruned)
    assert code == 2
    assert not (tmp_path / "theirs").exists()  # nor is anything fetched to where it says
    (pruned / "source.json").write_text(json.dumps(source | {"model": "evil:net"}))
    code, text = run(monkeypatch, capsys, "export", pruned, "--dense", out, "--model", "test_cli:tiny")
    assert code == 0, text
    assert not (tmp_path / "ran").exists()
    code, text = run(monkeypatch, capsys, "export", pruned, "--dense", out, "--trust")
    assert code == 2
    assert "expected evil:net to return an nn.Module" in text
    assert (tmp_path / "ran").exists()


def test_weights_and_what_is_to_say_of_a_network_go_on_into_the_next_command(
    monkeypatch, capsys, tmp_path, pictures
):
    state = {k: v + 0.01 for k, v in tiny().state_dict().items()}
    save_file(state, tmp_path / "mine.safetensors")
    monkeypatch.setattr(
        sources,
        "load_model",
        lambda *a, load=sources.load_model, **k: replace(load(*a, **k), note="a [b]note[/b]"),
    )
    out = tmp_path / "run"
    code, text = run(
        monkeypatch,
        capsys,
        "prune",
        "--model",
        "test_cli:tiny",
        "--weights",
        tmp_path / "mine.safetensors",
        "--data",
        pictures,
        "--crop",
        32,
        "--pattern",
        "2:4",
        "--samples",
        4,
        "--select",
        "magnitude",
        "--horizon",
        0,
        "--out",
        out,
    )
    assert code == 0, text
    assert "a [b]note[/b]" in text
    code, text = run(monkeypatch, capsys, "deploy", out, "--trust", "--objective", "size", "--batch-size", 2)
    assert code == 0, text
    (following,) = (x for x in text.splitlines() if x.startswith("next: snows "))
    assert f"--dense {tmp_path / 'mine.safetensors'}" in following
    code, text = run(monkeypatch, capsys, *shlex.split(following)[2:])
    assert code == 0, text
    assert "│ dense " in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("source.json", "[]"),
        ("source.json", "{"),
        ("source.json", '{"model": 3}'),
        ("source.json", {"crop": "32"}),
        ("source.json", {"crop": 0}),
        ("source.json", {"mean": [1, "a", 2]}),
        ("source.json", {"model": None}),
        ("source.json", {"more": 1}),
        ("source.json", {"weights": 3}),
        ("source.json", {"random_weights": None}),
        ("source.json", b"\xff\xfe"),
        ("report.json", "[]"),
        ("report.json", "{"),
        ("report.json", '{"layers": 3}'),
        ("report.json", '{"layers": [{"name": 3}]}'),
        ("report.json", '{"layers": [], "notes": [3]}'),
        ("report.json", b"\xff\xfe"),
        ("report.json", '{"layers": [], "settings": 7}'),
    ],
)
def test_an_edited_file_of_a_run_is_one_sentence(monkeypatch, capsys, pruned, file, content, tmp_path):
    if isinstance(content, dict):
        content = json.dumps(json.loads((pruned / file).read_text()) | content)
    (pruned / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    command = (
        ["export", pruned, "--dense", tmp_path / "x", "--trust"]
        if file == "source.json"
        else ["report", pruned]
    )
    code, text = run(monkeypatch, capsys, *command)
    assert code == 2, text
    assert f"{file} is " in text.replace("\n", " ")
    assert len(text.strip().splitlines()) == 1


def test_no_link_in_a_run_s_folder_leads_to_a_file_that_is_written(monkeypatch, capsys, pruned, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("report.html.partial", "report.html", "bench.json.partial", "bench.json", ".report.html.x"):
        (pruned / name).unlink(missing_ok=True)
        (pruned / name).symlink_to(victim)
    code, text = run(monkeypatch, capsys, "report", pruned)
    assert code == 0, text
    code, text = run(monkeypatch, capsys, "bench", pruned, "--trust", "--batch-sizes", 1)
    assert code == 0, text
    assert victim.read_text() == "precious"
    assert not (pruned / "report.html").is_symlink()
    assert "<svg" in (pruned / "report.html").read_text()


def test_a_finished_layer_is_a_file_of_the_run(monkeypatch, capsys, pruned):
    layer = next((pruned / "layers").iterdir())
    code, text = run(monkeypatch, capsys, "bench", pruned, "--trust", "--out", layer)
    assert code == 2
    assert "is a file of the run itself" in text


def test_what_a_terminal_would_obey_is_not_printed(monkeypatch, capsys, pruned):
    content = json.loads((pruned / "report.json").read_text())
    content["notes"] = ["a \x1b]0;title\x07 note"]
    content["layers"][0]["name"] = "layer\x1b[2J"
    (pruned / "report.json").write_text(json.dumps(content))
    monkeypatch.setattr("sys.argv", ["snows", "report", str(pruned)])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "a \ufffd]0;title\ufffd note" in text
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text


def test_out_that_became_a_file_is_one_sentence(monkeypatch, capsys, pruned, tmp_path):
    (tmp_path / "file").write_text("mine")
    for command in (
        ["deploy", pruned, "--objective", "size", "--trust", "--out", tmp_path / "file" / "x"],
        ["export", pruned, "--trust", "--dense", tmp_path / "file" / "x"],
    ):
        code, text = run(monkeypatch, capsys, *command)
        assert code == 2
        assert "cannot be written" in text
        assert "Traceback" not in text
    assert (tmp_path / "file").read_text() == "mine"


def test_a_device_that_is_not_there_is_told_before_anything_is_done(
    monkeypatch, capsys, pruned, pictures, tmp_path
):
    for command in (
        [
            "prune",
            "--model",
            "test_cli:tiny",
            "--data",
            pictures,
            "--pattern",
            "2:4",
            "--out",
            tmp_path / "new",
        ],
        ["demo"],
        ["eval", "--model", "test_cli:tiny", "--data", pictures],
        ["deploy", pruned],
        ["bench", pruned],
    ):
        code, text = run(monkeypatch, capsys, *command, "--device", "cuda:77")
        assert code == 2
        assert "--device: expected one that is there, got cuda:77" in text
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "dense is faster"])
def test_demo_judges_what_it_leaves(packs, monkeypatch, tmp_path):
    """The accuracy in the table is that of the weights in the folder, on as many test images as were asked for."""
    times = (
        [[2.0, 1.0], [3.0, 2.5, 1.5, 1.5]] if packs else [[1.0, 2.0], [3.0, 2.5, 2.5, 2.5]]
    )  # dense first: of a layer, of the network

    class Told(Stopwatch):
        def race(self, runs, seconds=0.0, undecided=None):
            return Race([tuple(times[len(runs) > 2][: len(runs)])] * 5)

    monkeypatch.setattr(
        snows.SparseConv2d, "kernel", "native"
    )  # where no kernel was built they are no candidates
    monkeypatch.setattr(snows.SparseLinear, "kernel", "native")
    console = Console(file=io.StringIO(), width=200)
    demo.run(
        tmp_path,
        console,
        96,
        cases=(("resnet20", snows.NM(1, 4)),),
        batches=zoo.calibration(32, 8),
        stopwatch=Told(),
        compiled=False,
    )
    printed = console.file.getvalue()
    assert "on the first 96 test images" in printed
    dense, (images, labels) = zoo.load("resnet20"), zoo.images("test")

    def percent(net):
        with torch.no_grad():
            return f"{100 * (net(images[:96]).argmax(1) == labels[:96]).double().mean().item():.2f}"

    pruned = zoo.load("resnet20")
    pruned.load_state_dict(load_file(tmp_path / "resnet20-1-4.safetensors"))
    weight = pruned.get_parameter("layer1.0.conv1.weight")
    assert ((weight.permute(0, 2, 3, 1).unflatten(-1, (-1, 4)) != 0).sum(-1) <= 1).all()
    accuracy, deployed = (x for x in printed.splitlines() if "resnet20" in x)
    assert percent(dense) in accuracy
    assert percent(pruned) in accuracy
    path = tmp_path / "resnet20-1-4.packed.safetensors"
    assert f" {20 if packs else 0} of 20 " in deployed
    assert path.exists() == packs
    if packs:
        packed = snows.load(path, dense)
        assert sum(isinstance(m, snows.SparseConv2d | snows.SparseLinear) for m in packed.modules()) == 20
        with torch.no_grad():
            assert (packed(images[:96]) - pruned(images[:96])).abs().max() < 1e-4 * pruned(
                images[:96]
            ).abs().max()
    assert "resnet20 1:4" in (tmp_path / "report.html").read_text()


def test_the_demo_ends_with_what_a_budget_gave(monkeypatch, tmp_path):
    monkeypatch.setattr(Stopwatch, "race", Counting.race)  # milliseconds by multiplications
    console = Console(file=io.StringIO(), width=200)
    goal = snows.Budget(0.7, of="latency", runtime="compile", images=8, using=("channels",))
    batches = zoo.calibration(32, 8)
    rows = demo.run(tmp_path, console, 96, cases=(("resnet20", goal),), batches=batches, compiled=False)
    last = console.file.getvalue().strip().splitlines()[-1]
    found = re.fullmatch(
        r"resnet20: ([\d.]+) times as fast, (-?[\d.]+) points lost, (\d+) % of the bytes", last
    )
    assert found, last
    assert float(found[1]) == pytest.approx(rows[0]["dense ms"] / rows[0]["snows ms"], abs=0.01)
    assert float(found[1]) > 1.3
    assert float(found[2]) == pytest.approx(rows[0]["dense"] - rows[0]["snows"], abs=0.01)
    network = snows.load(tmp_path / "resnet20-1.43-times-as-fast.safetensors", zoo.load("resnet20"))
    assert sum(p.numel() for p in network.parameters()) < 0.9 * 272474


@pytest.mark.parametrize("command", ["prune", "frontier", "measure"])
def test_what_is_stopped_early_says_that_nothing_is_kept(monkeypatch, capsys, tmp_path, pictures, command):
    def stop(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(snows, command, stop)
    asked = {"prune": ["--pattern", "2:4"], "frontier": [], "measure": []}[command]
    where = ["--model", "test_cli:tiny", "--data", pictures, "--crop", 32, "--out", tmp_path / "out"]
    code, text = run(monkeypatch, capsys, command, *where, *asked)
    assert code == 130
    assert text.strip().endswith("stopped before there was anything to keep")
