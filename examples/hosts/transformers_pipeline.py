"""An adapter in Hugging Face's image classification pipeline: labels and scores of PIL images.

Online methods adapt to batches of ``batch_size``; without it the pipeline passes one image
at a time.
"""

from PIL import Image

import ttt_plugins as tp
from ttt_plugins.hosts.transformers import image_classification

LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def main():
    net = tp.from_pretrained("bundled:mgg-resnet26-cifar10")
    classify = image_classification(net, LABELS)
    pictures = [Image.effect_noise((48, 48), 40 + i).convert("RGB") for i in range(4)]  # yours
    for answer in classify(pictures, batch_size=4, top_k=2):
        print({label["label"]: round(label["score"], 3) for label in answer})


if __name__ == "__main__":
    main()
