"""Models of other libraries, as they are: k-wide derivatives equal torch.func's, forward gradients equal simulated ones."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT32_BOUND, FLOAT64_BOUND, assert_close64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import frog_cuda as frog
from frog_cuda.layers import default_layers


def missing(library: str) -> str:
    """Why tests of ``library`` cannot run here; empty where they can."""
    try:
        __import__(library)
    except Exception as error:  # torchvision raises RuntimeError beside a torch of another build
        return f"{library} does not import here ({type(error).__name__}: {str(error).splitlines()[0]})"
    return ""


NO_TRANSFORMERS, NO_TORCHVISION, NO_TIMM = missing("transformers"), missing("torchvision"), missing("timm")
K = 2
ROWS, LENGTH, WIDTH, TOKENS = 3, 7, 16, 31


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, TOKENS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def padding() -> Tensor:
    """Sequences of different lengths."""
    return (torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [1]])).long()


class Case:
    """A model in eval mode with its inputs.

    Arguments:
        discrete, continuous: keyword arguments of the model; the latter with embeddings in place of tokens.
        layers: what ``ForwardGradient(layers=...)`` takes for one layer a block.
        innermost: likewise for one layer a module; None is the default.
    """

    def __init__(
        self, model: nn.Module, discrete: dict[str, Any], continuous: dict[str, Any], layers: Any, innermost: Any = None
    ) -> None:
        self.model, self.layers, self.innermost = model.double().eval(), layers, innermost
        self.discrete, self.continuous = discrete, continuous
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():  # biases and embeddings that start as zeros would hide their part
            for p in self.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
            for name, b in self.model.named_buffers():
                if name.endswith("running_var"):
                    b.add_(torch.rand(b.shape, dtype=b.dtype, generator=generator))
                elif name.endswith("running_mean"):
                    b.add_(0.1 * torch.randn(b.shape, dtype=b.dtype, generator=generator))


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def per_sample(output: Any, target: Tensor) -> Tensor:
    """(B,): cross-entropy of classes (B, C) or of a token after each token (B, T, C)."""
    scores = logits(output)
    if scores.dim() == 2:
        return F.cross_entropy(scores, target[:, 0] % scores.shape[1], reduction="none")
    return F.cross_entropy(scores.transpose(1, 2), target, reduction="none").mean(1)


# ---- transformers


def blocks(model: nn.Module, first: list[str], kinds: tuple[str, ...], last: list[str]) -> list[list[str]]:
    """Each module of the class names ``kinds`` a layer, what is before and after merged into the first and last."""
    groups = [[name] for name, module in model.named_modules() if type(module).__name__ in kinds]
    groups[0] = first + groups[0]
    groups[-1] += last
    return groups


def gpt2(attention: str) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    layers = blocks(model, ["transformer.wte", "transformer.wpe"], ("GPT2Block",), ["transformer.ln_f", "lm_head"])
    common = dict(attention_mask=padding(), use_cache=False)
    return Case(model, dict(input_ids=tokens()) | common, dict(inputs_embeds=draw(ROWS, LENGTH, WIDTH)) | common, layers)


def bert(attention: str) -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=LENGTH,
        num_labels=4,
        attn_implementation=attention,
    )
    model = BertForSequenceClassification(config)
    layers = blocks(model, ["bert.embeddings"], ("BertLayer",), ["bert.pooler", "classifier"])
    common = dict(attention_mask=padding(), token_type_ids=tokens(1) % 2)
    return Case(model, dict(input_ids=tokens()) | common, dict(inputs_embeds=draw(ROWS, LENGTH, WIDTH)) | common, layers)


def llama(attention: str) -> Case:
    """Rotary positions, grouped-query heads, RMS normalisation, gated MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    layers = blocks(model, ["model.embed_tokens"], ("LlamaDecoderLayer",), ["model.norm", "lm_head"])
    common = dict(attention_mask=padding(), use_cache=False)
    return Case(model, dict(input_ids=tokens()) | common, dict(inputs_embeds=draw(ROWS, LENGTH, WIDTH)) | common, layers)


def t5(attention: str) -> Case:
    """Encoder and decoder with cross-attention and learned relative positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=TOKENS,
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        attn_implementation=attention,
    )
    model = T5ForConditionalGeneration(config)
    layers = blocks(model, ["shared"], ("T5Block",), ["decoder.final_layer_norm", "lm_head"])
    encoder = [group for group in layers if any("encoder" in name for name in group)]
    encoder[-1].append("encoder.final_layer_norm")
    common = dict(attention_mask=padding(), use_cache=False)
    return Case(
        model,
        dict(input_ids=tokens(), decoder_input_ids=tokens(1)[:, :5]) | common,
        dict(inputs_embeds=draw(ROWS, LENGTH, WIDTH), decoder_inputs_embeds=draw(ROWS, 5, WIDTH, seed=1)) | common,
        layers,
    )


def vit(attention: str) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=4,
        attn_implementation=attention,
    )
    model = ViTForImageClassification(config)
    layers = blocks(model, ["vit.embeddings"], ("ViTLayer",), ["vit.layernorm", "classifier"])
    images = dict(pixel_values=draw(ROWS, 3, 8, 8))
    # The class token and the positions belong to no innermost module
    outside = [name for (name, _), *_ in default_layers(model) if not name.startswith("vit.embeddings.")]
    return Case(model, images, images, layers, ["vit.embeddings", *outside])


TRANSFORMERS: dict[str, Callable[[str], Case]] = dict(gpt2=gpt2, bert=bert, llama=llama, t5=t5, vit=vit)


# ---- torchvision, whose models take one tensor


def vision(model: nn.Module, layers: list[list[str]], innermost: Any = None, size: int = 32) -> Case:
    images = dict(x=draw(ROWS, 3, size, size))
    return Case(model, images, images, layers, innermost)


def resnet18() -> Case:
    from torchvision.models import resnet18

    return vision(resnet18(num_classes=4), [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"], ["fc"]])


def vision_transformer() -> Case:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=WIDTH, mlp_dim=24, num_classes=4
    )
    before = ["conv_proj", "class_token", "encoder.pos_embedding"]  # two parameters that no inner module owns
    layers = blocks(model, before, ("EncoderBlock",), ["encoder.ln", "heads"])
    # So that they reach the loss through a layer's output, the first block stays whole
    first = "encoder.layers.encoder_layer_0"
    outside = [[name] for (name, _), *_ in default_layers(model) if not name.startswith(("conv_proj", first))]
    return vision(model, layers, [layers[0], *outside])


def mobilenet() -> Case:
    from torchvision.models import mobilenet_v3_small

    model = mobilenet_v3_small(num_classes=4)
    return vision(model, [*([f"features.{i}"] for i in range(len(model.features))), ["classifier"]])


def convnext() -> Case:
    from torchvision.models import convnext_tiny

    model = convnext_tiny(num_classes=4)
    # layer_scale belongs to a block itself
    innermost = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "CNBlock" or (name, module) in [g[0] for g in default_layers(model)]
    ]
    return vision(model, [*([f"features.{i}"] for i in range(len(model.features))), ["classifier"]], innermost)


def swin() -> Case:
    """Windowed attention with a table of relative positions, shifted by rolling."""
    from torchvision.models import swin_t

    model = swin_t(num_classes=4)
    # An attention block uses its table and the weights of its linear layers by itself
    innermost = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "ShiftedWindowAttention"
        or ((name, module) in [g[0] for g in default_layers(model)] and ".attn." not in name)
    ]
    layers = [*([f"features.{i}"] for i in range(len(model.features))), ["norm", "head"]]
    return vision(model, layers, innermost)


TORCHVISION: dict[str, Callable[[], Case]] = dict(
    resnet18=resnet18, vit=vision_transformer, mobilenet_v3_small=mobilenet, convnext_tiny=convnext, swin_t=swin
)


# ---- timm


def timm_vit() -> Case:
    """Registers, normalised queries and keys, layer scale: parameters that belong to blocks and to the model itself."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2, mlp_ratio=2, num_classes=4, reg_tokens=2,
        qk_norm=True, init_values=0.1,
    )  # fmt: skip
    before = ["patch_embed", "cls_token", "pos_embed", "reg_token"]
    return vision(model, blocks(model, before, ("Block",), ["norm", "head"]))


def timm_mixer() -> Case:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(img_size=32, patch_size=8, embed_dim=WIDTH, num_blocks=2, num_classes=4)
    return vision(model, blocks(model, ["stem"], ("MixerBlock",), ["norm", "head"]))


def staged(model: nn.Module, stages: str, before: list[str], after: list[str], size: int = 32) -> Case:
    """Each stage a layer."""
    names = [[f"{stages}.{i}"] for i in range(len(model.get_submodule(stages)))]  # type: ignore[arg-type]
    return vision(model, [before, *names, after], size=size)


def timm_mobilenetv4() -> Case:
    """Depthwise convolutions of several sizes, normalisation and activation as one module."""
    from timm import create_model

    model = create_model("mobilenetv4_conv_small_035", num_classes=4)
    # 64: at the end batch statistics of three samples of 1x1 would be ill-conditioned beyond the bound
    return staged(model, "blocks", ["conv_stem", "bn1"], ["conv_head", "norm_head", "classifier"], size=64)


def timm_convnextv2() -> Case:
    """Global response normalisation."""
    from timm.models.convnext import ConvNeXt

    model = ConvNeXt(num_classes=4, depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), use_grn=True, ls_init_value=None)
    return staged(model, "stages", ["stem"], ["head"])


def timm_resnetv2() -> Case:
    """Weights standardised in each call, group normalisation before the activation."""
    from timm.models.resnetv2 import ResNetV2

    model = ResNetV2(layers=(1, 1, 1, 1), channels=(128, 128, 128, 128), stem_chs=32, num_classes=4)
    return staged(model, "stages", ["stem"], ["norm", "head"])


TIMM: dict[str, Callable[[], Case]] = dict(
    vit=timm_vit, mixer=timm_mixer, mobilenetv4=timm_mobilenetv4, convnextv2=timm_convnextv2, resnetv2=timm_resnetv2
)


# ---- the checks


class Double:
    """The torch that a file of transformers sees, where softmax or normalisation in single precision is asked to be double."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def all_double(monkeypatch):
    """Makes a model compute in double throughout, so that it can be held to 1e-10; otherwise it stays as it is."""
    return lambda case: monkeypatch.setattr(sys.modules[type(case.model).__module__], "torch", Double())


def check_jvp(case: Case, monkeypatch: Any, *, parameters: bool, bound: float = FLOAT64_BOUND) -> None:
    """frog.jvp over all parameters, or over the continuous inputs, against one torch.func.jvp for each tangent."""
    model = case.model
    weights = {name: p.detach() for name, p in model.named_parameters()}
    inputs = case.discrete if parameters else case.continuous
    moved = weights if parameters else {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    tangents = {name: draw(K, *x.shape, seed=10 + i) for i, (name, x) in enumerate(moved.items())}

    def fn(moved: dict[str, Tensor]) -> Tensor:
        if parameters:
            return logits(functional_call(model, moved, (), inputs))
        return logits(model(**(inputs | moved)))

    value, derivatives = frog.jvp(fn, (moved,), (tangents,))
    # PyTorch's forward mode knows neither fused attention nor the encoder layer that torch.nn takes as one call in eval mode
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    for i in range(K):
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            expected, along = torch.func.jvp(fn, (moved,), ({n: t[i] for n, t in tangents.items()},))
        assert_close64(value, expected, bound)
        assert along.abs().max() > 0
        assert_close64(derivatives[i], along, bound)


def check_gradient(case: Case, **options: Any) -> None:
    """ForwardGradient against the simulated estimate, relative to the largest entry of the whole gradient."""
    target = tokens(3)
    if "decoder_input_ids" in case.discrete:
        target = target[:, :5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # parameters that belong to no layer
        fg = frog.ForwardGradient(case.model, per_sample, k=K, **options)
    simulated = frog.simulate(fg, case.discrete, target)
    assert_close64(fg(case.discrete, target), simulated.loss)
    assert_close64(fg.last.directional_derivatives, simulated.directional_derivatives)
    found = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    assert set(found) == set(simulated.gradients) == {name for name, _ in case.model.named_parameters()}
    largest = max(g.abs().max() for g in simulated.gradients.values())
    assert largest > 0
    for name, g in found.items():
        assert g.isfinite().all(), name
        assert (g - simulated.gradients[name]).abs().max() <= FLOAT64_BOUND * largest, name


@pytest.mark.skipif(bool(NO_TRANSFORMERS), reason=NO_TRANSFORMERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
class TestTransformers:
    @pytest.mark.parametrize("parameters", [True, False], ids=["parameters", "inputs"])
    def test_jvp(self, name, attention, parameters, all_double, monkeypatch):
        case = TRANSFORMERS[name](attention)
        all_double(case)
        check_jvp(case, monkeypatch, parameters=parameters)

    def test_jvp_of_the_code_as_it_is(self, name, attention, monkeypatch):
        """Whatever the dtype of the model, parts of these run in single precision."""
        check_jvp(TRANSFORMERS[name](attention), monkeypatch, parameters=True, bound=FLOAT32_BOUND)

    @pytest.mark.parametrize(
        "options", [dict(perturb="weight"), dict(), dict(shared_across_batch=False), dict(per_sample=False)], ids=str
    )
    def test_forward_gradient(self, name, attention, options, all_double):
        case = TRANSFORMERS[name](attention)
        all_double(case)
        if "perturb" not in options:
            options = options | dict(layers=case.layers)
        check_gradient(case, **options)

    @pytest.mark.parametrize("perturb", ["weight", "activity"])
    def test_forward_gradient_in_train_mode(self, name, attention, perturb, all_double):
        """The value, all tangents and the simulated estimate see one draw of every dropout mask."""
        case = TRANSFORMERS[name](attention)
        all_double(case)
        case.model.train()
        dropped = [m for m in case.model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        if name in ("gpt2", "bert", "t5"):
            assert dropped
        check_gradient(case, perturb=perturb, layers=case.layers)

    def test_no_call_is_left_to_the_fallback(self, name, attention):
        case = TRANSFORMERS[name](attention)
        coverage = frog.coverage(case.model, case.discrete)
        assert coverage.count("fused") > 0 and coverage.count("fallback") == coverage.count("unsupported") == 0
        attentions = sum(n for (_, call, _), n in coverage.rows.items() if call == "scaled_dot_product_attention")
        assert attentions == (0 if attention == "eager" else 6 if name == "t5" else 2)

    def test_forward_gradient_of_innermost_modules(self, name, attention, all_double):
        case = TRANSFORMERS[name](attention)
        all_double(case)
        # T5 embeds relative positions, (T, T, heads): not a row for each sample
        check_gradient(case, layers=case.innermost, per_sample=name != "t5")


class VisionModels:
    """What holds for models of images of every library, ``models`` by name."""

    models: dict[str, Callable[[], Case]]

    @pytest.mark.parametrize("parameters", [True, False], ids=["parameters", "inputs"])
    def test_jvp(self, name, parameters, monkeypatch):
        check_jvp(self.models[name](), monkeypatch, parameters=parameters)

    @pytest.mark.parametrize("options", [dict(perturb="weight"), dict(), dict(per_sample=False)], ids=str)
    def test_forward_gradient(self, name, options):
        case = self.models[name]()
        if "perturb" not in options:
            options = options | dict(layers=case.layers)
        check_gradient(case, **options)

    @pytest.mark.parametrize("perturb", ["weight", "activity"])
    def test_forward_gradient_in_train_mode(self, name, perturb):
        """Batch statistics, dropout and stochastic depth."""
        case = self.models[name]()
        case.model.train()
        check_gradient(case, perturb=perturb, layers=case.layers, per_sample=False)


@pytest.mark.skipif(bool(NO_TORCHVISION), reason=NO_TORCHVISION)
@pytest.mark.parametrize("name", TORCHVISION)
class TestTorchvision(VisionModels):
    models = TORCHVISION

    def test_forward_gradient_of_innermost_modules(self, name):
        case = TORCHVISION[name]()
        check_gradient(case, layers=case.innermost)


@pytest.mark.skipif(bool(NO_TIMM), reason=NO_TIMM)
@pytest.mark.parametrize("name", TIMM)
class TestTimm(VisionModels):
    models = TIMM

    def test_no_call_is_left_to_the_fallback(self, name):
        case = TIMM[name]()
        coverage = frog.coverage(case.model, case.discrete)
        assert coverage.count("fused") > 0 and coverage.count("fallback") == coverage.count("unsupported") == 0
