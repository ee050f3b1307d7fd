# SPDX-License-Identifier: Apache-2.0
"""The target `coreml`: the encoder as `fastvithd.mlpackage`, an ML program for iOS 16 and macOS 13 or newer.

As in Apple's app, the input is `images` (1, 3, height, width) in float32, from 0 to 1, the output `image_features`
(1, tokens, channels) in float32, before the projector. Core ML runs only on Apple's systems, so the written program is
evaluated in PyTorch (`coreml_check`), and a script to check it on a Mac is written beside it.
"""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import FastViTHDModel
from ..inference import fuse
from .coreml_check import check_interface, evaluate
from .export_source import RESEARCH_ONLY, Source
from .reference import drawn_pixels, relative_error
from .targets import ExportOptions, Report, how_to_run

__all__ = ["PACKAGE", "convert_encoder", "write"]

PACKAGE = "fastvithd.mlpackage"
SCRIPT, SAMPLES = "check_coreml.py", "check_coreml.npz"
_MAC_SCRIPT = Path(__file__).with_name("coreml_on_mac.py")

# In float16 exports the encoder computes in float32 from here on: activations of published models overflow float16
# after this point.
_FIRST_FLOAT32_WEIGHTS = "p_encoder_network_8_"
_TOLERANCE = {"float32": 1e-4, "float16": 5e-2}


class _Encoder(nn.Module):
    """The encoder in the form for Core ML; attribute and argument names become names in the program."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        # The encoder's forward pass checks that sides are multiples of 64, which Core ML's sizes cannot express.
        hidden = self.encoder.patch_embed(images)
        for module in self.encoder.network:
            hidden = module(hidden)
        return self.encoder.conv_exp(hidden).flatten(2).transpose(1, 2)


def write(source: Source, out: Path, options: ExportOptions) -> Report:
    """Write the package, and the script that checks it on a Mac. See `targets`."""
    sizes = options.sizes or (source.image_size,)
    errors, samples = convert_encoder(source, out / PACKAGE, options.precision, sizes, options)
    shutil.copyfile(_MAC_SCRIPT, out / SCRIPT)
    _save_samples(out / SAMPLES, samples)
    shown = ", ".join(f"{size} x {size}" for size in sizes)
    channels = source.config.vision_config.num_features
    limits = [
        "The package contains only the encoder. The projector, which takes `image_features`, is part of the language "
        "model's files: see the target `apple-app`.",
        "For the error above, the program was read back from the package and evaluated operation by operation in "
        "PyTorch, each result rounded to the program's dtype. Core ML itself may differ a little; "
        f"`python {SCRIPT}` measures the error on a Mac.",
    ]
    if options.precision == "float16":
        limits.append(
            "From the last downsampling on, the weights and computations are float32, because published models "
            "overflow in float16."
        )
    return Report(
        checked_in=None,
        errors=errors,
        how_to_run=how_to_run("coreml", sizes=shown, first=sizes[0], channels=channels),
        limits=tuple(limits),
        notes=(f"The package was not run in Core ML. To check it, run `python {SCRIPT}` in its directory on a Mac.",),
        library_name="coreml",
    )


@torch.no_grad()
def convert_encoder(
    source: Source, package: Path, precision: str, sizes: tuple[int, ...], options: ExportOptions
) -> tuple[dict[str, float], dict[int, tuple[Tensor, Tensor]]]:
    """Write the encoder as an .mlpackage and check it.

    Args:
        package: the path to write.
        precision: "float32" or "float16".
        sizes: sides of the square images, the default first. A single size becomes fixed in the program.

    Returns:
        The relative error by name, and for each size the image and the encoder's output in PyTorch.

    Raises:
        ValueError: the encoder is not supported, or the program's output differs too much from the encoder's.
    """
    encoder: Any = FastViTHDModel.from_pretrained(source.directory, dtype=torch.float32).eval()
    if encoder.config.multi_scale is not None:
        raise ValueError(
            f"The encoder has multi_scale {encoder.config.multi_scale!r}, which this target does not support. Export "
            "to 'onnx' instead."
        )
    samples = {}
    for size in sizes:
        pixels = drawn_pixels(size)
        samples[size] = pixels, encoder(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    # Folding a layer scale into a kernel may underflow float16; keep it separate there.
    encoder = fuse(encoder) if precision == "float32" else encoder.reparameterize()
    options.say("converting the encoder")
    with _quiet():
        model = _converted(_Encoder(encoder).eval(), precision, sizes)
        model.short_description = "FastViTHD, the vision encoder of FastVLM: images to features."
        model.input_description["images"] = "RGB, from 0 to 1, (1, 3, height, width)"
        model.output_description["image_features"] = "(1, tokens, channels), rows of the image first"
        if source.may_be_apples:
            model.license = RESEARCH_ONLY
        model.save(str(package))
    channels = encoder.config.num_features
    with _quiet():
        check_interface(package, sizes, channels)
    errors = {}
    for size, (pixels, expected) in samples.items():
        options.say(f"evaluating the program at {size} x {size}")
        with _quiet():
            found = evaluate(package, pixels)
        errors[f"{precision}: image_features, {size} x {size}"] = error = relative_error(found, expected)
        if not error <= _TOLERANCE[precision]:
            raise ValueError(
                f"The converted encoder differs from the model by {error:.1e} at {size} x {size} in {precision}. "
                "Please report it, with the versions of torch and coremltools."
            )
    return errors, samples


def _converted(module: nn.Module, precision: str, sizes: tuple[int, ...]) -> Any:
    import coremltools as ct
    import numpy as np

    if len(sizes) == 1:
        example, dynamic = torch.zeros((1, 3, sizes[0], sizes[0])), None
        shape: Any = tuple(example.shape)
    else:
        # torch.export would treat equal sides as one size.
        example = torch.zeros((1, 3, min(sizes), max(sizes)))
        limits = {"min": min(sizes), "max": max(sizes)}
        sides = {axis: torch.export.Dim(name, **limits) for axis, name in ((2, "height"), (3, "width"))}
        dynamic = {"images": sides}
        shape = ct.EnumeratedShapes(shapes=[(1, 3, size, size) for size in sizes], default=(1, 3, sizes[0], sizes[0]))
    program = torch.export.export(module, (example,), dynamic_shapes=dynamic).run_decompositions({})
    pipeline = ct.PassPipeline.DEFAULT
    compute_precision = ct.precision.FLOAT32
    if precision == "float16":
        pipeline.remove_passes({"common::fuse_conv_scale"})
        compute_precision = ct.transform.FP16ComputePrecision(op_selector=_BeforeLastStage())
    return ct.convert(
        program,
        inputs=[ct.TensorType(name="images", shape=shape, dtype=np.float32)],
        outputs=[ct.TensorType(name="image_features", dtype=np.float32)],
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=compute_precision,
        compute_units=ct.ComputeUnit.CPU_AND_GPU,
        pass_pipeline=pipeline,
        skip_model_load=True,
    )


class _BeforeLastStage:
    """Whether an operation belongs to the part of the encoder that computes in float16."""

    def __init__(self) -> None:
        self._late: set[str] | None = None

    def __call__(self, operation: Any) -> bool:
        if self._late is None:
            self._late = self._names_from_boundary(operation.enclosing_block.operations)
        if operation.op_type != "const":
            return operation.name not in self._late
        users = operation.outputs[0].child_ops
        return all(user.name not in self._late for user in users)

    @staticmethod
    def _names_from_boundary(operations: Any) -> set[str]:
        late: set[str] = set()
        for operation in operations:
            weight = operation.inputs.get("weight") if operation.op_type == "conv" else None
            if late or (weight is not None and weight.name.startswith(_FIRST_FLOAT32_WEIGHTS)):
                late.add(operation.name)
        if not late:
            raise RuntimeError("The last stage was not found in the converted program. Please report it.")
        return late


def _save_samples(path: Path, samples: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Write images, as bytes, and expected features for the script that runs on a Mac."""
    import numpy as np

    arrays: dict[str, Any] = {}
    for size, (pixels, expected) in samples.items():
        arrays[f"images_{size}"] = (pixels * 255).round().to(torch.uint8).numpy()
        arrays[f"image_features_{size}"] = expected.numpy()
    np.savez_compressed(path, **arrays)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide coremltools' progress bars and version warnings; errors are still shown."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
