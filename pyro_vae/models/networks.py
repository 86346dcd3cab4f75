"""Networks: x (..., *data_shape) → features, and z (..., Z) → (..., P, *data_shape).

Both accept any number of leading batch dimensions, so particles of z need no reshaping elsewhere. P
is the number of parameters of the likelihood for each value of x. The output has the dtype of the
input, even under torch.autocast.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import InputError
from .bounds import soft_clamp

# Standardized inputs keep every bit up to this size. Of N rows, none is further than √N standard
# deviations from their mean: a training set of a million rows has no larger value.
MAX_STANDARDIZED = 1024.0
# Units of the layer that joins the features of x and a label.
JOINED = 128
# The decoder reads a one-hot label times this. Adam then learns the effect of a label before that
# of the latents, which might take its place; see docs/guide/labels.md.
LABEL_SCALE = 10.0


# By the number of dimensions of a row with its channels.
_CONV: dict[int, Any] = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {
    2: nn.ConvTranspose1d,
    3: nn.ConvTranspose2d,
    4: nn.ConvTranspose3d,
}


class Encoder(nn.Module):
    """x (..., *data_shape) → features (..., num_features).

    Args:
        architecture: `mlp`, or `conv` for sequences (C, T), images (C, H, W) and volumes
            (C, D, H, W), by convolutions in one, two and three dimensions.
        data_shape: shape of one x.
        hidden: units of each hidden layer (mlp) or channels of each strided layer (conv).
        activation: name of an activation in `torch.nn`.
        num_features: size of the output.
        mean, std: moments of the data, in the units of x. They standardize the input, so that the
            same initial weights suit data of any scale.
        bounded: whether the range of x is bounded. If not, an outlier is: see `MAX_STANDARDIZED`.
        missing: whether values of x may be NaN. The network then sees zeros in their place and,
            beside the values, which are observed: as further channels (conv) or inputs (mlp).
        inputs: module x (..., D) → (..., inputs.size), which standardizes columns of several kinds
            in place of `mean` and `std`, and keeps NaN.

    Raises:
        InputError: the activation is unknown, or the data do not suit the architecture.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        architecture: str,
        data_shape: tuple[int, ...],
        hidden: tuple[int, ...],
        activation: str,
        num_features: int,
        mean: Tensor,
        std: Tensor,
        bounded: bool = False,
        missing: bool = False,
        inputs: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.data_shape, self.bounded, self.missing = tuple(data_shape), bounded, missing
        copies = 2 if missing else 1  # the values, and which are observed
        self.architecture, self.activation = architecture, activation
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        layers: list[nn.Module] = []
        if architecture == "conv":
            size = hidden[-1] * _size(_conv_sizes(self.data_shape, hidden)[-1])
            for below, above in pairwise([copies * data_shape[0], *hidden]):
                layers.append(_CONV[len(data_shape)](below, above, 4, stride=2, padding=1))
                layers.append(_activation(activation))
            layers.append(nn.Flatten())
        else:
            first: Any = _size(self.data_shape) if inputs is None else inputs.size
            sizes = [copies * first, *hidden]
            size = sizes[-1]
            layers += [nn.Flatten(), *_mlp(sizes, activation)]
        self.layers = nn.Sequential(*layers, nn.Linear(size, num_features))

    def forward(self, x: Tensor) -> Tensor:
        batch_shape = x.shape[: x.dim() - len(self.data_shape)]
        standardized = (x - self.mean) / self.std if self.inputs is None else self.inputs(x)
        if not self.bounded:
            limit = MAX_STANDARDIZED
            standardized = soft_clamp(standardized, -limit, limit, width=limit)
        shape = self.data_shape if self.inputs is None else standardized.shape[-1:]
        standardized = standardized.reshape(-1, *shape)
        if self.missing:
            observed = ~standardized.isnan()
            values = torch.where(observed, standardized, 0.0)
            standardized = torch.cat([values, observed.to(values)], dim=1)
        features = self.layers(standardized)
        return features.to(x.dtype).reshape(*batch_shape, -1)


class Decoder(nn.Module):
    """z (..., Z) → likelihood parameters (..., P, *data_shape), unconstrained.

    Args:
        architecture, data_shape, hidden, activation: those of the encoder, which is mirrored.
        latent_dim: Z.
        bias: (P, *data_shape), initial output bias, a parameter for each output; of any shape,
            which is then that of the output, for mlp.

    Raises:
        InputError: as for `Encoder`.
    """

    def __init__(
        self,
        architecture: str,
        data_shape: tuple[int, ...],
        hidden: tuple[int, ...],
        activation: str,
        latent_dim: int,
        bias: Tensor,
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.clone())
        layers: list[nn.Module] = []
        if architecture == "conv":
            sizes = _conv_sizes(data_shape, hidden)
            layers.append(nn.Linear(latent_dim, hidden[-1] * _size(sizes[-1])))
            layers.append(_activation(activation))
            layers.append(nn.Unflatten(1, (hidden[-1], *sizes[-1])))
            channels = [len(bias) * data_shape[0], *hidden]
            for i in reversed(range(len(hidden))):
                layers.append(
                    _TRANSPOSED[len(data_shape)](
                        channels[i + 1],
                        channels[i],
                        kernel_size=4,
                        stride=2,
                        padding=1,
                        # Halving rounds down; output padding restores the odd row or column.
                        output_padding=[side % 2 for side in sizes[i]],
                        bias=i > 0,
                    )
                )
                if i > 0:
                    layers.append(_activation(activation))
        else:
            widths = [latent_dim, *reversed(hidden)]
            layers += _mlp(widths, activation)
            layers.append(nn.Linear(widths[-1], bias.numel(), bias=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.layers[:-1](z.reshape(-1, z.shape[-1]))
        head = self.layers[-1]
        if isinstance(head, nn.Linear):  # product and bias in one pass over the outputs
            output = F.linear(hidden, head.weight, self.bias.flatten()).to(z.dtype)
            return output.reshape(*z.shape[:-1], *self.bias.shape)
        return head(hidden).to(z.dtype).reshape(*z.shape[:-1], *self.bias.shape) + self.bias


class LabelledEncoder(nn.Module):
    """x (..., *data_shape), one-hot y (..., C) → features (..., num_features).

    Features of x and the label are joined by a hidden layer, so that x is read once for all labels.

    Args:
        trunk: module x (..., *data_shape) → (..., `JOINED`).
        activation: as in `Encoder`.
        num_classes: C.
        num_features: size of the output.
    """

    def __init__(
        self, trunk: nn.Module, activation: str, num_classes: int, num_features: int
    ) -> None:
        super().__init__()
        self.trunk, self.activation = trunk, _activation(activation)
        joined = _mlp([JOINED + num_classes, JOINED], activation)
        self.layers = nn.Sequential(*joined, nn.Linear(JOINED, num_features))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.layers(join(self.activation(self.trunk(x)), label)).to(x.dtype)


class LabelledDecoder(nn.Module):
    """z (..., Z), one-hot y (..., C) → likelihood parameters (..., P, *data_shape).

    Args:
        decoder: module (..., Z + C) → (..., P, *data_shape).
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.decoder(join(z, LABEL_SCALE * label))


def join(values: Tensor, label: Tensor) -> Tensor:
    """(..., V) and (..., C), which broadcast → (..., V + C)."""
    shape = torch.broadcast_shapes(values.shape[:-1], label.shape[:-1])
    parts = (values, label.to(values.dtype))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


def _mlp(sizes: list[int], activation: str) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for below, above in pairwise(sizes):
        layers += [nn.Linear(below, above), _activation(activation)]
    return layers


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _conv_sizes(data_shape: tuple[int, ...], hidden: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Length, or height and width, or all three, before each strided layer and after the last."""
    if len(data_shape) not in _CONV:
        raise InputError(
            f"--architecture conv expects images, volumes or sequences; the data are rows of "
            f"{data_shape[0]} values. Use --architecture mlp, --image-size H W if the rows are "
            f"images, or --layout sequences"
        )
    sides, least = data_shape[1:], max(8, 2 ** len(hidden))
    if min(sides) < least:
        kind, unit, remedy = {
            2: ("sequences", "values", ""),
            3: ("images", "pixels", ", a larger --image-size"),
            4: ("volumes", "voxels", ""),
        }[len(data_shape)]
        raise InputError(
            f"--architecture conv with {len(hidden)} layers expects {kind} of at least "
            f"{'x'.join([str(least)] * len(sides))} {unit}; got {'x'.join(map(str, sides))}. Use "
            f"fewer layers in --hidden{remedy} or --architecture mlp"
        )
    return [tuple(side >> i for side in sides) for i in range(len(hidden) + 1)]


def _activation(name: str) -> nn.Module:
    """The elementwise activation of torch.nn with this name, in any case."""
    module = nn.modules.activation
    kinds = {key.lower(): getattr(module, key) for key in module.__all__}
    try:
        with warnings.catch_warnings(), torch.device("cpu"):  # also for a model on "meta"
            probe = torch.tensor([[-1.0, 0.5]])
            warnings.simplefilter("ignore")  # Softmax warns that it acts on a whole dimension
            activation = kinds[name.lower()]().eval()
            whole, part = activation(probe), activation(probe[:, :1])
        elementwise = whole.shape == probe.shape and torch.allclose(whole[:, :1], part)
    except (KeyError, TypeError, ValueError, RuntimeError):  # no such name, arguments or shapes
        elementwise = False
    if not elementwise:
        raise InputError(
            f"--activation expects the name of an elementwise activation in torch.nn that needs no "
            f"argument, such as SiLU, ReLU, Tanh, Softplus, GELU or ELU; got {name!r}"
        )
    return activation.train()
