# SPDX-License-Identifier: Apache-2.0
"""The target coreml: what the written package says of itself, and what its program computes when read back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from transformers_fastvlm import FastViTHDModel
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.export import export

pytestmark = pytest.mark.filterwarnings("ignore")  # of coremltools and what it imports
pytest.importorskip("coremltools", reason="coremltools is not installed")


def description(package: Path):
    import coremltools

    return coremltools.models.MLModel(str(package), skip_model_load=True).get_spec()


def kernel_types(package: Path) -> list[tuple[str, str]]:
    """Return the convolutions' kernels in the program's order: its name for each, and the type."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)
    operations = program.functions["main"].operations
    convolutions = [operation for operation in operations if operation.op_type == "conv"]
    return [(operation.weight.name, str(operation.weight.val.dtype)) for operation in convolutions]


def test_float32_at_the_checkpoints_size(tmp_path: Path) -> None:
    from transformers_fastvlm.export.coreml_check import evaluate

    done = export("coreml", tiny_checkpoint(), tmp_path / "out", precision="float32")
    package = done.directory / "fastvithd.mlpackage"
    assert done.report.checked_in is None
    assert max(done.report.errors.values()) < 1e-5
    spec = description(package)
    assert spec.specificationVersion == 7, "iOS 16"
    (image,), (features,) = spec.description.input, spec.description.output
    assert (image.name, list(image.type.multiArrayType.shape)) == ("images", [1, 3, 256, 256])
    assert (features.name, list(features.type.multiArrayType.shape)) == ("image_features", [1, 16, 512])
    assert {kind for _, kind in kernel_types(package)} == {"float32"}

    encoder = FastViTHDModel.from_pretrained(tiny_checkpoint()).eval()
    size = sum(parameter.numel() for parameter in encoder.reparameterize().parameters()) * 4
    written = (package / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert 0.95 * size < written < 1.05 * size

    samples = np.load(done.directory / "check_coreml.npz")
    pixels = torch.from_numpy(samples["images_256"].astype(np.float32) / 255)
    expected = torch.from_numpy(samples["image_features_256"])
    found = evaluate(package, pixels)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    other = evaluate(package, pixels.flip(3))
    assert float((other - expected).norm() / expected.norm()) > 1e-2, "the program depends on the picture"

    script = subprocess.run([sys.executable, done.directory / "check_coreml.py"], capture_output=True, text=True)
    if sys.platform == "linux":
        assert (script.returncode, script.stderr) == (2, "Core ML runs only on a Mac.\n")


def test_float16_keeps_the_last_stage_in_float32(tmp_path: Path) -> None:
    done = export("coreml", tiny_checkpoint(), tmp_path / "out", precision="float16")
    assert 1e-5 < max(done.report.errors.values()) < 1e-2
    kernels = kernel_types(done.directory / "fastvithd.mlpackage")
    boundary = next(place for place, (name, _) in enumerate(kernels) if name.startswith("p_encoder_network_8_"))
    assert {kind for _, kind in kernels[:boundary]} == {"float16"}
    assert {kind for _, kind in kernels[boundary:]} == {"float32"}


def test_several_sizes_in_one_package(tmp_path: Path) -> None:
    done = export("coreml", tiny_checkpoint(), tmp_path / "out", precision="float32", sizes=(256, 128, 320))
    assert [name.split(", ")[1] for name in done.report.errors] == ["256 x 256", "128 x 128", "320 x 320"]
    assert max(done.report.errors.values()) < 1e-5
    (image,) = description(done.directory / "fastvithd.mlpackage").description.input
    array = image.type.multiArrayType
    assert list(array.shape) == [1, 3, 256, 256]
    assert {tuple(shape.shape)[2] for shape in array.enumeratedShapes.shapes} == {128, 256, 320}
