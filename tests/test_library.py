"""The README's Python example trains a model."""

from __future__ import annotations

import math
import re

from tests.test_house import README, ROOT


def test_the_python_example_in_the_readme_trains_from_the_loss_of_an_untrained_model(capsys, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(code, str(README), "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and abs(losses[0] - math.log(10_000)) < 0.3 and losses[-1] < losses[0] - 0.05
