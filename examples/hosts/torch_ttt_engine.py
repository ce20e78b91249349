"""Our engines in torch-ttt's registry: `pip install "ttt-plugins[torch-ttt]"`.

Importing ``ttt_plugins.hosts.torch_ttt`` adds ``mt3``, ``mgg`` and ``ttt_plugins_ttt`` (``ttt`` is
torch-ttt's own). In train mode an engine returns logits and a loss for training the classifier and
its heads; in eval mode it returns the adapter's logits and loss, even under ``no_grad``.
"""

import timm
import torch
from torch_ttt.engine_registry import EngineRegistry

import ttt_plugins.hosts.torch_ttt  # noqa: F401 (registers the engines)


def main():
    torch.manual_seed(0)
    model = timm.create_model("ttt_resnet26", num_classes=10)
    loader = [(torch.rand(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(2)]  # replace it
    engine = EngineRegistry.get_engine("mt3")(
        model, optimization_parameters={"lr": 0.1, "copies": 4}
    )
    optimizer = torch.optim.Adam(engine.parameters(), lr=1e-3)
    engine.train()
    for images, labels in loader:
        optimizer.zero_grad()
        outputs, loss_ttt = engine(images)
        (torch.nn.functional.cross_entropy(outputs, labels) + 0.1 * loss_ttt).backward()
        optimizer.step()
    engine.eval()
    for images, _ in loader:
        outputs, loss_ttt = engine(images)
        print(f"classes {outputs.argmax(1).tolist()}, self-supervised loss {loss_ttt:.3f}")


if __name__ == "__main__":
    main()
