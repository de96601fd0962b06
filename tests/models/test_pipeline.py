"""Running requests: from given noise, under a driver, with functions of one's own; and the recorder of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CASES_BY_NAME, PROMPTS
from torch import Tensor

import lesa
from lesa.forecasters import plan_of
from lesa.models import hooks
from lesa.models.pipeline import FeatureRecorder, calls_of, combined, parts_of, read_prompts, run
from lesa.planner.statistics import StatisticsError
from lesa.runtime.clock import Call, Request
from lesa.runtime.runner import PlanRunner

REQUEST = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": 8}
QWEN = CASES_BY_NAME["qwen_image"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return CASES_BY_NAME["flux_dev"].make()


def test_noise_is_each_prompt_s_own(pipe: Any) -> None:
    generator = torch.Generator("cpu").manual_seed(5)
    plain = pipe(prompt=["snow"], generator=[generator], output_type="latent", **REQUEST).images
    assert torch.equal(run(pipe, ["snow"], [5], REQUEST).images, plain)
    two = run(pipe, ["a red apple", "snow"], [4, 5], REQUEST).images
    torch.testing.assert_close(two[1:], plain)


def test_a_driver_is_gone_afterwards(pipe: Any) -> None:
    run(pipe, ["snow"], [0], REQUEST)
    driver = PlanRunner(plan_of("reuse", (0, 2), pipe.scheduler.sigmas.tolist(), "hidden"))
    full = run(pipe, ["snow"], [0], REQUEST).images
    fast = run(pipe, ["snow"], [0], REQUEST, driver).images
    assert driver.stats.forecast == 2 and not torch.equal(fast, full) and hooks.attached(pipe) is None
    assert torch.equal(run(pipe, ["snow"], [0], REQUEST).images, full)
    with pytest.raises(TypeError):
        run(pipe, ["snow"], [0], {**REQUEST, "height": "x"}, driver)
    assert hooks.attached(pipe) is None


def test_what_cannot_be_run(pipe: Any) -> None:
    for prompts, request_, message in [
        ("snow", REQUEST, "prompts='snow' is one string"),
        ([], REQUEST, "prompts is empty"),
        ((p for p in PROMPTS), REQUEST, "prompts is a generator"),
        (["snow", 3], REQUEST, r"prompts\[1\]=3"),
        (["snow"], {"num_steps": 4}, "FluxPipeline takes no num_steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(pipe, prompts, [0], request_)


def test_a_pipeline_without_prompts() -> None:
    with pytest.raises(ValueError, match="DiTPipeline takes no `prompt`"):
        run(CASES_BY_NAME["dit"].make(), ["snow"], [0], {})


def test_calls_are_batches_of_prompts(pipe: Any) -> None:
    calls = calls_of(pipe, PROMPTS[:3], None, REQUEST, None, 2, output_type="np")
    assert [call.labels for call in calls] == [
        (f"prompt 0 ({PROMPTS[0]!r})", f"prompt 1 ({PROMPTS[1]!r})"),
        (f"prompt 2 ({PROMPTS[2]!r})",),
    ]
    pictures = calls[1].run(FeatureRecorder(calls[1].labels), "hidden").images
    assert (pictures == run(pipe, PROMPTS[2:3], [2], REQUEST, output_type="np").images).all()


def test_functions_are_calls_of_their_own(pipe: Any) -> None:
    [call] = calls_of(pipe.transformer, None, [lambda: pipe("snow", **REQUEST) and "done"], {}, None, 1)
    recorder = FeatureRecorder(call.labels)
    assert call.labels == ("request 0",) and call.run(recorder, "hidden") == "done" and len(recorder.timesteps) == 4
    assert hooks.attached(pipe.transformer) is None
    lesa.enable(pipe, plan_of("reuse", (0, 2), pipe.scheduler.sigmas.tolist(), "hidden"))
    try:
        with pytest.raises(ValueError, match="lesa is enabled"):
            call.run(recorder, "hidden")
    finally:
        lesa.disable(pipe)


def test_requests_that_cannot_be(pipe: Any) -> None:
    for request_, message in [
        ([], r"request=\[\]"),
        ({1: 2}, r"request=\{1: 2\}"),
        ({"generator": torch.Generator()}, "request=.*JSON"),
        ({"prompt": "a"}, "request holds prompt='a'"),
    ]:
        with pytest.raises(ValueError, match=message):
            calls_of(pipe, PROMPTS, None, request_, None, 1)


# The recorder


@pytest.mark.parametrize("site", ["hidden", "output"])
def test_a_sink_is_handed_what_would_be_kept(site: str) -> None:
    pipe, handed = QWEN.make(), dict[str, list[Tensor]]()
    request = {**QWEN.request, "num_inference_steps": 3, "height": 32, "width": 32, "negative_prompt": "dark"}
    sink = FeatureRecorder(["one"], sink=lambda call, f: handed.setdefault(call.context, []).append(f.clone()))
    keeper = FeatureRecorder(["one"], [site])
    for recorder in (sink, keeper):
        run(pipe, PROMPTS[:1], [0], request, recorder, site)
    kept = keeper.features(site)
    assert sink.contexts == keeper.contexts == list(kept) == list(handed) == ["cond", "uncond"]
    assert sink.timesteps == keeper.timesteps and len(sink.timesteps) == 3
    assert sink.request is not None and sink.request.sigmas is not None and len(sink.request.sigmas) == 4
    for context, own in kept.items():
        assert len(own) == 3 and all(torch.equal(a, b) for a, b in zip(own, handed[context], strict=True))
    gram = keeper.gram(site)
    assert gram.shape == (6, 6) and not keeper.features(site), "the features are dropped"


class OtherError(Exception):
    pass


def test_what_spoils_a_recording_is_raised_as_asked() -> None:
    for recorder, error in (
        (FeatureRecorder(["one"]), StatisticsError),
        (FeatureRecorder(["one"], error=OtherError), OtherError),
    ):
        recorder.begin(Request())
        with pytest.raises(error, match="one runs more than one request"):
            recorder.begin(Request())
        with pytest.raises(error, match="cannot be taken: gone"):
            recorder.lose("gone")


def test_features_that_do_not_fit_together_are_named() -> None:
    def call(step: int, context: str, size: int = 4) -> Call:
        return Call(context, step, torch.tensor(1.0 - step / 2), torch.zeros(1, size), Request(), step == 0)

    recorder = FeatureRecorder(["one"], ["output"])
    for step, context in ((0, "cond"), (1, "cond"), (0, "uncond")):
        recorder.forecast(call(step, context))
        recorder.observe(call(step, context), torch.ones(1, 4))
    with pytest.raises(StatisticsError, match="context 'uncond' ran 1 of 2 steps in one"):
        recorder.gram("output")
    recorder.observe(call(1, "uncond", 5), torch.ones(1, 5))
    with pytest.raises(StatisticsError, match="features of site 'output' differ in size"):
        recorder.gram("output")


# Prompts


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n\n  snow \n", encoding="utf-8")
    assert read_prompts(path) == ["a red apple", "snow"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompt file '.*' is empty"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"prompt file '.*' is not UTF-8"):
        read_prompts(path)
    with pytest.raises(ValueError, match=r"prompt file 'missing.txt' does not exist"):
        read_prompts("missing.txt")


def test_parts_of_a_batch(seed: int) -> None:
    """Guidance repeats the samples of all requests, in the order of the requests."""
    x, y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    for parts in (1, 2, 3, 4):
        assert parts_of(torch.stack([x, y] * parts), 2) == parts
    assert parts_of(torch.stack([x, y]), 1) == parts_of(torch.stack([x, x, y, y]), 2) == 1
    assert parts_of(torch.stack([x, x]) / 0, 1) == 2
    outputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    expected = 3 * outputs[:2] - 1.5 * outputs[2:4] - 0.5 * outputs[4:]
    torch.testing.assert_close(combined(outputs, (3.0, -1.5, -0.5)), expected)
    assert combined(outputs, (1.0,)) is outputs and combined(outputs.bfloat16(), (3.0, -2.0)).dtype == torch.float32
