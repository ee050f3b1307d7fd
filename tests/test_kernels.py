# SPDX-License-Identifier: Apache-2.0
"""Fast operations against the plain forms that they replace, for each kind of CPU.

The form depends on the CPU, so the tests simulate other CPUs: every form computes correctly on any CPU.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from helpers import random_pixels, relative_error
from transformers_fastvlm import (
    FastViTHDBackbone,
    FastViTHDConfig,
    FastViTHDModel,
    FastVLMForConditionalGeneration,
    kernels,
)

# `kernels.linear` is a function as well as a module.
convolution = sys.modules["transformers_fastvlm.kernels.convolution"]
dispatch = sys.modules["transformers_fastvlm.kernels.dispatch"]
feed_forward = sys.modules["transformers_fastvlm.kernels.feed_forward"]
linear = sys.modules["transformers_fastvlm.kernels.linear"]

HALF = (torch.bfloat16, torch.float16)
TINY = {"depths": [1, 1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64, 128], "image_size": 128}
MACHINES = {"avx2": (256, False), "avx512_with_half_types": (512, True), "other": (0, False)}

# batch, in, out, kernel, stride, padding, groups, height, width
CONVOLUTIONS = {
    "pointwise": (2, 6, 10, 1, 1, 0, 1, 5, 7),
    "pointwise_one_position": (9, 6, 10, 1, 1, 0, 1, 1, 1),
    "pointwise_strided": (2, 6, 10, 1, 2, 0, 1, 5, 8),
    "stem": (1, 3, 8, 3, 2, 1, 1, 16, 24),
    "depthwise_1": (2, 8, 8, 1, 1, 0, 8, 5, 5),
    "depthwise_3": (2, 8, 8, 3, 1, 1, 8, 9, 11),
    "depthwise_5": (1, 8, 8, 5, 1, 2, 8, 8, 8),
    "depthwise_7": (3, 16, 16, 7, 1, 3, 16, 13, 10),
    "depthwise_7_smaller_map": (2, 8, 8, 7, 1, 3, 8, 2, 3),
    "depthwise_7_strided": (2, 8, 8, 7, 2, 3, 8, 12, 9),
    "two_outputs_a_channel": (2, 8, 16, 3, 1, 1, 8, 6, 5),
    "two_outputs_a_channel_strided": (1, 8, 16, 7, 2, 3, 8, 16, 11),
    "three_outputs_a_channel": (2, 4, 12, 3, 2, 1, 4, 7, 7),
    "groups": (2, 8, 12, 3, 1, 1, 4, 6, 6),
    "patches": (2, 8, 8, 4, 4, 0, 8, 8, 12),
    "no_rows": (0, 8, 16, 3, 1, 1, 8, 6, 5),
    "no_rows_pointwise": (0, 6, 10, 1, 1, 0, 1, 5, 7),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_first": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every_second_column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Simulate each kind of CPU for dispatch."""
    width, half = MACHINES[request.param]
    monkeypatch.setattr(convolution, "vector_width", lambda: width)
    monkeypatch.setattr(dispatch, "vector_width", lambda: width)
    monkeypatch.setattr(dispatch, "_onednn_takes", lambda dtype: half)
    return request.param


@pytest.fixture
def without_half_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_onednn_takes", lambda dtype: False)


def run(operation: Callable, tensors: list[Tensor], *arguments: int) -> list[Tensor]:
    """Return the output and the gradients of all tensors that require one."""
    output = operation(*tensors, *arguments)
    # Not symmetric, so that no error of sign or order cancels, and exact in every dtype.
    weights = torch.linspace(0.5, 5.5, output.numel()).view(output.shape).cos().mul(64).round().div(64).to(output.dtype)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, weights)]


def agree(fast: list[Tensor], plain: list[Tensor], exact: list[Tensor] | None = None) -> None:
    """Check against the plain form; in half precision the fast form must be as close to `exact` as the plain one."""
    assert [x.dtype for x in fast] == [x.dtype for x in plain]
    for number, (ours, reference) in enumerate(zip(fast, plain, strict=True)):
        assert ours.shape == reference.shape
        if reference.numel() == 0 or not reference.any():
            assert torch.equal(ours, reference)
        elif exact is None:
            assert relative_error(ours, reference) < 1e-5, number
        else:
            assert relative_error(ours, exact[number]) <= 1.02 * relative_error(reference, exact[number]), number


def convolution_inputs(case: str, dtype: torch.dtype, layout: str = "channels_last") -> tuple[list[Tensor], list[int]]:
    batch, inner, outer, kernel, stride, padding, groups, height, width = CONVOLUTIONS[case]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outer, inner // groups, kernel, kernel, generator=generator)
    tensors = [
        LAYOUTS[layout](torch.randn(batch, inner, height, width, generator=generator).to(dtype)),
        (weight * weight[0].numel() ** -0.5).to(dtype),
        torch.randn(outer, generator=generator).to(dtype),
    ]
    return [x.requires_grad_() for x in tensors], [stride, padding, groups]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
@torch.no_grad()
def test_convolution_with_gelu(case: str, layout: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "_ROWS", 16)
    tensors, geometry = convolution_inputs(case, torch.float32, layout)
    fast, plain = (f(*tensors, *geometry) for f in (kernels.conv2d_gelu, kernels.plain_conv2d_gelu))
    agree([fast], [plain])
    exact = nn.functional.gelu(kernels.plain_conv2d(*(x.double() for x in tensors), *geometry))
    assert torch.allclose(fast.double(), exact, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 2, 3), (2, 6, 5, 7), (0, 6, 5, 7)], ids=str)
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "folded"])
@pytest.mark.parametrize("weights", [torch.float32, *HALF], ids=str)
@torch.no_grad()
def test_feed_forward(
    shape: tuple[int, ...], scaled: bool, weights: torch.dtype, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_forward, "_ROWS", 16)  # several parts, the last one smaller
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator) for _ in range(2)]
    maps = [LAYOUTS["channels_last"](x) for x in maps]
    scale, *parameters = (
        torch.randn(size, generator=generator).to(weights)
        for size in ((6, 1, 1), (24, 6, 1, 1), (24,), (6, 24, 1, 1), (6,))
    )
    arguments = [*maps, scale if scaled else None, *parameters]
    before = [None if x is None else x.clone() for x in arguments]
    fast = kernels.feed_forward(*arguments)
    agree([fast], [kernels.plain_feed_forward(*arguments)])
    assert fast.numel() == 0 or fast.is_contiguous(memory_format=torch.channels_last)
    assert all(x is None or torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@torch.no_grad()
def test_feed_forward_takes_memory_for_some_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any size of the map, the wide result between the two GEMMs is never held as a whole.

    This holds on CPUs with 256-bit vectors; with wider ones oneDNN's convolutions replace this form.
    """
    monkeypatch.setattr(dispatch, "vector_width", lambda: 256)
    maps = LAYOUTS["channels_last"](torch.randn(1, 8, 128, 128))
    weights = torch.randn(512, 8, 1, 1), torch.randn(512), torch.randn(8, 512, 1, 1), torch.randn(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kernels.feed_forward(maps, maps, None, *weights)
    largest = max(event.self_device_memory_usage or event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= feed_forward._ROWS * 512 * 4 < 128 * 128 * 512


def test_forms_for_inference_run_only_there() -> None:
    maps = torch.zeros(1, 4, 2, 2)
    assert not kernels.infers_on_cpu(maps)
    with torch.no_grad():
        assert kernels.infers_on_cpu(maps, None)
        assert not kernels.infers_on_cpu(maps, torch.zeros(1, device="meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not kernels.infers_on_cpu(maps)


def as_float32(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().float().requires_grad_(x.requires_grad) for x in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: str, layout: str, machine: str) -> None:
    tensors, geometry = convolution_inputs(case, torch.float32, layout)
    agree(run(kernels.conv2d, tensors, *geometry), run(kernels.plain_conv2d, tensors, *geometry))
    with torch.no_grad():
        assert torch.allclose(kernels.conv2d(*tensors, *geometry), kernels.plain_conv2d(*tensors, *geometry), atol=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_of_half_types(case: str, dtype: torch.dtype, machine: str) -> None:
    tensors, geometry = convolution_inputs(case, dtype)
    exact = run(kernels.plain_conv2d, as_float32(tensors), *geometry)
    agree(run(kernels.conv2d, tensors, *geometry), run(kernels.plain_conv2d, tensors, *geometry), exact)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["pointwise", "depthwise_7", "two_outputs_a_channel_strided", "stem"])
def test_convolution_that_trains_only_some_inputs(
    case: str, dtype: torch.dtype, wanted: tuple[bool, ...], machine: str
) -> None:
    tensors, geometry = convolution_inputs(case, dtype)
    everything = run(kernels.conv2d, tensors, *geometry)
    for tensor, wants in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(wants)
    _, gradient = run(kernels.conv2d, tensors, *geometry)
    assert torch.equal(gradient, everything[1 + wanted.index(True)])


@pytest.mark.parametrize("case", ["pointwise", "depthwise_7", "two_outputs_a_channel", "stem"])
def test_convolution_under_autocast(case: str, machine: str) -> None:
    tensors, geometry = convolution_inputs(case, torch.float32)

    def autocast(operation: Callable) -> Callable:
        def inside(*arguments: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return operation(*arguments)

        return inside

    fast = run(autocast(kernels.conv2d), tensors, *geometry)
    assert fast[0].dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in fast[1:])
    exact = run(kernels.plain_conv2d, tensors, *geometry)
    agree(fast, run(autocast(kernels.plain_conv2d), tensors, *geometry), exact)


@pytest.mark.parametrize("case", ["pointwise", "depthwise_7", "two_outputs_a_channel"])
def test_convolution_of_float32_with_float16_weights(case: str, machine: str) -> None:
    tensors, geometry = convolution_inputs(case, torch.float16)
    tensors[0] = tensors[0].detach().float().requires_grad_()
    fast = run(kernels.conv2d, tensors, *geometry)
    assert [x.dtype for x in fast] == [torch.float32, torch.float32, torch.float16, torch.float16]
    exact = run(kernels.plain_conv2d, as_float32(tensors), *geometry)
    assert all(
        relative_error(x, y) < (1e-5 if x.dtype == torch.float32 else 1e-3) for x, y in zip(fast, exact, strict=True)
    )


def test_convolution_without_bias(machine: str) -> None:
    for case in ("pointwise", "depthwise_7", "two_outputs_a_channel"):
        (input, weight, _), geometry = convolution_inputs(case, torch.float32)
        tensors = [input, weight, None]
        agree(run(kernels.conv2d, tensors, *geometry), run(kernels.plain_conv2d, tensors, *geometry))


def test_fast_forms_run_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(case: str, dtype: torch.dtype, layout: str = "channels_last", trains: bool = True) -> str:
        tensors, geometry = convolution_inputs(case, dtype, layout)
        tensors[1].requires_grad_(trains)
        return kernels.conv2d(*tensors, *geometry).grad_fn.name()

    monkeypatch.setattr(dispatch, "_onednn_takes", lambda dtype: True)
    monkeypatch.setattr(convolution, "vector_width", lambda: 512)
    assert name("two_outputs_a_channel", torch.float32) == "_ConvolutionBackward"
    for dtype in (torch.float32, torch.bfloat16):
        assert name("depthwise_7", dtype) == name("depthwise_7_strided", dtype) == "_ConvolutionBackward"
        assert name("depthwise_7", dtype, trains=False) == name("stem", dtype) == "ConvolutionBackward0"
    assert name("pointwise", torch.float32) == "PermuteBackward0"
    assert name("pointwise", torch.float32, "channels_first") == "ConvolutionBackward0"
    monkeypatch.setattr(dispatch, "_onednn_takes", lambda dtype: False)
    assert name("stem", torch.bfloat16) == "_ConvolutionBackward"


@pytest.mark.parametrize("rows", [(0,), (1,), (5,), (8,), (3, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_linear(
    rows: tuple[int, ...], bias: bool, dtype: torch.dtype, without_half_types: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_BLOCK", 100)  # several blocks, the last one smaller
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, 24), (19, 24), (19,)][: 3 if bias else 2]
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    output = kernels.linear(*tensors)
    fast = "_Float32LinearBackward" in (output.grad_fn.name(), output.grad_fn.next_functions[0][0].name())
    assert fast == (torch.Size(rows).numel() >= 8)
    exact = run(kernels.plain_linear, as_float32(tensors))
    agree(run(kernels.linear, tensors), run(kernels.plain_linear, tensors), exact)
    for number in range(len(tensors)):
        for index, tensor in enumerate(tensors):
            tensor.requires_grad_(index == number)
        agree(run(kernels.linear, tensors)[1:], run(kernels.plain_linear, tensors)[1:], [exact[1 + number]])


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (7, 4), (8, 4), (9, 4), (100, 4), (5, 50), (3, 0)], ids=str)
def test_matrices_are_converted_in_parts_of_like_length(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_BLOCK", 32)
    parts = [len(range(*part.indices(shape[0]))) for part in linear._blocks(torch.empty(shape))]
    assert sum(parts) == shape[0] and all(0 < part * shape[1] <= max(32, shape[1]) for part in parts if shape[1])
    assert not parts or max(parts) - min(parts) < len(parts)


def test_linear_of_transposed_tensors(without_half_types: None) -> None:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(24, 9, generator=generator).bfloat16().t().requires_grad_()
    weight = torch.randn(24, 19, generator=generator).bfloat16().t().requires_grad_()
    exact = run(kernels.plain_linear, as_float32([input, weight]))
    agree(run(kernels.linear, [input, weight]), run(kernels.plain_linear, [input, weight]), exact)


def test_layers_are_sped_up_only_where_it_helps(without_half_types: None) -> None:
    model = nn.ModuleDict(
        {
            "slow": nn.Linear(4, 4, dtype=torch.bfloat16),
            "float32": nn.Linear(4, 4),
            "elsewhere": nn.Linear(4, 4, dtype=torch.bfloat16, device="meta"),
            "other": nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4, dtype=torch.bfloat16),
        }
    )
    kernels.speed_up_linear_layers(model)
    assert [name for name, module in model.items() if type(module) is kernels.Linear] == ["slow"]
    model.float()  # still on the CPU
    assert type(model["slow"]) is kernels.Linear
    own = kernels.Linear(4, 4)
    for layer in (model["slow"], own):
        layer.to("meta")  # as on any device that is not the CPU
    assert type(model["slow"]) is nn.Linear and type(own) is kernels.Linear


def test_layers_stay_where_half_types_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_onednn_takes", lambda dtype: True)
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16))
    kernels.speed_up_linear_layers(model)
    assert type(model[0]) is nn.Linear


def test_half_types_are_slow_without_onednn() -> None:
    # torch.backends.mkldnn.flags() would warn about a setting for GPUs.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        assert not kernels.has_fast_gemm(torch.bfloat16)
        assert kernels.has_fast_gemm(torch.float32) and kernels.has_fast_gemm(torch.float64)
    finally:
        torch._C._set_mkldnn_enabled(before)


def test_dispatch_leaves_compilers_and_transforms_alone() -> None:
    assert kernels.eager_on_cpu(torch.zeros(1), nn.Parameter(torch.zeros(1)), None)
    assert not kernels.eager_on_cpu(torch.zeros(1), torch.zeros(1, device="meta"))
    assert not kernels.eager_on_cpu(torch.zeros(1).as_subclass(type("Mine", (Tensor,), {})))
    inside: list[bool] = []

    def record(x: Tensor) -> Tensor:
        inside.append(kernels.eager_on_cpu(torch.zeros(1)))
        return x.sum()

    torch.func.grad(record)(torch.zeros(2))
    assert inside == [False]


def test_functional_gradients_of_the_encoder(machine: str) -> None:
    model = encoder()
    parameters = dict(model.named_parameters())
    pixels = random_pixels(1, 64, 64)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (pixels,)).last_hidden_state.square().mean()

    functional = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    scale = max(gradient.norm() for gradient in functional.values())
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            assert (functional[name] - parameter.grad).norm() < 1e-5 * max(scale, 1e-3), name


def encoder(dtype: torch.dtype = torch.float32, seed: int = 0, **fields: object) -> FastViTHDModel:
    torch.manual_seed(seed)
    config = FastViTHDConfig(**(TINY | {"layer_scale_init_value": 0.3, "projection_dim": 0} | fields))
    return FastViTHDModel(config).to(dtype).eval()


def step(model: FastViTHDModel, pixels: Tensor) -> list[Tensor]:
    """Return the features and the gradient of every parameter, one after the other in one vector."""
    model.zero_grad()
    features = model(pixels).last_hidden_state
    features.float().square().mean().backward()
    return [features.detach().float(), torch.cat([p.grad.flatten().float() for p in model.parameters()])]


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Disable all fast forms."""
    with contextlib.ExitStack() as stack:
        for module in (kernels, convolution, dispatch, feed_forward, linear):
            stack.enter_context(mock.patch.object(module, "eager_on_cpu", return_value=False))
        yield


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("reparameterized", [True, False], ids=["merged", "train_time_form"])
def test_encoder(reparameterized: bool, training: bool, machine: str) -> None:
    model = encoder(reparameterized=reparameterized).train(training)
    pixels = random_pixels(2, 128, 192)
    with plain():
        expected = step(model, pixels)
    for ours, reference in zip(step(model, pixels), expected, strict=True):
        assert relative_error(ours, reference) < 2e-5


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_encoder_of_half_types(dtype: torch.dtype, without_half_types: None) -> None:
    ratios = []
    for seed in range(4):  # single roundings differ by chance
        model = encoder(dtype, seed).train()
        pixels = random_pixels(2, 128, 64, seed)
        fast = step(model, pixels)
        with plain():
            reference, exact = step(model, pixels), step(model.float(), pixels)
        ratios.append(
            [relative_error(fast[i], exact[i]) / relative_error(reference[i], exact[i]) for i in range(len(exact))]
        )
    assert (torch.tensor(ratios).mean(0) < 1.05).all(), ratios


@pytest.mark.parametrize("reparameterized", [True, False], ids=["merged", "train_time_form"])
@torch.no_grad()
def test_encoder_for_inference(reparameterized: bool, machine: str) -> None:
    model = encoder(reparameterized=reparameterized)
    pixels = random_pixels(2, 128, 192)
    fast = model(pixels, output_hidden_states=True)
    with plain():
        expected = model(pixels, output_hidden_states=True)
    assert relative_error(fast.pooler_output, expected.pooler_output) < 1e-5
    for ours, reference in zip(fast.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(ours, reference) < 1e-5


@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_encoder_of_half_types_for_inference(dtype: torch.dtype, without_half_types: None) -> None:
    """Half-precision weights, everything else in float32: only the result is rounded."""
    model, pixels = encoder(dtype), random_pixels(2, 128, 64).to(dtype)
    fast = model(pixels)
    assert fast.last_hidden_state.dtype == fast.pooler_output.dtype == dtype
    with plain():
        reference = model(pixels).last_hidden_state
        exact = model.float()(pixels.float()).last_hidden_state
    assert relative_error(fast.last_hidden_state, exact) <= torch.finfo(dtype).eps
    assert relative_error(fast.last_hidden_state, exact) < relative_error(reference, exact)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_backbone_of_half_types_keeps_their_type(dtype: torch.dtype, without_half_types: None) -> None:
    torch.manual_seed(0)
    stages = ["stem", "stage1", "stage4", "stage5"]
    backbone = FastViTHDBackbone(FastViTHDConfig(**TINY, out_features=stages)).to(dtype).eval()
    last = torch.float32 if dtype == torch.float16 else dtype
    maps = backbone(random_pixels(1, 64, 64)).feature_maps
    assert [x.dtype for x in maps] == [dtype, dtype, dtype, last]


@torch.no_grad()
def test_hooks_and_replaced_layers_are_called() -> None:
    """A layer with hooks, or a replaced layer, is called as in the plain form."""
    model, pixels = encoder(), random_pixels(1, 64, 64)
    expected = model(pixels).last_hidden_state
    block = model.network[0][0].convffn
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in (("fc1", block.fc1), ("bn", block.conv.bn), ("stem", model.patch_embed[0].reparam_conv))
    ]
    assert relative_error(model(pixels).last_hidden_state, expected) < 1e-5
    assert called == ["stem", "bn", "fc1"]
    for handle in handles:
        handle.remove()
    block.fc2 = nn.Sequential(block.fc2, nn.Identity())
    assert relative_error(model(pixels).last_hidden_state, expected) < 1e-5
    block.fc2[1] = nn.Threshold(1e9, 0.0)
    assert relative_error(model(pixels).last_hidden_state, expected) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_lie_in_memory_as_the_weights_do(dtype: torch.dtype) -> None:
    """DistributedDataParallel warns about other strides."""
    model = encoder(dtype).train()
    step(model, random_pixels(2, 128, 128).to(dtype))
    assert {
        name: (weight.stride(), weight.grad.stride())
        for name, weight in model.named_parameters()
        if weight.grad is not None and weight.grad.stride() != weight.stride()
    } == {}


def test_encoder_with_gradient_checkpointing(machine: str) -> None:
    model = encoder(torch.bfloat16).train()
    pixels = random_pixels(1, 64, 128)
    kept = step(model, pixels)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert all(torch.equal(ours, again) for ours, again in zip(kept, step(model, pixels), strict=True))


@torch.no_grad()
def test_graphs_hold_the_plain_forms(without_half_types: None) -> None:
    model = encoder(torch.bfloat16)
    pixels = random_pixels(1, 64, 64)
    expected = model(pixels).last_hidden_state
    program = torch.export.export(model, (pixels,))
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("conv2d" in operation for operation in operations)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for outputs in (program.module()(pixels), compiled(pixels)):
        assert relative_error(outputs.last_hidden_state, expected) < 2e-2


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_loaded_language_model(dtype: torch.dtype, checkpoint: Callable, without_half_types: None) -> None:
    directory = checkpoint("qwen2_tied")
    exact = FastVLMForConditionalGeneration.from_pretrained(directory, dtype=dtype).float()
    fast = FastVLMForConditionalGeneration.from_pretrained(directory, dtype=dtype)
    layers = [module for module in fast.model.language_model.modules() if isinstance(module, nn.Linear)]
    assert layers and all(type(layer) is kernels.Linear for layer in layers)
    assert type(fast.lm_head) is kernels.Linear and fast.lm_head.weight is fast.get_input_embeddings().weight
    errors = []
    ids = torch.arange(5, 45).view(2, 20)
    exact(input_ids=ids, labels=ids).loss.backward()
    for speed_up in (True, False):
        fast.zero_grad()
        if not speed_up:
            for module in fast.modules():
                if type(module) is kernels.Linear:
                    module.__class__ = nn.Linear
        fast(input_ids=ids, labels=ids).loss.backward()
        pairs = [
            (p.grad, q.grad) for p, q in zip(fast.parameters(), exact.parameters(), strict=True) if p.grad is not None
        ]
        assert pairs
        errors.append(relative_error(*(torch.cat([p[i].flatten().float() for p in pairs]) for i in (0, 1))))
    assert errors[0] <= errors[1]


def test_a_batch_of_one_keeps_channels_last() -> None:
    """For any stride of the batch dimension: convolutions choose by it, and a recomputed block must choose the same."""
    maps = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    odd = maps.as_strided(maps.shape, (16, 1, 128, 16))
    for weight, groups in (
        (torch.randn(16, 1, 3, 3), 16),
        (torch.randn(32, 16, 1, 1), 1),
        (torch.randn(32, 1, 3, 3), 16),
    ):
        outs = [kernels.conv2d(input, weight, None, 1, weight.shape[-1] // 2, groups) for input in (maps, odd)]
        assert outs[0].stride() == outs[1].stride() == (outs[0].numel(), 1, 8 * outs[0].shape[1], outs[0].shape[1])
        assert torch.equal(outs[0], outs[1])
