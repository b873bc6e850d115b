"""Networks as people have them: what surgery must leave right, each with an input.

`ZOO[name]()` is a network in training mode that has seen a batch, so that no statistic and no affine parameter is
as it was built, and an example input. `timm_...` are there where timm can be imported.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from bnlight.models import ResNet
from bnlight.norm import NORMS, GroupNorm
from bnlight.norm.batch import BatchStatistics

Animal = tuple[nn.Module, Tensor]


class BasicBlock(nn.Module):
    """A block with torchvision's names and order."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class TorchvisionResNet(nn.Module):
    """torchvision's ResNet-18 in modules, names and order, narrower."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            blocks = [BasicBlock(inputs, outputs, 1 + (stage > 0)), BasicBlock(outputs, outputs, 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class UNet(nn.Module):
    """Down twice, up twice, with skip connections."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = self.twice(1, width)
        self.down = self.twice(width, 2 * width)
        self.deep = self.twice(2 * width, 4 * width)
        self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.merge1 = self.twice(4 * width, 2 * width)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2 = self.twice(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def twice(inputs: int, outputs: int) -> nn.Sequential:
        parts = OrderedDict()
        for number, channels in enumerate((inputs, outputs), 1):
            parts[f"conv{number}"] = nn.Conv2d(channels, outputs, 3, padding=1)
            parts[f"norm{number}"] = nn.BatchNorm2d(outputs)
            parts[f"act{number}"] = nn.ReLU()
        return nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        top = self.enter(x)
        middle = self.down(F.max_pool2d(top, 2))
        deep = self.deep(F.max_pool2d(middle, 2))
        middle = self.merge1(torch.cat([middle, self.up1(deep)], 1))
        return self.head(self.merge2(torch.cat([top, self.up2(middle)], 1)))


class LSTMClassifier(nn.Module):
    """(N, T, F): batch norm of the features, an LSTM, layer norm of its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.last = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.last(self.lstm(x)[0][:, -1]))


class Shared(nn.Module):
    """One norm in two places and twice in one parent, and two norms that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.same = self.norm
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), self.norm, nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), self.norm, nn.BatchNorm2d(4))
        self.second[2].weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.second(self.first(x)))


class BatchNormReLU(nn.BatchNorm2d):
    """A norm with a behaviour of its own, as timm's BatchNormAct2d."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's: buffers only, no torch.nn norm."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Softplus(nn.Module):
    """A parametrization."""

    def forward(self, value: Tensor) -> Tensor:
        return F.softplus(value)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)


def conv_net(norm: Callable[[int], nn.Module], dimensions: int = 2) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return nn.Sequential(
        OrderedDict(
            conv1=conv(3, 8, 3, padding=1),
            norm1=norm(8),
            act1=nn.ReLU(),
            conv2=conv(8, 8, 3, padding=1),
            norm2=norm(8),
        )
    )


def mlp(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 8), norm(8), nn.Linear(8, 3))


def hooked() -> nn.Module:
    """Every kind of hook; those of the forward show in the output."""
    model = conv_net(nn.BatchNorm2d)
    norm = model.norm1
    norm.register_forward_pre_hook(lambda _, args: (args[0] + 0.5,))
    norm.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] * 1.5,), kwargs), with_kwargs=True)
    norm.register_forward_hook(lambda _, args, output: output * 2)
    norm.register_forward_hook(lambda _, args, kwargs, output: output + 1, with_kwargs=True, always_call=True)
    norm.register_full_backward_pre_hook(lambda _, gradients: tuple(3 * g for g in gradients))
    norm.register_full_backward_hook(lambda _, inputs, outputs: tuple(2 * g for g in inputs))
    norm.register_state_dict_post_hook(lambda _, state, prefix, metadata: None)
    norm.register_load_state_dict_post_hook(lambda _, keys: None)
    return model


def parametrized() -> nn.Module:
    """A norm's weight that is computed, and a convolution with weight norm."""
    model = conv_net(nn.BatchNorm2d)
    parametrize.register_parametrization(model.norm1, "weight", Softplus())
    parametrizations.weight_norm(model.conv2)
    return model


def frozen() -> nn.Module:
    """As people freeze a backbone: no gradient and evaluation, for one of two norms."""
    model = conv_net(nn.BatchNorm2d)
    model.add_module("other", FrozenBatchNorm2d(8))
    model.norm1.requires_grad_(False).eval()
    return model


def odd_arguments() -> nn.Module:
    """Norms that are not as by default: eps, momentum, without affine, bias or statistics."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8, eps=1e-3, momentum=None),
        nn.BatchNorm2d(8, affine=False, momentum=0.3),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.GroupNorm(8, 8, eps=1e-2),
        nn.GroupNorm(2, 8, affine=False),
        nn.InstanceNorm2d(8, affine=True, eps=1e-4),
        nn.InstanceNorm2d(8),
    )


def families() -> nn.Module:
    """One layer of each of torch's kinds that works on (N, C, H)."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1),
        nn.BatchNorm1d(8),
        nn.GroupNorm(4, 8),
        nn.InstanceNorm1d(8, affine=True),
        nn.LayerNorm(6),
        nn.RMSNorm(6, eps=1e-6),
        nn.LayerNorm(6, bias=False),
        nn.LayerNorm(6, elementwise_affine=False),
    )


def animal(make: Callable[[], nn.Module], *shape: int, dtype: torch.dtype = torch.float32) -> Animal:
    """The network after a batch in training, and an input."""
    torch.manual_seed(0)
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
        return model, x
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 1:
                for parameter in module.parameters():
                    parameter.add_(0.2 * torch.rand_like(parameter))
        for _ in range(2):
            model(torch.randn(shape).to(dtype) + 0.5)
    return model, x


ZOO: dict[str, Callable[[], Animal]] = {
    "torchvision_resnet": lambda: animal(TorchvisionResNet, 4, 3, 64, 64),
    "resnet_group": lambda: animal(lambda: ResNet((3, 8, 8), 5, GroupNorm, depth=8), 4, 3, 8, 8),
    "unet": lambda: animal(UNet, 2, 1, 16, 16),
    "transformer": lambda: animal(transformer, 3, 5, 8),
    "lstm_classifier": lambda: animal(LSTMClassifier, 4, 7, 6),
    "mlp": lambda: animal(lambda: mlp(nn.BatchNorm1d), 8, 6),
    "conv1d": lambda: animal(lambda: conv_net(nn.BatchNorm1d, 1), 4, 3, 6),
    "conv3d": lambda: animal(lambda: conv_net(nn.BatchNorm3d, 3), 2, 3, 4, 4, 4),
    "shared": lambda: animal(Shared, 4, 3, 6, 6),
    "parametrized": lambda: animal(parametrized, 4, 3, 6, 6),
    "hooked": lambda: animal(hooked, 4, 3, 6, 6),
    "subclassed": lambda: animal(lambda: conv_net(BatchNormReLU), 4, 3, 6, 6),
    "frozen": lambda: animal(frozen, 4, 3, 6, 6),
    "lazy": lambda: animal(
        lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)),
        *(4, 3, 6, 6),
    ),
    "half": lambda: animal(lambda: conv_net(nn.BatchNorm2d), 4, 3, 6, 6, dtype=torch.bfloat16),
    "double": lambda: animal(lambda: conv_net(nn.BatchNorm2d), 4, 3, 6, 6, dtype=torch.float64),
    "odd_arguments": lambda: animal(odd_arguments, 4, 3, 6, 6),
    "families": lambda: animal(families, 4, 3, 6),
}
for _name, _layer in NORMS.items():
    if issubclass(_layer, BatchStatistics):
        ZOO[f"our_{_name}"] = lambda layer=_layer: animal(lambda: conv_net(layer), 4, 3, 6, 6)


def _timm(name: str, size: int) -> Callable[[], Animal]:
    def make() -> Animal:
        import timm

        extra = {"img_size": size} if name.startswith("vit") else {}
        return animal(lambda: timm.create_model(name, num_classes=5, **extra), 2, 3, size, size)

    return make


def timm_is_there() -> bool:
    """Whether timm can be imported: it needs a torchvision that fits torch."""
    if importlib.util.find_spec("timm") is None:
        return False
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


TIMM = {
    "resnet18": 64,
    "mobilenetv3_small_050": 64,
    "efficientnet_b0": 64,
    "resnetv2_50": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 64,
}
if timm_is_there():
    ZOO |= {f"timm_{name}": _timm(name, size) for name, size in TIMM.items()}
