"""Models of libraries that import each in a way of its own, small enough for a sweep, with inputs that fit.

A table of lines: the name, what makes the model, and its inputs: shapes of images or signals, `n<1000` for
whole numbers below 1000, or a dict of either by name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

Make = Callable[[], Any]
Shapes = Any
Entry = tuple[str, Make, Shapes]
"""The name, what makes the model, and what its inputs look like; None where they are inferred."""

IMAGE = ((1, 3, 64, 64),)
_TIMES = ((2, 3, 64),)
_EEG = ((1, 8, 400),)


def made(module: str, name: str, *words: Any, **options: Any) -> Make:
    """What calls `name` of a module, found when it is called."""

    def make() -> Any:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found(*words, **options)

    return make


def entries() -> Iterator[Entry]:
    """Every model of the table."""
    for of in (
        _transformers,
        _detectors,
        _vision,
        _mmpretrain,
        _speech,
        _signals,
        _graphs,
        _volumes,
        _tables,
    ):
        yield from of()


def inputs_like(shapes: Shapes) -> Any:
    """Inputs of these shapes, drawn from a seed."""
    import torch

    from bntool.graph.inputs import Inputs

    generator = torch.Generator().manual_seed(0)

    def drawn(shape: Any) -> Any:
        if callable(shape):
            return shape()
        if isinstance(shape, dict):
            return {name: drawn(part) for name, part in shape.items()}
        if isinstance(shape, list):
            return [drawn(part) for part in shape]
        if shape and isinstance(shape[0], str):
            return torch.randint(int(shape[0].removeprefix("n<")), shape[1:], generator=generator)
        return torch.randn(shape, generator=generator)

    if isinstance(shapes, dict):
        return Inputs((), drawn(shapes))
    return Inputs(tuple(map(drawn, shapes)))


# -- transformers -------------------------------------------------------------------------------------------

_SMALL_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_DETR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}
_RT: dict[str, Any] = {
    "encoder_in_channels": [16, 16, 32],
    "encoder_hidden_dim": 32,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 20,
    "decoder_layers": 2,
    "num_denoising": 0,
}
_PIXELS = {"pixel_values": (1, 3, 64, 64)}
_HF: dict[str, tuple[str, dict[str, Any], Shapes]] = {
    "ResNetModel": ("ResNetConfig", _SMALL_RESNET, _PIXELS),
    "RegNetModel": ("RegNetConfig", {**_SMALL_RESNET, "layer_type": "y", "groups_width": 8}, _PIXELS),
    "MobileNetV1Model": ("MobileNetV1Config", {"depth_multiplier": 0.25}, _PIXELS),
    "MobileNetV2Model": ("MobileNetV2Config", {"depth_multiplier": 0.35}, _PIXELS),
    "MobileNetV2ForSemanticSegmentation": ("MobileNetV2Config", {"depth_multiplier": 0.35}, _PIXELS),
    "EfficientNetModel": ("EfficientNetConfig", {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}, _PIXELS),
    "LevitModel": ("LevitConfig", {"image_size": 64}, _PIXELS),
    "MobileViTModel": ("MobileViTConfig", {"image_size": 64}, _PIXELS),
    "MobileViTV2Model": ("MobileViTV2Config", {"image_size": 64, "width_multiplier": 0.5}, _PIXELS),
    "MobileViTForSemanticSegmentation": ("MobileViTConfig", {"image_size": 64}, {"pixel_values": (2, 3, 64, 64)}),
    "SegformerForSemanticSegmentation": ("SegformerConfig", {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 32], "decoder_hidden_size": 16}, _PIXELS),
    "SwiftFormerModel": ("SwiftFormerConfig", {"depths": [1] * 4, "embed_dims": [16, 16, 32, 32]}, _PIXELS),
    "TextNetModel": ("TextNetConfig", {}, _PIXELS),
    "HGNetV2ForImageClassification": ("HGNetV2Config", {}, _PIXELS),
    "RTDetrResNetBackbone": ("RTDetrResNetConfig", _SMALL_RESNET, _PIXELS),
    "PPLCNetBackbone": ("PPLCNetConfig", {}, _PIXELS),
    "DetrModel": ("DetrConfig", _DETR, _PIXELS),
    "ConditionalDetrModel": ("ConditionalDetrConfig", _DETR, _PIXELS),
    "DabDetrModel": ("DabDetrConfig", {**_DETR, "hidden_size": 32}, _PIXELS),
    "DeformableDetrModel": ("DeformableDetrConfig", _DETR, {"pixel_values": (1, 3, 128, 128)}),
    "TableTransformerModel": ("TableTransformerConfig", _DETR, _PIXELS),
    "RTDetrModel": ("RTDetrConfig", _RT, _PIXELS),
    "RTDetrV2Model": ("RTDetrV2Config", _RT, _PIXELS),
    "DFineModel": ("DFineConfig", _RT, _PIXELS),
    "DFineForObjectDetection": ("DFineConfig", _RT, _PIXELS),
    "UperNetForSemanticSegmentation": ("UperNetConfig", {"hidden_size": 16, "auxiliary_channels": 8}, {"pixel_values": (2, 3, 64, 64)}),
    "BeitForSemanticSegmentation": ("BeitConfig", {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 32, "image_size": 64, "out_indices": [1, 2, 3, 4]}, {"pixel_values": (2, 3, 64, 64)}),
    "DPTForDepthEstimation": ("DPTConfig", {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 32, "image_size": 64, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "use_batch_norm_in_fusion_residual": True, "is_hybrid": False}, _PIXELS),
    "SuperPointForKeypointDetection": ("SuperPointConfig", {}, _PIXELS),
    "EfficientLoFTRModel": ("EfficientLoFTRConfig", {}, {"pixel_values": (1, 2, 3, 64, 64)}),
    "PatchTSTModel": ("PatchTSTConfig", {"num_input_channels": 3, "context_length": 64, "patch_length": 8, "patch_stride": 8, "d_model": 16, "num_attention_heads": 2, "ffn_dim": 16, "num_hidden_layers": 2}, {"past_values": (2, 64, 3)}),
    "PatchTSMixerModel": ("PatchTSMixerConfig", {"num_input_channels": 3, "context_length": 64, "patch_length": 8, "patch_stride": 8, "d_model": 16, "num_layers": 2, "norm_mlp": "BatchNorm"}, {"past_values": (2, 64, 3)}),
    "Wav2Vec2ConformerModel": ("Wav2Vec2ConformerConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}, {"input_values": (1, 4000)}),
    "Wav2Vec2ConformerForCTC": ("Wav2Vec2ConformerConfig", {"hidden_size": 32, "vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}, {"input_values": (1, 4000)}),
    "ParakeetEncoder": ("ParakeetEncoderConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "subsampling_conv_channels": 8, "num_mel_bins": 16}, {"input_features": (1, 64, 16)}),
    "FastSpeech2ConformerModel": ("FastSpeech2ConformerConfig", {"hidden_size": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, "encoder_linear_units": 32, "decoder_linear_units": 32, "speech_decoder_postnet_units": 16, "vocab_size": 40}, {"input_ids": ("n<40", 1, 9)}),
    "SuperGlueForKeypointMatching": ("SuperGlueConfig", {}, {"pixel_values": (1, 2, 3, 64, 64)}),
    "Data2VecVisionForSemanticSegmentation": ("Data2VecVisionConfig", {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 32, "image_size": 64, "out_indices": [1, 2, 3, 4]}, {"pixel_values": (2, 3, 64, 64)}),
}  # fmt: skip


def _transformers() -> Iterator[Entry]:
    for name, (config, options, shapes) in _HF.items():
        yield f"transformers:{name}", functools.partial(_of_config, name, config, options), shapes


def _of_config(name: str, config: str, options: dict[str, Any]) -> Any:
    library = importlib.import_module("transformers")
    extra: dict[str, Any] = {}
    if config in ("DetrConfig", "ConditionalDetrConfig", "DabDetrConfig", "DeformableDetrConfig", "TableTransformerConfig"):  # fmt: skip
        outs = ["stage2", "stage3", "stage4"] if config.startswith("Deformable") else ["stage4"]
        extra["backbone_config"] = library.ResNetConfig(**_SMALL_RESNET, out_features=outs)
    if config in ("RTDetrConfig", "RTDetrV2Config"):
        extra["backbone_config"] = library.RTDetrResNetConfig(**_SMALL_RESNET, out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    if config == "UperNetConfig":
        extra["backbone_config"] = library.ResNetConfig(**_SMALL_RESNET, out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
        extra["auxiliary_in_channels"] = 16
    if config == "DFineConfig":
        options = {k: v for k, v in options.items() if k != "encoder_in_channels"}
    return getattr(library, name)(getattr(library, config)(**options, **extra))


# -- detection, and vision at large -------------------------------------------------------------------------

_YOLO = """yolov3-tiny yolov5n yolov5n-p6 yolov6n yolov8n yolov8n-p2 yolov8n-ghost yolov9t yolov10n yolo11n yolo12n
yolo26n""".split()
_YOLO_TASKS = {"SegmentationModel": "yolov8n-seg", "PoseModel": "yolov8n-pose", "OBBModel": "yolov8n-obb", "ClassificationModel": "yolov8n-cls"}  # fmt: skip
_OCR = """classification.mobilenet_v3_small classification.mobilenet_v3_large_r classification.resnet18
classification.resnet31 classification.resnet34 classification.vgg16_bn_r classification.textnet_tiny
classification.magc_resnet31 detection.db_resnet50 detection.db_mobilenet_v3_large detection.linknet_resnet18
detection.fast_tiny recognition.crnn_vgg16_bn recognition.crnn_mobilenet_v3_small""".split()
_GEFFNET = """efficientnet_b0 efficientnet_es mobilenetv3_large_100 mnasnet_a1 mnasnet_b1 fbnetc_100 spnasnet_100
mixnet_s semnasnet_100 tf_efficientnet_lite0 mobilenetv2_100""".split()


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
    yield "facexlib:ResNetArcFace", made("facexlib.recognition.arcface_arch", "Backbone", 50, drop_ratio=0.4, mode="ir_se"), ((1, 3, 112, 112),)  # fmt: skip
    yield "basicsr:VGGDiscriminator", made("basicsr.archs.discriminator_arch", "VGGStyleDiscriminator128", 3, 8), ((1, 3, 128, 128),)  # fmt: skip


def _vision() -> Iterator[Entry]:
    for name in _OCR:
        kind, _, bare = name.partition(".")
        shape = ((1, 3, 32, 128),) if kind == "recognition" else IMAGE
        options = {} if kind == "classification" else {"pretrained_backbone": False, "exportable": True}
        yield f"doctr:{bare}", made(f"doctr.models.{kind}", bare, pretrained=False, **options), shape
    for name in _GEFFNET:
        yield f"geffnet:{name}", made("geffnet", "create_model", name, pretrained=False), IMAGE
    for name, shape in {"HardNet": ((2, 1, 32, 32),), "HyNet": ((2, 1, 32, 32),), "SOSNet": ((2, 1, 32, 32),), "TFeat": ((2, 1, 32, 32),), "YuNet": ((1, 3, 64, 64),)}.items():  # fmt: skip
        if name == "YuNet":
            yield "kornia:YuNet", made("kornia.contrib.face_detection", "YuNet", "test", False), shape
        else:
            yield f"kornia:{name}", made("kornia.feature", name, False), shape
    for name in ("resnet-9", "resnet-18", "resnet-50"):
        yield f"lightly:{name}", made("lightly.models", "ResNetGenerator", name), ((1, 3, 32, 32),)
    for name in "BarlowTwinsProjectionHead BYOLProjectionHead SimSiamPredictionHead SimCLRProjectionHead SwaVProjectionHead VICRegProjectionHead".split():  # fmt: skip
        yield f"lightly:{name}", functools.partial(_head, name), ((4, 32),)
    yield "torchxrayvision:DenseNet", made("torchxrayvision.models", "DenseNet", num_classes=5, in_channels=1), ((1, 1, 64, 64),)  # fmt: skip
    for name in ("FCN", "FarSeg", "FCSiamConc", "FCSiamDiff", "ChangeStarFarSeg"):
        yield f"torchgeo:{name}", functools.partial(_torchgeo, name), ((1, 2, 3, 64, 64),) if name.startswith(("FCS", "Change")) else IMAGE  # fmt: skip
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
    yield "vit_pytorch:LeViT", made("vit_pytorch.levit", "LeViT", image_size=64, num_classes=5, stages=3, dim=(32, 48, 64), depth=2, heads=(2, 3, 4), mlp_mult=2), IMAGE  # fmt: skip
    yield "vit_pytorch:MobileViT", made("vit_pytorch.mobile_vit", "MobileViT", image_size=(64, 64), dims=[16, 24, 32], channels=[8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64], num_classes=5), IMAGE  # fmt: skip
    yield "vit_pytorch:MaxViT", made("vit_pytorch.max_vit", "MaxViT", num_classes=5, dim=16, dim_head=8, depth=(1, 1), window_size=4), IMAGE  # fmt: skip


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


# -- mmpretrain ---------------------------------------------------------------------------------------------

_MM: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "ResNet": ((18,), {}),
    "ResNetV1c": ((50,), {}),
    "ResNetV1d": ((50,), {}),
    "ResNet_CIFAR": ((18,), {}),
    "ResNeXt": ((50,), {}),
    "SEResNet": ((50,), {}),
    "SEResNeXt": ((50,), {}),
    "ResNeSt": ((50,), {}),
    "Res2Net": ((50,), {}),
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
    "XCiT": ((), {"img_size": 64, "patch_size": 16, "embed_dims": 32, "depth": 2, "num_heads": 2, "layer_scale_init_value": 1.0}),
    "RepMLPNet": (("base",), {"img_size": 64, "patch_size": 4, "out_indices": (3,)}),
    "TinyViT": (("5m",), {"img_size": (64, 64)}),
}  # fmt: skip


def _mmpretrain() -> Iterator[Entry]:
    for name, (words, options) in _MM.items():
        shape = ((1, 3, 128, 128),) if name == "InceptionV3" else IMAGE
        yield f"mmpretrain:{name}", functools.partial(_backbone, name, words, options), shape


def _backbone(name: str, words: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Without the models of images and text, which need an older transformers."""
    sys.modules.setdefault("mmpretrain.models.multimodal", types.ModuleType("mmpretrain.models.multimodal"))
    return getattr(importlib.import_module("mmpretrain.models.backbones"), name)(*words, **options)


# -- speech, signals, time series ---------------------------------------------------------------------------


def _speech() -> Iterator[Entry]:
    brain = "speechbrain.lobes.models"
    mels = ((2, 40, 20),)
    yield "speechbrain:Xvector", made(f"{brain}.Xvector", "Xvector", in_channels=20, lin_neurons=16), mels
    yield "speechbrain:ECAPA_TDNN", made(f"{brain}.ECAPA_TDNN", "ECAPA_TDNN", 20, lin_neurons=16, channels=[32] * 4 + [96], attention_channels=16), mels  # fmt: skip
    yield (
        "speechbrain:ResNet",
        made(f"{brain}.ResNet", "ResNet", input_size=20, channels=[8] * 4, lin_neurons=16),
        mels,
    )
    yield "asteroid:DCUNet", made("asteroid.models", "DCUNet", "mini", fix_length_mode="pad"), ((1, 1600),)
    yield "speechbrain:CRDNN", made(f"{brain}.CRDNN", "CRDNN", input_shape=[2, 40, 20]), mels
    yield "speechbrain:ContextNet", made(f"{brain}.ContextNet", "ContextNet", input_shape=[2, 40, 20]), mels
    yield "torchaudio:Conformer", made("torchaudio.models", "Conformer", 16, 2, 32, 2, 7), ((2, 20, 16), lambda: _lengths(20, 2))  # fmt: skip
    yield "torchaudio:WaveRNN", made("torchaudio.models", "WaveRNN", upsample_scales=[2, 2, 2], n_classes=8, hop_length=8, n_res_block=2, n_rnn=16, n_fc=16, n_freq=16, n_hidden=16, n_output=16), ((1, 1, 48), (1, 1, 16, 10))  # fmt: skip
    yield "torchaudio:Postnet", made("torchaudio.models.tacotron2", "_Postnet", 16, 32, 5, 3), ((2, 16, 20),)


def _lengths(length: int, number: int) -> Any:
    import torch

    return torch.full((number,), length)


_BRAIN = """EEGNet ShallowFBCSPNet Deep4Net EEGInceptionERP EEGInceptionMI EEGITNet ATCNet EEGConformer TIDNet
BDTCN EEGTCNet EEGNeX EEGSimpleConv TSception SCCNet DeepSleepNet AttentionBaseNet CTNet FBCNet
FBMSNet FBLightConvNet IFNet MSVTNet SPARCNet SincShallowNet ContraWR USleep SleepStagerChambon2018
MEDFormer PBT TCFormer SSTDPN""".split()
_TSAI = """InceptionTime ResNet FCN XceptionTime OmniScaleCNN TCN ResCNN mWDN XCM RNN_FCN TST XResNet1d
TransformerModel ConvTranPlus""".split()
_TSAI_NAMES = {"RNN_FCN": "LSTM_FCN", "XResNet1d": "xresnet1d18"}


def _signals() -> Iterator[Entry]:
    for name in _BRAIN:
        yield f"braindecode:{name}", functools.partial(_brain, name), _EEG
    for name in _TSAI:
        bare = _TSAI_NAMES.get(name, name)
        yield f"tsai:{bare}", functools.partial(_tsai, name, bare), _TIMES


def _brain(name: str) -> Any:
    kind = getattr(importlib.import_module("braindecode.models"), name)
    return kind(n_chans=8, n_outputs=2, n_times=400, sfreq=100)


def _tsai(module: str, name: str) -> Any:
    kind = getattr(importlib.import_module(f"tsai.models.{module}"), name)
    needs = inspect.signature(kind).parameters
    return kind(3, 2, seq_len=64) if "seq_len" in needs else kind(3, 2)


# -- graphs, volumes, tables --------------------------------------------------------------------------------


def _graphs() -> Iterator[Entry]:
    shapes = {"x": (12, 8), "edge_index": ("n<12", 2, 40)}
    for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN", "PNA"):
        yield f"torch_geometric:{name}", functools.partial(_graph_net, name), shapes
    yield (
        "torch_geometric:MLP",
        made("torch_geometric.nn", "MLP", [8, 16, 4], norm="batch_norm"),
        {"x": (12, 8)},
    )
    yield "torch_geometric:GIN-layer", _gin, shapes
    yield "torch_geometric:CGConv", made("torch_geometric.nn", "CGConv", 8, batch_norm=True), shapes


def _graph_net(name: str) -> Any:
    import torch

    options: dict[str, Any] = {"norm": "batch_norm"}
    if name == "PNA":
        options |= {"aggregators": ["mean", "max", "std"], "scalers": ["identity"], "deg": torch.arange(5)}
    return getattr(importlib.import_module("torch_geometric.nn"), name)(8, 16, 3, 4, **options)


def _gin() -> Any:
    from torch import nn

    library = importlib.import_module("torch_geometric.nn")
    inner = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    return library.GINConv(inner)


def _volumes() -> Iterator[Entry]:
    volume = ((1, 1, 16, 16, 16),)
    colour = ((1, 3, 32, 32, 32),)
    yield "unet:UNet3D", made("unet", "UNet3D", normalization="batch", num_encoding_blocks=2, out_channels_first_layer=4, padding=True), volume  # fmt: skip
    yield "unet:UNet2D", made("unet", "UNet2D", normalization="batch", num_encoding_blocks=2, out_channels_first_layer=4, padding=True), ((1, 1, 32, 32),)  # fmt: skip
    for name in ("resnet18", "mobilenetv3_small_100", "efficientnet_b0"):
        yield f"timm_3d:{name}", made("timm_3d", "create_model", name, pretrained=False), colour
    for decoder in ("Unet", "FPN", "Linknet"):
        yield f"smp_3d:{decoder}", made("segmentation_models_pytorch_3d", decoder, "resnet18", encoder_weights=None), colour  # fmt: skip
    clip = ((1, 3, 4, 64, 64),)
    for name, options in {
        "resnet.create_resnet": {"model_depth": 50, "model_num_class": 5, "head_pool_kernel_size": (4, 2, 2)},
        "x3d.create_x3d": {"input_clip_length": 4, "input_crop_size": 64, "model_num_class": 5},
        "csn.create_csn": {"model_num_class": 5, "head_pool_kernel_size": (1, 2, 2)},
        "r2plus1d.create_r2plus1d": {"model_num_class": 5, "head_pool_kernel_size": (1, 2, 2)},
    }.items():
        module, _, function = name.partition(".")
        shape = ((1, 3, 8, 64, 64),) if module == "csn" else clip
        yield f"pytorchvideo:{module}", made(f"pytorchvideo.models.{module}", function, **options), shape


def _tables() -> Iterator[Entry]:
    yield (
        "pytorch_tabnet:TabNet",
        made("pytorch_tabnet.tab_network", "TabNetNoEmbeddings", 8, 3, n_d=4, n_a=4),
        ((4, 8),),
    )
    yield "rtdl:ResNet", made("rtdl", "ResNet.make_baseline", d_in=8, n_blocks=2, d_main=16, d_hidden=16, dropout_first=0.0, dropout_second=0.0, d_out=2), ((4, 8),)  # fmt: skip
