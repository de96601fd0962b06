"""The benchmarks of operators run, what they keep has the right columns, and the picture shows what the rows say."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import bench_build, bench_ops, measuring, roofline
from lesa import ops

ROOT = Path(__file__).parents[2]
HEAD = "hardware,commit,date,op,shape,k,dtype,provider,p20_us,p50_us,p80_us,bytes,gbps"


def run_benchmarks(*arguments: str) -> str:
    # Under xdist, which this process may be a worker of, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_ops.py", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(
        command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    return run.stdout


def test_quick_run_keeps_a_row_of_everything(tmp_path):
    path = tmp_path / "rows.csv"
    # windows 2 and 8 differ from 4 in nothing but the number
    chosen = "not compile and not k2 and (k4 or kan or train_step)"
    run_benchmarks("--quick", "--results", str(path), "--commit", "abc1234", "-k", chosen)
    assert path.read_text().splitlines()[0] == HEAD
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    fused = {ops.backend_of("kan", torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))} - {"torch"}
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["op"], set()).add(row["provider"])
        assert row["commit"] == "abc1234" and row["shape"] == "tiny"
        p20, p50, p80 = (float(row[name]) for name in ("p20_us", "p50_us", "p80_us"))
        assert 0 < p20 <= p50 <= p80
        # The time is rounded to a hundredth of a microsecond, the rate to a tenth of a gigabyte.
        least, most = (int(row["bytes"]) / (p50 + error) / 1e3 for error in (0.0051, -0.0051))
        assert least - 0.051 <= float(row["gbps"]) <= most + 0.051
    assert found == {
        "forecast": {*fused, "eager", "paper", "copy"},
        "forecast_at": {*fused, "copy"},
        "forecast_head": {*(fused - {"cpp"}), "eager", "paper", "copy"},
        "forecast_errors": {*fused, "eager", "copy"},
        "predict": {*fused, "eager", "copy"},
        "predict_loss": {*fused, "eager", "copy"},
        "predict_loss_fwd_bwd": {*fused, "eager", "copy"},
        "kan": {*fused, "eager", "copy"},
        "kan_fwd_bwd": {*fused, "eager", "copy"},
        "train_step": {*fused, "eager"},
    }
    assert "| train_step | tiny |" in roofline.markdown(next(iter(roofline.read(path).values())))


def test_building_a_plan_is_timed(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    timed = SimpleNamespace(enabled=True, stats=SimpleNamespace(stats=SimpleNamespace(data=[])))

    def pedantic(function, setup, rounds, warmup_rounds):
        for _ in range(rounds):
            arguments, named = setup()
            begin = time.perf_counter()
            function(*arguments, **named)
            timed.stats.stats.data.append(time.perf_counter() - begin)

    timed.pedantic = pedantic
    options = {"--results": path, "--quick": True, "--commit": "abc1234"}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    [build] = [build for build in bench_build.BUILDS if str(build) == "cfg1-euler-20"]
    bench_build.test_build(build, timed, SimpleNamespace(config=SimpleNamespace(getoption=options.get)))
    with path.open(newline="") as file:
        [row] = csv.DictReader(file)
    assert [row[name] for name in ("commit", "threads", "guidance", "scheduler", "steps", "computed")] == [
        *("abc1234", "1", "1", "euler", "20", "10")
    ]
    assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])


def test_names_select():
    provider = "triton" if torch.cuda.is_available() else "cpp"
    names = [str(spec) for spec in bench_ops.specs(quick=False)]
    assert len(names) == len(set(names))
    chosen = [name for name in names if "forecast" in name and "flux" in name]
    assert f"forecast-flux-k8-bfloat16-{provider}" in chosen
    assert all("-tiny-" in str(spec) for spec in bench_ops.specs(quick=True))


def test_rows_are_appended_and_other_files_refused(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    spec = measuring.Spec("kan", "t50x3", None, torch.float32, "eager")
    for _ in range(2):
        measuring.Results(path, "abc").add(spec, [4e-6, 1e-6, 2e-6, 3e-6, 5e-6, 6e-6], 7000)
    head, *rows = path.read_text().splitlines()
    assert head == HEAD and len(rows) == 2
    assert rows[0].endswith("kan,t50x3,,float32,eager,2.00,3.50,5.00,7000,2.0")
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="columns"):
        measuring.Results(path, "abc")


def test_wrong_and_unwritten_results_are_seen():
    exact, plain = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.0])
    wanted = measuring.expected([exact], [plain])
    assert wanted[0].allowed == 2 * 2 * torch.finfo(torch.float32).eps
    measuring.assert_close(lambda: [plain], wanted, "right")
    for wrong in (plain * (1 + 1e-6), plain + torch.nan, plain.unsqueeze(0)):
        with pytest.raises(AssertionError, match="wrong"):
            measuring.assert_close(lambda wrong=wrong: [wrong], wanted, "wrong")


def test_inputs_leave_the_cache():
    assert [measuring.copies_beyond(50, size) for size in (1, 60, 1000)] == [200, 4, 2]
    call = measuring.rotating(lambda i: i * 10, [1, 2, 3])
    assert [call() for _ in range(4)] == [10, 20, 30, 10]


def test_device_timer_adds_up_events_and_sees_exposed_rounds(monkeypatch):
    """Events that lie 3 ms apart; the queue of the second round runs empty before its launches are done."""
    done = iter([False, True])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def query(self):
            return next(done)

        def synchronize(self):
            pass

        def elapsed_time(self, stop):
            return 3.0

    class Others:
        def zero_(self):
            order.append("others")

    order = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("wait"))
    timer = measuring.DeviceTimer(Others())
    begin = timer()
    order.append("round")
    assert timer() - begin == pytest.approx(3e-3)
    assert order == ["others", "wait", "event", "round", "event"] and timer.exposed == 0
    timer()
    assert timer() == pytest.approx(6e-3) and timer.exposed == 1


def synthetic(path: Path) -> Path:
    """Two hardwares, an older commit, and one row that was measured again."""
    lines = [HEAD]

    def add(hardware, commit, op, provider, p50, gbps, shape="flux", k="8", dtype="bfloat16"):
        lines.append(f"{hardware},{commit},2026-01-02,{op},{shape},{k},{dtype},{provider},1,{p50},9,1000,{gbps}")

    for commit, factor in (("old", 7), ("new", 1)):
        for shape in ("emoji", "flux"):
            add("H100", commit, "forecast", "triton", 75 * factor, 2850, shape)
            add("H100", commit, "forecast", "eager", 190, 1200, shape)
            add("H100", commit, "forecast", "copy", 71, 3000, shape)
    add("H100", "new", "forecast", "triton", 40, 2000, k="4")
    add("H100", "new", "forecast", "copy", 39, 2500, k="4")
    add("H100", "new", "kan", "triton", 30, 300, "t50x3", "", "float32")
    add("H100", "new", "kan", "copy", 6, 1500, "t50x3", "", "float32")
    add("H100", "new", "train_step", "eager", 12345, 20)
    add("x86 CPU", "old", "forecast", "cpp", 20000, 10)
    add("x86 CPU", "old", "forecast", "copy", 16000, 12)
    add("H100", "new", "forecast", "triton", 74, 2880)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_table_holds_the_newest_rows(tmp_path):
    found = roofline.read(synthetic(tmp_path / "ops.csv"))
    assert list(found) == ["x86 CPU", "H100"] and {row.commit for row in found["H100"]} == {"new"}
    table = roofline.markdown(found["H100"]).splitlines()
    assert table[0] == "| op | shape | K | dtype | triton | eager | copy |"
    assert table[1] == "| --- | --- | --- | --- | ---: | ---: | ---: |"
    assert "| forecast | flux | 8 | bfloat16 | 74.0 µs (96 %) | 190 µs (40 %) | 71.0 µs |" in table
    assert "| kan | t50x3 |  | float32 | 30.0 µs (20 %) |  | 6.0 µs |" in table
    assert "| train_step | flux | 8 | bfloat16 |  | 12.3 ms |  |" in table
    assert len(table) == 2 + 5


def test_an_operator_that_is_not_measured_again_keeps_its_rows(tmp_path, capsys):
    path = synthetic(tmp_path / "ops.csv")
    with path.open("a") as file:
        for provider in ("triton", "copy"):
            file.write(f"H100,newest,2026-03-04,forecast_errors,flux,8,bfloat16,{provider},1,80,9,1000,2900\n")
    found = roofline.read(path)
    assert list(found) == ["x86 CPU", "H100"]
    assert {(row.op, row.commit) for row in found["H100"]} == {
        *((op, "new") for op in ("forecast", "kan", "train_step")),
        ("forecast_errors", "newest"),
    }
    roofline.main(["--results", str(path), "--out", str(tmp_path / "roofline.png")])
    assert "### H100, new, 2026-01-02; newest, 2026-03-04\n" in capsys.readouterr().out


def test_picture_shows_the_gpu_with_every_provider(tmp_path, capsys):
    path, picture = synthetic(tmp_path / "ops.csv"), tmp_path / "roofline.png"
    roofline.main(["--results", str(path), "--out", str(picture)])
    table = capsys.readouterr().out
    assert "### H100, new, 2026-01-02" in table and "### x86 CPU, old" in table
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert 1300 <= pixels.shape[1] <= 1500
    count = {
        name: int((pixels == tuple(bytes.fromhex(color[1:]))).all(-1).sum()) for name, color in roofline.COLORS.items()
    }
    # 95 % and 40 % of the same copy, and the legend's patches
    assert count["triton"] > 1.5 * count["eager"] > 1000
    assert count["paper"] == count["compile"] == 0


def test_picture_of_no_rows_is_refused(tmp_path):
    path = tmp_path / "ops.csv"
    path.write_text(HEAD + "\n")
    with pytest.raises(ValueError, match="no rows"):
        roofline.read(path)
    found = roofline.read(synthetic(path))
    with pytest.raises(ValueError, match="nothing to draw"):
        roofline.draw(tmp_path / "x.png", [row for row in found["H100"] if row.op == "train_step"])
