"""Models of transformers, from configurations that make small ones."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

from tools.sweeps.libraries.making import Entry, Shapes

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
    "EfficientNetModel": (
        "EfficientNetConfig",
        {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        _PIXELS,
    ),
    "LevitModel": ("LevitConfig", {"image_size": 64}, _PIXELS),
    "MobileViTModel": ("MobileViTConfig", {"image_size": 64}, _PIXELS),
    "MobileViTV2Model": ("MobileViTV2Config", {"image_size": 64, "width_multiplier": 0.5}, _PIXELS),
    "MobileViTForSemanticSegmentation": (
        "MobileViTConfig",
        {"image_size": 64},
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 32], "decoder_hidden_size": 16},
        _PIXELS,
    ),
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
    "UperNetForSemanticSegmentation": (
        "UperNetConfig",
        {"hidden_size": 16, "auxiliary_channels": 8},
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "BeitForSemanticSegmentation": (
        "BeitConfig",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "intermediate_size": 32,
            "image_size": 64,
            "out_indices": [1, 2, 3, 4],
        },
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "DPTForDepthEstimation": (
        "DPTConfig",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "intermediate_size": 32,
            "image_size": 64,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 8,
            "use_batch_norm_in_fusion_residual": True,
            "is_hybrid": False,
        },
        _PIXELS,
    ),
    "SuperPointForKeypointDetection": ("SuperPointConfig", {}, _PIXELS),
    "EfficientLoFTRModel": ("EfficientLoFTRConfig", {}, {"pixel_values": (1, 2, 3, 64, 64)}),
    "PatchTSTModel": (
        "PatchTSTConfig",
        {
            "num_input_channels": 3,
            "context_length": 64,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 16,
            "num_attention_heads": 2,
            "ffn_dim": 16,
            "num_hidden_layers": 2,
        },
        {"past_values": (2, 64, 3)},
    ),
    "PatchTSMixerModel": (
        "PatchTSMixerConfig",
        {
            "num_input_channels": 3,
            "context_length": 64,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 16,
            "num_layers": 2,
            "norm_mlp": "BatchNorm",
        },
        {"past_values": (2, 64, 3)},
    ),
    "Wav2Vec2ConformerModel": (
        "Wav2Vec2ConformerConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
        },
        {"input_values": (1, 4000)},
    ),
    "Wav2Vec2ConformerForCTC": (
        "Wav2Vec2ConformerConfig",
        {
            "hidden_size": 32,
            "vocab_size": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
        },
        {"input_values": (1, 4000)},
    ),
    "ParakeetEncoder": (
        "ParakeetEncoderConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "subsampling_conv_channels": 8,
            "num_mel_bins": 16,
        },
        {"input_features": (1, 64, 16)},
    ),
    "FastSpeech2ConformerModel": (
        "FastSpeech2ConformerConfig",
        {
            "hidden_size": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_num_attention_heads": 2,
            "decoder_num_attention_heads": 2,
            "encoder_linear_units": 32,
            "decoder_linear_units": 32,
            "speech_decoder_postnet_units": 16,
            "vocab_size": 40,
        },
        {"input_ids": ("n<40", 1, 9)},
    ),
    "SuperGlueForKeypointMatching": ("SuperGlueConfig", {}, {"pixel_values": (1, 2, 3, 64, 64)}),
    "Data2VecVisionForSemanticSegmentation": (
        "Data2VecVisionConfig",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "intermediate_size": 32,
            "image_size": 64,
            "out_indices": [1, 2, 3, 4],
        },
        {"pixel_values": (2, 3, 64, 64)},
    ),
}


def _transformers() -> Iterator[Entry]:
    for name, (config, options, shapes) in _HF.items():
        yield f"transformers:{name}", functools.partial(_of_config, name, config, options), shapes


def _of_config(name: str, config: str, options: dict[str, Any]) -> Any:
    library = importlib.import_module("transformers")
    extra: dict[str, Any] = {}
    if config in (
        "DetrConfig",
        "ConditionalDetrConfig",
        "DabDetrConfig",
        "DeformableDetrConfig",
        "TableTransformerConfig",
    ):
        outs = ["stage2", "stage3", "stage4"] if config.startswith("Deformable") else ["stage4"]
        extra["backbone_config"] = library.ResNetConfig(**_SMALL_RESNET, out_features=outs)
    if config in ("RTDetrConfig", "RTDetrV2Config"):
        extra["backbone_config"] = library.RTDetrResNetConfig(
            **_SMALL_RESNET, out_features=["stage2", "stage3", "stage4"]
        )
    if config == "UperNetConfig":
        extra["backbone_config"] = library.ResNetConfig(
            **_SMALL_RESNET, out_features=["stage1", "stage2", "stage3", "stage4"]
        )
        extra["auxiliary_in_channels"] = 16
    if config == "DFineConfig":
        options = {k: v for k, v in options.items() if k != "encoder_in_channels"}
    return getattr(library, name)(getattr(library, config)(**options, **extra))


TABLES = (_transformers,)
