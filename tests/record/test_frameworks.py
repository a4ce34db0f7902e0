"""Scripts that leave the loop to a framework: watched or not, they do and say the same, and raise no alarm.

`make test-frameworks` installs the frameworks, in an environment of its own, and runs these tests in it.
"""

import importlib.util

import pytest
from script_runs import SCRIPTS, silent_and_unchanged

CASES = {
    "hf_trainer": ("transformers", ""),  # accumulation, evaluation on the way, a schedule
    "hf_trainer bfloat16": ("transformers", "--bf16 --steps 80"),
    "accelerate_loop": ("accelerate", ""),
    "accelerate_loop bfloat16": ("accelerate", "--mixed_precision bf16 --epochs 3"),
    "lightning_fit": ("lightning", ""),
    "lightning_fit bfloat16": ("lightning", "--precision bf16-mixed --steps 120"),
    "lightning_fit manual": ("lightning", "--manual"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_framework_trains_as_it_would_and_nothing_is_said(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    framework, args = CASES[case]
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed: make test-frameworks")
    silent_and_unchanged(SCRIPTS / f"{case.split()[0]}.py", args.split())
