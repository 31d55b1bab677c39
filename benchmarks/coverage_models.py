"""The models of the coverage run, by list, with how each is built and the inputs it gets.

- ``families``: every module of ``timm.models`` that registers models, each with its smallest real member (by
  parameters; timm's ``test_*`` models are not real ones).
- ``timm``: widely used models, in sizes that a CPU can run in float64.
- ``torchvision``: the classification models up to ``LARGEST`` parameters, and three segmentation models.
- ``transformers``: those of ``transformer_models.py``.

All have random weights; nothing is downloaded. Images are small (see ``SIZES``), because float64 convolutions are slow
and the structure of a network does not depend on the image size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

try:
    from transformer_models import TRANSFORMERS
except ModuleNotFoundError as missing:
    if missing.name != "transformer_models":
        raise
    TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {}

Made = tuple[nn.Module, Any, int | None]  # the model, its batch, and the image size if the inputs are images

SAMPLES = 2
# Image sizes in pixels, tried in this order before the model's own size. With the usual stride of 32, a size of 96 leaves
# three positions per side, so that border and centre positions differ. 112 is a multiple of the patch sizes 14 and 16 and
# of the window size 7.
SIZES = (96, 112, 128)
LARGEST = 90_000_000  # parameters; this includes the base sizes of vision transformers
LARGER = ("vgg11", "vgg11_bn")  # above that limit, but the smallest members of their family

FAMILIES = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_035",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p16_224",
}

LEFT_OUT: dict[str, str] = {}  # family -> the reason why it has no model in the table above

USED = tuple(  # one text, because two hundred quoted names are hard to read
    """
    resnet18 resnet34 resnet50 resnet50d resnet101 resnet26d resnetrs50 resnetaa50 resnetblur50 resnext50_32x4d
    seresnet50 seresnext50_32x4d ecaresnet50t wide_resnet50_2 resnetv2_50 resnetv2_50x1_bit resnet50_gn resnet50_clip
    res2net50_26w_4s resnest50d skresnet34 seresnext26t_32x4d
    regnetx_008 regnety_004 regnety_016 regnety_032 regnetz_005 regnetz_c16 repvgg_a0 repvgg_b0 mobileone_s0 gernet_s
    densenet169 vgg16_bn dla34 dpn68 hrnet_w18 cspresnet50 cspdarknet53 darknet53 vovnet39a ese_vovnet39b xception65
    selecsls60b rexnet_150 hgnet_tiny hgnetv2_b2 nfnet_l0 dm_nfnet_f0 eca_nfnet_l0 nf_resnet50
    eca_botnext26ts_256 botnet26t_256 lambda_resnet26t sehalonet33ts
    efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_lite0 efficientnet_es
    efficientnetv2_rw_t efficientnetv2_s tf_efficientnet_b0 tf_efficientnetv2_b0 tf_efficientnetv2_s tinynet_a
    mixnet_s mnasnet_100 semnasnet_100 spnasnet_100 fbnetc_100 fbnetv3_b hardcorenas_a lcnet_100
    mobilenetv1_100 mobilenetv2_100 mobilenetv2_050 mobilenet_edgetpu_v2_s mobilenetv3_small_100 mobilenetv3_large_100
    tf_mobilenetv3_large_100 mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_hybrid_medium
    ghostnet_100 ghostnetv2_100 ghostnetv3_100 repghostnet_100 fasternet_t2 starnet_s1 starnet_s4 repvit_m1_1 lcnetv2_base
    convnext_atto convnext_femto convnext_pico convnext_nano convnext_tiny convnext_small convnextv2_atto
    convnextv2_nano convnextv2_tiny inception_next_tiny mambaout_tiny rdnet_tiny focalnet_small_srf nextvit_small
    edgenext_small edgenext_base fastvit_t12 fastvit_sa12 fastvit_mci0 mobilevit_s mobilevit_xs mobilevitv2_050
    mobilevitv2_100 efficientformer_l3 efficientformerv2_s2 swiftformer_s efficientvit_b1 efficientvit_l1
    efficientvit_m4 shvit_s2 iformer_s
    poolformer_s12 poolformerv2_s24 caformer_s18 convformer_s18 convmixer_1024_20_ks9_p14
    vit_dwee_patch16_reg1_gap_256 vit_small_patch16_224 vit_small_patch32_224 vit_base_patch32_224 vit_base_patch16_224
    vit_base_patch16_clip_224 vit_base_patch32_clip_224 vit_base_patch16_siglip_224 vit_base_patch16_siglip_gap_224
    vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_base_patch14_dinov2 vit_small_patch16_dinov3
    vit_small_plus_patch16_dinov3 vit_medium_patch16_reg4_gap_256 vit_small_r26_s32_224 vit_relpos_small_patch16_224
    vit_pe_core_tiny_patch16_384 vit_small_patch16_rope_mixed_224 flexivit_small
    deit_small_patch16_224 deit_base_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
    deit3_medium_patch16_224 beitv2_base_patch16_224 eva02_tiny_patch14_224 eva02_small_patch14_224
    eva02_base_patch16_clip_224 cait_xxs36_224 cait_s24_224 xcit_tiny_12_p16_224 xcit_small_12_p16_224
    swin_small_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window16_256 swinv2_small_window8_256
    swinv2_cr_tiny_ns_224 coatnet_nano_rw_224 coatnet_0_rw_224 coatnet_rmlp_nano_rw_224 maxvit_tiny_tf_224
    maxvit_nano_rw_256 maxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 mixer_s32_224 mixer_s16_224 mixer_b16_224
    gmlp_s16_224 gmixer_12_224 resmlp_12_224 resmlp_24_224 tnt_s_patch16_224 pvt_v2_b1 pvt_v2_b2 pvt_v2_b2_li levit_128
    levit_256 levit_conv_128s visformer_small vitamin_small_224 crossvit_small_240 crossvit_9_dagger_240 davit_small
    gcvit_xtiny hiera_small_224 hiera_small_abswin_256 pit_xs_224 pit_s_distilled_224 sequencer2d_m tiny_vit_11m_224
    twins_pcpvt_small twins_svt_base coat_lite_tiny coat_lite_mini convit_small mvitv2_small mvitv2_small_cls nest_small
    volo_d1_224 naflexvit_base_patch16_gap samvit_base_patch16_224
    """.split()  # noqa: SIM905
)

SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")

LISTS = ("families", "timm", "torchvision", "transformers")


@dataclass(frozen=True)
class Subject:
    """One model of the run.

    Attributes:
        library: ``timm``, ``torchvision`` or ``transformers``.
        name: the model's name in it.
        family: the module that defines it.
        onnx: whether it is also exported to ONNX. Only one model of each family is, because the export takes longer than
            everything else.
    """

    library: str
    name: str
    family: str
    onnx: bool

    @property
    def key(self) -> str:
        """The name of the model in the results."""
        return f"{self.library}/{self.name}"

    def make(self) -> Made:
        """Return the model with random weights and a batch for it."""
        return {"timm": _timm, "torchvision": _torchvision, "transformers": _transformer}[self.library](self.name)


def subjects(listed: str) -> Iterator[Subject]:
    """Yield the models of one list."""
    match listed:
        case "families":
            check_families()
            yield from (Subject("timm", name, family, True) for family, name in FAMILIES.items())
        case "timm":
            families = {name: _timm_module(name) for name in USED}
            yield from (Subject("timm", name, family, FAMILIES[family] == name) for name, family in families.items())
        case "torchvision":
            left_out = left_out_torchvision()
            names = torchvision.models.list_models(module=torchvision.models)
            seen: set[str] = set()
            for name in [*(name for name in names if name not in left_out), *SEGMENTATION]:
                module = torchvision.models.get_model_builder(name).__module__
                family = module.removeprefix("torchvision.models.")
                yield Subject("torchvision", name, family, family not in seen)
                seen.add(family)
        case "transformers":
            for name in TRANSFORMERS:
                yield Subject("transformers", name, name, True)


def check_families() -> None:
    """Raise unless every timm module that registers models has a model in the table or a reason for having none."""
    found, known = set(timm.list_modules()), {*FAMILIES, *LEFT_OUT}
    wrong = [name for family, name in FAMILIES.items() if name not in timm.list_models(module=family)]
    if found != known or wrong:
        raise AssertionError(
            f"FAMILIES does not fit timm {timm.__version__}: missing {sorted(found - known)}, unknown "
            f"{sorted(known - found)}, of another family {wrong}"
        )


def left_out_torchvision() -> dict[str, int]:
    """Return the torchvision classification models that are too large, with their numbers of parameters."""
    sizes = {
        name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        for name in torchvision.models.list_models(module=torchvision.models)
    }
    return {name: size for name, size in sizes.items() if size > LARGEST and name not in LARGER}


def _timm_module(name: str) -> str:
    return next(module for module in timm.list_modules() if timm.models.is_model_in_modules(name, [module]))


def _timm(name: str) -> Made:
    with torch.device("meta"):
        wanted = timm.create_model(name).pretrained_cfg
    own: int = wanted["input_size"][-1]

    def build(size: int) -> nn.Module:
        fixed = wanted.get("fixed_input_size", False) and size != own
        return timm.create_model(name, **({"img_size": size} if fixed else {}))

    return _smallest(build, own)


def _torchvision(name: str) -> Made:
    def build(size: int) -> nn.Module:
        options: dict[str, Any] = {}
        if name in SEGMENTATION:
            options["weights_backbone"] = None
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False  # initialisation is slow, and the weights are replaced anyway
        if name.startswith("vit_"):
            options["image_size"] = size
        return torchvision.models.get_model(name, **options)

    return _smallest(build, 224)


def _smallest(build: Callable[[int], nn.Module], own: int) -> Made:
    """Return the model and images of the first size for which it can be built and run."""
    for size in (*(size for size in SIZES if size < own), own):
        images = torch.randn(SAMPLES, 3, size, size)
        try:
            model = build(size).eval()
            with torch.no_grad():
                model(images)
        except Exception:  # each library raises its own exceptions for a size that does not fit
            if size == own:
                raise
            continue
        return model, images, size
    raise AssertionError("the model's own size is always tried")


def _transformer(name: str) -> Made:
    model, batch = TRANSFORMERS[name]()
    return model, batch, None
