"""What the display shows fits the terminal, says what it must, and gives the terminal back."""

import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlsys.config.schema import (
    ArithmeticData,
    ModelConfig,
    RewardConfig,
    RewardPart,
    RunConfig,
    TorchRollout,
    TrainerConfig,
)
from rlsys.tracking import blocks
from rlsys.tracking.display import PlainDisplay, make_display
from rlsys.tracking.live import LiveDisplay

HEADER = {"model": "tiny · 0.8 M parameters", "run folder": "runs/x"}
RUN = {"title": "grpo_qwen", "steps": 30}
SUMMARY = {
    "name": "grpo_qwen",
    "status": "finished",
    "steps": 30,
    "wall_s": 112.3,
    "eval/initial_accuracy": 0.483,
    "eval/final_accuracy": 0.961,
    "tokens_generated": 61_234,
    "tokens_trained": 61_000,
    "tokens_per_s": 5210.0,
    "mismatch/logprob_abs_mean_max": 2.4e-6,
    "peak_memory_bytes": 4 << 30,
    "run_folder": "/runs/x",
}
COMMAND = "python -m rlsys.launch +recipe=grpo_qwen model.path=SOME/MODEL " + "key=value " * 20


def console(width: int, terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)


def metrics(step: int) -> dict[str, float]:
    found = {
        "step": step,
        "reward/mean": 0.5 + step / 100,
        "reward/std": 0.3,
        "policy/entropy": 0.4,
        "throughput/tokens_per_s": 5210.0,
        "mismatch/logprob_abs_mean": 2e-6,
        "time/rollout_s": 0.9,
        "time/update_s": 0.6,
        "time/step_s": 1.6,
    }
    return found | (
        {"eval/accuracy": 0.712, "eval/accuracy_low": 0.68, "eval/accuracy_high": 0.74} if step == 10 else {}
    )


def play(display: PlainDisplay | LiveDisplay) -> str:
    display.start(HEADER)
    for step in range(1, 31):
        display.phase("rollout")
        display.step(metrics(step))
    display.note("checkpoint written")
    display.note("look at the mismatch", alert=True)
    display.finish(SUMMARY, plot=Path("/runs/x/curves.png"), next_command=COMMAND)
    return display._console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_fits_the_terminal_and_says_what_it_must(width: int, terminal: bool):
    display = make_display("auto", **RUN, console=console(width, terminal))
    assert isinstance(display, LiveDisplay if terminal else PlainDisplay)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", play(display))
    for expected in (
        "0.8 M parameters",
        "30/30",
        "0.800",
        "71.2 %",
        "5,210",
        "2.0e-06",
        "checkpoint written",
        "look at the mismatch",
        "48.3 % → 96.1 %   (+47.8 points)",
        "30 in 1 min 52 s",
        "4.0 GiB",
        "/runs/x/curves.png",
        COMMAND.strip(),  # unbroken: to be copied
    ):
        assert expected in text
    too_long = [line for line in re.split(r"[\r\n]+", text) if len(line) > width and "╭" in line]
    assert not too_long


def test_the_live_panel_has_its_figures_at_80_columns():
    screen = console(80, True)
    display = LiveDisplay(screen, **RUN)
    display.start(HEADER)
    for step in range(1, 15):
        display.step(metrics(step))
    display.phase("update")
    screen.file = io.StringIO()
    screen.print(display._render())
    display.close()
    text = screen.file.getvalue()
    for expected in ("step 14/30", " left", "update", "0.640 ± 0.30", "71.2 % 68–74", "rollout 0.90 s", "tokens/s"):
        assert expected in text
    assert "…" not in text


def test_nothing_measured_yet_is_no_error():
    screen = console(80, True)
    display = LiveDisplay(screen, **RUN)
    display.start(HEADER)
    screen.print(display._render())
    display.step({"step": 0, "policy/entropy": math.nan})
    screen.print(display._render())
    display.close()


def test_plain_lines_are_few_but_evaluations_and_the_end_are_among_them():
    text = play(PlainDisplay(console(100, False), **RUN, every_s=1e9))
    assert [int(step) for step in re.findall(r"step +(\d+)/30", text)] == [1, 10, 30]
    assert len(re.findall(r"step +\d+/30", play(PlainDisplay(console(100, False), **RUN, every_s=0)))) == 30


CTRL_C = """
import sys
from rich.console import Console
from rlsys.tracking.live import LiveDisplay
display = LiveDisplay(Console(force_terminal=True, width=80), title="t", steps=3)
display.start({})
raise KeyboardInterrupt
"""


def test_ctrl_c_gives_the_cursor_back():
    """Even where nobody caught it."""
    done = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True, check=False)
    hidden, shown = done.stdout.rfind("\x1b[?25l"), done.stdout.rfind("\x1b[?25h")
    assert 0 <= hidden < shown


def test_close_may_come_twice():
    display = LiveDisplay(console(80, True), **RUN)
    display.close()
    display.start(HEADER)
    display.close()
    display.close()


def test_an_interrupted_run_says_how_to_go_on():
    screen = console(80, False)
    PlainDisplay(screen, **RUN).finish(
        SUMMARY | {"status": "interrupted", "eval/final_accuracy": None, "tokens_per_s": None},
        next_command="rlsys resume=auto",
    )
    text = screen.file.getvalue()
    assert "interrupted" in text
    assert "To go on:\n  rlsys resume=auto" in text
    assert "held-out" not in text


def test_header_says_what_will_be_trained_on_what():
    config = RunConfig(
        name="tiny",
        steps=20,
        model=ModelConfig(path="/models/tiny"),
        data=ArithmeticData(kind="arithmetic", prompts_per_step=4, max_prompt_tokens=8, max_response_tokens=5),
        reward=RewardConfig(
            parts={"correct": RewardPart(use="exact_match"), "length": RewardPart(use="length", weight=0.1)}
        ),
        rollout=TorchRollout(engine="torch", samples_per_prompt=8),
        trainer=TrainerConfig(lr=3e-4),
    )
    rows = blocks.header_rows(
        config,
        parameters=812_000,
        training_problems=None,
        held_out_problems=1000,
        ranks=2,
        cluster="local Ray, 2 CPUs",
        run_folder=Path.cwd() / "runs" / "x",
        resumed_step=5,
    )
    text = " ".join(rows.values())
    for expected in (
        "812,000 parameters",
        "endless",
        "1,000 held out",
        "4 prompts × 8 samples = 32",
        "correct (exact_match) + 0.1 × length",
    ):
        assert expected in text
    assert "grpo" in rows["algorithm"]
    assert "resumed after step 5" in rows["steps"]
    assert rows["run folder"] == "runs/x"


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32)), st.integers(1, 30))
def test_a_sparkline_fits(values: list[float], width: int):
    assert len(blocks.sparkline(values, width)) <= width


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (blocks.percent(0.7123), "71.2 %"),
        (blocks.percent(None), "–"),
        (blocks.duration(8.44), "8.4 s"),
        (blocks.duration(92.4), "1 min 32 s"),
        (blocks.duration(7500), "2 h 05 min"),
        (blocks.size(512), "512 B"),
        (blocks.size(3.4 * 2**30), "3.4 GiB"),
        (blocks.count(5210), "5,210"),
        (blocks.count(1.236e6), "1.24 M"),
        (blocks.count(7.6e9), "7.6 B"),
        (blocks.figure(2.1e-6), "2.1e-06"),
        (blocks.figure(0.4123), "0.412"),
        (blocks.figure(math.nan), "–"),
        (blocks.sparkline([0, 1, 2, 3], 4), "▁▃▆█"),
    ],
)
def test_figures_are_written_for_people(shown: str, expected: str):
    assert shown == expected
