"""What fine-tuning cannot use is refused in one sentence, before anything is written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import draw_image, make_image_folder
from helpers_transfer import FAST, config, losses, make_pretrained
from PIL import Image

from scaletransfer.finetune import finetune, main
from scaletransfer.transfer.network import decide_head, open_pretrained
from scaletransfer.transfer.plan import make_plan

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "animals", classes=CLASSES)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("models") / "pre")


def refused(tmp_path: Path, message: str, *arguments: str) -> None:
    """The command says `message` in one sentence and leaves nothing behind."""
    logdir = tmp_path / "logdir"
    with pytest.raises(ValueError, match=message) as caught:
        main([*arguments, "--logdir", str(logdir), *FAST])
    assert "\n" not in str(caught.value) and not logdir.exists()


# ---- images


def test_every_kind_of_image_trains(tmp_path, pretrained):
    """Grey, RGBA, 16-bit, CMYK, palette, EXIF-rotated, 1-bit, other formats: one class each, all are read."""
    root = tmp_path / "kinds"
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    saved = {
        "grey.jpg": (colour.convert("L"), {}),
        "rgba.png": (colour.convert("RGBA"), {}),
        "la.png": (colour.convert("LA"), {}),
        "deep.png": (Image.fromarray(rng.integers(0, 65535, (40, 50), dtype=np.uint16)), {}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "palette.png": (colour.convert("P"), {}),
        "bits.png": (colour.convert("1"), {}),
        "turned.jpg": (colour, {"exif": exif}),
        "anim.gif": (colour.convert("P"), {}),
        "plain.bmp": (colour, {}),
        "tiff.tif": (colour, {}),
        "web.webp": (colour, {}),
    }
    for split in ("train", "val"):
        for name, (picture, options) in saved.items():
            for shot in range(2):
                path = root / split / name.split(".")[0] / f"{shot}_{name}"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, **options)
    result = finetune(tmp_path / "run", config(f"data.images={root}", f"model.path={pretrained}"))
    assert result["valid_samples"] == 24 and len(losses(tmp_path / "run")) == 6


def test_sixteen_bits_alone_stay_sixteen_bits(tmp_path, pretrained):
    root = make_image_folder(tmp_path / "deep", suffix=".png", mode="I;16")
    plan = make_plan(config(f"data.images={root}", f"model.path={pretrained}"))
    assert (plan.target.depth, plan.target.channels) == (16, 1)
    finetune(tmp_path / "run", config(f"data.images={root}", f"model.path={pretrained}"))


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_a_corrupt_image_is_found_before_training(tmp_path, pretrained, damage):
    root = make_image_folder(tmp_path / "animals", per_class=3)
    bad = root / "val" / "dog" / "img_1.jpg"
    data = bad.read_bytes()
    bad.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"no image at all"}[damage])
    refused(tmp_path, r"val/dog/img_1\.jpg", "--images", str(root), "--model-path", str(pretrained))


def test_an_empty_class_folder_and_one_class(tmp_path, pretrained):
    root = make_image_folder(tmp_path / "animals")
    (root / "train" / "fox").mkdir()
    refused(tmp_path, "fox holds no image", "--images", str(root), "--model-path", str(pretrained))
    alone = make_image_folder(tmp_path / "alone", classes=("cat",))
    refused(tmp_path, "single class 'cat'", "--images", str(alone), "--model-path", str(pretrained))
    refused(tmp_path, "there is no folder", "--images", str(tmp_path / "nowhere"), "--model-path", str(pretrained))


def test_without_a_validation_folder_images_are_held_out(tmp_path, pretrained, capsys):
    root = make_image_folder(tmp_path / "flat", per_class=20, splits=("train",)) / "train"
    main(["--images", str(root), "--model-path", str(pretrained), "--logdir", str(tmp_path / "run"), *FAST])
    said = capsys.readouterr().out
    assert "held out" in said and "3 classes: cat, dog, emu" in said and "resolution 36, crop 32" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["train_samples"] + result["valid_samples"] == 60 and 4 <= result["valid_samples"] <= 24


@pytest.mark.slow
def test_ten_thousand_classes(tmp_path, pretrained):
    root = tmp_path / "many"
    for number in range(10_000):
        for split in ("train", "val"):
            draw_image(root / split / f"c{number:05d}" / "0.png", number, width=12, height=12)
    cfg = config(f"data.images={root}", f"model.path={pretrained}", "validate.every_steps=null", "bootstrap=5")
    result = finetune(tmp_path / "run", cfg)
    assert len(result["label_names"]) == 10_000 and result["metrics"]["mean_classes"] == 10_000
    assert len((tmp_path / "run" / "predictions.csv").read_text().splitlines()) == 10_001


# ---- checkpoints


def test_a_class_count_that_differs_replaces_the_head_and_says_so(images, pretrained, tmp_path, capsys):
    main(["--images", str(images), "--model-path", str(pretrained), "--logdir", str(tmp_path / "run"), *FAST])
    said = capsys.readouterr().out
    assert "the checkpoint's head has 5 outputs and the data 3 classes: replaced by a new head" in said


def test_other_labels_are_refused_with_both_lists(images, tmp_path):
    model = make_pretrained(tmp_path / "pre", labels=("cat", "emu", "dog"))
    refused(
        tmp_path,
        r"label names do not fit: .* has cat, emu, dog; the data has cat, dog, emu; .*model\.head=new",
        *("--images", str(images), "--model-path", str(model)),
    )
    plan = make_plan(config(f"data.images={images}", f"model.path={model}", "model.head=new"))
    assert plan.head == "new"


def test_equal_labels_keep_the_head(images, tmp_path):
    model = make_pretrained(tmp_path / "pre", labels=CLASSES)
    plan = make_plan(config(f"data.images={images}", f"model.path={model}"))
    assert plan.head == "keep" and any("head kept" in line for line in plan.says)
    finetune(tmp_path / "run", config(f"data.images={images}", f"model.path={model}", "seed=1"))
    assert losses(tmp_path / "run")[0] != pytest.approx(np.log(3), rel=1e-3)


def test_keep_needs_the_same_labels(images, pretrained):
    with pytest.raises(ValueError, match=r"model.head is keep but .* has 5 outputs and the data 3"):
        make_plan(config(f"data.images={images}", f"model.path={pretrained}", "model.head=keep"))


def test_another_normalisation_is_refused_with_both(images, pretrained, tmp_path):
    refused(
        tmp_path,
        r"normalisation does not fit: .* has mean 0\.5 and std 0\.5, data.mean and data.std mean 0\.4 and std 0\.5",
        *("--images", str(images), "--model-path", str(pretrained), "data.mean=0.4"),
    )
    (tmp_path / "imagenet.yaml").write_text(
        "model: {name: BiT-tiny}\ndata: {train: x, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}\n"
    )
    refused(
        tmp_path,
        r"normalisation does not fit: .* mean 0\.5 .* the pre-training configuration mean \[0\.485",
        *("--images", str(images), "--model-path", str(pretrained)),
        *("--pretrain-config", str(tmp_path / "imagenet.yaml")),
    )
    same = make_pretrained(tmp_path / "three", mean=[0.5, 0.5, 0.5], std=0.5)
    assert make_plan(config(f"data.images={images}", f"model.path={same}", "data.mean=0.5"))


def published(path: Path, labels: int = 5) -> Path:
    """model.pth.tar as the published code wrote it: it names neither labels nor normalisation."""
    from scaletransfer.models import create_model, init_weights

    network = create_model("BiT-tiny", labels)
    init_weights(network, 0)
    path.mkdir(parents=True)
    torch.save({"model": network.state_dict(), "optimizer": {}, "epoch": 90}, path / "model.pth.tar")
    return path


def test_a_published_checkpoint_needs_its_normalisation(images, tmp_path):
    model = published(tmp_path / "chexpert_bit50x1")
    refused(tmp_path, "does not say how its images were", "--images", str(images), "--model-path", str(model))
    plan = make_plan(config(f"data.images={images}", f"model.path={model}", "data.mean=0.5", "data.std=0.5"))
    assert (plan.start.model, plan.start.title, plan.head) == ("BiT-tiny", "chexpert_bit50x1", "new")
    three = published(tmp_path / "three", 3)
    plan = make_plan(config(f"data.images={images}", f"model.path={three}", "data.mean=0.5", "data.std=0.5"))
    assert plan.head == "new" and any("does not name its 3 labels" in line for line in plan.says)


class Planted:
    """Would make a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_not_opened(images, tmp_path):
    bad = tmp_path / "model.pth.tar"
    bad.write_bytes(pickle.dumps({"model": Planted(tmp_path / "executed")}))
    refused(tmp_path, "was refused|not a readable", "--images", str(images), "--model-path", str(bad), "data.mean=0.5")
    assert not (tmp_path / "executed").exists()


def test_models_that_are_not_there_or_of_another_network(images, pretrained, tmp_path):
    refused(tmp_path, "there is no pre-trained model: give --model-path", "--images", str(images))
    with pytest.raises(FileNotFoundError, match="there is no such checkpoint"):
        main(["--images", str(images), "--model-path", str(tmp_path / "none"), "--logdir", str(tmp_path / "x")])
    arguments = ("--images", str(images), "--model-path", str(pretrained))
    refused(tmp_path, "holds BiT-tiny, but BiT-S-R50x1 was asked for", *arguments, "model.name=BiT-S-R50x1")
    (tmp_path / "a_run" / "checkpoints").mkdir(parents=True)
    refused(tmp_path, "is a run, not a model", "--images", str(images), "--model-path", str(tmp_path / "a_run"))


def test_the_architecture_of_published_tensors(tmp_path):
    from scaletransfer.models import create_model
    from scaletransfer.models.weights import architecture_of

    for name in ("BiT-S-R50x1", "BiT-S-R101x3", "BiT-S-R152x4", "BiT-tiny"):
        with torch.device("meta"):
            state = create_model(name, 3).state_dict()
        assert architecture_of(state) == name
    assert architecture_of({"conv1.weight": torch.zeros(3)}) is None


def test_scratch_needs_no_checkpoint_but_a_network(images):
    start = open_pretrained(config("model.from_scratch=true", "model.name=BiT-tiny"), None, None)
    assert start.state is None and start.title == "scratch" and decide_head("auto", start, CLASSES)[0] == "new"
    with pytest.raises(ValueError, match="which network"):
        open_pretrained(config("model.from_scratch=true"), None, None)


# ---- options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no target"),
        (("IMAGES", "data.shards=x"), "data.images and data.shards"),
        (("val_dir=x",), "val_dir"),
        (("IMAGES", "train_dir=x"), "both given"),
        (("IMAGES", "micro_batch=3"), "micro_batch must be a divisor"),
        (("IMAGES", "micro_batch=1", "mixup=0.1"), "is odd, but mixup mixes pairs"),
        (("IMAGES", "data.resolution=[16,32]"), "data.resolution"),
        (("IMAGES", "protocol=big"), "one of bit, paper"),
        (("IMAGES", "optimizer.lr=-1"), "optimizer.lr must be a positive number"),
        (("IMAGES", "validate.every_epochs=1"), "validate.every_epochs must be null"),
        (("IMAGES", "exmples_per_class=1"), "did you mean examples_per_class"),
        (("IMAGES", "memory_gb=0.000001", "micro_batch=null"), "memory"),
        (("IMAGES", "data.train_split=valid"), "both 'valid'"),
        (("IMAGES", "data.valid_split=test"), "has only train, valid"),
        (("IMAGES", "--sed", "1"), "did you mean --seed"),
    ],
)
def test_wrong_options(images, pretrained, tmp_path, arguments, message):
    words = [f"data.images={images}" if word == "IMAGES" else word for word in arguments]
    logdir = tmp_path / "logdir"
    with pytest.raises(ValueError, match=message) as caught:
        main(["--model-path", str(pretrained), "--logdir", str(logdir), *FAST, *words])
    assert "\n" not in str(caught.value) and not logdir.exists()


def test_train_dir_and_val_dir_must_be_apart(images, pretrained):
    for train, valid in ((images / "train", images / "train"), (images, images / "val")):
        with pytest.raises(ValueError, match="lie in each other"):
            make_plan(config(f"train_dir={train}", f"val_dir={valid}", f"model.path={pretrained}"))
    with pytest.raises(ValueError, match=r"train_dir .* is not a folder"):
        make_plan(config("train_dir=nowhere", f"model.path={pretrained}"))
