"""Small 32x32 networks of the test-time-training papers, registered with timm.

After ``import ttt_plugins`` timm can create them::

    timm.create_model("ttt_resnet26", num_classes=10, width=16)      # GroupNorm
    timm.create_model("ttt_resnet26_bn", num_classes=10)             # BatchNorm
    timm.create_model("ttt_vit_tiny_patch4_32", num_classes=10)      # LayerNorm

Sources: He et al., "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027) for
the pre-activation unit; Sun et al., TTT (arXiv 1909.13231) for depth 26, widths 16/32/64,
8 groups and parameter-free shortcuts; Bartler et al., MT3 (arXiv 2103.16201) for the
32-filter form with 16 groups, biased convolutions and a hidden layer of 256 before the
classifier; Dosovitskiy et al., ViT (arXiv 2010.11929).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["MT3_NETWORK", "PreActResNet"]

#: Arguments of ``ttt_resnet26`` that make it the network of MT3's paper.
MT3_NETWORK: dict[str, Any] = {
    "width": 32,
    "groups": 16,
    "norm_eps": 1e-3,
    "conv_bias": True,
    "activate_shortcut": True,
    "hidden": 256,
}


class PreActUnit(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, with a shortcut that has no parameters.

    If the resolution halves, the shortcut is 2x2 average pooling. If there are more output channels
    than input channels, the additional ones are zeros: half of them before the others and half
    after, or all of them after.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        stride: int,
        norm,
        bias: bool,
        activate_shortcut: bool,
        pad_end: bool,
        zeros_last: bool,
    ):
        super().__init__()
        self.norm1 = norm(width_in)
        # TensorFlow's SAME padding at stride 2 pads only bottom and right.
        self.pad_end = pad_end and stride > 1
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 0 if self.pad_end else 1, bias=bias)
        self.norm2 = norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=bias)
        self.stride = stride
        self.missing = width_out - width_in
        self.zeros_last = zeros_last
        self.activate_shortcut = activate_shortcut

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = active if self.activate_shortcut else x
        if self.stride > 1:
            shortcut = F.avg_pool2d(shortcut, self.stride)
        if self.missing:
            before = 0 if self.zeros_last else self.missing // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.missing - before))
        out = self.conv1(F.pad(active, (0, 1, 0, 1)) if self.pad_end else active)
        return self.conv2(F.relu(self.norm2(out))) + shortcut


class PreActResNet(nn.Module):
    """Pre-activation ResNet for small images, with timm's feature interface.

    Args:
        num_classes: number of classes; 0 for no classifier.
        in_chans: number of channels of the images.
        depth: number of layers, 6n + 2 for n units in each of the three stages; 26 in both papers.
        width: number of channels of the first stage; the next two have 2 and 4 times as many.
        norm: ``"group"`` or ``"batch"``.
        groups: number of groups of every GroupNorm (TTT: 8 at width 16; MT3: 16 at width 32).
        norm_eps: epsilon of the norms (1e-5 by default in PyTorch; 1e-3 in MT3's TensorFlow code).
        conv_bias: whether the units' convolutions have biases (MT3: yes).
        activate_shortcut: whether the shortcut of the first unit starts after the activation (MT3:
            yes).
        hidden: width of a linear layer without bias, with a ReLU, between pooled features and
            classifier (256 in MT3); 0 for no such layer. Its outputs are the pooled features.
        pad_end: whether convolutions that halve the resolution pad only bottom and right, as in
            TensorFlow (MT3's released weights: yes).
        zeros_last: whether all additional channels of a shortcut come after the others, as in TTT's
            released code, instead of half before and half after.
        global_pool: ``"avg"``, or ``""`` for feature maps instead of logits.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: int = 26,
        width: int = 16,
        norm: str = "group",
        groups: int = 8,
        norm_eps: float = 1e-5,
        conv_bias: bool = False,
        activate_shortcut: bool = False,
        hidden: int = 0,
        pad_end: bool = False,
        zeros_last: bool = False,
        global_pool: str = "avg",
    ):
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2, got {depth}")
        if norm == "group":
            norm_layer = partial(nn.GroupNorm, groups, eps=norm_eps)
        elif norm == "batch":
            norm_layer = partial(nn.BatchNorm2d, eps=norm_eps)
        else:
            raise ValueError(f"norm must be 'group' or 'batch', got {norm!r}")
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        units = (depth - 2) // 6
        self.global_pool = global_pool
        self.stem = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        stages, width_in = [], width
        for stage, width_out in enumerate((width, 2 * width, 4 * width)):
            blocks = []
            for unit in range(units):
                first = unit == 0
                blocks.append(
                    PreActUnit(
                        width_in,
                        width_out,
                        2 if first and stage else 1,
                        norm_layer,
                        conv_bias,
                        activate_shortcut and first and stage == 0,
                        pad_end,
                        zeros_last,
                    )
                )
                width_in = width_out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = norm_layer(width_in)
        self.pre_logits = nn.Linear(width_in, hidden, bias=False) if hidden else nn.Identity()
        self.num_features = width_in
        self.head_hidden_size = hidden or width_in
        self.feature_info = [
            {"num_chs": width * 2**i, "reduction": 2**i, "module": f"stages.{i}"} for i in range(3)
        ]
        self.num_classes = num_classes
        self.head = self._classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The classifier layer; part of timm's interface."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for this number of classes, or by none for 0."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head = self._classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) -> maps (B, 4 * width, 8, 8) after the last norm and ReLU."""
        return F.relu(self.norm(self.stages(self.stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps (B, C, H, W) -> pooled features (B, head_hidden_size) or logits (B, classes)."""
        if not self.global_pool:
            return x
        x = self.pre_logits(x.mean((2, 3)))
        if isinstance(self.pre_logits, nn.Linear):
            x = F.relu(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, classes)."""
        return self.forward_head(self.forward_features(x))


_CIFAR10 = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    # Means and standard deviations of the channels of the CIFAR-10 training images.
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}

default_cfgs = generate_default_cfgs(
    {
        "ttt_resnet26.untrained": {**_CIFAR10, "first_conv": "stem", "classifier": "head"},
        "ttt_resnet26_bn.untrained": {**_CIFAR10, "first_conv": "stem", "classifier": "head"},
        "ttt_vit_tiny_patch4_32.untrained": {
            **_CIFAR10,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
)


@register_model
def ttt_resnet26(pretrained: bool = False, **kwargs) -> PreActResNet:
    """Pre-activation ResNet-26 with GroupNorm; ``width=16`` (TTT) or ``32`` (MT3)."""
    network = build_model_with_cfg(PreActResNet, "ttt_resnet26", pretrained, **kwargs)
    return cast(PreActResNet, network)


@register_model
def ttt_resnet26_bn(pretrained: bool = False, **kwargs) -> PreActResNet:
    """Pre-activation ResNet-26 with BatchNorm."""
    kwargs.setdefault("norm", "batch")
    network = build_model_with_cfg(PreActResNet, "ttt_resnet26_bn", pretrained, **kwargs)
    return cast(PreActResNet, network)


@register_model
def ttt_vit_tiny_patch4_32(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """Vision transformer for 32x32 images: 64 patches of 4x4, width 192, 6 blocks, LayerNorm."""
    defaults = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "mlp_ratio": 2.0,
    }
    network = build_model_with_cfg(
        VisionTransformer, "ttt_vit_tiny_patch4_32", pretrained, **{**defaults, **kwargs}
    )
    return cast(VisionTransformer, network)
