"""Detectors, readers of text, and vision at large."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

from tools.sweeps.libraries.making import IMAGE, Entry, Shapes, made

_YOLO = """yolov3-tiny yolov5n yolov5n-p6 yolov6n yolov8n yolov8n-p2 yolov8n-ghost yolov9t yolov10n
yolo11n yolo12n yolo26n""".split()
_YOLO_TASKS = {
    "SegmentationModel": "yolov8n-seg",
    "PoseModel": "yolov8n-pose",
    "OBBModel": "yolov8n-obb",
    "ClassificationModel": "yolov8n-cls",
}
_OCR = """classification.mobilenet_v3_small classification.mobilenet_v3_large_r
classification.resnet18 classification.resnet31 classification.resnet34
classification.vgg16_bn_r classification.textnet_tiny classification.magc_resnet31
detection.db_resnet50 detection.db_mobilenet_v3_large detection.linknet_resnet18
detection.fast_tiny recognition.crnn_vgg16_bn recognition.crnn_mobilenet_v3_small""".split()
_GEFFNET = """efficientnet_b0 efficientnet_es mobilenetv3_large_100 mnasnet_a1 mnasnet_b1 fbnetc_100
spnasnet_100 mixnet_s semnasnet_100 tf_efficientnet_lite0 mobilenetv2_100""".split()


_HEADS = """BarlowTwinsProjectionHead BYOLProjectionHead SimSiamPredictionHead SimCLRProjectionHead
SwaVProjectionHead VICRegProjectionHead""".split()


def _detectors() -> Iterator[Entry]:
    tasks = "ultralytics.nn.tasks"
    for name in _YOLO:
        yield f"ultralytics:{name}", made(tasks, "DetectionModel", f"{name}.yaml", verbose=False), IMAGE
    for kind, name in _YOLO_TASKS.items():
        yield f"ultralytics:{name}", made(tasks, kind, f"{name}.yaml", verbose=False), IMAGE
    yield "easyocr:CRAFT", made("easyocr.craft", "CRAFT", pretrained=False), IMAGE
    for name in ("model", "vgg_model"):
        options: dict[str, Any] = {
            "input_channel": 1,
            "output_channel": 32,
            "hidden_size": 16,
            "num_class": 10,
        }
        yield (
            f"easyocr:{name}",
            made(f"easyocr.model.{name}", "Model", **options),
            ((1, 1, 32, 64), ("n<3", 1)),
        )
    yield "facexlib:FAN", made("facexlib.alignment.awing_arch", "FAN", num_modules=1), ((1, 3, 256, 256),)
    yield "facexlib:BiSeNet", made("facexlib.parsing.bisenet", "BiSeNet", 5), IMAGE
    yield (
        "facexlib:ParseNet",
        made("facexlib.parsing.parsenet", "ParseNet", 64, 64, 16, norm_type="bn"),
        IMAGE,
    )
    yield (
        "facexlib:ResNetArcFace",
        made("facexlib.recognition.arcface_arch", "Backbone", 50, drop_ratio=0.4, mode="ir_se"),
        ((1, 3, 112, 112),),
    )
    yield (
        "basicsr:VGGDiscriminator",
        made("basicsr.archs.discriminator_arch", "VGGStyleDiscriminator128", 3, 8),
        ((1, 3, 128, 128),),
    )


def _vision() -> Iterator[Entry]:
    for name in _OCR:
        kind, _, bare = name.partition(".")
        shape = ((1, 3, 32, 128),) if kind == "recognition" else IMAGE
        options = {} if kind == "classification" else {"pretrained_backbone": False, "exportable": True}
        yield f"doctr:{bare}", made(f"doctr.models.{kind}", bare, pretrained=False, **options), shape
    for name in _GEFFNET:
        yield f"geffnet:{name}", made("geffnet", "create_model", name, pretrained=False), IMAGE
    for name, shape in {
        "HardNet": ((2, 1, 32, 32),),
        "HyNet": ((2, 1, 32, 32),),
        "SOSNet": ((2, 1, 32, 32),),
        "TFeat": ((2, 1, 32, 32),),
        "YuNet": ((1, 3, 64, 64),),
    }.items():
        if name == "YuNet":
            yield "kornia:YuNet", made("kornia.contrib.face_detection", "YuNet", "test", False), shape
        else:
            yield f"kornia:{name}", made("kornia.feature", name, False), shape
    for name in ("resnet-9", "resnet-18", "resnet-50"):
        yield f"lightly:{name}", made("lightly.models", "ResNetGenerator", name), ((1, 3, 32, 32),)
    for name in _HEADS:
        yield f"lightly:{name}", functools.partial(_head, name), ((4, 32),)
    yield (
        "torchxrayvision:DenseNet",
        made("torchxrayvision.models", "DenseNet", num_classes=5, in_channels=1),
        ((1, 1, 64, 64),),
    )
    for name in ("FCN", "FarSeg", "FCSiamConc", "FCSiamDiff", "ChangeStarFarSeg"):
        yield (
            f"torchgeo:{name}",
            functools.partial(_torchgeo, name),
            ((1, 2, 3, 64, 64),) if name.startswith(("FCS", "Change")) else IMAGE,
        )
    yield "fastai:xresnet18", made("fastai.vision.models.xresnet", "xresnet18"), IMAGE
    yield "fastai:xse_resnet18", made("fastai.vision.models.xresnet", "xse_resnet18"), IMAGE
    yield "fastai:xresnext18", made("fastai.vision.models.xresnet", "xresnext18"), IMAGE
    yield "fastai:DynamicUnet", _dynamic_unet, IMAGE
    yield "resnet_pytorch:resnet18", made("resnet_pytorch", "ResNet.from_name", "resnet18"), IMAGE
    for decoder in ("Unet", "FPN", "DeepLabV3Plus"):
        yield (
            f"torchseg:{decoder}",
            made("torchseg", decoder, "resnet18", encoder_weights=None),
            ((2, 3, 64, 64),),
        )
    yield (
        "vit_pytorch:LeViT",
        made(
            "vit_pytorch.levit",
            "LeViT",
            image_size=64,
            num_classes=5,
            stages=3,
            dim=(32, 48, 64),
            depth=2,
            heads=(2, 3, 4),
            mlp_mult=2,
        ),
        IMAGE,
    )
    yield (
        "vit_pytorch:MobileViT",
        made(
            "vit_pytorch.mobile_vit",
            "MobileViT",
            image_size=(64, 64),
            dims=[16, 24, 32],
            channels=[8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64],
            num_classes=5,
        ),
        IMAGE,
    )
    yield (
        "vit_pytorch:MaxViT",
        made("vit_pytorch.max_vit", "MaxViT", num_classes=5, dim=16, dim_head=8, depth=(1, 1), window_size=4),
        IMAGE,
    )


def _head(name: str) -> Any:
    options = {"SimSiamPredictionHead": (32, 16, 32), "BYOLProjectionHead": (32, 16, 8)}
    head = getattr(importlib.import_module("lightly.models.modules.heads"), name)
    given: dict[str, Any] = {"batch_norm": True} if "batch_norm" in inspect.signature(head).parameters else {}
    return head(*options.get(name, (32, 16, 8)), **given)


def _torchgeo(name: str) -> Any:
    kinds = importlib.import_module("torchgeo.models")
    if name == "FCN":
        return kinds.FCN(3, 4, 16)
    if name == "FarSeg":
        return kinds.FarSeg("resnet18", 4, False)
    if name == "ChangeStarFarSeg":
        return kinds.ChangeStarFarSeg("resnet18", 4, False)
    return getattr(kinds, name)("resnet18", encoder_weights=None)


def _dynamic_unet() -> Any:
    from torch import nn
    from torchvision.models import resnet18

    body = nn.Sequential(*list(resnet18(weights=None).children())[:-2])
    unet = importlib.import_module("fastai.vision.models.unet")
    return unet.DynamicUnet(body, 3, (64, 64))


_MM: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "ResNet": ((18,), {}),
    "ResNetV1c": ((), {"depth": 50}),
    "ResNetV1d": ((), {"depth": 50}),
    "ResNet_CIFAR": ((18,), {}),
    "ResNeXt": ((50,), {}),
    "SEResNet": ((50,), {}),
    "SEResNeXt": ((50,), {}),
    "ResNeSt": ((50,), {}),
    "Res2Net": ((), {"depth": 50}),
    "VGG": ((11,), {"norm_cfg": {"type": "BN"}}),
    "RepVGG": (("A0",), {}),
    "MobileOne": (("s0",), {}),
    "MobileNetV2": ((), {"widen_factor": 0.5}),
    "MobileNetV3": (("small",), {}),
    "ShuffleNetV1": ((), {}),
    "ShuffleNetV2": ((), {"widen_factor": 0.5}),
    "RegNet": (("regnetx_400mf",), {}),
    "EfficientNet": (("b0",), {}),
    "EfficientNetV2": (("b0",), {}),
    "DenseNet": (("121",), {}),
    "InceptionV3": ((), {"num_classes": 5, "aux_logits": False}),
    "CSPDarkNet": ((53,), {}),
    "CSPResNet": ((50,), {}),
    "ConvMixer": (("768/32",), {}),
    "EfficientFormer": (("l1",), {}),
    "LeViT": (("128s",), {"img_size": 64}),
    "MobileViT": (("xx_small",), {}),
    "VAN": (("tiny",), {}),
    "XCiT": (
        (),
        {
            "img_size": 64,
            "patch_size": 16,
            "embed_dims": 32,
            "depth": 2,
            "num_heads": 2,
            "layer_scale_init_value": 1.0,
        },
    ),
    "RepMLPNet": (("base",), {"img_size": 64, "patch_size": 4, "out_indices": (3,)}),
    "TinyViT": (("5m",), {"img_size": (64, 64)}),
}


_MM_SIZES: dict[str, Shapes] = {"InceptionV3": ((1, 3, 128, 128),), "EfficientFormer": ((1, 3, 224, 224),)}


def _mmpretrain() -> Iterator[Entry]:
    for name, (words, options) in _MM.items():
        shape = _MM_SIZES.get(name, IMAGE)
        yield f"mmpretrain:{name}", functools.partial(_backbone, name, words, options), shape


def _backbone(name: str, words: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Without the models of images and text, which need an older transformers."""
    sys.modules.setdefault("mmpretrain.models.multimodal", types.ModuleType("mmpretrain.models.multimodal"))
    return getattr(importlib.import_module("mmpretrain.models.backbones"), name)(*words, **options)


TABLES = (_detectors, _vision, _mmpretrain)
