"""A run's folder: locked while it is used, and nothing in it is taken that is not as it was written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_pruning import quiet, small

from snows import NM
from snows.results import storage
from snows.results.run import LOCK


def bits(net):
    return [x.clone() for x in net.state_dict().values()]


@pytest.fixture
def run(tmp_path):
    net, batches = small()
    whole, _ = quiet(net, batches, NM(2, 4), out=tmp_path)
    return net, batches, tmp_path, bits(whole)


def again(run):
    net, batches, folder, _ = run
    return quiet(net, batches, NM(2, 4), out=folder, resume=True)


def test_a_flipped_bit_in_a_layers_file_is_found_and_the_layer_fitted_again(run):
    _, _, folder, wanted = run
    path = folder / "layers" / "0001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    resumed, _ = again(run)
    assert all(torch.equal(a, b) for a, b in zip(bits(resumed), wanted, strict=True))
    assert path.read_bytes() != content


@pytest.mark.parametrize("change", ["weight", "mask", "report"])
def test_a_layers_file_of_another_kind_is_not_taken(run, change):
    _, _, folder, wanted = run
    path = folder / "layers" / "0000.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in ("weight", "mask")}, file.metadata()
    if change == "report":
        metadata["report"] = metadata["report"].replace('"kept": ', '"kept": 1')
    else:
        tensors[change] = tensors[change].double() if change == "weight" else tensors[change].to(torch.uint8)
    save_file(tensors, path, metadata)
    resumed, report = again(run)
    assert all(torch.equal(a, b) for a, b in zip(bits(resumed), wanted, strict=True))
    assert all(x.kept == x.size // 2 for x in report.layers if not x.reason)


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_pruning import quiet, small, NM
import snows
net, batches = small()
def slow(weight, statistics, pattern):
    print("inside", flush=True)
    sys.stdin.readline()
    return snows.magnitude(weight, statistics, pattern)
slow.__name__, slow.__module__ = snows.magnitude.__name__, snows.magnitude.__module__
quiet(net, batches, NM(2, 4), select=slow, out={str(tmp_path / "run")!r})
"""
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as process:
        assert process.stdout.readline() == "inside\n"
        net, batches = small()
        with pytest.raises(
            ValueError, match=r"out: .* is in use by another process; wait for it, or name another folder"
        ):
            quiet(net, batches, NM(2, 4), out=tmp_path / "run", resume=True)
        process.communicate("\n" * 10)
        assert process.returncode == 0
    _, report = quiet(net, batches, NM(2, 4), out=tmp_path / "run", resume=True)  # free again
    assert report.zeros


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    net, batches = small()
    with pytest.raises(ValueError, match="is a symbolic link"):
        quiet(net, batches, NM(2, 4), out=tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"


def test_results_do_not_go_through_a_link(run, tmp_path):
    _, _, folder, _ = run
    (folder / "elsewhere").write_text("mine")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "elsewhere")
    again(run)
    assert (folder / "elsewhere").read_text() == "mine"
    assert not (folder / "model.safetensors").is_symlink()


def test_a_run_of_an_older_version_is_refused_by_name(run):
    _, _, folder, _ = run
    path = folder / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 1}))
    with pytest.raises(
        ValueError,
        match=r"resume: .* holds a run of another version of snows \(format 1, this one writes 2\)",
    ):
        again(run)


def test_another_number_of_threads_is_told(run):
    _, _, folder, _ = run
    path = folder / "run.json"
    content = json.loads(path.read_text())
    assert content["threads"] == torch.get_num_threads()
    path.write_text(json.dumps({**content, "threads": 77}))
    _, report = again(run)
    assert report.notes == [
        f"The run began with 77 threads and ended with {torch.get_num_threads()}; the last bits of its numbers may differ "
        "from those of a run that was not interrupted."
    ]


def test_a_folder_is_free_after_an_error_before_the_first_layer(tmp_path):
    net, batches = small()

    def fails(weight, statistics, pattern):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        quiet(net, batches, NM(2, 4), select=fails, out=tmp_path)
    _, report = quiet(net, batches, NM(2, 4), out=tmp_path)
    assert report.zeros


def test_a_file_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write(tmp_path / "a", b"x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_half_written_goes_on_resume(run):
    _, _, folder, wanted = run
    half = folder / "layers" / ".0001.safetensors.abcdef"
    half.write_bytes(b"half")
    resumed, _ = again(run)
    assert not half.exists()
    assert all(torch.equal(a, b) for a, b in zip(bits(resumed), wanted, strict=True))


def test_the_same_tensors_and_metadata_make_the_same_file_whatever_stands_in_them(tmp_path):
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.arange(7),
        "é": torch.zeros(0, 2),
        "scalar": torch.tensor(True),
    }
    metadata = {
        f"key {x}": x for x in ('"quoted"', "a\tb\n\r\f\b\x00\x1f\x7f", "\\u0041/", "ß𝄞\u2028", "", "plain")
    }
    found = set()
    for order in (list(metadata), list(metadata)[::-1], sorted(metadata)) * 3:
        storage.write_tensors(tmp_path / "a", tensors, {key: metadata[key] for key in order})
        found.add((tmp_path / "a").read_bytes())
    assert len(found) == 1
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), x) for name, x in tensors.items())


def test_tensors_are_written_without_a_second_copy_of_them(tmp_path):
    net = torch.nn.Sequential(*(torch.nn.Linear(2000, 2000) for _ in range(8)))  # 128 MB
    net[1].weight = net[0].weight  # tied: one tensor in two places
    peak, now = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not peak.exists():
        pytest.skip("the system does not say how much memory a process has taken")

    def kilobytes(kind):
        return int(re.search(rf"{kind}:\s+(\d+) kB", now.read_text())[1])

    storage.write_tensors(tmp_path / "warm", {"a": torch.zeros(1)}, {})
    peak.write_text("5")  # VmHWM begins anew
    before = kilobytes("VmRSS")
    storage.write_tensors(tmp_path / "a", storage.state(net), {"key": "value"})
    assert (tmp_path / "a").stat().st_size > 128_000_000
    assert kilobytes("VmHWM") - before < 32_000  # the tied weight's second place has its own 16 MB


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path):
    script = f"""
import resource, torch
from pathlib import Path
from snows.results import storage
path = Path({str(tmp_path)!r}) / "a"
storage.write_tensors(path, {{"x": torch.ones(3)}}, {{"key": "value"}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda: storage.write_tensors(path, {{"x": torch.ones(100_000)}}, {{"key": "value"}}, "mine"),
    lambda: storage.write(path, bytes(400_000), "mine"),
):
    try:
        write()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert len(told) == 2
    assert all(
        re.fullmatch(rf"mine: {re.escape(str(tmp_path / 'a'))} cannot be written \(.*File too large.*\)", x)
        for x in told
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with safe_open(tmp_path / "a", "pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.ones(3))
