"""The benchmarks measure what they say: equal baselines, right bytes, budgets, steps that fail."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import pytest
import torch

from mnist_ops import _torch_private

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
NAMES = (
    *("op_timing", "op_cases", "op_record", "bench_ops", "op_plots", "op_checks", "run_all"),
    "bench_online_sgd",
)


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The scripts as modules, forgotten afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bench_ops(modules):
    return modules["bench_ops"]


@pytest.fixture(scope="module")
def op_cases(modules):
    return modules["op_cases"]


@pytest.fixture(scope="module")
def run_all(modules):
    return modules["run_all"]


# --------------------------------------------------------------------------------------- baselines


def small(case):
    return (37, 23) if case.family in ("softmax_nll", "log_softmax") else (3, 5, 11, 9)


def test_baselines_compute_what_ours_do(op_cases):
    """Every way of every case, results and gradients in float64, in both memory formats."""
    for case in op_cases.CASES:
        shape = (40,) if case.family == "sigmoid" else small(case)
        for layout in (torch.contiguous_format, torch.channels_last)[: len(shape) // 2]:
            x = torch.randn(shape, dtype=torch.float64)
            x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
            constants = case.constants(x)
            leaf = x.requires_grad_()
            ours = case.ours(leaf, *constants)
            assert ours.shape == case.output(shape), case.name
            g = torch.randn_like(ours)
            (ours_grad,) = torch.autograd.grad(ours, leaf, g)
            ways = case.eager | case.compiled
            ways |= {"reference": case.reference} if case.reference else {}
            for name, function in ways.items():
                if name == "F.lp_pool2d":  # signed powers: defined for p = 2, which is even
                    assert "p=2" in case.name
                theirs = function(leaf, *constants)
                (grad,) = torch.autograd.grad(theirs, leaf, g)
                what = f"{case.name}, {name}: {{}}".format
                torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9, msg=what)
                torch.testing.assert_close(grad, ours_grad, rtol=1e-9, atol=1e-9, msg=what)


def test_families_are_all_there(op_cases):
    wanted = {
        *(f"{kind}_norm2d" for kind in ("subtractive", "divisive", "contrastive")),
        *("lp_pool2d", "stage2d", "softmax", "log_softmax", "softmax_nll", "sigmoid"),
    }
    for device in ("cpu", "cuda"):
        settings = op_cases.settings(device)
        assert {s.case.family for s in settings[: len(wanted)]} == wanted  # headlines come first
        assert len({str(s) for s in settings}) == len(settings)
    columns = {s.shape[-1] for s in settings if "softmax" in s.case.family and len(s.shape) == 2}
    assert min(columns) == 10 and max(columns) == 131072
    channels = {s.shape[1] for s in settings if "norm2d" in s.case.family}
    assert min(channels) == 1 and max(channels) == 512
    assert {s.dtype for s in settings} == {torch.float32, torch.bfloat16, torch.float16}
    elements = {s.elements for s in settings if s.case.family == "sigmoid"}
    assert max(elements) == 2**28
    assert any(s.shape == (1, 64, 28, 28) for s in settings)
    pools = {s.case.options for s in settings if s.case.family == "lp_pool2d"}
    plain = {f"p={p} {k}/2" for p in ("1", "2", "3", "inf") for k in ("2x2", "3x3")}
    assert pools == {*plain, "GeM, p in a tensor"}


@pytest.mark.parametrize(
    ("name", "shape", "forward", "backward"),
    [
        # 8 of 4 bytes in, 2 windows out; gradient of 2, input of 8, gradient of 8.
        ("lp_pool2d p=2 2x2/2", (1, 1, 2, 4), 40, 72),
        # 3x3 at distance 2 on 5x5: 2x2 windows.
        ("lp_pool2d p=2 3x3/2", (1, 1, 5, 5), 116, 216),
        ("subtractive_norm2d 7 taps", (1, 2, 3, 2), 96, 96),  # linear: gradient in and out
        ("local_mean2d 7 taps", (1, 2, 3, 2), 96, 96),
        ("divisive_norm2d 7 taps", (1, 2, 3, 2), 96, 144),
        ("contrastive_norm2d 7 taps", (1, 2, 3, 2), 96, 144),
        # 4 of 4 bytes in, 1 pixel out; gradient of 1, input of 4, gradient of 4.
        ("stage2d tanh p=2 2x2/2 7 taps", (1, 1, 2, 2), 20, 36),
        ("softmax", (2, 3), 48, 72),
        ("log_softmax", (2, 3), 48, 72),
        # 6 scores, 1 loss, 2 targets of 8 bytes; the loss's gradient, scores, their gradient.
        ("softmax_nll", (2, 3), 44, 68),
        ("sigmoid", (5,), 40, 60),
    ],
)
def test_bytes_by_hand(op_cases, name, shape, forward, backward):
    (case,) = (case for case in op_cases.CASES if case.name == name)
    found = [case.bytes_moved(shape, torch.float32, d) for d in op_cases.DIRECTIONS]
    assert found == [forward, backward, forward + backward]
    indices = 16 if name == "softmax_nll" else 0
    halved = (forward - indices) // 2 + indices
    assert case.bytes_moved(shape, torch.bfloat16, "forward") == halved


# ------------------------------------------------------------------------------------------ timing


class FakeClock:
    """Calls take as long as they say; nothing else takes time."""

    device = "cpu"
    block_s = 0.0
    most_calls = 8

    def __init__(self):
        self.order = []

    def seconds(self, calls):
        times = [call() for call in calls]
        self.order.append(times[0])
        return sum(times) / len(times)

    def synchronize(self):
        pass


def test_rounds_are_interleaved_and_the_first_changes(modules):
    op_timing, clock = modules["op_timing"], FakeClock()

    def broken(n):
        raise RuntimeError("no such thing\nsecond line")

    contenders = {"a": lambda n: [lambda: 1.0] * n, "b": lambda n: [lambda: 2.0] * n, "c": broken}
    times, failures = op_timing.interleave(clock, contenders, sets=2, rounds=4, most_s=1e9)
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert failures == {"c": "RuntimeError: no such thing"}
    assert clock.order[-8:] == [1, 2, 2, 1, 1, 2, 2, 1]
    assert op_timing.ratio({"a": [1, 9, 2], "b": [2, 3, 4]}, "b", "a") == 2
    times, _ = op_timing.interleave(clock, contenders, sets=1, rounds=9, most_s=0)
    assert len(times["a"]) == 3


def test_kernels_are_counted_in_a_trace(modules):
    events = [
        {"cat": "kernel", "dur": 2.5},
        {"cat": "gpu_memset", "dur": 1},
        {"cat": "gpu_user_annotation", "dur": 100},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 4},
        {"name": "process_name", "ph": "M"},
    ]
    assert modules["op_timing"].kernels_in({"traceEvents": events}) == (2, 3.5)
    assert modules["op_timing"].count_kernels([lambda: torch.ones(3)]) == (0, 0)  # on the CPU


@pytest.fixture(scope="module")
def quick(bench_ops, op_cases):
    """The first two settings, without a compiler; the first of them with a budget of nothing."""
    options = bench_ops.Options(rounds=2, row_s=0.01, compile=0, quick=True)
    return options, op_cases.settings("cpu", quick=True)[:2]


def test_a_budget_leaves_out_and_says_so(bench_ops, quick, tmp_path, monkeypatch):
    options, settings = quick
    path = tmp_path / "ops.json"
    seconds = iter([0.0, 1.0, 1.0, 1.5, 11.0, 12.0])
    monkeypatch.setattr(bench_ops.op_timing, "interleave", lambda *a, **k: (TIMES, {}))
    monkeypatch.setattr(bench_ops.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(bench_ops.Options, "ceilings", lambda self: dict(options.before))
    said = []
    record = bench_ops.run(settings, options, budget_s=10, path=path, say=said.append)
    monkeypatch.undo()
    assert {row["setting"] for row in record["rows"]} == {str(settings[0])}
    assert record["left_out"] == [str(settings[1])] and len(said) == 1
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    text = bench_ops.table(record)
    assert f"Left out, 1 settings, for want of time:\n\n- {settings[1]}" in text
    # A second run goes on where the first one stopped.
    again = bench_ops.run(settings, options, path=path, done=record, say=said.append)
    assert [row["setting"] for row in again["rows"]] == [
        str(settings[i]) for i in (0, 0, 0, 1, 1, 1)
    ]
    assert again["left_out"] == [] and again["rows"][:3] == record["rows"]


def test_a_setting_that_fails_stops_no_other(bench_ops, quick, tmp_path, monkeypatch):
    options, settings = quick
    measure = bench_ops.measure

    def out_of_memory(setting, *rest):
        if setting is settings[0]:
            raise MemoryError("no room")
        return measure(setting, *rest)

    monkeypatch.setattr(bench_ops, "measure", out_of_memory)
    monkeypatch.setattr(bench_ops.op_timing, "interleave", lambda *a, **k: (TIMES, {}))
    path = tmp_path / "ops.json"
    record = bench_ops.run(settings, options, path=path, say=lambda line: None)
    assert record["failed"] == {str(settings[0]): "MemoryError: no room"}
    assert {row["setting"] for row in record["rows"]} == {str(settings[1])}
    assert f"- {settings[0]}: MemoryError: no room" in bench_ops.table(record)
    assert bench_ops.ours_failed(record) and "1 settings failed" in bench_ops.verdict(record)
    # Once the device itself is gone, what is left is left out.
    monkeypatch.setattr(options.clock, "lost", lambda: True, raising=False)
    record = bench_ops.run(settings, options, path=path, say=lambda line: None)
    assert record["rows"] == [] and record["left_out"] == [str(settings[1])]
    assert json.loads(path.read_text())["failed"]


TIMES = {
    "mnist_ops": [2e-6, 4e-6, 2e-6],
    "eager: avg_pool2d": [8e-6, 8e-6, 9e-6],
    "eager: F.lp_pool2d": [6e-6, 6e-6, 6e-6],
    "copy": [1e-6, 1e-6, 1e-6],
}


def test_a_row_by_hand(bench_ops, quick):
    options, (setting, _) = quick
    errors = {"mnist_ops": 1e-7, "eager: avg_pool2d": math.nan}
    failures = {"compile: avg_pool2d": "BackendCompilerFailed: no"}
    row = bench_ops.row(setting, "forward", 4000, TIMES, errors, failures, options)
    assert row["us"] == pytest.approx({"mnist_ops": 2, "eager": 6, "copy": 1})
    assert row["chosen"]["eager"] == "eager: F.lp_pool2d"  # the faster of two
    assert row["over_ours"] == pytest.approx({"eager": 3, "copy": 0.5})
    assert row["gb_per_s"] == pytest.approx(2)
    assert row["percent_of_copy"] == pytest.approx(2e9 / options.bandwidth * 100)
    assert row["wrong"] == ["eager: avg_pool2d"]
    record = {"machine": bench_ops.header(options), "rows": [row], "left_out": []}
    line = next(x for x in bench_ops.table(record).splitlines() if str(setting) in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["forward", "2.0", "2.0"] and cells[5:8] == ["3.00", "failed", "0.50"]
    assert "BackendCompilerFailed" in bench_ops.table(record)
    assert not bench_ops.ours_failed(record)
    row["failures"]["mnist_ops"] = "RuntimeError: launch failure"
    assert bench_ops.ours_failed(record)


def test_wrong_results_are_marked(bench_ops, op_cases):
    """One element of one row at either end of the batch, forward or backward."""
    torch.manual_seed(0)
    for case in (op_cases.HEADLINES[0], op_cases.SOFTMAXES["softmax_nll"]):
        shape = (4, 2, 6, 6) if case.family == "lp_pool2d" else (40, 10)
        setting = op_cases.Setting(case, shape)
        arguments = bench_ops.Arguments.of(setting, 1, "cpu")
        tolerance = bench_ops.TOLERANCE[torch.float32]
        assert bench_ops.deviation(setting, arguments, case.ours) < tolerance

        def spoiled(x, *constants, case=case, at=0):
            y = case.ours(x, *constants)
            extra = x[at].flatten()[0]
            return y + 0.05 * (extra - extra.detach())  # the gradient alone

        for at in (0, -1):
            assert bench_ops.deviation(setting, arguments, lambda *a, at=at: spoiled(*a, at=at)) > (
                tolerance
            )
        assert bench_ops.deviation(setting, arguments, lambda *a: case.ours(*a) * 1.01) > tolerance


def test_deviation_looks_at_both_ends_of_a_large_batch(bench_ops, op_cases):
    setting = op_cases.Setting(op_cases._SIGMOID, (2**20 + 5,))
    arguments = bench_ops.Arguments.of(setting, 1, "cpu")
    for at in (0, -1):

        def spoiled(x, at=at):
            y = torch.sigmoid(x)
            return torch.cat([y[:at], y[at:] + 1]) if at else torch.cat([y[:1] + 1e3, y[1:]])

        assert bench_ops.deviation(setting, arguments, spoiled) > 1e-4


def test_pytest_benchmark_gets_the_same_numbers(tmp_path):
    """One group, all contenders of it measured at once."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            str(FOLDER / "bench_ops.py"),
            *("-k", "softmax_nll and 100x10 and not compile"),
            f"--benchmark-json={tmp_path / 'out.json'}",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # In a worker of pytest-xdist pytest-benchmark would measure nothing.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        | {"MNIST_OPS_BENCH_QUICK": "1", "MNIST_OPS_BENCH_COMPILE": "0"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert len(found) == 6 and len({entry["group"] for entry in found}) == 2
    for entry in found:
        contender = entry["params"]["contender"]
        assert entry["stats"]["median"] * 1e6 == pytest.approx(entry["extra_info"]["us"][contender])
    # Contenders of a group show one and the same measurement.
    for group in {entry["group"] for entry in found}:
        rows = [entry["extra_info"] for entry in found if entry["group"] == group]
        assert len(rows) == 3 and all(row == rows[0] for row in rows)


def test_figures_and_table(modules, bench_ops, quick, tmp_path):
    options, (setting, _) = quick
    rows = [
        bench_ops.row(setting, d, 4000, TIMES, {"mnist_ops": 0.0}, {}, options) | {"elements": n}
        for d in ("forward", "backward")
        for n in (1000, 64000)
    ]
    record = {"machine": bench_ops.header(options), "rows": rows, "left_out": []}
    written = modules["op_plots"].draw(record, tmp_path)
    assert [path.name for path in written] == ["ops.md", "ops-lp_pool2d.png"]
    png = written[1].read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 700  # 3.5 in


# ---------------------------------------------------------------------------------- device checks


def test_checks_see_a_changed_bit(modules):
    same = modules["op_checks"].same
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert same((x, x), (x.clone(), x.clone())) == ""
    y = x.clone()
    y[0] = torch.nextafter(y[0], torch.tensor(2.0))
    assert same((x, x), (x, y)).startswith("gradient DIFFERS in")
    assert same((x, x), (torch.tensor([1.0, 7e7, float("inf")]), x)).startswith("result DIFFERS")


def test_agreement_sees_what_is_too_far(modules):
    checks = modules["op_checks"]
    check = next(checks.checks(torch.device("cpu"), "full"))
    assert check.dtype == torch.float32
    x = torch.tensor([-8.0, 1.0, float("inf")])
    assert checks.apart(check, (x, x), (x, x + 4e-5)) == ""
    assert checks.apart(check, (x, x), (x, x + 4e-4)).startswith("gradient DIFFERS by 0.0004")
    assert "finite" in checks.apart(check, (x, x), (x.clamp(max=1e3), x))
    assert checks.apart(check, (x * float("nan"), x), (x, x)) != ""
    for check in checks.checks(torch.device("cpu"), "quick"):
        assert checks.agreement(check, torch.device("cpu"), True) == ""


def test_checks_run_every_operator(modules):
    """The list of operators of the device checks lacks none of the library's."""
    cpu = torch.device("cpu")
    names = {name.split()[0] for name in modules["op_checks"].operators(cpu)}
    schemas = _torch_private.operators("mnist_ops")
    derived = ("backward", "jvp", "sgd", "activate")  # the last is a step of stage2d
    assert names == {s for s in schemas if not any(part in s for part in derived)}
    for check in modules["op_checks"].checks(cpu, "quick"):
        assert modules["op_checks"].once(check, cpu, True) == ""


# ----------------------------------------------------------------------------------------- run_all


def shell(script):
    return [sys.executable, "-c", script]


def test_steps_that_fail_or_hang_stop_no_other(run_all, tmp_path):
    """A child that a step leaves behind is ended with it."""
    orphan = tmp_path / "orphan"
    hang = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', "
        f"\"import time; time.sleep(2.2); open({str(orphan)!r}, 'w')\"])\n"
        "print('begun', flush=True); time.sleep(60)"
    )

    def step(name, script, limit=30.0):
        command = run_all.Command(shell(script), f"{name}.txt", {"FROM_THE_STEP": name})
        return run_all.Step(name, limit, lambda out, machine, left: [command])

    def impossible(out, machine, left):
        return f"no CUDA: {machine['cuda']}"

    chosen = [
        step("failing", "print('about to fail'); raise SystemExit(3)"),
        step("hanging", hang, limit=1.0),
        run_all.Step("impossible", 30.0, impossible),
        step("nothing here", f"print('no device'); raise SystemExit({run_all.SKIPPED})"),
        step("good", "import os; print(os.environ['FROM_THE_STEP'])"),
        run_all.Step("defective", 30.0, lambda out, machine, left: [][0]),
    ]
    out = tmp_path / "out"
    archive = tmp_path / "out.tar.gz"
    start = time.monotonic()
    outcomes = {o.step: o for o in run_all.run_steps(chosen, out, archive=archive, say=lambda s: 0)}
    assert time.monotonic() - start < 15
    assert {name: o.status for name, o in outcomes.items()} == {
        "failing": "failed",
        "hanging": "timed out",
        "impossible": "skipped",
        "nothing here": "skipped",
        "good": "passed",
        "defective": "failed",
    }
    assert outcomes["failing"].note == "exit status 3: about to fail"
    assert outcomes["hanging"].note == "after 1 s: begun"
    assert outcomes["impossible"].note == "no CUDA: not known: the environment step has not run"
    assert outcomes["good"].note == "good"
    summary = (out / "summary.md").read_text()
    assert "| failing | failed |" in summary and "| hanging | timed out |" in summary
    with tarfile.open(archive) as tar:
        assert {"out/summary.md", "out/good.txt", "out/hanging.txt"} <= set(tar.getnames())
    # Another call adds to what is there, and replaces what it repeats.
    repeated = [step("failing", "print('mended')")]
    found = {o.step: o.status for o in run_all.run_steps(repeated, out, say=lambda s: 0)}
    assert found["failing"] == "passed" and found["hanging"] == "timed out" and len(found) == 6
    time.sleep(max(0.0, 3.5 - (time.monotonic() - start)))
    assert not orphan.exists()


def test_a_budget_is_shared_and_what_is_left_goes_on(run_all, tmp_path, monkeypatch):
    limits = {}

    def run_step(step, out, machine, limit):
        limits[step.name] = limit
        clock[0] += {"a": 10, "b": 75}[step.name]
        return run_all.Outcome(step.name, "passed", 0.0)

    clock = [0.0]
    monkeypatch.setattr(run_all, "run_step", run_step)
    monkeypatch.setattr(run_all.time, "monotonic", lambda: clock[0])
    chosen = [run_all.Step(n, s, None) for n, s in (("a", 30), ("b", 60), ("c", 10))]
    outcomes = run_all.run_steps(chosen, tmp_path, budget_s=80, say=lambda s: 0)
    assert limits == {"a": 24, "b": 60}  # 30 of 100; 60 of 70 of the 70 that are left
    assert (outcomes[2].status, outcomes[2].note) == ("skipped", "the budget is spent")


def test_what_measures_no_time_runs_side_by_side(run_all, tmp_path):
    meet = (
        "import pathlib, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / f'{sys.argv[1]}.there').touch()\n"
        "while not (here / f'{sys.argv[2]}.there').exists(): time.sleep(0.01)\n"
    )

    def step(name, script, *arguments, measures=False):
        command = run_all.Command([*shell(script), *arguments], f"{name}.txt")
        return run_all.Step(name, 60.0, lambda out, machine, left: [command], measures)

    alone = f"import os; print([n for n in os.listdir({str(tmp_path)!r}) if n.endswith('.there')])"
    chosen = [
        step("environment", "print('first')"),
        step("a", meet, "a", "b"),
        step("slow", alone, measures=True),
        step("b", meet, "b", "a"),
    ]
    out = tmp_path / "out"
    outcomes = run_all.run_steps(chosen, out, side_by_side=True, say=lambda s: 0)
    assert [(o.step, o.status) for o in outcomes] == [
        (name, "passed") for name in ("environment", "a", "slow", "b")
    ]
    assert "a.there" in outcomes[2].note and "b.there" in outcomes[2].note


def test_ctrl_c_ends_what_runs_side_by_side(run_all, tmp_path):
    script = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import pathlib, run_all\n"
        "def step(name):\n"
        "    code = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "    command = run_all.Command([sys.executable, '-c', code], f'{name}.txt')\n"
        "    return run_all.Step(name, 600.0, lambda *_: [command])\n"
        f"out = pathlib.Path({str(tmp_path)!r})\n"
        "run_all.run_steps([run_all.Step('first', 9.0, lambda *_: 'skipped'), step('a'),"
        " step('b')], out, side_by_side=True)\n"
    )
    process = subprocess.Popen(
        shell(script),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline, files = time.monotonic() + 60, [tmp_path / "a.txt", tmp_path / "b.txt"]
    while not all(file.exists() and file.read_text().endswith("\n") for file in files):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_steps_exist_and_unknown_ones_are_refused(run_all, tmp_path):
    names = [step.name for step in run_all.steps(quick=False)]
    assert {"tests", "sanitizer", "ops", "online", "reproduce"} <= set(names)
    script = [sys.executable, str(FOLDER / "run_all.py"), "--out", str(tmp_path)]
    result = subprocess.run([*script, "--steps", "opps"], capture_output=True, text=True)
    assert result.returncode == 2
    assert f"--steps must be among {','.join(names)}, got opps" in result.stderr


@pytest.mark.parametrize("small", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("cuda", ["available", "not built"])
def test_every_step_knows_what_to_run(run_all, bench_ops, tmp_path, monkeypatch, cuda, small):
    """On a machine with a GPU and a sanitizer too, which this one need not be."""
    monkeypatch.setattr(run_all.shutil, "which", lambda name, path: f"/opt/{name}")
    files = []
    for step in run_all.steps(small, ["-n", "4"]):
        commands = step.commands(tmp_path, {"cuda": cuda}, 100.0)
        if step.name in ("sanitizer", "large", "peers") and cuda != "available":
            assert commands == "no CUDA: not built"
            continue
        for command in commands:
            files.append(command.output)
            scripts = [word for word in command.arguments if word.startswith(f"{ROOT}/")]
            assert all(Path(script).exists() for script in scripts)
            assert scripts or "pytest" in command.arguments
            if "bench_ops.py" in command.arguments[1]:
                assert bench_ops.main([*command.arguments[2:], "--list"]) == 0
    assert len(files) == len(set(files))
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"] if cuda == "available" else []
    assert {f"sanitizer-{tool}.txt" for tool in tools} <= set(files)


@pytest.mark.parametrize("where", ["here", "no sanitizer"])
def test_a_dry_run_prints_the_steps_and_runs_nothing(called, modules, tmp_path, monkeypatch, where):
    run_all = modules["run_all"]
    if where != "here":
        monkeypatch.setattr(run_all.shutil, "which", lambda name, path: None)
    monkeypatch.setattr(run_all, "run_command", lambda *_: pytest.fail("a process was started"))
    out = tmp_path / "out"
    code, printed, errors = called("run_all", "--out", out, "--dry-run", "--budget-s", "800")
    assert (code, errors, out.exists()) == (0, "", False)
    steps = re.findall(r"^(\w+) \(at most (\d+) s\)$", printed, re.MULTILINE)
    assert [name for name, _ in steps] == [step.name for step in run_all.steps(quick=False)]
    assert sum(int(seconds) for _, seconds in steps) == pytest.approx(800, abs=len(steps))
    # Tests, times, peers, then what may be cut off, the reports last.
    order = ["environment", "tests", "ops", "peers", "determinism", "graphs", "sanitizer", "large"]
    found = [name for name, _ in steps]
    assert [name for name in found if name in order] == order and found[-2:] == [
        "online",
        "reproduce",
    ]
    assert "bench_ops.py --peers --json-out" in printed and "> peers.txt" in printed
    if where != "here":
        assert "  skipped: no compute-sanitizer here" in printed


def test_peers_are_measured_where_they_are_installed(
    bench_ops, op_cases, called, monkeypatch, tmp_path
):
    """By stand-ins: which functions are taken, that an input survives, what is said of the rest."""
    softmax, loss = op_cases.SOFTMAXES["softmax"], op_cases.SOFTMAXES["softmax_nll"]
    assert op_cases.peers(op_cases.STAGE) == op_cases.peers(op_cases.GIBBS) == {}

    class Spoiling(torch.autograd.Function):  # as Liger's: the gradient into the input
        @staticmethod
        def forward(ctx, x, target):
            with torch.enable_grad():
                leaf = x.detach().clone().requires_grad_()
                y = torch.nn.functional.cross_entropy(leaf, target)
                (grad,) = torch.autograd.grad(y, leaf)
            if ctx.needs_input_grad[0]:
                x.copy_(grad)
            ctx.save_for_backward(grad)
            return y.detach()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0], None

    def liger_cross_entropy(x, target):
        return Spoiling.apply(x, target)

    def absent(name):
        if name.startswith("quack"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return types.SimpleNamespace(
            liger_softmax=lambda x: x.softmax(-1), liger_cross_entropy=liger_cross_entropy
        )

    monkeypatch.setattr(op_cases.importlib, "import_module", absent)
    reason = "quack.softmax.softmax: ModuleNotFoundError: No module named 'quack.softmax'"
    assert op_cases.peers(softmax)["QuACK"] == reason
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    before, constants = x.detach().clone(), loss.constants(x)
    functions = bench_ops.candidates(loss, compile=False, peers=True)
    assert list(functions) == ["mnist_ops", "eager: cross_entropy", "Liger"]
    grads = [torch.autograd.grad(f(x, *constants), x)[0] for f in functions.values()]
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])
    assert torch.equal(x.detach(), before)

    settings = op_cases.peer_settings("cuda")
    assert {s.shape[1] for s in settings} == {1024, 4096, 16384, 65536, 262144}
    assert {(s.case, s.dtype) for s in settings} == {
        (case, dtype) for case in (softmax, loss) for dtype in (torch.float32, torch.bfloat16)
    }
    assert {s.directions for s in settings} == {("forward", "backward")}
    options = bench_ops.Options(quick=True, rounds=3, row_s=0.1, compile=0, peers=True)
    record = bench_ops.run(op_cases.peer_settings("cpu", quick=True)[:1], options, say=len)
    assert record["rows"][0]["us"]["Liger"] > 0 and "| Liger |" in bench_ops.table(record)
    assert "QuACK" not in bench_ops.table(record)
    code, out, _ = called(
        *("bench_ops", "--peers", "--quick", "--device=cpu", "--limit=1", "--no-compile"),
        *("--rounds=1", "--row-s=0.1", f"--json-out={tmp_path / 'peers.json'}"),
    )
    assert code == 0 and "left out, QuACK and Liger: they run on CUDA only" in out


def test_the_command_as_a_user_gives_it(tmp_path):
    """Steps of the real list; the machine here may have a GPU or not."""
    script = [sys.executable, str(FOLDER / "run_all.py"), "--out", str(tmp_path), "--quick"]
    result = subprocess.run(
        [*script, "--steps", "sanitizer"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout
    machine = json.loads((tmp_path / "environment.json").read_text())
    assert machine["torch"] == str(torch.__version__) and "date" not in json.dumps(machine).lower()
    if machine["cuda"] != "available":
        assert f"| sanitizer | skipped | 0 | no CUDA: {machine['cuda']} |" in result.stdout
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            assert (tmp_path / f"sanitizer-{tool}.txt").read_text().startswith("skipped: no CUDA")


def test_selected_tests_exist(run_all):
    """The sanitizer's expression names functions that are there, or cases of theirs."""
    sources = "".join(
        (ROOT / path).read_text() for path in run_all.SANITIZED if path.endswith(".py")
    )
    expression = run_all.SANITIZED[-1]
    for word in expression.replace("(", " ").replace(")", " ").split():
        if word not in ("cuda", "and", "or", "bfloat16"):
            of_a_case = re.search(rf'^    "[^"]*\b{word}\b[^"]*": ', sources, re.MULTILINE)
            assert f"def test_{word}" in sources or f"_{word}" in sources or of_a_case, word
    assert "def test_more_than_two_to_the_31" in (ROOT / "tests/ops/test_operators.py").read_text()


# ------------------------------------------------------------------------------------ how they end


@pytest.fixture
def called(modules, monkeypatch, capsys):
    """A script's main function as its last lines call it: exit code, output and errors."""
    from mnist_ops.lab import command_line, records

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr("warnings.formatwarning", lambda *_: "")

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            code = command_line.run(modules[name].main, [records.RunError])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("op_timing", "op_cases", "op_record")]
)
def test_help(called, name):
    code, out, errors = called(name, "--help")
    assert code == 0 and out.startswith(f"usage: {name}.py") and errors == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bench_ops", "--rounds", "0"], "argument --rounds: must be 1 or more, got 0"),
        (["bench_ops", "--limit", "-1"], "argument --limit: must be 1 or more, got -1"),
        (["bench_ops", "--threads", "x"], "argument --threads: invalid integer: 'x'"),
        (["bench_ops", "--match", "nothing is called so"], "none is like that"),
        (["bench_online_sgd", "--rounds", "0"], "argument --rounds: must be 1 or more, got 0"),
        (["bench_online_sgd", "--models", "1,0"], "argument --models: must be 1 or more, got 0"),
        (["op_checks", "once", "--device", "tpux"], "--device tpux: "),
        (
            ["op_checks", "once", "--device", "meta"],
            "--device must be cpu, cuda or cuda:N, got meta",
        ),
        (["op_checks", "nothing"], "invalid choice: 'nothing'"),
        (
            ["op_plots", "nowhere.json", "x"],
            "nowhere.json cannot be read: No such file or directory",
        ),
        (["run_all", "--out", "/dev/null"], "--out /dev/null is a file, not a folder"),
        (["run_all", "--out", "/proc/x"], "/proc/x: No such file or directory"),
        (
            ["run_all", "--out", "x", "--budget-s", "much"],
            "argument --budget-s: invalid float value",
        ),
    ],
)
def test_wrong_arguments(called, arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = called(*arguments)
    *usage, last = errors.splitlines()
    assert code == 2 and line in last and (not usage or usage[0].startswith("usage: "))
    assert list(tmp_path.iterdir()) == []


def test_damaged_results_are_named_in_one_line(called, modules, tmp_path):
    """By everything that reads them; the whole ones are read."""
    published = sorted((FOLDER / "results").rglob("ops*.json"))
    assert len(published) >= 4
    for path in published:
        assert modules["op_plots"].records.read_json(path, modules["bench_ops"].RECORD)["rows"]
    good = json.loads(published[0].read_text())
    file = tmp_path / "ops.json"

    def row(**changes):
        return good | {"rows": [good["rows"][0] | changes]}

    cases = [
        (b"\xff", "damaged or not JSON"),
        (b"", "damaged or not JSON"),
        (None, "expected an object, got null"),
        (good | {"rows": None}, "rows: expected a list, got null"),
        (good | {"rows": {}}, "rows: expected a list, got {}"),
        (good | {"rows": [[]]}, "rows[0]: expected an object, got []"),
        ({"rows": []}, "machine is missing"),
        (row(elements="9"), 'rows[0], elements: expected an integer from 0 on, got "9"'),
        (row(us={"mnist_ops": "1"}), "us: expected numbers by name"),
        (row(floor_us=float("nan")), "NaN is not JSON"),
        (row(floor_us=10**400), "floor_us: expected a finite number"),
        (row(wrong=[1]), "wrong[0]: expected a text, got 1"),
    ]
    for content, words in cases:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        for arguments in (
            ["op_plots", file, tmp_path / "figures"],
            ["bench_ops", "--quick", "--resume", "--json-out", file],
        ):
            code, _, errors = called(*arguments)
            assert code == 2 and words in errors and str(file) in errors
            assert errors.count("\n") == 1
    (tmp_path / "summary.json").write_text('[{"step": "tests"}]')
    code, _, errors = called("run_all", "--out", tmp_path, "--steps", "environment")
    assert (code, errors.count("\n")) == (2, 1) and "status is missing" in errors


def test_a_result_that_is_not_a_number_is_wrong_and_can_be_written(bench_ops, quick, tmp_path):
    options, (setting, _) = quick
    errors = {"mnist_ops": math.nan, "eager": 0.0}
    row = bench_ops.row(setting, "forward", 4000, TIMES, errors, {}, options)
    assert row["wrong"] == ["mnist_ops"]
    record = {"machine": bench_ops.header(options), "rows": [row], "left_out": []}
    bench_ops.write(tmp_path / "ops.json", record)
    assert bench_ops.records.read_json(tmp_path / "ops.json", bench_ops.RECORD) == json.loads(
        json.dumps(record)
    )
    assert "| failed |" in bench_ops.table(record)
