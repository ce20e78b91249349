"""An adapter in a Lightning module, for ``Trainer.predict`` and ``Trainer.test``.

Lightning runs prediction without gradients and in eval mode; an adapter computes the gradients that
it needs nevertheless. ``reset`` at the start keeps one run's stream out of the next.
"""

import lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ttt_plugins as tp


class Adapting(lightning.LightningModule):
    """Predicts with an adapter, whose stream restarts with every run."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def on_predict_start(self):
        """Begin the stream at the source."""
        self.net.reset()

    def predict_step(self, batch):
        """Classes (B,) of a batch that begins with its images."""
        return self.net(batch[0]).argmax(1)

    def on_test_start(self):
        """Begin the stream at the source."""
        self.net.reset()

    def test_step(self, batch):
        """Log loss and accuracy of a batch of images and labels."""
        images, labels = batch
        logits = self.net(images)
        self.log("loss", F.cross_entropy(logits, labels))
        self.log("accuracy", (logits.argmax(1) == labels).float().mean())


def main():
    net = tp.from_pretrained("bundled:mgg-resnet26-cifar10")
    data = TensorDataset(torch.rand(8, 3, 32, 32), torch.randint(10, (8,)))
    loader = DataLoader(data, batch_size=4)  # replace it with your own
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    predictions = torch.cat(trainer.predict(Adapting(net), loader))
    print(f"classes {predictions.tolist()}")
    trainer.test(Adapting(net), loader)


if __name__ == "__main__":
    main()
