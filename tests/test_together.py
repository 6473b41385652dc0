"""Several processes prune one network as one process does."""

import copy
import functools
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import settle
from test_latency import Counting
from test_taking import Net

import snows
from snows import NM, Budget, Structured, Unstructured, together
from snows.choosing.measuring import Stopwatch
from snows.cli import processes as processes_of_torchrun
from snows.matching.losses import Matching
from snows.matching.metrics import OutputSensitivity
from snows.networks.batches import Batch
from snows.results.run import Run
from snows.solving.newton import Newton
from snows.solving.preconditioners import Factors, RowBlocks


def subject(dtype=torch.float64):
    torch.manual_seed(0)
    net = settle(Net()).to(dtype)
    generator = torch.Generator().manual_seed(1)
    sizes = (7, 7, 2, 7)  # of the third, one of three processes has none
    return net, [torch.randn(n, 3, 8, 8, generator=generator).to(dtype) for n in sizes]


def pruned(goal, dtype=torch.float64, **settings):
    net, batches = subject(dtype)
    settings = {"matching": Matching(2), "solver": Newton(max_iterations=3), "progress": False, **settings}
    found = snows.prune(net, batches, goal, **settings)
    return found.network.state_dict(), found.masks, [(x.name, x.after) for x in found.report.layers]


def _work(rank, size, folder, work, args):
    torch.set_num_threads(1)
    together.WORTH = 0  # so that rows are shared out, of layers as small as these too
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    try:
        found = work(*args)
    except Exception:
        found = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def processes(size, folder, work, *args):
    """What each of several processes returns; None of one that ended before."""
    folder.mkdir()
    context = mp.get_context("spawn")
    all_ = [context.Process(target=_work, args=(i, size, str(folder), work, args)) for i in range(size)]
    for each in all_:
        each.start()
    for each in all_:
        each.join()
    paths = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


GOALS = {
    "2:4": (NM(2, 4), {"select": snows.sparsegpt}),
    "published": (
        NM(2, 4),
        {"select": snows.magnitude, "matching": Matching.published(2), "solver": Newton.published(3)},
    ),
    "variance": (Unstructured(0.6), {"select": snows.wanda, "matching": Matching(2, metric="variance")}),
    "structured": (Structured(0.6, multiple=2), {}),
    "budget": (Budget(0.5, multiple=2), {}),
    "memory": (NM(2, 4), {"select": snows.wanda, "memory": "1.5MB"}),
    "hap": (Structured(0.7, multiple=2, using=("channels",), order="hap"), {}),
}


def close(a, b, atol=1e-6):
    """The same network to rounding; what ends iterations at a tolerance would amplify that."""
    (net, masks, losses), (net_, masks_, losses_) = a, b
    assert net.keys() == net_.keys()
    for key in net:
        assert net[key].shape == net_[key].shape, key
        assert (net[key] - net_[key]).abs().max() <= atol * (1 + net[key].abs().max()), key
    assert all(torch.equal(masks[key], masks_[key]) for key in masks)
    assert [x for x, _ in losses] == [x for x, _ in losses_]
    one, other = (torch.tensor([x for _, x in rows]) for rows in (losses, losses_))
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-12, equal_nan=True)


def identical(a, b):
    return all(torch.equal(a[0][key], b[0][key]) for key in a[0]) and a[0].keys() == b[0].keys()


def all_goals(names=tuple(GOALS)):
    return {name: pruned(GOALS[name][0], **GOALS[name][1]) for name in names}


class Moments:
    """What selectors ask of a layer's statistics: rows of two groups, whose inputs are correlated."""

    def __init__(self, rows, columns):
        generator = torch.Generator().manual_seed(2)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        x, g = draw(2, 3 * columns, columns) @ draw(columns, columns), draw(2, rows, 3)
        self.gram, self.sensitivity = x.mT @ x / len(x), g @ g.mT + torch.eye(rows, dtype=torch.float64)
        self.weight = draw(2 * rows, columns, 1, 1)

    def cross(self, weight):
        return weight.view(2, -1, self.gram.shape[-1]) @ self.gram


def chosen():
    """What selectors and a preconditioner make of their shares of a layer's rows."""
    found = {"own": together.Rows(7, 0).own}
    for shape in ((5, 8), (330, 12)):  # few directions of the wider one weigh more
        moments = Moments(*shape)
        for name in ("alps", "sparsegpt", "least_squares"):
            found[name, shape] = getattr(snows, name)(moments.weight, moments, NM(2, 4))
        mask = found["alps", shape].mask
        blocks = RowBlocks(Factors(moments.gram, moments.sensitivity), mask, 0.01)
        found["rows", shape] = blocks @ (moments.weight * mask)
    return found


class Turned(torch.nn.Module):
    """A network of whose outputs one has samples in its second dimension."""

    def __init__(self):
        super().__init__()
        self.one, self.other = torch.nn.Linear(3, 9), torch.nn.Linear(9, 4)

    def forward(self, x):
        y = self.one(x).relu()
        return self.other(y), y.mean(1).mT


def measured():
    """How strongly outputs depend on operations: by case, the metrics' matrices."""
    net, batches = subject()
    torch.manual_seed(3)
    turned = settle(Turned()).double()
    cases = {
        "7 samples": (net, batches[0]),
        "2 samples": (net, batches[2]),  # of three processes one has none
        "turned": (turned, torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(4)).double()),
    }
    found = {}
    for case, (model, x) in cases.items():
        sensitivity = OutputSensitivity(model, Batch.of(x), 5)
        assert not sensitivity.note
        for name, metric in sensitivity.of(sensitivity._metrics).items():
            width = metric.basis.shape[0]
            found[case, name] = metric.matrix(width)
    return found


def sentence(work):
    """The error that something raises."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def of_two(folder):
    """What two processes find, one thing after the other."""
    rank, (net, batches) = dist.get_rank(), subject()
    found = {"goals": all_goals(), "again": all_goals(["2:4"])["2:4"]}
    found["float32"] = pruned(NM(2, 4), torch.float32, select=snows.wanda)

    def prune(model=net, data=batches, goal=None, **settings):
        return snows.prune(model, data, goal or Structured(0.6), progress=False, **settings)

    other = copy.deepcopy(net)
    torch.nn.init.normal_(other.conv1.weight)
    found["model"] = sentence(lambda: prune(model=other if rank else net))
    found["architecture"] = sentence(lambda: prune(model=Turned() if rank else net))
    found["data"] = sentence(lambda: prune(data=batches[: 4 - rank]))
    found["settings"] = sentence(lambda: prune(solver=Newton(passes=1 + rank)))
    found["seconds"] = sentence(lambda: prune(seconds=100.0 + rank))
    found["memory"] = sentence(lambda: prune(data=batches[:1], memory=600_000))  # three and four pictures
    with together.alone():
        found["alone"] = all_goals(["2:4"])["2:4"]
    if rank == 0:
        found["frontier"] = len(snows.frontier(net, batches, Budget(0.6), (0.8,), progress=False).points)
    found["first"] = together.first(lambda: rank), sentence(lambda: together.first(lambda: int("x")))
    with pytest.MonkeyPatch.context() as patch:
        # milliseconds by multiplications in the first process; the other one has nothing to time with
        patch.setattr(Stopwatch, "race", None if rank else Counting.race)
        found["timed"] = pruned(Structured(0.6, of="latency", multiple=2), torch.float32, solver=None)
    found["limited"] = prune(goal=NM(2, 4), seconds=1.5).report.notes
    (folder / "run").mkdir(exist_ok=True)
    keep, count = Run.keep, 0

    def stopping(run, *args):
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        keep(run, *args)

    Run.keep = stopping
    try:
        pruned(GOALS["2:4"][0], out=folder / "run", **GOALS["2:4"][1])
    except KeyboardInterrupt:
        found["layers"] = len(list((folder / "run" / "layers").iterdir()))
    return found


@pytest.fixture(scope="module")
def alone():
    return all_goals()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    found = processes(2, folder / "a", of_two, folder)
    assert not any(isinstance(x, str) for x in found), found
    return folder, found


@pytest.mark.parametrize("goal", GOALS)
def test_two_processes_agree_with_one(alone, two, goal):
    one, other = (x["goals"][goal] for x in two[1])
    close(alone[goal], one)
    assert identical(one, other)


def of_three(goals):
    return all_goals(goals), chosen(), measured()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return processes(3, tmp_path_factory.mktemp("three") / "a", of_three, ("2:4", "variance", "budget"))


def test_three_processes_of_which_one_has_no_sample_of_a_batch_agree_with_one(alone, three):
    found = [x[0] for x in three]
    for goal, one in found[0].items():
        close(alone[goal], one)
        assert all(identical(one, x[goal]) for x in found)


def test_rows_that_processes_share_out_are_those_of_one(three):
    alone, shared = chosen(), [x[1] for x in three]
    assert alone.pop("own") == slice(0, 7)
    assert [x.pop("own") for x in shared] == [slice(0, 2), slice(2, 4), slice(4, 7)]
    for key, found in alone.items():
        for other in shared:
            if key[0] == "rows":
                assert torch.allclose(found, other[key], rtol=1e-9, atol=1e-12)
                continue
            assert torch.equal(found.mask, other[key].mask), key
            assert torch.allclose(found.weight, other[key].weight, rtol=1e-6, atol=1e-9), key
            assert torch.equal(other[key].weight, shared[0][key].weight)


def test_output_sensitivity_that_processes_measure_is_that_of_one(three):
    alone, shared = measured(), [x[2] for x in three]
    assert {case for case, _ in alone} == {"7 samples", "2 samples", "turned"}
    for other in shared:
        assert other.keys() == alone.keys()
        for key, found in alone.items():
            assert torch.equal(other[key], shared[0][key]), key
            if key[0] != "turned":  # its noise is drawn a process, so that it is another estimate of the same
                assert torch.allclose(other[key], found, rtol=1e-8, atol=1e-10 * found.abs().max()), key


def test_a_repeated_run_gives_the_same_bits(two):
    for each in two[1]:
        assert identical(each["goals"]["2:4"], each["again"])


def test_single_precision_gives_the_same_masks_and_losses(two):
    # ALPS is left out: rounding of 1e-8 in its Gram matrix changes a tenth of its mask, and its loss by a per cent
    _, masks, losses = pruned(NM(2, 4), torch.float32, select=snows.wanda)
    _, masks_, losses_ = two[1][0]["float32"]
    same = sum(int((masks[key] == masks_[key]).sum()) for key in masks)
    assert same >= 0.999 * sum(x.numel() for x in masks.values())
    for (name, one), (name_, other) in zip(losses, losses_, strict=True):
        assert name == name_
        assert one != one or abs(one - other) <= 0.01 * abs(one) + 1e-9


def test_processes_with_different_arguments_are_told_which(two):
    wanted = {
        "model": "the same conv1.weight of the model in all processes, got others in process 1 of 2",
        "architecture": "the same model, scale of the model, gamma of the model and 26 more in all processes",
        "data": "the same number of calibration batches, calibration batch 4 in all processes",
        "settings": "the same solver in all processes",
        "seconds": "the same seconds in all processes",
    }
    for each in two[1]:
        for name, text in wanted.items():
            assert text in each[name]
        assert each["first"][0] == 0
        assert "invalid literal for int" in each["first"][1]


def test_a_bound_that_is_too_small_for_one_is_told_to_all(two):
    one, other = (x["memory"] for x in two[1])
    assert one == other
    assert one.startswith("memory: expected at least ")


def test_one_process_alone_works_in_a_group(alone, two):
    for each in two[1]:
        assert identical(alone["2:4"], each["alone"])
    assert two[1][0]["frontier"] == 1


def test_a_limit_of_time_is_one_for_all(two):
    notes = [x["limited"] for x in two[1]]
    assert notes[0] == notes[1]
    assert any(x.startswith("The limit was 1.5 seconds") for x in notes[0])


def test_a_budget_of_milliseconds_is_chosen_by_what_the_first_has_timed(two):
    (net, masks, losses), other = (x["timed"] for x in two[1])
    assert identical((net, masks, losses), other)
    wide = subject()[0].state_dict()
    assert sum(x.numel() for x in net.values()) < sum(x.numel() for x in wide.values())


@pytest.mark.parametrize("change", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}])
def test_a_group_that_is_not_there_is_a_sentence(monkeypatch, change):
    monkeypatch.setattr(processes_of_torchrun, "SIZE", 2)
    monkeypatch.setattr(processes_of_torchrun, "JOINING", timedelta(seconds=1))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **change}.items():
        monkeypatch.setenv(name, value)
    before = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    wanted = "expected 2 processes, as WORLD_SIZE says, got no connection"
    with pytest.raises(ValueError, match=wanted), processes_of_torchrun.joined():
        pytest.fail("joined nobody")
    assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_run_goes_on_with_another_number_of_processes(alone, two):
    folder, found = two
    assert [x["layers"] for x in found] == [3, 3]
    goal, settings = GOALS["2:4"]
    close(alone["2:4"], pruned(goal, out=folder / "run", resume=True, **settings))


def until_the_third_layer(then, folder):
    """What a process is told, where in the second one something happens in the third layer."""
    layers, solve = [], Newton.solve

    def watched(self, *args, **kwargs):
        layers.append(1)
        if len(layers) == 3 and dist.get_rank():
            then()
        return solve(self, *args, **kwargs)

    goal, settings = GOALS["2:4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Newton, "solve", watched)
        return sentence(lambda: pruned(goal, out=folder, **settings))


def fail():
    raise ValueError("of one alone")


def failing(folder):
    began = time.perf_counter()
    told = until_the_third_layer(fail, folder)
    return told, time.perf_counter() - began, all_goals(["2:4"])["2:4"]


def ending(folder):
    return until_the_third_layer(lambda: os._exit(1), folder)


def test_a_process_that_fails_ends_the_waits_of_the_others(alone, tmp_path):
    one, other = processes(2, tmp_path / "a", failing, tmp_path / "run")
    assert one[0].startswith("lost another of 2 processes, which has ended or failed; ")
    assert other[0] == "of one alone"
    assert one[1] < 120  # and not the half hour that a group waits
    assert not (tmp_path / "run").exists() or len(list((tmp_path / "run" / "layers").iterdir())) == 2
    close(alone["2:4"], one[2])  # the caller's group stays as it was
    assert identical(one[2], other[2])


def going_on(folder):
    goal, settings = GOALS["2:4"]
    return pruned(goal, out=folder, resume=True, **settings)


def test_a_run_of_which_a_process_ends_goes_on_with_three(alone, tmp_path):
    told, ended = processes(2, tmp_path / "a", ending, tmp_path / "run")
    assert ended is None
    assert "goes on with resume=True (--resume), with any number of processes" in told
    assert len(list((tmp_path / "run" / "layers").iterdir())) == 2
    found = processes(3, tmp_path / "b", going_on, tmp_path / "run")
    close(alone["2:4"], found[0])
    assert all(identical(found[0], x) for x in found)


def absent():
    """What a process is told that prunes where another does not."""
    together.MEETING = timedelta(seconds=2)
    net, batches = subject()
    return "" if dist.get_rank() else sentence(lambda: snows.prune(net, batches, NM(2, 4), progress=False))


def test_a_process_that_prunes_where_others_do_not_is_told(tmp_path):
    told, _ = processes(2, tmp_path / "a", absent)
    assert told.startswith(
        "expected all 2 processes to call prune, got some that have ended or have not called it in 2 seconds; "
        "call it in every process, or in one of them under snows.together.alone()"
    )


def test_processes_of_torchrun_without_a_group_are_told(monkeypatch):
    net, batches = subject()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.warns(
        UserWarning, match=r"^prune: torchrun started 3 processes, which have no process group"
    ):
        snows.prune(net, batches, NM(2, 4), select=snows.magnitude, solver=None, progress=False)


def test_torchrun_prunes_by_the_command_line(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "snows"]
    images = [
        "--model",
        "zoo:resnet20",
        "--data",
        "zoo:fashion-mnist",
        "--samples",
        "32",
        "--batch-size",
        "8",
    ]
    asked = ["--pattern", "2:4", "--select", "magnitude", "--iterations", "1", "--judge", "20"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "prune", *images, *asked, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weights, masks and report are in") == 1
    assert "no process group" not in done.stderr  # judging prunes once more, alone
    assert (tmp_path / "run" / "model.safetensors").is_file()
    done = subprocess.run([*command, "groups", *images[:2]], capture_output=True, text=True, env=env)
    assert done.returncode != 0
    assert "groups: expected one process, got 2" in done.stderr


def one_held_back():
    """A batch of eight, of which one sample is held back, by a metric that looks at its variance."""
    net, _ = subject()
    batch = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    found = snows.prune(
        net, [batch], NM(2, 4), select=snows.wanda, matching=Matching(2, metric="variance"), progress=False
    )
    return found.network.state_dict(), found.masks, [(x.name, x.after) for x in found.report.layers]


def test_one_sample_held_back_is_one_for_all(tmp_path):
    wanted = one_held_back()
    for each in processes(2, tmp_path / "a", one_held_back):
        close(wanted, each)
