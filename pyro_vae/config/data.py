"""`DataConfig`: the data set and its splits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .columns import check_columns, read_columns
from .options import InputError, Typed, auto, check_integer, check_path

# torchvision's data sets by their names for --data. Write ./name for a folder of such a name.
TORCHVISION_CLASSES = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
}


def columns_flag() -> Any:
    """The flag --columns: a file, whose content becomes the setting."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE",
        instance_from_str=lambda texts: read_columns(Path(texts[0]).expanduser()),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["found from the values" if value is None else str(value)],
    )


@dataclass(frozen=True)
class DataConfig(Typed):
    """The data set and its splits.

    Attributes:
        source: Data set: digits (included, needs no network); mnist, fashion-mnist, kmnist or
            emnist (torchvision, downloaded to --data-root); or the path of a folder of images or of
            a .npy, .npz, .csv, .parquet or .arrow file.
        root: Folder of torchvision's data sets. Missing ones are downloaded to it.
        image_size: Image height and width in pixels; one number is a square. Images in a folder
            are resized to it; flat rows of an array or a table are reshaped to it.
        layout: Shape of the rows of an array. auto: (N, D) rows, (N, H, W) and (N, H, W, C) images,
            (N, D, H, W) volumes. sequences: (N, T) or (N, T, C). volumes: (N, D, H, W) also where D
            or W is 1 or 3, which auto reads as channels.
        max_value: Largest value that the data can take, for example 255 for 8-bit images.
        validation_size: Number of validation rows, drawn from the training data by the seed.
        test_size: Number of test rows, for data without a test split.
        missing: Missing values: NaN in arrays, empty cells or NA, NaN, null and the like in tables.
            refuse: an error. model: the model observes the others, and the encoder is told which
            they are. Values are assumed to be missing at random: whether one is missing may depend
            on the observed values only.
        labelled: Number of training rows whose label is used, drawn by the seed with the shares of
            the classes. The labels of the others are latents of the model (semi-supervised).
        columns: Kinds of the columns of a table, a TOML or JSON file: age = "poisson". Others are
            found from the values. Kinds: gaussian, student-t, log-normal, poisson,
            negative-binomial, zero-inflated-poisson, zero-inflated-negative-binomial, bernoulli,
            categorical, ordinal; drop leaves a column out.
    """

    source: Annotated[str, tyro.conf.arg(name="data", metavar="NAME|PATH")] = "digits"
    root: Annotated[Path, tyro.conf.arg(name="data-root", metavar="DIR")] = Path("data")
    image_size: Annotated[tuple[int, int] | None, auto("H W", "as they are")] = None
    layout: Literal["auto", "sequences", "volumes"] = "auto"
    max_value: Annotated[int | None, auto("INT", "1, 255 or the largest count in the data")] = None
    validation_size: Annotated[int | None, auto("INT", "a tenth of the rows, at most 5000")] = None
    test_size: Annotated[int | None, auto("INT", "a tenth, if the data have no test split")] = None
    missing: Literal["refuse", "model"] = "refuse"
    labelled: Annotated[int | None, auto("INT", "all that have one")] = None
    columns: Annotated[Path | dict[str, Any] | None, columns_flag()] = None

    def absolute(self) -> DataConfig:
        """The same data by absolute paths."""
        root = self.root.expanduser().absolute()
        if self.source == "digits" or self.source in TORCHVISION_CLASSES:
            return dataclasses.replace(self, root=root)
        source = str(Path(self.source).expanduser().absolute())
        return dataclasses.replace(self, root=root, source=source)

    def __post_init__(self) -> None:
        if isinstance(self.columns, str | Path):
            check_path("columns", str(self.columns))
            object.__setattr__(self, "columns", read_columns(Path(self.columns).expanduser()))
        elif self.columns is not None:
            object.__setattr__(self, "columns", check_columns(self.columns))
        super().__post_init__()
        if not self.source:
            raise InputError("--data expects the name of a data set or a path; got nothing")
        check_path("data", self.source)
        check_path("data-root", str(self.root))
        check_integer("validation-size", self.validation_size)
        check_integer("test-size", self.test_size)
        check_integer("labelled", self.labelled)
        check_integer("max-value", self.max_value)
        for side in self.image_size or ():
            check_integer("image-size", side)
