"""Networks by name: their weights from the libraries' own caches, their pictures prepared as those libraries do, bit for bit."""

from pathlib import Path

import pytest
import torch
from conftest import define_torchvision_schemas
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from snows.sources import Plain, load_model, networks, runs_code
from snows.sources.preparation import of_timm, of_torchvision

define_torchvision_schemas()
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    """Nothing is fetched: the hubs' caches are the test's own, and empty."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    if hasattr(transformers.utils.hub, "is_offline_mode"):
        monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)


CAT = Image.open(Path(__file__).parent / "photographs" / "chelsea.jpg").convert("RGB")
PHOTOGRAPHS = [
    CAT,
    CAT.crop((30, 10, 363, 299)).rotate(90, expand=True),
    CAT.crop((100, 50, 197, 111)),
    CAT.resize((1023, 769)),
]


def untrained():
    return nn.Sequential(nn.Linear(3, 3))


def fails():
    return 1 / 0


# ---------------------------------------------------------------- preparation


@pytest.mark.parametrize(
    "name", ["efficientnet_b3", "vit_base_patch16_clip_224.openai", "mobilenetv3_large_100", "convnext_tiny"]
)
def test_timm_prepares_its_own_pictures(name):
    net = timm.create_model(name)
    network = networks.Network(net, name, of_timm(net))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    for picture in PHOTOGRAPHS:
        assert torch.equal(network.preparation(picture), transform(picture))
    assert (
        network.preparation(PHOTOGRAPHS[0]).shape[-1]
        == timm.data.resolve_model_data_config(net)["input_size"][-1]
    )


@pytest.mark.parametrize(
    "weights",
    [
        torchvision.models.ResNet50_Weights.IMAGENET1K_V2,
        torchvision.models.EfficientNet_B3_Weights.IMAGENET1K_V1,
        torchvision.models.Inception_V3_Weights.IMAGENET1K_V1,
        torchvision.models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1,
    ],
    ids=str,
)
def test_torchvision_prepares_its_own_pictures(weights):
    prepare, transform = of_torchvision(weights.transforms), weights.transforms()
    for picture in PHOTOGRAPHS:
        assert torch.equal(prepare(picture), transform(picture))


def processor(folder, kind, **settings):
    getattr(transformers, kind)(**settings).save_pretrained(folder)
    return transformers.AutoImageProcessor.from_pretrained(folder)


HF = {
    "ViTImageProcessor": {"size": {"height": 48, "width": 48}, "do_normalize": False},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 160}, "crop_pct": 0.7},
    "BitImageProcessor": {"size": {"shortest_edge": 60}, "crop_size": {"height": 48, "width": 48}},
}


def vit(folder, **more):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=48,
        patch_size=16,
        **more,
    )
    net = transformers.ViTForImageClassification(config).eval()
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("kind", HF)
def test_a_processor_of_transformers_prepares_its_own_pictures(kind, tmp_path):
    vit(tmp_path)
    own = processor(tmp_path, kind, **HF[kind])
    network = load_model(f"hf:{tmp_path}")
    assert network.note == ""
    for picture in PHOTOGRAPHS:
        wanted = own(images=picture, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(network.preparation(picture), wanted)


def test_options_replace_single_settings():
    net = timm.create_model("efficientnet_b3")
    config = timm.data.resolve_model_data_config(net)
    changed = of_timm(net).override(mean=(0.5, 0.5, 0.5))
    assert torch.equal(
        changed(PHOTOGRAPHS[0]),
        timm.data.create_transform(**{**config, "mean": (0.5, 0.5, 0.5)})(PHOTOGRAPHS[0]),
    )
    changed = of_timm(net).override(crop=64)
    assert torch.equal(
        changed(PHOTOGRAPHS[0]),
        timm.data.create_transform(**{**config, "input_size": (3, 64, 64)})(PHOTOGRAPHS[0]),
    )
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    prepare = of_torchvision(weights.transforms)
    for given, wanted in (
        ({"crop": 112}, {"crop_size": 112, "resize_size": 116}),
        ({"crop": 64, "resize": 70}, {"crop_size": 64, "resize_size": 70}),
        ({"resize": 300}, {"resize_size": 300, "crop_size": 224}),
        ({"std": (1.0, 2.0, 3.0)}, {"std": (1.0, 2.0, 3.0)}),
    ):
        assert torch.equal(
            prepare.override(**given)(PHOTOGRAPHS[1]), weights.transforms(**wanted)(PHOTOGRAPHS[1])
        )
    for given, sentence in (
        ({"crop": 0}, "crop and a resize of at least 1"),
        ({"mean": (0.1, 0.2)}, "three finite means"),
        ({"std": (1.0, 0.0, 1.0)}, "three finite deviations above 0"),
        ({"mean": (float("nan"),) * 3}, "three finite means"),
    ):
        for kind in (prepare, Plain()):
            with pytest.raises(ValueError, match=sentence):
                kind.override(**given)


@pytest.mark.parametrize("kind", HF)
def test_options_replace_single_settings_of_a_processor(kind, tmp_path):
    vit(tmp_path)
    own = processor(tmp_path, kind, **HF[kind])
    prepare = load_model(f"hf:{tmp_path}").preparation
    found = prepare.override(crop=32)(PHOTOGRAPHS[0])
    assert found.shape == (3, 32, 32)
    found = prepare.override(mean=(0.0,) * 3, std=(2.0,) * 3)(PHOTOGRAPHS[0])
    assert torch.equal(
        found,
        own(images=PHOTOGRAPHS[0], return_tensors="pt", image_mean=[0.0] * 3, image_std=[2.0] * 3)[
            "pixel_values"
        ][0],
    )


def test_plain_preparation_is_what_it_says():
    x = Plain(8, 10, (0.5,) * 3, (0.5,) * 3)(Image.new("RGB", (50, 70), (255, 0, 51)))
    assert torch.allclose(x, torch.tensor([1.0, -1.0, -0.6]).view(3, 1, 1).expand(3, 8, 8), atol=1e-6)
    assert Plain()(PHOTOGRAPHS[0]).shape == (3, 300, 451)
    assert Plain().override(crop=32)(PHOTOGRAPHS[0]).shape == (3, 32, 32)
    assert (Plain().override(resize=64).crop, Plain().override(crop=64).resize) == (56, 73)
    assert "the middle 224 square" in str(Plain(224, 256))


def test_a_folder_without_a_processor_says_what_is_done_instead(tmp_path):
    vit(tmp_path)
    network = load_model(f"hf:{tmp_path}")
    assert network.preparation == Plain()
    assert "brings no preparation of pictures" in network.note


# ---------------------------------------------------------------- weights


def in_torch_cache(monkeypatch, tmp_path, name):
    """Put a state of ones into torch hub's cache, where torchvision looks for a network's weights, with the hash that it asks for."""
    entry = torchvision.models.get_model_weights(name).DEFAULT
    net = torchvision.models.get_model(name)
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.25)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / entry.url.rpartition("/")[2])
    return net


def test_torchvision_s_weights_come_from_its_cache(monkeypatch, tmp_path):
    net = in_torch_cache(monkeypatch, tmp_path, "squeezenet1_1")
    network = load_model("torchvision:squeezenet1_1")
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), network.model.state_dict().values(), strict=True)
    )
    assert not network.model.training
    named = load_model("torchvision:squeezenet1_1:IMAGENET1K_V1")
    assert torch.equal(named.model.features[0].weight, net.features[0].weight)
    assert network.classes[0][-1] == "tench"
    assert network.classes[0][0] == "n01440764"
    assert network.classes[134][-1] == "crane bird"
    assert not torch.equal(
        load_model("torchvision:squeezenet1_1", random_weights=True).model.features[0].weight,
        net.features[0].weight,
    )


def in_hub_cache(tmp_path, repository, files):
    """A repository in the layout of Hugging Face's cache."""
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def test_timm_s_weights_come_from_the_hub_s_cache(tmp_path):
    net = timm.create_model("resnet10t")
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.5)
    snapshot = in_hub_cache(tmp_path, "timm/resnet10t.c3_in1k", {})
    save_file(net.state_dict(), snapshot / "model.safetensors")
    for name in ("timm:resnet10t", "timm:resnet10t.c3_in1k"):
        network = load_model(name)
        assert all(
            torch.equal(a, b)
            for a, b in zip(net.state_dict().values(), network.model.state_dict().values(), strict=True)
        )
    assert network.classes[0][:2] == ("n01440764", "tench")


def test_transformers_weights_come_from_the_hub_s_cache_or_a_folder(tmp_path):
    net = vit(
        tmp_path / "folder",
        id2label={0: "tench, Tinca tinca", 1: "cat"},
        label2id={"tench, Tinca tinca": 0, "cat": 1},
    )
    in_hub_cache(
        tmp_path, "somebody/small", {p.name: p.read_bytes() for p in (tmp_path / "folder").iterdir()}
    )
    for name in (f"hf:{tmp_path / 'folder'}", "hf:somebody/small"):
        network = load_model(name)
        assert all(
            torch.equal(a, b)
            for a, b in zip(net.state_dict().values(), network.model.state_dict().values(), strict=True)
        ), name
        assert network.classes == (("tench", "Tinca tinca", "tench, Tinca tinca"), ("cat",))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "hf:somebody/unknown"])
def test_without_a_connection_and_a_cache_it_says_what_to_do(name):
    with pytest.raises(
        ValueError,
        match=r"trained weights of .* are not in the cache and cannot be fetched .* --weights, or say --random",
    ):
        load_model(name)


def test_a_library_without_trained_weights_of_a_network_says_so():
    name = next(name for name in timm.list_models() if not timm.is_model_pretrained(name))
    with pytest.raises(ValueError, match=f"timm has no trained weights of {name}"):
        load_model(f"timm:{name}")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_of_a_file_meet_the_network_that_torchvision_trained(name, tmp_path):
    """With its own weights torchvision builds these two otherwise: another head, another scaling of the input."""
    state = load_model(f"torchvision:{name}", random_weights=True).model.state_dict()
    save_file(state, tmp_path / "x.safetensors")
    net = load_model(f"torchvision:{name}", tmp_path / "x.safetensors").model
    assert net.transform_input
    assert ("aux1.conv.conv.weight" in state) == (net.aux1 is not None if name == "googlenet" else False)


def test_a_folder_of_transformers_loads_whole_or_not_at_all(tmp_path):
    net = vit(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    weight = state.pop("classifier.weight")
    save_file(state | {"extra": weight}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"does not match the model: missing classifier.weight; unexpected extra"
    ):
        load_model(f"hf:{tmp_path}")
    save_file(
        state | {"classifier.weight": weight[:1].clone()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"of another shape classifier.weight"):
        load_model(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="could not be built"):
        load_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"hold a config.json as transformers saves it"):
        load_model(f"hf:{tmp_path}")
    assert net.classifier.weight.shape == weight.shape


def test_a_network_without_weights_starts_from_the_same_ones():
    """So that a run of it can be resumed, and deployed from its folder."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (load_model("test_sources:untrained").model[0].weight for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(untrained()[0].weight, first)
    assert not torch.equal(
        load_model("zoo:resnet20", random_weights=True).model.conv1.weight,
        load_model("zoo:resnet20").model.conv1.weight,
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet", "model: expected zoo:NAME"),
        (":net", "model: expected zoo:NAME"),
        ("zoo:resnet99", "zoo: expected one of"),
        ("torchvision:resnet51", "torchvision has no network 'resnet51'"),
        ("timm:resnet51", "timm has no network 'resnet51'"),
        ("torchvision:resnet50:BEST", "expected weights IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, got 'BEST'"),
        ("nowhere:net", "expected a module in this folder"),
        ("test_sources:fails", r"could not be built \(division by zero\)"),
        ("json:dumps", "could not be built"),
    ],
)
def test_what_is_no_network_is_one_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_which_names_run_code():
    assert [runs_code(x) for x in ("package.module:net", "m:f")] == [True, True]
    assert not any(
        map(
            runs_code,
            ("zoo:vit", "timm:x", "torchvision:x:Y", "hf:a/b", "cifar10:x", "folder", "./a", ":", "x:"),
        )
    )
