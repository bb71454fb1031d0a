"""The models that bntool and its peers are compared on, and the few that no registry has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.sweeps.sweeping import Results

MODELS = """
torchvision:vgg11_bn torchvision:resnet18 torchvision:resnet50 torchvision:resnext50_32x4d
torchvision:wide_resnet50_2 torchvision:densenet121 torchvision:googlenet torchvision:inception_v3
torchvision:mobilenet_v2 torchvision:mobilenet_v3_small torchvision:shufflenet_v2_x1_0
torchvision:efficientnet_b0 torchvision:mnasnet1_0 torchvision:regnet_y_400mf torchvision:fcn_resnet50
torchvision:deeplabv3_mobilenet_v3_large torchvision:lraspp_mobilenet_v3_large torchvision:r3d_18
torchvision:r2plus1d_18 tools.sweeps.peer_models:frozen_resnet50 tools.sweeps.peer_models:frozen_mobilenet_fpn
tools.sweeps.peer_models:retinanet_backbone tools.sweeps.peer_models:ssdlite_backbone
timm:botnet26t_256 timm:convmixer_768_32 timm:cspdarknet53 timm:dla34 timm:dpn68
timm:efficientformer_l1 timm:efficientvit_b0 timm:efficientvit_m0 timm:ese_vovnet19b_dw timm:fastvit_t8
timm:ghostnet_100 timm:ghostnetv3_100 timm:hardcorenas_a timm:hgnet_tiny timm:hrnet_w18_small
timm:inception_next_atto timm:levit_128s timm:lcnet_050 timm:mixnet_s timm:mobilenetv4_conv_small
timm:mobileone_s0 timm:mobilevit_s timm:mobilevitv2_050 timm:regnetz_b16 timm:repghostnet_050
timm:repvgg_a0 timm:repvit_m0_9 timm:res2net50_26w_4s timm:resnest14d timm:resnetv2_50 timm:rexnet_100
timm:selecsls42b timm:shvit_s1 timm:skresnet18 timm:starnet_s1 timm:swiftformer_xs timm:tinynet_e
timm:tiny_vit_5m_224 timm:tresnet_m timm:vovnet39a timm:xception41 timm:xcit_nano_12_p16_224
timm:sebotnet33ts_256 timm:lambda_resnet26t timm:halonet26t timm:mobilenetv4_hybrid_medium timm:xception41p
timm:coatnet_0_rw_224 timm:coatnet_nano_cc_224 timm:coatnet_rmlp_0_rw_224 timm:regnetv_040
timm:tf_efficientnet_cc_b0_8e timm:dpn48b timm:resnetv2_18d
""".split()
"""A sample of all kinds. What the sweep adds: see `kept_in`."""


def kept_in(sweep: Path) -> list[str]:
    """The models of the sweep on which bntool keeps a BatchNorm: a peer could be ahead there alone."""
    return [name for name, row in Results(sweep).rows.items() if row.get("kept")]


def frozen_resnet50() -> Any:
    """A ResNet-50 as detectors use it: FrozenBatchNorm2d everywhere."""
    from torchvision.models import resnet50
    from torchvision.ops import FrozenBatchNorm2d

    return resnet50(norm_layer=FrozenBatchNorm2d)


def frozen_mobilenet_fpn() -> Any:
    """The backbone of torchvision's Faster R-CNN on MobileNetV3."""
    from torchvision.models.detection.backbone_utils import mobilenet_backbone
    from torchvision.ops import FrozenBatchNorm2d

    return mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=FrozenBatchNorm2d
    )


def retinanet_backbone() -> Any:
    """The backbone of torchvision's RetinaNet."""
    from torchvision.models.detection import retinanet_resnet50_fpn

    return retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone


def ssdlite_backbone() -> Any:
    """The backbone of torchvision's SSDlite, with its extra layers."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone
