"""Parts of a model as programs of tensors, which other software can run: torch.export and ONNX.

    encoder          x → parameters of q(z|x)
                     x, noise ε → z ~ q(z|x) and log q(z|x), for a flow
    decoder          z → mean of p(x|z)
    log_likelihood   x, z → log p(x|z) and log p(z)
    classifier       x → probabilities of q(y|x), of a semi-supervised model

x is in the units of the likelihood, as in `VAE.posterior`; its moments are part of the programs. A
model with labels takes y (B,), int64, as the last input of the first three. B is any number of
rows. With the first three, log w = log p(x|z) + log p(z) − log q(z|x) of a draw is a sum of
outputs.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputError
from ..runtime.packages import of_extra
from ..runtime.randomness import derive, random_states, usual_settings
from . import posteriors
from .autoencoder import Autoencoder
from .labels import ConditionalVAE, SemiSupervisedVAE, labels_at
from .likelihoods import MAX_TERMS, DiscretizedLogistic
from .priors import Vamp
from .refined import Refined

# Largest difference of a program from its model that is accepted, see `difference`
TOLERANCE = 1e-5
OPSET = 18
# Rows on which programs are compared with the model, at most
ROWS = 256
# ONNX stores a model of at most this many bytes in one file.
MAX_ONNX_BYTES = 2**31 - 2**20

Run = Callable[..., Sequence[Tensor]]
_Inputs = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        module: inputs → tuple of outputs.
        inputs: name → shape of a row and dtype.
        outputs: name → unit, a number or a tensor of the shape of a row, see `difference`.
    """

    module: nn.Module
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    outputs: Mapping[str, float | Tensor]


@dataclass(frozen=True)
class File:
    """A part of a model in a file.

    Attributes:
        name: of the file.
        content: its bytes.
        part: what it computes.
        difference: from the model, see `difference`.
    """

    name: str
    content: bytes
    part: Part
    difference: float


class _Function(nn.Module):
    """A function of a model and tensors, with the model's weights."""

    def __init__(self, function: Callable[..., Sequence[Tensor]], vae: Any, *modules: str) -> None:
        """`modules`: the submodules of the model that the function needs, and a file shall hold."""
        super().__init__()
        self.function, self.vae = function, copy.copy(vae)
        self.vae._modules = {name: vae._modules[name] for name in modules}

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.function(self.vae, *inputs)


def parts(vae: Any) -> dict[str, Part]:
    """The parts of a model by name. A refined guide has no encoder: it is a search for each row."""
    likelihood, is_vae = vae.likelihood_module, not isinstance(vae, Autoencoder)
    shape = tuple(likelihood.spec.shape)
    size = vae.prior().event_shape.numel() if is_vae else vae.encoder.layers[-1].out_features
    x, z = (shape, torch.float32), ((size,), torch.float32)
    y: _Inputs = {"y": ((), torch.int64)} if isinstance(vae, ConditionalVAE) else {}
    guide: tuple[str, ...] = ("encoder", "family")
    model: tuple[str, ...] = ("decoder", "likelihood_module")
    found: dict[str, Part] = {}
    if not is_vae:
        found["encoder"] = Part(_Function(_code, vae, "encoder"), {"x": x}, {"z": 1.0})
    elif isinstance(vae.family, posteriors.Flow):
        outputs = {"z": 1.0, "log_q": float(size)}
        inputs = {"x": x, "noise": z, **y}
        found["encoder"] = Part(_Function(_draw, vae, *guide), inputs, outputs)
    elif not isinstance(vae.family, Refined):
        outputs = dict.fromkeys(_PARAMETERS[vae.family.kind], 1.0)
        found["encoder"] = Part(_Function(_posterior, vae, *guide), {"x": x, **y}, outputs)
    mean = {"mean": likelihood.std.expand(shape)}
    found["decoder"] = Part(_Function(_mean, vae, *model), {"z": z, **y}, mean)
    densities = {"log_likelihood": float(math.prod(shape))}
    if is_vae:
        densities["log_prior"] = float(size)
        model += ("prior_module", *guide * isinstance(vae.prior_module, Vamp))
    function = _Function(_densities, vae, *model)
    found["log_likelihood"] = Part(function, {"x": x, "z": z, **y}, densities)
    if isinstance(vae, SemiSupervisedVAE):
        function = _Function(_classes, vae, "classifier")
        found["classifier"] = Part(function, {"x": x}, {"probabilities": 1.0})
    return found


# Names of the parameters of q(z|x), by the kind of its family
_PARAMETERS = {
    "diagonal": ("loc", "scale"),
    "full": ("loc", "scale_tril"),
    "mixture": ("logits", "loc", "scale"),
}


def _posterior(vae: Any, x: Tensor, *y: Tensor) -> Sequence[Tensor]:
    q = vae.posterior(x, *y)
    if vae.family.kind == "diagonal":
        return q.base_dist.loc, q.base_dist.scale
    if vae.family.kind == "full":
        return q.loc, q.scale_tril
    normals = q.component_distribution.base_dist
    return q.mixture_distribution.logits, normals.loc, normals.scale


def _draw(vae: Any, x: Tensor, noise: Tensor, *y: Tensor) -> Sequence[Tensor]:
    q = vae.posterior(x, *y)
    z = q.from_normals(noise)
    return z, q.log_prob(z)


def _code(vae: Any, x: Tensor) -> Sequence[Tensor]:
    return (vae.encoder(x),)


def _mean(vae: Any, z: Tensor, *y: Tensor) -> Sequence[Tensor]:
    p = vae.likelihood(z, *y)
    base = p.base_dist
    if not isinstance(base, DiscretizedLogistic) or base.max_value > MAX_TERMS:
        return (p.mean,)
    # The same sum as that of its mean, in a sixteenth of the operations
    total = torch.zeros_like(base.loc)
    for k in torch.arange(base.max_value, device="cpu").split(16):
        away = base.loc.unsqueeze(-1) - (k.to(base.loc) + 0.5)
        total = total + torch.sigmoid(away / base.scale.unsqueeze(-1)).sum(-1)
    return (total,)


def _densities(vae: Any, x: Tensor, z: Tensor, *y: Tensor) -> Sequence[Tensor]:
    log_likelihood = vae.likelihood(z, *y).log_prob(x)
    if isinstance(vae, Autoencoder):
        return (log_likelihood,)
    return log_likelihood, vae.prior().log_prob(z)


def _classes(vae: Any, x: Tensor) -> Sequence[Tensor]:
    return (vae.label_posterior(x).probs,)


def program_files(
    name: str, part: Part, rows: Mapping[str, Tensor], onnx: bool = False
) -> Iterator[File]:
    """The files of a part, each compared with the model on these rows.

    Args:
        name: of the part.
        rows: the inputs by name, see `example_rows`.
        onnx: whether to write ONNX too.

    Raises:
        InputError: a program differs from the model by more than `TOLERANCE`.
    """
    program, inputs = exported(part), [rows[key] for key in part.inputs]
    contents = {f"{name}.pt2": (to_pt2(program), run_pt2)}
    if onnx:
        contents[f"{name}.onnx"] = to_onnx(part, program), run_onnx
    for file, (content, run) in contents.items():
        found = difference(part, run(content), inputs)
        if not found <= TOLERANCE:
            raise InputError(
                f"{file} would differ from the model by {found:.2g}, above {TOLERANCE:g} of the "
                f"value or its unit: rounding errors grow in this model, or the exporter has a "
                f"fault; export the model by --weights-only"
            )
        yield File(file, content, part, found)


@torch.no_grad()
def example_rows(vae: Any, x: Tensor, y: Tensor | None, seed: int) -> dict[str, Tensor]:
    """All inputs of the parts by name, for rows x (B, *data_shape), y (B,) of the data.

    z are draws from q(z|x), codes of an autoencoder; noise are draws from N(0, I).
    """
    labels = (labels_at(vae, x, y),) if isinstance(vae, ConditionalVAE) else ()
    with random_states(x.device, derive(seed, "export")):
        z = vae.posterior(x, *labels).sample()
        rows = {"x": x, "z": z, "noise": torch.randn_like(z)}
    return rows | dict(zip(("y",), labels, strict=False))


@torch.no_grad()
def exported(part: Part) -> torch.export.ExportedProgram:
    """The part as a program of torch.export, for any number of rows. It is traced on zeros."""
    rows = [torch.zeros(2, *shape, dtype=dtype) for shape, dtype in part.inputs.values()]
    batch = torch.export.Dim("batch")
    with usual_settings(validate=False):
        return torch.export.export(
            part.module.eval(), tuple(rows), dynamic_shapes=(tuple({0: batch} for _ in rows),)
        )


def to_pt2(program: torch.export.ExportedProgram) -> bytes:
    """The file of a program, for `torch.export.load`."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def to_onnx(part: Part, program: torch.export.ExportedProgram) -> bytes:
    """The program as an ONNX model.

    Raises:
        InputError: the extra `onnx` is missing, or the model exceeds ONNX's limit.
    """
    require_onnx()
    table = {
        torch.ops.aten.lgamma.default: _lgamma,
        torch.ops.aten.expm1.default: _expm1,
        torch.ops.aten.log_sigmoid.default: _log_sigmoid,
        torch.ops.aten.sigmoid.default: _sigmoid,
        torch.ops.aten.logaddexp.default: _logaddexp,
        torch.ops.aten.linalg_solve_triangular.default: _solve_triangular,
    }
    with usual_settings(validate=False):
        program = program.run_decompositions(table)
        model = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    assert model is not None
    proto = model.model_proto
    if proto.ByteSize() > MAX_ONNX_BYTES:
        raise InputError("ONNX holds models of at most 2 GiB in one file; drop --onnx")
    return proto.SerializeToString()


def require_onnx() -> None:
    """Check that the packages of the extra `onnx` are installed.

    Raises:
        InputError: one is missing.
    """
    for module in ("onnx", "onnxruntime", "onnxscript"):
        of_extra(module, "onnx", "--onnx requires packages")


def run_pt2(content: bytes) -> Run:
    """The function of a file that `to_pt2` has just made."""
    return torch.export.load(io.BytesIO(content)).module()


def run_onnx(content: bytes) -> Run:
    """The function of an ONNX model, computed by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        values = [x.numpy() for x in inputs]
        return [
            torch.from_numpy(v) for v in session.run(None, dict(zip(names, values, strict=True)))
        ]

    return run


@torch.no_grad()
def difference(part: Part, run: Run, inputs: Sequence[Tensor]) -> float:
    """The largest difference of a program from the model, relative to the value or its unit.

        max |program − model| / max(unit, |model|), over all rows and outputs

    Rounding errors of a small value have the size of the terms it is a sum of. The unit is 1 for
    latents and probabilities, the standard deviation of each column of the data for means of
    p(x|z), and 1 nat for each value of a row for log-densities.

    Args:
        run: the program.
        inputs: in the order of `part.inputs`, with B rows each. They are computed in batches of 1,
            7 and the rest, by the model as a whole.
    """
    with usual_settings(validate=False):
        expected = part.module(*inputs)
        sizes = [1, 7, len(inputs[0]) - 8] if len(inputs[0]) > 8 else [1] * len(inputs[0])
        found = [run(*rows) for rows in zip(*(v.split(sizes) for v in inputs), strict=True)]
    largest = 0.0
    for model, unit, *several in zip(expected, part.outputs.values(), *found, strict=True):
        program = torch.cat(several)
        if program.shape != model.shape or program.dtype != model.dtype:
            return math.inf
        same = (program == model) | (program.isnan() & model.isnan())
        size = model.abs().clamp_min(torch.as_tensor(unit, dtype=model.dtype))
        distance = torch.where(same, 0.0, (program - model).abs() / size)
        largest = max(largest, distance.nan_to_num(math.inf, posinf=math.inf).max().item())
    return largest


def _lgamma(x: Tensor) -> Tensor:
    """log Γ(x) for x > 0 by Stirling's series at x + 8, which ONNX lacks; error below 1e-11."""
    v = x.double()
    steps = torch.arange(8, dtype=v.dtype)
    above = v + len(steps)
    inverse = 1 / above
    series = inverse / 12 - inverse**3 / 360 + inverse**5 / 1260 - inverse**7 / 1680
    stirling = (above - 0.5) * above.log() - above + math.log(2 * math.pi) / 2 + series
    return (stirling - (v.unsqueeze(-1) + steps).log().sum(-1)).to(x.dtype)


def _expm1(x: Tensor) -> Tensor:
    """exp(x) − 1, which ONNX has by a difference that cancels; relative error below 1e-10."""
    v = x.double()
    return torch.where(v.abs() < 1e-5, v + v.square() / 2, v.exp() - 1).to(x.dtype)


def _log_sigmoid(x: Tensor) -> Tensor:
    """log σ(x). In ONNX, the logarithm of σ(x) is −∞ for x below −104."""
    return x.clamp_max(0) - (1 + (-x.abs()).exp()).log()


def _sigmoid(x: Tensor) -> Tensor:
    """σ(x) with a small relative error. That of onnxruntime is 0 below −18."""
    return x.clamp_max(0).exp() / (1 + (-x.abs()).exp())


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(eᵃ + eᵇ) of finite numbers, whose exponentials may underflow."""
    return torch.maximum(a, b) + (1 + (-(a - b).abs()).exp()).log()


def _solve_triangular(
    a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """a⁻¹ b for lower triangular a (..., Z, Z) and b (..., Z, N), row by row, which ONNX lacks."""
    if upper or not left or unitriangular:
        raise NotImplementedError("expected a lower triangular matrix on the left")
    rows: list[Tensor] = []
    for i in range(a.shape[-1]):
        rest = b[..., i : i + 1, :]
        if rows:
            rest = rest - a[..., i : i + 1, :i] @ torch.cat(rows, -2)
        rows.append(rest / a[..., i : i + 1, i : i + 1])
    return torch.cat(rows, -2)
