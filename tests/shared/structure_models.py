"""Small models with random weights that couple channels, neurons and heads in every way."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from structure_oracle import randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Entry:
    """A model, its inputs, and facts about it that were worked out by hand.

    ``free`` counts the members of all groups by kind, ``frozen`` names parts of the reasons that must be given.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[object, ...]]
    free: Counter[str] | None = None
    frozen: tuple[str, ...] = ()

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return randomise(self.build()).eval()


ZOO: dict[str, Entry] = {}
HUGGING_FACE: dict[str, Entry] = {}


def images(*shape: int, batch: int = 2) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(batch, *shape),)


def tokens(vocabulary: int, length: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(vocabulary, (2, length)),)


def zoo(inputs: Callable[[], tuple[object, ...]], *frozen: str, table: dict[str, Entry] = ZOO, **free: int):
    """Put a model class or factory into the table under its name; free members by kind if they are known."""

    def add(build):
        table[build.__name__] = Entry(build, inputs, Counter(free) if free or frozen else None, frozen)
        return build

    return add


# --- convolutional networks ------------------------------------------------------------------------------------------


def conv_bn(inputs: int, outputs: int, size: int = 3, activation=nn.ReLU, **options) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation())


def classifier(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


@zoo(images(6), "an output", neuron=12 + 10)
def MLP():
    return nn.Sequential(
        nn.Linear(6, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(12, 10),
        nn.BatchNorm1d(10),
        nn.Tanh(),
        nn.Linear(10, 3),
    )


@zoo(images(3, 8, 8), "an output", channel=8 + 12, neuron=10)
class VGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 8), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Sequential(nn.Linear(12 * 4, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x):
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


@zoo(images(3, 8, 8), "an output", channel=8 + 12, neuron=10)
class VGGWithView(VGG):
    def forward(self, x):
        return self.head(self.pool(self.features(x)).view(-1, 48))


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    def __init__(self, inputs, middle, outputs, stride=1, groups=1):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, middle, 1),
            conv_bn(middle, middle, 3, stride=stride, groups=groups),
            conv_bn(middle, outputs, 1, nn.Identity),
        )
        self.short = nn.Identity() if inputs == outputs else conv_bn(inputs, outputs, 1, nn.Identity, stride=stride)

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x))


class PreActivation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(2 * width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


@zoo(images(3, 8, 8), channel=8 + 8 + 16 + 16)
def ResNetBasic():
    return nn.Sequential(conv_bn(3, 8), Basic(8, 8), Basic(8, 16, 2), classifier(16))


@zoo(images(3, 8, 8), channel=8 + 2 * 4 + 16 + 2 * 4)
def ResNetBottleneck():
    return nn.Sequential(conv_bn(3, 8), Bottleneck(8, 4, 16, 2), Bottleneck(16, 4, 16), classifier(16))


@zoo(images(3, 8, 8), channel=8 + 16 + 16)
def ResNetPreActivation():
    return nn.Sequential(nn.Conv2d(3, 8, 3), PreActivation(8), PreActivation(8), nn.BatchNorm2d(8), classifier(8))


@zoo(images(3, 8, 8), channel=8 + 4 + 16)
def ResNeXt():
    return nn.Sequential(conv_bn(3, 8), Bottleneck(8, 12, 16, groups=4), classifier(16))


@zoo(images(3, 8, 8), channel=4)
class PaddedShortcut(nn.Module):
    """The shortcut of the CIFAR ResNets, padded with zeros: channels that are added to padding only stay."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, 2, 1)
        self.head = classifier(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, squeezed, activation, gate):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x):
        y = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.excite(self.activation(self.squeeze(y))))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, hidden, outputs, stride=1, activation=nn.ReLU6, excite=None):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, hidden, 1, activation),
            conv_bn(hidden, hidden, 3, activation, stride=stride, groups=hidden),
            excite or nn.Identity(),
            conv_bn(hidden, outputs, 1, nn.Identity),
        )
        self.skip = inputs == outputs

    def forward(self, x):
        return x + self.body(x) if self.skip else self.body(x)


@zoo(images(3, 8, 8), channel=8 + 24 + 20 + 12 + 20)
def MobileNetV2():
    return nn.Sequential(
        conv_bn(3, 8, 3, nn.ReLU6, stride=2),
        InvertedResidual(8, 24, 8),
        InvertedResidual(8, 20, 12, 2),
        conv_bn(12, 20, 1, nn.ReLU6),
        classifier(20),
    )


@zoo(images(3, 8, 8), channel=8 + 16 + 4 + 20, neuron=10)
def MobileNetV3():
    return nn.Sequential(
        conv_bn(3, 8, 3, nn.Hardswish, stride=2),
        InvertedResidual(8, 16, 8, 1, nn.Hardswish, SqueezeExcite(16, 4, nn.ReLU, nn.Hardsigmoid)),
        conv_bn(8, 20, 1, nn.Hardswish),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 10),
        nn.Hardswish(),
        nn.Linear(10, 3),
    )


@zoo(images(3, 8, 8), channel=8 + 24 + 2)
def EfficientNet():
    excite = SqueezeExcite(24, 2, nn.SiLU, nn.Sigmoid)
    return nn.Sequential(conv_bn(3, 8, 3, nn.SiLU), InvertedResidual(8, 24, 8, 1, nn.SiLU, excite), classifier(8))


@zoo(images(3, 8, 8), channel=8 + 3 * 4 + 10)
class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)) for i in range(3)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2))
        self.head = classifier(10)

    def forward(self, x):
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.head(self.transition(torch.cat(found, 1)))


class ShuffleUnit(nn.Module):
    def __init__(self, width):
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1), conv_bn(half, half, 3, nn.Identity, groups=half), conv_bn(half, half, 1)
        )

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        x = torch.cat([first, self.branch(second)], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(batch, -1, height, width)


@zoo(images(3, 8, 8), channel=8 + 8 + 2 * 8 + 10)
def ShuffleNetV2():
    """The view before a shuffle pairs the halves: eight pairs; what only a branch reads is free by itself."""
    return nn.Sequential(conv_bn(3, 16), ShuffleUnit(16), ShuffleUnit(16), conv_bn(16, 10, 1), classifier(10))


@zoo(images(3, 8, 8), "an output", channel=8 + 12 + 8 + 8)
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.middle = conv_bn(3, 8), conv_bn(8, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.decode, self.out = conv_bn(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        skip = self.down(x)
        x = self.up(self.middle(F.max_pool2d(skip, 2)))
        return self.out(self.decode(torch.cat([x, skip], 1)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.ones(width))
        self.expand, self.reduce = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.reduce(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


@zoo(images(3, 8, 8), "layer_norm", neuron=24 + 24)
class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


@zoo(images(3, 8, 8), channel=3 + 8)
def GroupNormGrouped():
    """Groups of four from the norms, of two from the convolution: blocks of four."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.GroupNorm(3, 12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=6),
        nn.GroupNorm(3, 12),
        nn.Conv2d(12, 8, 1),
        nn.InstanceNorm2d(8, affine=True),
        classifier(8),
    )


@zoo(images(3, 8, 8), channel=4 + 12)
def GroupedTransposed():
    """Four groups, each with two inputs and three outputs; a depthwise layer with a multiplier of two."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ConvTranspose2d(8, 12, 2, 2, groups=4),
        nn.ReLU(),
        nn.Conv2d(12, 12, 1),
        nn.Conv2d(12, 24, 3, groups=12),
        classifier(24),
    )


@zoo(images(3, 6, 6), channel=8 + 4)
def PixelShuffle():
    """A channel after the shuffle is four channels before it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 3, 1)
    )


@zoo(images(3, 8, 8), channel=4 + 8)
def PixelUnshuffle():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )


@zoo(images(3, 8, 8), channel=8 + 2 * 6 + 2 * 6 + 10)
class C2f(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.last = conv_bn(3, 8), conv_bn(8, 12, 1), conv_bn(24, 10, 1)
        self.inner = nn.ModuleList([nn.Sequential(conv_bn(6, 6), conv_bn(6, 6)) for _ in range(2)])
        self.head = classifier(10)

    def forward(self, x):
        found = list(self.first(self.stem(x)).split((6, 6), 1))
        for layer in self.inner:
            found.append(found[-1] + layer(found[-1]))
        return self.head(self.last(torch.cat(found, 1)))


@zoo(images(4, 20), channel=8 + 8 + 8)
class TCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(4, 8, 1)
        self.layers = nn.ModuleList(nn.Conv1d(8, 8, 3, dilation=2**i) for i in range(2))
        self.out = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for i, (layer, out) in enumerate(zip(self.layers, self.out, strict=True)):
            x = x + out(F.relu(layer(F.pad(x, (2 ** (i + 1), 0)))))
        return self.head(x[..., -1])


@zoo(images(2, 6, 6, 6), channel=6 + 8)
def Conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(6, 8, 3, padding=1),
        nn.Conv3d(8, 8, 3, padding=1, groups=8),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@zoo(images(3, 8, 8), "an output", channel=8)
class BroadcastMask(nn.Module):
    """A single channel multiplies eight."""

    def __init__(self):
        super().__init__()
        self.mask, self.image, self.out = nn.Conv2d(3, 1, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.out(torch.sigmoid(self.mask(x)) * self.image(x))


@zoo(images(3, 8, 8), "an output", channel=6 + 8)
class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.interpolate(self.one(x), scale_factor=2, mode="nearest")
        return self.out(F.interpolate(self.two(x), size=(8, 8), mode="bilinear", align_corners=False))


@zoo(images(3, 6, 6), channel=8 + 10)
def BatchNormWithoutAffine():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Conv2d(8, 10, 3),
        nn.PReLU(10),
        classifier(10),
    )


@zoo(images(3, 8, 8), "mixed by softmax", channel=6)
class ChannelSoftmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(self.two(F.relu(self.one(x))).softmax(1))


@zoo(images(3, 8, 8), "reduced by mean", channel=6)
class ChannelMean(nn.Module):
    """Spatial attention as in CBAM: mean and maximum over channels."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.mask = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(2, 1, 3, padding=1)
        self.head = classifier(8)

    def forward(self, x):
        x = self.two(F.relu(self.one(x)))
        mask = self.mask(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
        return self.head(x * mask.sigmoid())


# --- plain layers and elementwise operators ---------------------------------------------------------------------------


@zoo(images(6), neuron=12 + 10 + 8 + 6)
class Activations(nn.Module):
    """Activations that do not map 0 to 0: a closed channel is not zero until it is read."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 8), nn.Linear(8, 6)])
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.sigmoid(self.layers[0](x)) + 1
        x = torch.exp(self.layers[1](x).clamp(max=2))
        x = torch.log(F.softplus(self.layers[2](x)) + 0.1)
        x = torch.cos(self.layers[3](x)) ** 2 - 0.5
        return self.out(x)


@zoo(images(6), neuron=8 + 6 + 6)
class Glu(nn.Module):
    """A member is a value with its gate."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.out = nn.Linear(6, 16), nn.Linear(8, 12), nn.Linear(6, 12), nn.Linear(6, 3)

    def forward(self, x):
        x = F.glu(self.two(F.glu(self.one(x), -1)), -1)
        value, gate = self.three(x).chunk(2, -1)
        return self.out(value * F.gelu(gate))


@zoo(images(6), neuron=10 + 8)
class ElementwiseMaximum(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 10), nn.Linear(6, 10)
        self.three, self.four, self.out = nn.Linear(10, 8), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.max(self.one(x), self.two(x))
        return self.out(torch.minimum(self.three(x), self.four(x)))


@zoo(images(6), neuron=10)
class BufferConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.out = nn.Linear(6, 10), nn.Linear(10, 3)
        self.register_buffer("scale", torch.rand(10))
        self.register_buffer("shift", torch.randn(1, 10), persistent=False)

    def forward(self, x):
        return self.out(F.relu(self.one(x)) * self.scale + self.shift)


@zoo(images(6), neuron=8)
class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.shared, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.one(x))
        return self.out(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


@zoo(lambda: (torch.randn(2, 6), torch.randn(2, 4)), neuron=10 + 8)
class DictOutput(nn.Module):
    """Two inputs and named outputs; one of them is a hidden layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.shown = nn.Linear(6, 10), nn.Linear(4, 10), nn.Linear(10, 5)
        self.three, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, y):
        shown = self.shown(F.relu(self.one(x)) + self.two(y))
        return {"hidden": shown, "logits": (self.out(F.relu(self.three(shown))), None)}


@zoo(images(5, 6), neuron=8)
class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.two(F.relu(self.one(x)))
        return self.out(torch.einsum("bnc,bmc->bnm", x, x) @ x)


@zoo(images(6), "broadcast across channels", neuron=5)
class Outer(nn.Module):
    """Every neuron of one layer times every one of another: only one side can be free."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(20, 3)

    def forward(self, x):
        return self.out((self.one(x)[:, :, None] * self.two(x)[:, None]).flatten(1))


@zoo(images(6), "linalg_vector_norm", "reduced by max", "reduced by std", neuron=8)
class NormsByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 8), nn.Linear(8, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        x = self.one(x).relu()
        x = F.normalize(self.two(x), dim=-1)
        x = self.three(x)
        x = self.four(x - x.max(-1, keepdim=True).values)
        return self.out(x / x.std(-1, keepdim=True))


class OwnContext(nn.Module):
    """A part that runs in a graph of its own."""

    def __init__(self, context, size_by_hand=False):
        super().__init__()
        self.one, self.two, self.three, self.out = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.context, self.size_by_hand = context, size_by_hand

    def forward(self, x):
        x = self.two(self.one(x).relu())
        with self.context():
            x = self.three(x.relu())
            x = x.view(-1, 1, 7).squeeze(1) if self.size_by_hand else x
        return self.out(x)


@zoo(images(6), "an output of the model", neuron=8 + 7 + 7)
def OwnPrecision():
    return OwnContext(functools.partial(torch.autocast, "cpu", enabled=False))


@zoo(images(6), "an output of the model", neuron=8 + 7 + 7)
def OwnGradients():
    return OwnContext(torch.enable_grad)


@zoo(images(6), "an output of the model", neuron=8 + 7 + 7)
def SizesInARegion():
    return OwnContext(functools.partial(torch.autocast, "cpu", enabled=False), size_by_hand=True)


@zoo(tokens(10, 5), "an output of the model", neuron=8 + 7)
class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.one, self.out = nn.EmbeddingBag(10, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, ids):
        return self.out(self.one(self.bag(ids)).relu())


def _recurrent(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.recurrent = nn.Linear(6, 8), kind(8, 10, batch_first=True)
            self.two, self.out = nn.Linear(10, 12), nn.Linear(12, 3)

        def forward(self, x):
            x, _ = self.recurrent(F.relu(self.one(x)))
            return self.out(F.relu(self.two(x)))

    return Recurrent


@zoo(images(5, 6), "has no rule", neuron=12)
def LSTM():
    return _recurrent(nn.LSTM)()


@zoo(images(5, 6), "has no rule", neuron=12)
def GRU():
    return _recurrent(nn.GRU)()


@zoo(tokens(20, 5), neuron=16 + 12)
class TiedLanguageModel(nn.Module):
    """The embedding's columns are written by one end and read by the other."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.up, self.down, self.head = nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(F.relu(self.up(x))))


@zoo(images(6), neuron=6 + 6)
class Standardised(nn.Module):
    """Kernels that are computed, by a parametrization and in the forward pass: they write, but do not read."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), parametrizations.weight_norm(nn.Linear(6, 6))
        self.three, self.four, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.two(F.relu(self.one(x))))
        x = F.linear(x, self.three.weight * 2, self.three.bias)
        return self.out(F.relu(self.four(x)))


@zoo(images(6))
class SharedStorage(nn.Module):
    """An autoencoder whose decoder uses the transpose of the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(8, 6)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().t())
        self.one = nn.Linear(6, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x):
        return self.out(F.relu(self.one(self.decoder(F.relu(self.encoder(x))))))


@zoo(images(6), "both as a weight and as an activation", neuron=5)
class WeightShown(nn.Module):
    """A row of a layer's weight is added to an activation."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(6, 8)
        self.four, self.out = nn.Linear(16, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.cat([self.two(F.relu(self.one(x))), self.three(x) + self.two.weight[0]], 1)
        return self.out(F.relu(self.four(x)))


@zoo(images(5, 8), head=4, neuron=8)
class ZeroBias(nn.Module):
    """Attention that adds zeros made for a fixed number of heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (layer(x).view(x.shape[0], 5, 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = torch.zeros(1, 4, 5, 5)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias * 2)
        y = y + torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v
        return self.out(torch.tanh(self.proj(y.transpose(1, 2).reshape(x.shape[0], 5, 16)))).mean(1)


@zoo(images(6), "no weight reads them", neuron=8 + 7 + 4)
class InPlace(nn.Module):
    """Activations written into others through views: one neuron of the second layer, half of the third's."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.one(x), inplace=True)
        x[:, :4].mul_(2)
        x = self.two(x)
        total = x.new_zeros(x.shape)
        total[:, 1:2].add_(x[:, 3:4])
        total[:, 4:] = self.three(x)[:, :4]
        return self.out(torch.cat([total, x], 1))


@zoo(images(6), "used as an index", neuron=8)
class Steered(nn.Module):
    """Activations that are used as indices."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.values = (nn.Linear(6, 8) for _ in range(4))
        self.table, self.out = nn.Embedding(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        first, second = ((layer(x).sigmoid() * 3).long() for layer in (self.one, self.two))
        found = torch.gather(x.repeat(1, 2), 1, first)[:, :1] + self.table(second).sum(1)
        return self.out(torch.where(self.three(x) > 0, found, self.values(x)))


def graph() -> tuple[Tensor, ...]:
    """Features of seven nodes, and twelve edges."""
    return torch.randn(7, 6), torch.randint(7, (12, 2))


@zoo(graph, neuron=28)
class MessagePassing(nn.Module):
    """A graph network: rows are gathered along edges, and added up or replaced where they arrive."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 11)
        self.out = nn.Linear(11, 3)

    def forward(self, x, edges):
        first, second = edges.unbind(1)
        x = F.relu(self.one(x))
        x = torch.zeros_like(x).index_add(0, second, x[first])
        x = F.relu(self.two(x))
        sent = torch.take_along_dim(x, first[:, None], 0)
        arrived = x.new_zeros(x.shape).scatter_add_(0, second[:, None].expand_as(sent), sent)
        arrived = arrived.scatter_reduce(0, first[:, None].expand_as(sent), sent, "amax", include_self=False)
        x = F.relu(self.three(arrived))
        return self.out(x.index_copy(0, second[:1], x[first[:1]] / 2))


@zoo(graph, "indices of their own for each channel", neuron=9)
class OwnIndices(nn.Module):
    """Each channel is read and written at other rows, or not all channels are."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.free, self.out = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x, edges):
        first = edges[: len(x), :1]
        own = (first + torch.arange(8)) % 7
        found = self.one(x).gather(0, own) + torch.zeros(len(x), 8).scatter_add(0, own, self.two(x))
        part = self.three(x).gather(0, first.expand(-1, 4))
        return self.out(F.relu(self.free(x))) + found.sum(1, keepdim=True) + part.sum(1, keepdim=True)


@zoo(images(6), neuron=12)
class Repeated(nn.Module):
    """Channels copied, reversed and concatenated."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 6), nn.Linear(12, 6), nn.Linear(30, 3)

    def forward(self, x):
        x = F.relu(self.one(x)).repeat(1, 2)
        y = self.two(x)
        parts = [y.flip(1), torch.stack([y, -y], 2).flatten(1), y.repeat_interleave(2, 1)]
        return self.out(torch.cat(parts, 1))


@zoo(images(6), "channels that are padded", neuron=8)
class PaddedNeurons(nn.Module):
    """Padding with zeros, and with copies of the edge."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 8), nn.Linear(10, 8), nn.Linear(10, 3)

    def forward(self, x):
        x = self.two(F.pad(F.relu(self.one(x)), (1, 1)))
        return self.out(F.pad(F.relu(x), (1, 1), mode="replicate"))


@zoo(images(5, 6), neuron=10 + 8 + 7)
class Mixer(nn.Module):
    """Weights that mix the tokens, from the left: of an input, where they are free, and of free channels."""

    def __init__(self):
        super().__init__()
        self.left, self.back = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5, 7))
        self.up, self.down, self.out = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.tall, self.wide = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5, 7))

    def forward(self, x):
        x = x + self.wide @ F.gelu(self.tall @ x)
        x = self.down(F.gelu(self.up(x)))
        return self.out(x + self.back @ F.gelu(self.left @ x))


# --- attention --------------------------------------------------------------------------------------------------------


def _split(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


class FusedBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@zoo(images(3, 8, 8), "residual stream of layer_norm", head=2 * 4, neuron=2 * 32)
class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        self.blocks = nn.Sequential(FusedBlock(16, 4), FusedBlock(16, 4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


@zoo(images(5, 16), "an input of the model", head=2 * 4, neuron=2 * 20)
def TransformerEncoder():
    layers = [nn.TransformerEncoderLayer(16, 4, 20, batch_first=i == 0, norm_first=i == 1) for i in range(2)]
    return nn.Sequential(*layers, nn.Linear(16, 3))


@zoo(lambda: (torch.randn(2, 5, 8), torch.randn(2, 7, 6)), "an output", head=4, neuron=6 + 8)
class CrossAttention(nn.Module):
    """Queries, keys and values of different widths; what the memory and the output projection write is free."""

    def __init__(self):
        super().__init__()
        self.memory = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x, memory):
        memory = F.relu(self.memory(memory))
        mixed, _ = self.attention(x, memory, memory, need_weights=False)
        return self.out(mixed)


@zoo(lambda: (torch.randn(2, 5, 8), torch.randn(2, 7, 6)), "reduced by mean", neuron=6 + 8)
class ShownAttention(CrossAttention):
    """The mean of the weights over the heads is an output: heads stay."""

    def forward(self, x, memory):
        memory = F.relu(self.memory(memory))
        mixed, weights = self.attention(x, memory, memory)
        return self.out(mixed), weights


@zoo(images(5, 16), head=4, neuron=16)
class PlainAttention(nn.Module):
    """Attention written out, with a scale, a mask and a bias for each head; the residual stream has no norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))
        self.table = nn.Embedding(9, 4)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        length = x.shape[1]
        q, k, v = (_split(f(x), 4) for f in (self.q, self.k, self.v))
        steps = torch.arange(length)
        scores = q @ k.transpose(-2, -1) / 2 + self.table(steps[:, None] - steps + length - 1).permute(2, 0, 1)
        scores = scores.masked_fill(torch.ones(length, length).tril() == 0, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(x + self.proj(mixed))


@zoo(images(5, 16), head=2, neuron=16 + 24)
class RotaryAttention(nn.Module):
    """Grouped queries, rotary positions, RMS norms of queries and keys within a head, and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.q, self.k, self.v, self.proj = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)
        self.norm_q, self.norm_k = nn.RMSNorm(4), nn.RMSNorm(4)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]))
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        q, k = (
            self._turn(n(_split(f(x), h)), angles) for f, n, h in ((self.q, self.norm_q, 4), (self.k, self.norm_k, 2))
        )
        v = _split(self.v(x), 2)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], 4, -1, 4) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return self.out(x + self.down(F.silu(self.gate(x)) * self.up(x)))

    def _turn(self, x, angles):
        low, high = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-high, low], -1) * angles.sin()


@zoo(images(5, 16), head=4)
class MovedAttention(nn.Module):
    """Heads that are reshaped after another tensor, broadcast, and copied into a fresh tensor piece by piece."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = torch.stack([q[..., ::2], q[..., 1::2]], -1).reshape_as(q)
        k = torch.broadcast_to(k, (b, self.heads, n, 4))
        copied = v.new_empty(b, self.heads, n, 4)
        copied[..., :2] = v[..., :2]
        copied[..., 2:] = v[..., 2:]
        copied[:, :, 0].zero_()
        first, second = torch.tensor_split(copied, 2, -1)
        h = F.scaled_dot_product_attention(q, k, torch.cat([first, second], -1))
        return self.proj(h.transpose(1, 2).flatten(2))


@zoo(images(5, 16), head=4)
class EinsumAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(16, 3))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, 4)) for f in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
        h = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return torch.einsum("...i,io->...o", h.flatten(2), self.proj)


@zoo(images(5, 8), channel=12)
class StateSpace(nn.Module):
    """Mamba's inner channels: a depthwise kernel without its middle axis, a parameter of states for each channel."""

    def __init__(self):
        super().__init__()
        self.inner = 12
        self.into, self.conv = nn.Linear(8, 24), nn.Conv1d(12, 12, 3, groups=12)
        self.states, self.skip = nn.Parameter(torch.empty(12, 3)), nn.Parameter(torch.empty(12))
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        h, gate = self.into(x).transpose(1, 2).chunk(2, 1)
        kernel = self.conv.weight.squeeze(1)
        h = F.silu(F.conv1d(F.pad(h, (2, 0)), kernel.unsqueeze(1), self.conv.bias, groups=kernel.shape[0]))
        decay = torch.exp(-torch.exp(self.states.float()))[None]
        state, seen = h.new_zeros(h.shape[0], self.inner, 3), []
        for i in range(h.shape[2]):
            state = decay * state + h[:, :, i, None]
            seen.append(state.sum(-1))
        h = (torch.stack(seen, -1) + h * self.skip[None, :, None]) * F.silu(gate)
        return self.out(h.transpose(1, 2))


@zoo(images(5, 16), head=4)
class ComplexRotation(nn.Module):
    """Rotary positions by complex numbers, and keys that attend over channels instead of tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("turn", torch.polar(torch.ones(5, 2), torch.randn(5, 2)))

    def forward(self, x):
        q, k, v = (_split(f(x), 4) for f in (self.q, self.k, self.v))
        q, k = (torch.view_as_complex(t.reshape(*t.shape[:-1], 2, 2)) * self.turn for t in (q, k))
        q, k = (torch.view_as_real(t).flatten(3) for t in (q, k))
        mixed = F.elu(q) @ (F.elu(k).transpose(-2, -1) @ v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


@zoo(images(5, 16), head=4, neuron=16)
class MultiQuery(nn.Module):
    """One key and one value for all heads: only the queries' heads would be free, and they are read apart."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.bias = nn.Parameter(torch.randn(1, 1, 5, 5))
        self.proj = nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.embed(x))
        k, v = self.kv(x)[:, None].split(4, -1)
        mixed = (_split(self.q(x), 4) @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


@zoo(images(5, 16), head=4, neuron=16)
class OneMaskForAllHeads(nn.Module):
    """A bias on the scores that is computed from the sample and shared by all heads; half of it is not used."""

    def __init__(self):
        super().__init__()
        self.embed, self.bias = nn.Linear(16, 16), nn.Linear(16, 10)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.embed(x))
        q, k, v = (_split(t, 4) for t in self.qkv(x).chunk(3, -1))
        bias = self.bias(x)[..., :5][:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))


# --- transformers -----------------------------------------------------------------------------------------------------


class Called(nn.Module):
    """A model of ``transformers``, called with its keywords and giving plain tensors."""

    def __init__(self, model: nn.Module, *names: str):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values):
        return tuple(self.model(**dict(zip(self.names, values, strict=True)), return_dict=True).to_tuple()[:1])


def hugging_face(inputs, *frozen: str, **free: int):
    return zoo(inputs, *frozen, table=HUGGING_FACE, **free)


def masked(vocabulary: int, length: int):
    def inputs():
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, -2:] = 0
        return torch.randint(1, vocabulary, (2, length)), mask

    return inputs


@hugging_face(images(3, 32, 32), channel=8 + 2 * 2 + 16 + 2 * 2 * 4)
def HFResNet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
    return Called(ResNetForImageClassification(config), "pixel_values")


@hugging_face(images(3, 32, 32))
def HFMobileNetV2():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.25, min_depth=4, num_labels=3, image_size=32)
    return Called(MobileNetV2ForImageClassification(config), "pixel_values")


@hugging_face(images(3, 32, 32), "residual stream of layer_norm", neuron=4 * 8 + 4 * 12)
def HFConvNeXt():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=3, image_size=32)
    return Called(ConvNextForImageClassification(config), "pixel_values")


_BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


@hugging_face(images(3, 16, 16), "residual stream of layer_norm", head=8, neuron=48)
def HFViT():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**_BODY, image_size=16, patch_size=8, num_labels=3)
    return Called(ViTForImageClassification(config), "pixel_values")


def _bert(attention):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**_BODY, vocab_size=50, max_position_embeddings=20, num_labels=3, attn_implementation=attention)
    return Called(BertForSequenceClassification(config), "input_ids", "attention_mask")


@hugging_face(masked(50, 7), "residual stream of layer_norm", head=8, neuron=48 + 16)
def HFBertEager():
    return _bert("eager")


@hugging_face(masked(50, 7), "residual stream of layer_norm", head=8, neuron=48 + 16)
def HFBertSdpa():
    return _bert("sdpa")


@hugging_face(masked(50, 7), "residual stream of layer_norm", head=8, neuron=48 + 16)
def HFDistilBert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=50, max_position_embeddings=20, n_layers=2, n_heads=4, dim=16, hidden_dim=24)
    return Called(DistilBertForSequenceClassification(config), "input_ids", "attention_mask")


@hugging_face(masked(50, 7), "residual stream of layer_norm", head=8, neuron=2 * 64)
def HFGPT2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=4, use_cache=False)
    return Called(GPT2LMHeadModel(config), "input_ids", "attention_mask")


def _both_sides():
    return (*masked(50, 7)(), torch.randint(1, 50, (2, 4)))


@hugging_face(_both_sides, "reduced by mean", head=4 + 4 + 2 * 4, neuron=4 * 24)
def HFT5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, use_cache=False)
    return Called(T5ForConditionalGeneration(config), "input_ids", "attention_mask", "decoder_input_ids")


@hugging_face(masked(50, 7), "reduced by mean", head=2 * 2, neuron=48)
def HFLlama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_BODY, num_key_value_heads=2, vocab_size=50, use_cache=False)
    return Called(LlamaForCausalLM(config), "input_ids", "attention_mask")


@hugging_face(images(3, 32, 32), "residual stream of layer_norm", head=2 * 2 + 2 * 4, neuron=2 * 32 + 2 * 64)
def HFSwin():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=3
    )
    return Called(SwinForImageClassification(config), "pixel_values")
