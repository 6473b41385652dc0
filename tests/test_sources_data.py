"""Images by name: folders as people have them, datasets of libraries, batches of one's own; and which output a class is."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import define_torchvision_schemas
from PIL import Image
from torch import nn

from snows.sources import Network, Plain, load_data
from snows.sources.classes import numbered, read, synonyms
from snows.sources.pictures import UnreadableError, open_picture

CROP = Plain(16, 20)


class Means(nn.Module):
    """As many outputs as asked, of any picture."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None].expand(-1, self.outputs)


def network(outputs=2, classes=None):
    return Network(Means(outputs), "test", CROP, classes)


def picture(path, shade=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


def shades(data):
    """What each image shows, a grey."""
    return [
        round(
            ((x.mean(dim=(0, 2, 3)) * torch.tensor(CROP.std) + torch.tensor(CROP.mean)) * 255).mean().item()
        )
        for x, _ in data.batches(1)
    ]


# ---------------------------------------------------------------- folders


def test_a_folder_with_and_without_classes(tmp_path):
    for i in range(5):
        picture(tmp_path / "dog" / f"{i}.png", 100 + i)
        picture(tmp_path / "cat" / "inside" / f"{i}.JPG".lower(), 20 * i)
    data = load_data(str(tmp_path), network(), "test")
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert shades(data)[5:] == [100, 101, 102, 103, 104]
    assert load_data(str(tmp_path / "dog"), network(), "test").labels.tolist() == [-1] * 5


@pytest.mark.parametrize(
    ("folders", "calibration", "test"),
    [
        (("train", "test"), "train", "test"),
        (("Train", "Val", "test"), "Train", "Val"),
        (("training", "validation"), "training", "validation"),
        (("train", "valid"), "train", "valid"),
        (("VAL",), "VAL", "VAL"),
        (("a", "b"), "", ""),
    ],
)
def test_splits_are_found_under_any_of_their_names(tmp_path, folders, calibration, test):
    for i, folder in enumerate(folders):
        picture(tmp_path / folder / "c0" / f"{i}.png", 50 * i)
        picture(tmp_path / folder / "c1" / f"{i}.png", 50 * i)
    names = {"calibration": calibration, "test": test}
    for split, name in names.items():
        data = load_data(str(tmp_path), network(), split)
        assert data.origin == str(tmp_path / name)
        if name:
            assert set(shades(data)) == {50 * folders.index(name)}
            assert len(data) == 2


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "car", "train"):
        picture(tmp_path / name / "1.png")
    for split in ("calibration", "test"):
        assert load_data(str(tmp_path), network(3), split).labels.tolist() == [0, 1, 2]


def test_hidden_folders_are_no_classes_and_empty_ones_keep_their_number(tmp_path):
    for name in (".ipynb_checkpoints", "b", "d", "__MACOSX"):
        picture(tmp_path / name / "1.png")
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
    picture(tmp_path / "b" / "._1.png")
    assert load_data(str(tmp_path), network(4), "test").labels.tolist() == [1, 3]


def test_links_are_followed_once(tmp_path):
    picture(tmp_path / "elsewhere" / "1.png", 7)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "dog").mkdir()
    (tmp_path / "data" / "dog" / "up").symlink_to(tmp_path / "data")
    picture(tmp_path / "data" / "dog" / "2.png", 9)
    assert sorted(shades(load_data(str(tmp_path / "data"), network(), "calibration"))) == [7, 9]


def test_deep_pictures_are_scaled_and_cameras_rotations_applied(tmp_path):
    x = np.linspace(0, 65535, 12).reshape(3, 4)
    for dtype, mode, values in (
        (np.uint16, "I;16", x),
        (np.int32, "I", x),
        (np.float32, "F", x / 65535),
        (np.uint8, "L", x / 257),
    ):
        path = tmp_path / f"{mode.replace(';', '')}.tif"
        Image.fromarray(values.round(9).astype(dtype)).save(path)
        found = np.asarray(open_picture(path)).astype(int)
        assert found.shape == (3, 4, 3)
        assert np.abs(found - (x / 257)[..., None]).max() <= 1, mode
    for mode in ("P", "LA", "RGBA", "CMYK", "1"):
        assert open_picture(Image.new(mode, (4, 3))).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (20, 30)


def test_what_no_decoder_takes_is_left_out_and_named(tmp_path):
    picture(tmp_path / "good.png", 5)
    (tmp_path / "huge.ppm").write_bytes(b"P6 999999 999999 255\n")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\x00" * 40)
    picture(tmp_path / "cut.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:300])
    data = load_data(str(tmp_path), network(), "test")
    for _ in range(2):
        assert shades(data) == [5]
    reasons = dict(data.broken)
    assert len(data.broken) == 3
    assert reasons["huge.ppm"].startswith("too many pixels: ")
    assert reasons["bad.png"] == "no picture of a known format"
    assert reasons["cut.bmp"].startswith("broken: ")
    with pytest.raises(UnreadableError, match="too many pixels"):
        open_picture(tmp_path / "huge.ppm")


def test_drawing_is_the_seed_s_and_spreading_leaves_out(tmp_path):
    for i in range(10):
        picture(tmp_path / f"{i}.png", 20 * i)
    data = load_data(str(tmp_path), network(), "calibration")
    order = np.random.default_rng(3).permutation(10)[:7]
    assert data.drawn(7, 3) == order.tolist()
    drawn = data.draw(7, 4, 3)
    assert [len(x) for x in drawn] == [4, 3]
    assert torch.equal(torch.cat(drawn), torch.cat([data.read(int(i))[None] for i in order]))
    kept = [x for x, _ in data.spread(100, 2, data.drawn(7, 3))]
    assert torch.equal(
        torch.cat(kept), torch.stack([data.read(i) for i in sorted(set(range(10)) - set(order.tolist()))])
    )
    assert torch.equal(
        torch.cat([x for x, _ in data.spread(2, 9)]), torch.stack([data.read(0), data.read(9)])
    )
    assert data.first(3).shape == (3, 3, 16, 16)
    for call in (lambda: data.draw(11, 4, 3), lambda: data.first(11)):
        with pytest.raises(ValueError, match=r"asked for 11 images, but .* has 10"):
            call()


# ---------------------------------------------------------------- classes


IMAGENETTE = ["n01440764", "n02102040", "n02979186"]
NAMES = (
    ("n01440764", "tench", "Tinca tinca"),
    ("n00000001", "crane"),
    ("n02102040", "English springer"),
    ("n02979186", "cassette player"),
    ("n00000002", "crane"),
)


def test_some_of_the_network_s_classes_are_judged_by_its_list(tmp_path):
    for name in IMAGENETTE:
        picture(tmp_path / name / "1.png")
    assert load_data(str(tmp_path), network(5, NAMES), "test").labels.tolist() == [0, 2, 3]
    with pytest.raises(
        ValueError,
        match=r"has 3 classes, the network 5 outputs, and nothing says which they are; give .* --classes FILE",
    ):
        load_data(str(tmp_path), network(5), "test")
    assert load_data(str(tmp_path), network(5), "calibration").labels.tolist() == [
        0,
        1,
        2,
    ]  # nobody judges by them
    for text in (
        "\n".join(f"{x[0]} {', '.join(x[1:])}" for x in NAMES),
        json.dumps({str(i): list(x) for i, x in enumerate(NAMES)}),
        json.dumps([x[0] for x in NAMES]),
        json.dumps({x[0]: i for i, x in enumerate(NAMES)}),
        "\n".join(x[0] for x in NAMES),
    ):
        (tmp_path.parent / "classes").write_text(text)
        assert load_data(
            str(tmp_path), network(5), "test", classes=tmp_path.parent / "classes"
        ).labels.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("found", "names", "outputs", "wanted"),
    [
        (["tench", "cassette_player"], NAMES, 5, [0, 3]),
        (["Tinca-Tinca", "ENGLISH SPRINGER"], NAMES, 5, [0, 2]),
        (["b", "a"], None, 2, [0, 1]),
        (["0", "10", "2"], None, 11, [0, 10, 2]),
        (["1", "10", "2", "3", "4", "5", "6", "7", "8", "9"], None, 10, [0, 9, 1, 2, 3, 4, 5, 6, 7, 8]),
        (["x", "y"], (("a",), ("b",)), 2, [0, 1]),
        (["7"], None, 1000, [7]),
        (["0", "1", "5"], None, 3, "numbers 0 to 5, the network 3 outputs"),
        (["cat", "Cat"], None, 2, "two classes of one name"),
        (["1", "01"], None, 3, "numbers 1 to 1"),
        (["tench", "Tinca tinca"], NAMES, 5, "tench and Tinca tinca of here are the same class"),
        (["crane", "tench"], NAMES, 5, "crane of here may be any of several classes"),
        (["tench", "ship"], NAMES, 5, "ship of here are no classes"),
        (["a", "b", "c"], None, 2, "has 3 classes, the network 2 outputs"),
        (["a"], None, 2, "has 1 classes, the network 2 outputs"),
    ],
)
def test_which_output_a_class_is(found, names, outputs, wanted):
    classes = [(x,) for x in found]
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            numbered(classes, names, lambda: outputs, "here")
    else:
        found, note = numbered(classes, names, lambda: outputs, "here")
        assert found == wanted
        assert bool(note) == (names == (("a",), ("b",)))  # that the names were known, and none fits
        if note:
            with pytest.raises(ValueError, match="are no classes of the network"):
                numbered(classes, names, lambda: outputs, "here", asked=True)


def test_names_of_classes():
    assert synonyms("n01440764 tench, Tinca tinca") == (
        "n01440764",
        "tench",
        "Tinca tinca",
        "tench, Tinca tinca",
    )
    assert synonyms("tabby cat") == ("tabby cat",)
    assert synonyms("n01440764") == ("n01440764",)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"0": "a", "2": "b"}', '{"a": "b"}', "7"])
def test_a_file_of_no_classes_is_one_sentence(tmp_path, content):
    (tmp_path / "x").write_text(content)
    if content == "7":
        with pytest.raises(ValueError, match="classes: expected"):
            read(tmp_path / "x")
    else:
        with pytest.raises(ValueError, match=r"classes: expected .* to (hold a list|name classes)"):
            read(tmp_path / "x")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "nowhere")


def test_a_flat_folder_with_a_file_of_labels(tmp_path):
    for i in range(4):
        picture(tmp_path / "val" / f"ILSVRC2012_val_{i}.JPEG")
    path, folder = tmp_path / "labels.txt", str(tmp_path)
    cases = {
        "3\n0\n2\n3\n": [3, 0, 2, 3],
        "n02102040\nn01440764\nn01440764\nn02979186": [2, 0, 0, 3],
        "ILSVRC2012_val_1.JPEG 4\nILSVRC2012_val_0.JPEG 2\nILSVRC2012_val_3.JPEG 0\nILSVRC2012_val_2.JPEG 0": [
            2,
            4,
            0,
            0,
        ],
        "tench\nEnglish springer\ntench\ncassette player": [0, 2, 0, 3],
    }
    for text, wanted in cases.items():
        path.write_text(text)
        assert load_data(folder, network(5, NAMES), "test", labels=path).labels.tolist() == wanted
    for text, sentence in {
        "1\n2\n1000\n3": "go from 1 to 1000",
        "0\n1": "a line for each of 4 pictures, got 2",
        "0\n1\n2\n9": "numbers 0 to 9, the network 5 outputs",
        "ILSVRC2012_val_1.JPEG 4\nb.JPEG 1": "says nothing of ILSVRC2012_val_0.JPEG",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_data(folder, network(5, NAMES), "test", labels=path)
    picture(tmp_path / "val" / "class" / "1.png")
    with pytest.raises(ValueError, match="expected a flat folder"):
        load_data(folder, network(5, NAMES), "test", labels=path)


# ---------------------------------------------------------------- datasets


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_binary_files(tmp_path, kind):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6, 3, 32, 32), np.uint8)
    labels = np.arange(6, dtype=np.uint8)[:, None]
    head = labels if kind == "cifar10" else np.concatenate([labels * 0 + 9, labels], axis=1)
    (tmp_path / "inside").mkdir()
    np.concatenate([head, pixels.reshape(6, -1)], axis=1).tofile(
        tmp_path / "inside" / ("test_batch.bin" if kind == "cifar10" else "test.bin")
    )
    outputs = int(kind.removeprefix("cifar"))
    own = Network(Means(outputs), "test", Plain(mean=(0.5,) * 3, std=(0.25,) * 3))
    ((x, y),) = load_data(f"{kind}:{tmp_path}", own, "test").batches(10)
    assert y.tolist() == list(range(6))
    assert torch.allclose(x, (torch.from_numpy(pixels) / 255 - 0.5) / 0.25, atol=1e-6)
    with pytest.raises(ValueError, match=f"has {outputs} classes, the network 1000 outputs"):
        load_data(f"{kind}:{tmp_path}", network(1000, tuple((f"c{i}",) for i in range(1000))), "test")
    with pytest.raises(ValueError, match=r"expected (data_batch_1|train).bin in"):
        load_data(f"{kind}:{tmp_path}", own, "calibration")


def test_a_dataset_of_torchvision(tmp_path):
    define_torchvision_schemas()
    pytest.importorskip("torchvision", exc_type=ImportError)
    import pickle

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (4, 3072), np.uint8)
    import hashlib

    import torchvision

    files = {
        "test_batch": {"data": pixels, "labels": [3, 0, 9, 9]},
        "batches.meta": {"label_names": list("abcdefghij")},
    }
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in files}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, "train_list", [])
        patch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        patch.setattr(
            torchvision.datasets.CIFAR10,
            "meta",
            {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
        )
        own = Network(Means(10), "test", Plain(mean=(0.0,) * 3, std=(1.0,) * 3))
        ((x, y),) = load_data(f"torchvision:CIFAR10:{tmp_path}", own, "test").batches(9)
    assert y.tolist() == [3, 0, 9, 9]
    assert torch.equal(x, torch.from_numpy(pixels).view(4, 3, 32, 32) / 255)
    for name, sentence in (
        ("torchvision:Nothing", "torchvision has no dataset 'Nothing'"),
        ("torchvision:VOCDetection:/nowhere", "could not be opened in /nowhere"),
        ("torchvision:wrap_dataset_for_transforms_v2", "has no dataset"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_data(name, own, "test")


def test_a_dataset_of_torchvision_with_class_names_meets_the_network_s():
    define_torchvision_schemas()
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)

    class Few:
        classes = [("tench", "Tinca tinca"), ("English springer",)]
        wnids = ["n01440764", "n02102040"]
        _labels = [1, 0, 1]

        def __init__(self, root, split="train"):
            if split not in ("train", "val"):
                raise ValueError("no such split")
            self.split = split

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return Image.new("RGB", (24, 24), (i + (100 if self.split == "val" else 0),) * 3), self._labels[i]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets, "Few", Few, raising=False)
        data = load_data("torchvision:Few", network(5, NAMES), "test")
        assert data.labels.tolist() == [2, 0, 2]
        assert shades(data) == [100, 101, 102]
        assert shades(load_data("torchvision:Few", network(5, NAMES), "calibration")) == [0, 1, 2]


def test_a_dataset_without_splits_is_one_and_the_same(tmp_path):
    define_torchvision_schemas()
    pytest.importorskip("torchvision", exc_type=ImportError)
    for name in ("a", "b"):
        picture(tmp_path / name / "1.png")
    calibration, test = (
        load_data(f"torchvision:ImageFolder:{tmp_path}", network(2), split)
        for split in ("calibration", "test")
    )
    assert calibration.origin == test.origin
    assert test.labels.tolist() == [0, 1]


def test_nothing_is_fetched_where_that_is_not_allowed(tmp_path):
    define_torchvision_schemas()
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.MNIST, "download", lambda self: pytest.fail("fetched"))
        with pytest.raises(ValueError, match=r"could not be opened in .*; expected its files there$"):
            load_data(f"torchvision:MNIST:{tmp_path}", network(10), "test", fetch=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("zoo:fashion-mnist", {"preparation": Plain(8, 8)}, "takes no --crop, --resize, --mean or --std"),
        ("zoo:fashion-mnist", {"labels": True}, "takes no --labels"),
        ("cifar10:nowhere", {"classes": True}, "takes no --classes"),
        ("of_ones_own:both", {"labels": True}, "takes no --labels"),
        ("of_ones_own:both", {"preparation": Plain(8, 8)}, "takes no --crop"),
    ],
)
def test_what_data_has_no_use_for_is_refused(module, tmp_path, name, options, sentence):
    (tmp_path / "file").write_text("a\nb")
    with pytest.raises(ValueError, match=sentence):
        load_data(
            name, network(), "test", **{k: tmp_path / "file" if v is True else v for k, v in options.items()}
        )


def test_a_dataset_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["English springer", "tench"])}
    )
    made = {}
    for split, shade in (("train", 10), ("validation", 90)):
        rows = {
            "picture": [Image.new("RGB", (20, 30), (shade + i,) * 3) for i in range(3)],
            "kind": [0, 1, 0],
        }
        made[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "d"))
    data = load_data(f"hf:{tmp_path / 'd'}", network(5, NAMES), "test")
    assert data.labels.tolist() == [2, 0, 2]
    assert shades(data) == [90, 91, 92]
    assert shades(load_data(f"hf:{tmp_path / 'd'}", network(5, NAMES), "calibration")) == [10, 11, 12]


def test_datasets_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets .*; pip install '.\[data\]'"):
        load_data("hf:somebody/data", network(), "test")


# ---------------------------------------------------------------- batches of one's own


BATCHES = [
    (torch.arange(12.0).view(4, 3, 1, 1), torch.tensor([0, 1, 1, 0])),
    (torch.arange(12.0, 24).view(4, 3, 1, 1), torch.tensor([1, 1, 0, 0])),
]


@pytest.fixture
def module(monkeypatch):
    made = ModuleType("of_ones_own")
    made.both = lambda: BATCHES
    made.split = lambda split: BATCHES[:1] if split == "test" else BATCHES
    made.mapping = lambda: [{"pixel_values": x, "labels": y} for x, y in BATCHES]
    made.once = lambda: iter(BATCHES)
    made.nothing = lambda: 3
    made.fails = lambda: 1 / 0
    made.loader = lambda: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.cat([x for x, _ in BATCHES])), batch_size=3
    )
    monkeypatch.setitem(sys.modules, "of_ones_own", made)
    return SimpleNamespace(
        load=lambda name, split="calibration": load_data(f"of_ones_own:{name}", network(), split)
    )


def test_batches_of_a_callable(module):
    data = module.load("both")
    assert torch.equal(torch.cat(data.draw(6, 2, 0)), torch.arange(18.0).view(6, 3, 1, 1))
    assert torch.equal(data.first(5), torch.arange(15.0).view(5, 3, 1, 1))
    assert [len(y) for _, y in data.batches(1)] == [4, 4]
    assert len(list(data.spread(4, 1))) == 1
    assert module.load("both").origin == module.load("both", "test").origin
    assert module.load("split").origin != module.load("split", "test").origin
    assert len(list(module.load("split", "test").batches(1))) == 1
    drawn = module.load("mapping").draw(5, 1, 0)
    assert [x["pixel_values"].shape[0] for x in drawn] == [4, 1]
    assert torch.equal(torch.cat(module.load("loader").draw(7, 1, 0)), torch.arange(21.0).view(7, 3, 1, 1))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("once", "iterated again and again"),
        ("nothing", "iterated again and again, a DataLoader or a list of batches, got int"),
        ("fails", r"could not be opened \(ZeroDivisionError: division by zero\)"),
        ("missing", "could not be opened .AttributeError"),
    ],
)
def test_a_callable_that_gives_no_batches_is_one_sentence(module, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        module.load(name)


def test_too_few_batches_are_one_sentence(module):
    for call in (lambda: module.load("both").draw(9, 1, 0), lambda: module.load("both").first(9)):
        with pytest.raises(ValueError, match="asked for 9 images, but of_ones_own:both has 8"):
            call()
    with pytest.raises(ValueError, match="got keyword inputs"):
        module.load("mapping").first(2)


def test_pictures_of_several_sizes_are_one_sentence(monkeypatch):
    define_torchvision_schemas()
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    monkeypatch.setattr(
        torchvision.datasets,
        "Two",
        type(
            "Two",
            (),
            {
                "targets": [0, 1],
                "__init__": lambda self, root: None,
                "__getitem__": lambda self, i: (Image.new("RGB", (20 + i, 30)), i),
            },
        ),
        raising=False,
    )
    data = load_data("torchvision:Two", Network(Means(2), "test"), "test")
    with pytest.raises(
        ValueError, match=r"expected pictures of one size, got 3x30x20, 3x30x21; say --crop and --resize"
    ):
        list(data.batches(2))
