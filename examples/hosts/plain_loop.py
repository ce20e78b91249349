"""An adapter in a plain evaluation loop, in place of the model.

Images are in [0, 1]: remove a ``Normalize`` at the end of the loader's transform, and give the
adapter the mean and deviation if the model does not know them. Online methods depend on the order
of the images, so a stream begins with ``reset``.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset

import ttt_plugins as tp


@torch.inference_mode()
def accuracy(model, loader):
    """Share of images classified correctly, as timm's and torchvision's scripts compute it."""
    model.eval()
    right = seen = 0
    for images, labels in loader:
        right += (model(images).argmax(1) == labels).sum().item()
        seen += len(labels)
    return right / seen


def main():
    net = tp.from_pretrained("bundled:mgg-resnet26-cifar10")
    data = TensorDataset(torch.rand(8, 3, 32, 32), torch.randint(10, (8,)))
    loader = DataLoader(data, batch_size=4)  # replace it with your own
    net.reset()
    print(f"accuracy {accuracy(net, loader):.2f} after {net.batches} adapted batches")


if __name__ == "__main__":
    main()
