"""Speech, signals, graphs, volumes and tables."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from tools.sweeps.libraries.making import Entry, made

_TIMES = ((2, 3, 64),)
_EEG = ((1, 8, 400),)


def _speech() -> Iterator[Entry]:
    brain = "speechbrain.lobes.models"
    mels = ((2, 40, 20),)
    yield "speechbrain:Xvector", made(f"{brain}.Xvector", "Xvector", in_channels=20, lin_neurons=16), mels
    yield (
        "speechbrain:ECAPA_TDNN",
        made(
            f"{brain}.ECAPA_TDNN",
            "ECAPA_TDNN",
            20,
            lin_neurons=16,
            channels=[32] * 4 + [96],
            attention_channels=16,
        ),
        mels,
    )
    yield (
        "speechbrain:ResNet",
        made(f"{brain}.ResNet", "ResNet", input_size=20, channels=[8] * 4, lin_neurons=16),
        mels,
    )
    yield "asteroid:DCUNet", made("asteroid.models", "DCUNet", "mini", fix_length_mode="pad"), ((1, 1600),)
    yield "speechbrain:CRDNN", made(f"{brain}.CRDNN", "CRDNN", input_shape=[2, 40, 20]), mels
    yield "speechbrain:ContextNet", made(f"{brain}.ContextNet", "ContextNet", input_shape=[2, 40, 20]), mels
    yield (
        "torchaudio:Conformer",
        made("torchaudio.models", "Conformer", 16, 2, 32, 2, 7),
        ((2, 20, 16), lambda: _lengths(20, 2)),
    )
    yield (
        "torchaudio:WaveRNN",
        made(
            "torchaudio.models",
            "WaveRNN",
            upsample_scales=[2, 2, 2],
            n_classes=8,
            hop_length=8,
            n_res_block=2,
            n_rnn=16,
            n_fc=16,
            n_freq=16,
            n_hidden=16,
            n_output=16,
        ),
        ((1, 1, 48), (1, 1, 16, 10)),
    )
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
    yield (
        "unet:UNet3D",
        made(
            "unet",
            "UNet3D",
            normalization="batch",
            num_encoding_blocks=2,
            out_channels_first_layer=4,
            padding=True,
        ),
        volume,
    )
    yield (
        "unet:UNet2D",
        made(
            "unet",
            "UNet2D",
            normalization="batch",
            num_encoding_blocks=2,
            out_channels_first_layer=4,
            padding=True,
        ),
        ((1, 1, 32, 32),),
    )
    for name in ("resnet18", "efficientnet_b0"):
        yield f"timm_3d:{name}", made("timm_3d", "create_model", name, pretrained=False), colour
    for decoder in ("Unet", "FPN", "Linknet"):
        yield (
            f"smp_3d:{decoder}",
            made("segmentation_models_pytorch_3d", decoder, "resnet18", encoder_weights=None),
            colour,
        )
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
    yield (
        "rtdl:ResNet",
        made(
            "rtdl",
            "ResNet.make_baseline",
            d_in=8,
            n_blocks=2,
            d_main=16,
            d_hidden=16,
            dropout_first=0.0,
            dropout_second=0.0,
            d_out=2,
        ),
        ((4, 8),),
    )


TABLES = (_speech, _signals, _graphs, _volumes, _tables)
