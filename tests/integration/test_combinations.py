"""What lesa is combined with: each run has the bits of an oracle that skips no block, or of a fresh pipeline.

Pairs with a request as it is and after one, since several of these leave a trace at the end of each request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from pipelines import CASES_BY_NAME, Case
from test_dropin import assert_same, by_oracle, plan_for, stats_of
from torch import nn

import lesa

CASES = [CASES_BY_NAME[name] for name in ("flux_dev", "qwen_image", "wan", "sdxl")]
FLUX, QWEN, WAN, SDXL = CASES
# Wan's head reads a parameter of the denoiser itself.
FEW = [(FLUX, "hidden"), (FLUX, "output"), (QWEN, "output"), (WAN, "hidden"), (SDXL, "output")]
ON_FEW = pytest.mark.parametrize(("case", "site"), [pytest.param(*one, id=f"{one[0].name}-{one[1]}") for one in FEW])
ORDERS = [*((*one, "before") for one in FEW), (FLUX, "hidden", "after"), (SDXL, "output", "after")]
ON_FEW_ORDERS = pytest.mark.parametrize(
    ("case", "site", "order"), [pytest.param(*one, id=f"{one[0].name}-{one[1]}-{one[2]}") for one in ORDERS]
)


def check(case: Case, site: str, change: Callable[[Any], Any], order: str = "before", **request: Any) -> Any:
    """Two requests with lesa and `change`, made before or after `enable`, against the oracle; then disabled."""
    other = case.make()
    change(other)
    wanted, plain = by_oracle(case, plan_for(case, "reuse", site), other, **request), case.call(other, **request)
    pipe = case.make()
    if order == "before":
        change(pipe)
    lesa.enable(pipe, plan_for(case, "reuse", site))
    if order == "after":
        change(pipe)
    for requests in (1, 2):
        assert_same(case.call(pipe, **request), wanted)
        assert stats_of(pipe)[0] == requests and not stats_of(pipe)[3]
    lesa.disable(pipe)
    assert_same(case.call(pipe, **request), plain)
    return pipe


# Memory


def model_offload(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    pipe.enable_model_cpu_offload(device="cpu")


def groups(level: str, **more: Any) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        options = {"num_blocks_per_group": 1} if level == "block_level" else {}
        cpu = torch.device("cpu")
        apply_group_offloading(denoiser, onload_device=cpu, offload_device=cpu, offload_type=level, **options, **more)

    return change


def sequential(pipe: Any) -> None:
    """As `enable_sequential_cpu_offload` does to the denoiser: each layer's weights come for its call only."""
    accelerate = pytest.importorskip("accelerate")
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    accelerate.cpu_offload(denoiser, torch.device("cpu"))


def casting(pipe: Any) -> None:
    """Weights are kept in float8 and computed in float32."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@ON_FEW_ORDERS
def test_model_offload_goes_off_and_on_after_each_request(case: Case, site: str, order: str) -> None:
    pipe = check(case, site, model_offload, order)
    pipe.remove_all_hooks()
    assert not hasattr(case.denoiser(pipe), "_hf_hook")


@ON_FEW_ORDERS
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(case: Case, site: str, order: str, level: str) -> None:
    check(case, site, groups(level), order)


@ON_FEW
def test_sequential_offload(case: Case, site: str) -> None:
    check(case, site, sequential, "after" if site == "output" else "before")


@ON_FEW
def test_layerwise_casting(case: Case, site: str) -> None:
    check(case, site, casting)


# Weights


def lora(scale: float) -> Callable[[Any], None]:
    peft = pytest.importorskip("peft")

    @torch.no_grad()
    def change(pipe: Any) -> None:
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        name = f"by {scale}".replace(".", "_")
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
        denoiser.add_adapter(config, name)
        draw = torch.Generator().manual_seed(9)
        for key, parameter in denoiser.named_parameters():
            if "lora_" in key and name in key:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
                parameter.requires_grad_(False)
        denoiser.set_adapter(name)

    return change


@ON_FEW_ORDERS
def test_lora(case: Case, site: str, order: str) -> None:
    check(case, site, lora(0.3), order)


@ON_FEW
def test_lora_swapped_weighted_by_step_and_unloaded(case: Case, site: str) -> None:
    plan = plan_for(case, "reuse", site)
    pipe, other = case.make(), case.make()
    lesa.enable(pipe, plan)

    def by_step(running: Any, step: int, _: Any, kwargs: dict) -> dict:
        denoiser = case.denoiser(running)
        denoiser.set_adapters(denoiser.active_adapters(), [1.0 - step / 10])
        return kwargs

    for change in (lora(0.3), lora(0.2)):  # the second in the place of the first
        for one in (pipe, other):
            change(one)
        assert_same(case.call(pipe), by_oracle(case, plan, other))
    weighted = {"callback_on_step_end": by_step}
    for one in (pipe, other):
        case.denoiser(one).set_adapters("by 0_2", [1.0])
    assert_same(case.call(pipe, **weighted), by_oracle(case, plan, other, **weighted))
    for one in (pipe, other):
        case.denoiser(one).unload_lora()
    assert_same(case.call(pipe), by_oracle(case, plan))


@pytest.mark.parametrize(
    ("case", "site", "kind"),
    [(*one, "int8") for one in FEW] + [(FLUX, "hidden", "fp8")],
    ids=lambda one: getattr(one, "name", one),
)
def test_quantised_weights_of_torchao(case: Case, site: str, kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    name = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[kind]

    def change(pipe: Any) -> None:
        quantization.quantize_(getattr(pipe, "unet", None) or pipe.transformer, getattr(quantization, name)())

    check(case, site, change)


@ON_FEW
def test_quantised_weights_of_gguf(case: Case, site: str) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    q8 = gguf.GGMLQuantizationType.Q8_0

    def change(pipe: Any) -> None:
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        linears = [(n, m) for n, m in denoiser.named_modules() if type(m) is nn.Linear and n.endswith(("to_q", "to_v"))]
        for name, linear in linears:
            if linear.in_features % 32 == 0:
                one = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
                weight = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), q8))
                one.weight, one.bias = GGUFParameter(weight, quant_type=q8), linear.bias
                denoiser.set_submodule(name, one)
        assert any(type(module) is GGUFLinear for module in denoiser.modules())

    check(case, site, change)


@pytest.mark.parametrize(("site", "order"), [("hidden", "before"), ("output", "after")])
def test_ip_adapter(site: str, order: str) -> None:
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    def change(pipe: Any) -> None:
        torch.manual_seed(8)
        transformer = pipe.transformer
        for block in transformer.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 16, num_tokens=(2,), scale=1.0))
        transformer.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, 16, num_image_text_embeds=2)])

    picture = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(7))
    given = {"ip_adapter_image_embeds": [picture], "negative_ip_adapter_image_embeds": [-picture]}
    pipe = check(FLUX, site, change, order, **given)
    assert not torch.equal(FLUX.call(pipe, **given), FLUX.call(FLUX.make()))


# Requests


@ON_FEW
def test_several_images_a_prompt_and_batches(case: Case, site: str) -> None:
    check(case, site, lambda pipe: None, images=2, batch=2)


@ON_FEW
def test_latents_that_a_callback_edits(case: Case, site: str) -> None:
    def edit(_: Any, step: int, __: Any, kwargs: dict) -> dict:
        return {"latents": kwargs["latents"] * (1.1 if step == 3 else 1.0)}

    check(case, site, lambda pipe: None, callback_on_step_end=edit)


@pytest.mark.parametrize("case", [FLUX, SDXL], ids=lambda case: case.name)
def test_a_second_thread_is_an_error_and_the_first_goes_on(case: Case) -> None:
    plan = plan_for(case, "reuse", "output")
    pipe, errors = case.make(), []
    wanted = by_oracle(case, plan, case.make())
    lesa.enable(pipe, plan)
    probe = case.probes(pipe)[0]

    def intrude(*_: Any) -> None:
        handle.remove()

        def call() -> None:
            try:
                case.denoiser(pipe)(torch.zeros(1))
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    handle = probe.register_forward_pre_hook(intrude)
    assert_same(case.call(pipe), wanted)
    assert len(errors) == 1 and "thread" in errors[0]
    assert_same(case.call(pipe), wanted)


@pytest.mark.parametrize(
    ("case", "site"), [(FLUX, "hidden"), (QWEN, "output")], ids=lambda one: getattr(one, "name", one)
)
def test_another_attention_backend(case: Case, site: str) -> None:
    check(case, site, lambda pipe: pipe.transformer.set_attention_backend("_native_math"))


@pytest.mark.parametrize("case", [FLUX, SDXL], ids=lambda case: case.name)
def test_tiles_of_the_vae(case: Case) -> None:
    site = case.sites[0]
    check(case, site, lambda pipe: pipe.vae.enable_tiling(), output_type="np")
