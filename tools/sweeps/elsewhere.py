"""Fold and insert over the models of other libraries: `make elsewhere`.

torchvision and timm write their models with care, and alike; these are written in styles of their own.
Results are appended to `docs/elsewhere.jsonl` as they come; `docs/elsewhere.md` is written from them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tools.sweeps.coverage_page import page
from tools.sweeps.kept_page import kept_page, shares
from tools.sweeps.libraries import Make, Shapes, entries, inputs_like
from tools.sweeps.libraries import made as _made
from tools.sweeps.sweeping import Results, arguments, put, sweep
from tools.sweeps.zoo import folded_of, judged

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "elsewhere.jsonl"
TITLE = "Models of other libraries"

_DECODERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer".split()
_ENCODERS = """efficientnet-b0 mobilenet_v2 densenet121 vgg11 vgg11_bn se_resnet50 xception inceptionv4 dpn68
timm-efficientnet-b0 mit_b0 mobileone_s0 resnext50_32x4d timm-regnetx_002 timm-resnest14d
inceptionresnetv2""".split()
_PRETRAINED = """nasnetamobile xception dpn68 bninception fbresnet152 resnext101_32x4d cafferesnet101
se_resnet50 inceptionv4 polynet""".split()
_FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_STEPS: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
_MONAI: dict[str, tuple[str, dict[str, Any]]] = {
    "UNet": ("UNet", {**_FLAT, **_STEPS, "num_res_units": 2, "norm": "batch"}),
    "UNet3d": ("UNet", {**_FLAT, **_STEPS, "spatial_dims": 3, "norm": "batch"}),
    "BasicUNet": ("BasicUNet", {**_FLAT, "norm": ("batch", {})}),
    "BasicUNetPlusPlus": ("BasicUNetPlusPlus", {**_FLAT, "norm": ("batch", {})}),
    "AttentionUnet": ("AttentionUnet", {**_FLAT, **_STEPS}),
    "SegResNet": ("SegResNet", {**_FLAT, "norm": ("BATCH", {})}),
    "DynUNet": (
        "DynUNet",
        {
            **_FLAT,
            "kernel_size": [3] * 3,
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2] * 2,
            "norm_name": "batch",
        },
    ),
    "VNet": ("VNet", {**_FLAT, "spatial_dims": 3}),
    "HighResNet": ("HighResNet", _FLAT),
    "DenseNet121": ("DenseNet121", _FLAT),
    "SEResNet50": ("SEResNet50", {"spatial_dims": 2, "in_channels": 3, "num_classes": 2}),
    "FlexibleUNet": ("FlexibleUNet", {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"}),
    "resnet18_3d": ("resnet18", {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 2}),
    "RegUNet": ("RegUNet", {"spatial_dims": 2, "in_channels": 2, "num_channel_initial": 8, "depth": 2}),
    "AutoEncoder": ("AutoEncoder", {**_FLAT, **_STEPS, "strides": (2, 2, 2), "norm": "BATCH"}),
    "HoVerNet": ("HoVerNet", {"mode": "fast", "in_channels": 3, "out_classes": 0}),
}
_NNUNET: dict[str, Any] = {
    "input_channels": 1,
    "n_stages": 3,
    "features_per_stage": (8, 16, 32),
    "kernel_sizes": 3,
    "strides": (1, 2, 2),
    "num_classes": 2,
    "conv_bias": True,
    "norm_op_kwargs": {},
    "nonlin_kwargs": {"inplace": True},
}


_SIZES: dict[str, Shapes] = {
    "pretrainedmodels:polynet": ((1, 3, 331, 331),),
    "monai:HoVerNet": ((1, 3, 256, 256),),
    "pytorchcv:voca8flame": ((2, 1, 16, 29), ("n<8", 2)),
    "pytorchcv:visemenet20": ((34, 8, 195), ("n<8", 34, 76)),
    "pytorchcv:nvpattexp116bazel76": ((2, 8, 16, 29), ("n<8", 2)),
    "pytorchcv:pfpcnet": ((1, 1, 320, 240),),
    "pytorchcv:raft_things": ((1, 3, 128, 128), (1, 3, 128, 128)),
    "pytorchcv:propainter": ((1, 3, 2, 64, 64), (1, 3, 1, 64, 64)),
    "pytorchcv:propainter_rfc": ((1, 3, 2, 64, 64), (1, 3, 1, 64, 64)),
    "pytorchcv:propainter_ip": ((3, 3, 64, 64), (3, 1, 64, 64), (2, 4, 64, 64), lambda: "nearest"),
    **dict.fromkeys(
        ("pytorchcv:jasper5x3", "pytorchcv:jasperdr10x5_en", "pytorchcv:quartznet5x5_en_ls"),
        ((1, 64, 96), lambda: torch.tensor([96])),
    ),
}
"""Of models that take one size alone, and do not say which, or several inputs."""


def every_model() -> Iterator[tuple[str, Make]]:
    """The name of each model, and what makes it."""
    yield from _of_pytorchcv()
    for decoder in _DECODERS:
        yield (
            f"smp:{decoder}",
            _made("segmentation_models_pytorch", decoder, "resnet18", encoder_weights=None),
        )
    for encoder in _ENCODERS:
        yield (
            f"smp:Unet-{encoder}",
            _made("segmentation_models_pytorch", "Unet", encoder, encoder_weights=None),
        )
    for name, (kind, options) in _MONAI.items():
        yield f"monai:{name}", _made("monai.networks.nets", kind, **options)
    for name in _PRETRAINED:
        yield f"pretrainedmodels:{name}", _made("pretrainedmodels", name, num_classes=1000, pretrained=None)
    for name in ("PlainConvUNet", "ResidualEncoderUNet"):
        yield f"nnunet:{name}", lambda name=name: _nnunet(name)
    yield (
        "efficientnet_pytorch:b0",
        _made("efficientnet_pytorch", "EfficientNet.from_name", "efficientnet-b0"),
    )
    yield "facenet:InceptionResnetV1", _made("facenet_pytorch", "InceptionResnetV1", pretrained=None)
    yield "resnest:resnest50", _made("resnest.torch", "resnest50", pretrained=False)
    yield "open_clip:RN50", lambda: _made("open_clip", "create_model", "RN50", pretrained=None)().visual


def _of_pytorchcv() -> Iterator[tuple[str, Make]]:
    """The first model of each of its families."""
    models = importlib.import_module("pytorchcv.model_provider")._models
    families = {make.__module__: name for name, make in reversed(models.items())}
    for name in sorted(families.values(), key=list(models).index):
        speech = {"from_audio": False} if name.startswith(("jasper", "quartznet")) else {}
        yield f"pytorchcv:{name}", functools.partial(models[name], pretrained=False, **speech)


def _nnunet(name: str) -> Any:
    from torch import nn

    module = importlib.import_module("dynamic_network_architectures.architectures.unet")
    residual = name == "ResidualEncoderUNet"
    blocks = {"n_blocks_per_stage" if residual else "n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}
    kinds = {"conv_op": nn.Conv2d, "norm_op": nn.BatchNorm2d, "nonlin": nn.LeakyReLU}
    return getattr(module, name)(**_NNUNET, **blocks, **kinds)


def observed(model: Any, shapes: Shapes = None) -> Any:
    """On inputs of these shapes, else on the smallest image that it takes, or one as large as it says."""
    from bntool.core.errors import ObserveError
    from bntool.graph.inputs import Inputs
    from bntool.observe.eager import observe
    from bntool.observe.inference import observe_inferred

    if shapes is not None:
        return observe(model, inputs_like(shapes))
    try:
        return observe_inferred(model, small=True)
    except ObserveError:
        channels, size = (
            getattr(model, "in_channels", None) or 3,
            getattr(model, "in_size", None) or (224, 224),
        )
        shape = getattr(model, "input_size", None) or (channels, *size)
        return observe(model, Inputs.of(torch.randn(1, *shape)))


def told(results: dict[str, Any], file: str, known: int) -> str:
    """The page, with how many libraries there are, and how many models are yet to be run."""
    text = page(results, title=TITLE, target="elsewhere", file=file)
    libraries = {name.partition(":")[0] for name, row in results.items() if row["status"] == "ok"}
    left = f"; {known - len(results)} more models are in the tables, and yet to be run" * (
        known > len(results)
    )
    text = text.replace(
        "\n- BatchNorms that ran",
        f"\n- [what stays](elsewhere-kept.md): {shares(results)}\n- BatchNorms that ran",
        1,
    )
    return text.replace("\n- models run:", f"\n- libraries: {len(libraries)}{left}\n- models run:", 1)


def main() -> None:
    chosen = arguments(__doc__, RESULTS, limit=90).parse_args()
    models: dict[str, tuple[Make, Shapes]] = {name: (make, shapes) for name, make, shapes in entries()}
    with contextlib.suppress(ModuleNotFoundError):
        models |= {name: (make, _SIZES.get(name)) for name, make in every_model()}
    made = functools.partial(told, file=chosen.results.name, known=len(models))

    def examine(name: str) -> dict[str, Any]:
        make, shapes = models[name]
        return judged(make, functools.partial(observed, shapes=shapes))

    sweep(chosen, models, examine, made, folded_of)
    put(chosen.results.with_name(f"{chosen.results.stem}-kept.md"), kept_page(Results(chosen.results).rows))


if __name__ == "__main__":
    main()
