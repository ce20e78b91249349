"""Adapters in Hugging Face's image classification pipeline."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import ttt_plugins as tp

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import ViTImageProcessor, pipeline
from transformers import logging as transformers_logging

from ttt_plugins.hosts.transformers import Classifier, image_classification

MGG = "bundled:mgg-resnet26-cifar10"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def pictures():
    """Five PIL images of the model's size, so that resizing changes nothing."""
    pixels = torch.randint(0, 256, (5, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(p.to(torch.uint8).numpy()) for p in pixels]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_labels_and_scores_are_the_adapters(pictures, batch_size):
    answers = image_classification(tp.from_pretrained(MGG), NAMES)(
        pictures, batch_size=batch_size, top_k=10
    )
    net = tp.from_pretrained(MGG)
    images = torch.stack([to_tensor(p) for p in pictures])
    expected = torch.cat([net(x) for x in images.split(batch_size)]).softmax(1)
    for answer, row in zip(answers, expected, strict=True):
        scores = {label["label"]: label["score"] for label in answer}
        assert scores.keys() == set(NAMES)
        for name, score in zip(NAMES, row.tolist(), strict=True):
            assert scores[name] == pytest.approx(score, abs=1e-5)
        assert answer[0]["label"] == NAMES[row.argmax()]


def test_transformers_own_pipeline_takes_the_model(pictures, caplog):
    """Without its warning that the model's type is unknown."""
    net = tp.from_pretrained(MGG)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False)
    transformers_logging.enable_propagation()
    model = Classifier(net, NAMES)
    classify = pipeline("image-classification", model=model, image_processor=processor)
    transformers_logging.disable_propagation()
    assert not [r for r in caplog.records if "not supported" in r.getMessage()]
    assert classify.model.net is net
    assert len(classify(pictures[0], top_k=3)) == 3
    assert net.batches == 1


def test_the_model_in_a_loop_of_its_own(pictures):
    net = tp.from_pretrained("bundled:source-resnet26-cifar10")
    model = Classifier(net)
    images = torch.stack([to_tensor(p) for p in pictures])
    output = model(pixel_values=images, labels=torch.arange(5))
    assert torch.equal(output.logits, net(images))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.arange(5))
    assert torch.equal(output.loss, expected)
    assert model.config.id2label[3] == "LABEL_3"


def test_it_saves_the_adapters_artifact(tmp_path, pictures):
    model = Classifier(tp.from_pretrained("bundled:ttt-resnet26-cifar10", steps=1, copies=2))
    model.save_pretrained(tmp_path / "saved")
    loaded = tp.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.net.config


def test_mistakes():
    net = tp.from_pretrained(MGG)
    with pytest.raises(tp.InputError, match="3 labels were given, but the model has 10"):
        Classifier(net, ["a", "b", "c"])
    layers = torch.nn.Conv2d(3, 10, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    unknown = tp.wrap(torch.nn.Sequential(*layers), "source", normalize=False)
    with pytest.raises(tp.InputError, match="give labels="):
        Classifier(unknown)
    classify = image_classification(unknown, NAMES)
    assert not classify.image_processor.do_resize
